"""Layers that put trained rows in the place of some rows of an embedding's weight, and of the output head's if tied.

    W' = W but for the rows t_1 ... t_n, which are the trained rows R [n, E];  at the start R = W[t]

    embedding   W'[id]:   a row of R where id is one of t, else the base's
    head        x W'^T:   the base's logits, and x (R - W[t])^T added to the columns t

Neither makes a copy of W. A weight that is tied stands in several places: one layer, the *owner*, holds R, and the
layers at the other places read it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.adapters.layer import PREFIX, AdapterLayer, adapter_chain, bare_module
from llmtune.adapters.token_ids import check_tokens


class TokenRows(AdapterLayer):
    """What both layers share: the tokens, their rows, and what these change.

    Attributes:
        tokens: t, the rows of W that are replaced, in the order of R.
        rows: R [n, E]; in a layer that reads the owner's, the owner's.
    """

    reads_weight = True
    index: Tensor

    def __init__(
        self, base: nn.Module, *, tokens: Sequence[int], dtype: torch.dtype = torch.float32,
        owner: TokenRows | None = None, file_name: str = "trainable_tokens_delta", in_every_place: bool = True,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        super().__init__(base, adapter_name=adapter_name)
        check_base(base, tokens, "the base")
        bare: Any = bare_module(base)
        self.tokens = tuple(tokens)
        self.file_name, self.in_every_place = file_name, in_every_place
        self._owner = () if owner is None else (owner,)  # in a tuple, so that it is no sub-module of this one
        if owner is None:
            kind = torch.promote_types(dtype, bare.weight.dtype)
            start = bare.weight.detach()[list(tokens)]
            self.trained_rows = nn.Parameter(start.to(kind, copy=True))
        self._make_index()

    @property
    def origin(self) -> TokenRows:
        """The layer that holds the rows; see `AdapterLayer`."""
        return self._owner[0] if self._owner else self

    @property
    def rows(self) -> nn.Parameter:
        """R [n, E]."""
        return self.origin.trained_rows

    @property
    def weight(self) -> Any:
        """W' [V, E], made anew every time, for code that takes a weight without calling its module; W where off."""
        below: Any = self.base if isinstance(self.base, TokenRows) else bare_module(self)
        if not self.takes_part:
            return below.weight
        self._follow()
        return below.weight.index_copy(0, self.index, self.rows.to(below.weight.dtype))

    @property
    def padding_idx(self) -> int | None:
        """The bare module's, where it has one."""
        return getattr(bare_module(self), "padding_idx", None)

    def change(self) -> Tensor:
        """Return R - W[t], [n, E]: exactly 0 at the start."""
        self._follow()
        bare: Any = bare_module(self)
        return self.rows - bare.weight[self.index]

    def deltas(self) -> dict[str, Tensor]:
        """Return W' - W as [V, E]; see `AdapterLayer`.

        Raises:
            ValueError: the layer is merged: W stands no longer there.
        """
        if self.merged:
            raise ValueError(
                f'adapter "{self.adapter_name}" is merged: what its rows change is known again after unmerge'
            )
        bare: Any = bare_module(self)
        change = self.change()
        change = change.to(torch.promote_types(change.dtype, torch.float32))
        return {"weight": change.new_zeros(bare.weight.shape).index_copy(0, self.index, change)}

    def replacements(self) -> dict[str, Tensor]:
        """Return W' [V, E]: merged rows are the trained ones exactly; see `AdapterLayer`."""
        self._follow()
        bare: Any = bare_module(self)
        wide = bare.weight.detach().to(torch.promote_types(bare.weight.dtype, self.rows.dtype))
        return {"weight": wide.index_copy(0, self.index, self.rows.detach().to(wide.dtype))}

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's name and the rows [n, E]; see `AdapterLayer`."""
        if self._owner and not self.in_every_place:
            return {}
        return {f"{PREFIX}{place}.{self.file_name}": self.rows}

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"adapter={self.adapter_name}, tokens={len(self.tokens)}, active={self.active}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenRows:
        """Make the index again after a move: `to_empty` leaves what it moves without values."""
        super()._apply(fn, recurse)
        self._make_index()
        return self

    def _follow(self) -> None:
        """Make the index again where the weight has come to another device by itself, as weights assigned do."""
        bare: Any = bare_module(self)
        if bare.weight.device != self.index.device:
            self._make_index()

    def _make_index(self) -> None:
        bare: Any = bare_module(self)
        index = torch.tensor(self.tokens, device=bare.weight.device)
        self.register_buffer("index", index, persistent=False)


class NewTokensEmbedding(TokenRows):
    """An embedding of which some rows are trained: rows[i] for the i-th of the tokens, the base's row for all others.

    At the start the output is the base's to the bit, in every dtype. Rows that are wider than the base are rounded to
    the base's dtype on the way out. A token that is the base's `padding_idx` is trained like any other here.

    Args:
        base: an `nn.Embedding` [V, E]; one that multiplies its output by `embed_scale` has the rows multiplied too.
        tokens: the rows to train, each once.
        dtype: of the rows, or a wider one where it cannot hold the base's.
        owner: the layer whose rows these are, where the weight is tied and they are held at another place.
        file_name: what the rows are called in a file, after the module's name.
        in_every_place: whether a file holds the rows under the name of this place too where another layer owns them.
        adapter_name: the adapter the layer belongs to.

    Raises:
        TypeError: the base is no embedding, or one with a forward pass of its own or with `max_norm`.
        ValueError: a token is out of range, named twice, or trained by another adapter already.

    Example:
        >>> base = nn.Embedding(11, 3)
        >>> layer = NewTokensEmbedding(base, tokens=[9, 2])
        >>> ids = torch.arange(11)
        >>> torch.equal(layer(ids), base(ids)), layer.rows.shape
        (True, torch.Size([2, 3]))
    """

    row_of: Tensor

    @property
    def num_embeddings(self) -> int:
        """V."""
        return len(self.row_of)

    @property
    def embedding_dim(self) -> int:
        """E."""
        return self.rows.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., E] in the dtype of the base's output, for token ids [...]."""
        result: Tensor = self.base(ids)
        if not self.takes_part:
            return result
        self._follow()
        bare: Any = bare_module(self)
        at = self.row_of[ids]
        new = F.embedding(at.clamp(min=0), self.rows)
        factor = getattr(bare, "embed_scale", None)
        if factor is not None:
            new = new * (factor.to(bare.weight.dtype) if isinstance(factor, Tensor) else factor)
        if self.base is not bare:  # what other adapters add to these rows, 0 where they add nothing
            new = new + (result - bare(ids))
        return torch.where(at.unsqueeze(-1) >= 0, new.to(result.dtype), result)

    def _make_index(self) -> None:
        super()._make_index()
        bare: Any = bare_module(self)
        row_of = torch.full((len(bare.weight),), -1, device=bare.weight.device)
        row_of[self.index] = torch.arange(len(self.tokens), device=bare.weight.device)
        self.register_buffer("row_of", row_of, persistent=False)


class NewTokensHead(TokenRows):
    """An output head of which some rows are trained: x W^T + bias, with x (R - W[t])^T added to the columns t.

    The change is computed in the dtype of the rows and the sum is rounded once; at the start the output is the base's
    to the bit.

    Args:
        base: an `nn.Linear` with a floating weight [V, E]; its bias stays as it is.
        tokens, dtype, owner, file_name, in_every_place, adapter_name: as for `NewTokensEmbedding`.

    Raises:
        TypeError: the base is no `nn.Linear` with the plain forward pass and a floating weight.
        ValueError: a token is out of range, named twice, or trained by another adapter already.

    Example:
        >>> base = nn.Linear(3, 11)
        >>> layer = NewTokensHead(base, tokens=[9, 2])
        >>> x = torch.randn(5, 3)
        >>> torch.equal(layer(x), base(x))
        True
    """

    @property
    def bias(self) -> Any:
        """The bare module's bias, or None."""
        return bare_module(self).bias

    @property
    def in_features(self) -> int:
        """E."""
        return self.rows.shape[1]

    @property
    def out_features(self) -> int:
        """V."""
        bare: Any = bare_module(self)
        return bare.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., V] in the dtype of the base's output, for x [..., E]."""
        result: Tensor = self.base(x)
        if not self.takes_part:
            return result
        change = F.linear(x.to(self.rows.dtype), self.change())
        columns = result.index_select(-1, self.index) + change
        return result.index_copy(-1, self.index, columns.to(result.dtype))


def check_base(base: nn.Module, tokens: Sequence[int], where: str) -> None:
    """Check that rows of a module can be trained, beside the adapters that stand there already.

    Args:
        base: the module, adapters around it included.
        tokens: the ids.
        where: its name, for the sentence.

    Raises:
        TypeError: it is neither an embedding nor a head whose output is known from its rows.
        ValueError: the tokens are no ids or out of range; or another adapter has a part in their rows, which would be
            lost.
    """
    check_tokens(tokens)
    bare: Any = bare_module(base)
    weight = getattr(bare, "weight", None)
    if isinstance(bare, nn.Embedding):
        own = type(bare).forward is not nn.Embedding.forward and not hasattr(bare, "embed_scale")
        fits = not own and bare.max_norm is None  # max_norm rewrites rows as it reads them
    else:
        fits = isinstance(bare, nn.Linear) and type(bare).forward is nn.Linear.forward
    if not fits or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"{where} is a {type(bare).__name__}: rows of single tokens are trained in an nn.Embedding without "
            "max_norm, or in an nn.Linear head, with the plain forward pass and a floating weight"
        )
    if max(tokens) >= len(weight):
        raise ValueError(
            f"token {max(tokens)} is out of range: {where} has {len(weight)} rows, 0 to {len(weight) - 1}. For new "
            "tokens call model.resize_token_embeddings(n) before attaching"
        )
    for layer in adapter_chain(base):
        if layer.merged or (layer.reads_weight and not isinstance(layer, TokenRows)):
            raise ValueError(
                f'adapter "{layer.adapter_name}" is made for the whole weight of {where}, or stands in it merged: take '
                "it off before rows of that weight are trained by another"
            )
        both = set(tokens).intersection(layer.tokens) if isinstance(layer, TokenRows) else ()
        if both:
            raise ValueError(
                f'token {min(both)} of {where} is trained by adapter "{layer.adapter_name}" already: leave it out'
            )
