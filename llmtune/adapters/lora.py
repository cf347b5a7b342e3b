"""LoRA: a frozen weight W and a trained change of low rank, y = x W^T + scaling * (x A^T) B^T.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1. rsLoRA's scaling alpha / sqrt(r):
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.adapters.formula import lora_change
from llmtune.adapters.fused import lora_added, lora_linear
from llmtune.adapters.layer import PREFIX, AdapterLayer, bare_module, plain_linear

INITIALISATIONS = ("kaiming", "gaussian")


def lora_scaling(alpha: float, rank: int, rslora: bool) -> float:
    """Return alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class LowRankLayer(AdapterLayer):
    """What every LoRA layer shares: A [r, columns], B [rows, r], their start, and how they change the base's weight.

    The weight that A and B change is B A times the scaling, or its transpose where the base keeps its weight [in, out].
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    transposed = False

    def __init__(
        self, base: nn.Module, columns: int, rows: int, *, rank: int, alpha: float, dropout: float, rslora: bool,
        lora_bias: bool, initialise: str, dtype: torch.dtype, adapter_name: str,
    ) -> None:  # fmt: skip
        super().__init__(base, adapter_name=adapter_name)
        largest = min(columns, rows)
        if not 0 < rank <= largest:
            raise ValueError(
                f"the rank must be between 1 and {largest}, the smaller side of {columns} -> {rows}; got {rank}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a probability from 0 to below 1; got {dropout!r}")
        if initialise not in INITIALISATIONS:
            raise ValueError(f"initialise must be one of {', '.join(INITIALISATIONS)}; got {initialise!r}")
        device = next((p.device for p in bare_module(base).parameters()), torch.device("cpu"))
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = lora_scaling(alpha, rank, rslora)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_a = nn.Parameter(torch.empty(rank, columns, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(rows, rank, dtype=dtype, device=device))
        self.lora_bias = nn.Parameter(torch.zeros(rows, dtype=dtype, device=device)) if lora_bias else None
        self.start(initialise)
        self.train(base.training)

    def start(self, initialise: str) -> None:
        """Draw A and set B to zero, so that the layer's output is the base's."""
        if initialise == "gaussian":
            nn.init.normal_(self.lora_a, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def drop_p(self) -> float:
        """Return the probability with which an entry is dropped at the moment: 0 in eval mode."""
        return self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0

    @property
    def weight(self) -> Any:
        """The bare module's weight."""
        return bare_module(self).weight

    @property
    def bias(self) -> Any:
        """The bare module's bias, or None."""
        return getattr(bare_module(self), "bias", None)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """Return (left, right, scaling): the weight's change is scaling * left @ right; see `AdapterLayer`."""
        left, right = (self.lora_a.T, self.lora_b.T) if self.transposed else (self.lora_b, self.lora_a)
        return left, right, self.scaling

    def deltas(self) -> dict[str, Tensor]:
        """Return the change of the bare weight, and of the bias where there is `lora_bias`; see `AdapterLayer`."""
        left, right, scaling = self.low_rank()
        wide = torch.promote_types(left.dtype, torch.float32)
        found = {"weight": scaling * (left.to(wide) @ right.to(wide))}
        if self.lora_bias is not None:
            found["bias"] = scaling * self.lora_bias.to(wide)
        return found

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names and the tensors; see `AdapterLayer`."""
        found: dict[str, Tensor] = {
            f"{PREFIX}{place}.lora_A.weight": self.lora_a,
            f"{PREFIX}{place}.lora_B.weight": self.lora_b,
        }
        if self.lora_bias is not None:
            found[f"{PREFIX}{place}.lora_B.bias"] = self.lora_bias
        return found

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"adapter={self.adapter_name}, rank={self.rank}, scaling={self.scaling:g}, active={self.active}"


class LoRALinear(LowRankLayer):
    """A linear layer with a change of low rank beside it: base(x) + scaling * (dropout(x) A^T) B^T.

    Works over `nn.Linear` and over any module that maps [..., in] to [..., out] and has `in_features` and
    `out_features`. At the start B = 0, so the output is the base's to the bit. A and B are float32 whatever the base
    is; the sum is made in float32 and rounded once to the base's dtype.

    Args:
        base: the layer to adapt; its parameters are left alone.
        rank: r, from 1 to the smaller of in and out.
        alpha: the change is scaled by alpha / r.
        dropout: probability with which an entry of x is dropped on the way to A, in training mode.
        rslora: scale by alpha / sqrt(r) instead.
        lora_bias: train a bias [out] beside B.
        initialise: how A is drawn: "kaiming" (uniform, as `nn.Linear`) or "gaussian" (standard deviation 1 / r).
        dtype: of A and B.
        adapter_name: the adapter the layer belongs to.

    Raises:
        TypeError: the base has no `in_features` and `out_features`.
        ValueError: the rank or `initialise` is out of range.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = LoRALinear(base, rank=2, alpha=4)
        >>> x = torch.randn(7, 5)
        >>> torch.equal(layer(x), base(x))
        True
    """

    def __init__(
        self, base: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        lora_bias: bool = False, initialise: str = "kaiming", dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        bare: Any = bare_module(base)
        if not isinstance(getattr(bare, "in_features", None), int) or not isinstance(
            getattr(bare, "out_features", None), int
        ):
            raise TypeError(
                f"LoRALinear needs a module with in_features and out_features; got {type(bare).__name__}. One that "
                "maps [..., in] to [..., out] works once it has these two attributes"
            )
        super().__init__(
            base, bare.in_features, bare.out_features, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora,
            lora_bias=lora_bias, initialise=initialise, dtype=dtype, adapter_name=adapter_name,
        )  # fmt: skip

    @property
    def in_features(self) -> int:
        """The size of the input."""
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        """The size of the output."""
        return self.lora_b.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in the dtype of the base's output, for x [..., in]."""
        if not self.takes_part:
            return self.base(x)
        plain, p = plain_linear(self.base), self.drop_p()
        if self.lora_bias is not None:
            result = self.base(x)
            change = lora_change(self.dropout(x), self.lora_a, self.lora_b, self.scaling)
            return (result + (change + self.scaling * self.lora_bias)).to(result.dtype)
        if plain is not None:
            return lora_linear(
                x, plain.weight, plain.bias, self.lora_a, self.lora_b, scaling=self.scaling, dropout_p=p
            )  # fmt: skip
        return lora_added(self.base(x), x, self.lora_a, self.lora_b, scaling=self.scaling, dropout_p=p)


class LoRAConv1D(LoRALinear):
    """`LoRALinear` over GPT-2's `Conv1D`, a linear layer that keeps its weight as [in, out].

    Args:
        base: a `transformers.pytorch_utils.Conv1D`.
        rank, alpha, dropout, rslora, lora_bias, initialise, dtype, adapter_name: as for `LoRALinear`.

    Raises:
        ValueError: the rank or `initialise` is out of range.
    """

    transposed = True

    def __init__(
        self, base: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        lora_bias: bool = False, initialise: str = "kaiming", dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        bare: Any = bare_module(base)
        columns, rows = bare.weight.shape
        LowRankLayer.__init__(
            self, base, columns, rows, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, lora_bias=lora_bias,
            initialise=initialise, dtype=dtype, adapter_name=adapter_name,
        )  # fmt: skip

    @property
    def nf(self) -> int:
        """The size of the output, by the name `Conv1D` has for it."""
        return self.out_features


class LoRAEmbedding(LowRankLayer):
    """An embedding with a change of low rank: the rows of W + scaling * (B A)^T for the tokens that come.

    A [r, V] starts at zero and B [E, r] at standard normal draws, as in PEFT, so the output is the base's to the bit.

    Args:
        base: an `nn.Embedding`; one that multiplies its output by `embed_scale` has the change multiplied too.
        rank: r, from 1 to the smaller of V and E.
        alpha, rslora, initialise, dtype, adapter_name: as for `LoRALinear`; `initialise` says nothing here.
        dropout: must be 0: a token has no entries to drop.
        lora_bias: must be False: an embedding has no bias.

    Raises:
        TypeError: the base is no embedding, or one with a forward pass of its own or with `max_norm`.
        ValueError: an argument is out of range.
    """

    transposed = True

    def __init__(
        self, base: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        lora_bias: bool = False, initialise: str = "kaiming", dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        bare = bare_module(base)
        own = type(bare).forward is not nn.Embedding.forward and not hasattr(bare, "embed_scale")
        if not isinstance(bare, nn.Embedding) or own or bare.max_norm is not None:  # max_norm rewrites rows as it reads
            raise TypeError(
                f"LoRAEmbedding needs an nn.Embedding with the plain forward pass and without max_norm; "
                f"got {type(bare).__name__}"
            )
        if lora_bias:
            raise ValueError("lora_bias has no meaning for an embedding: leave embeddings out of the targets")
        if dropout:
            raise ValueError(f"dropout has no meaning for an embedding, a token has no entries to drop; got {dropout}")
        super().__init__(
            base, bare.num_embeddings, bare.embedding_dim, rank=rank, alpha=alpha, dropout=0.0, rslora=rslora,
            lora_bias=False, initialise=initialise, dtype=dtype, adapter_name=adapter_name,
        )  # fmt: skip

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names and the tensors; see `AdapterLayer`."""
        start = f"{PREFIX}{place}.lora_embedding_"
        return {f"{start}A": self.lora_a, f"{start}B": self.lora_b}

    def start(self, initialise: str) -> None:
        """Set A to zero and draw B."""
        nn.init.zeros_(self.lora_a)
        nn.init.normal_(self.lora_b)

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.lora_a.shape[1]

    @property
    def embedding_dim(self) -> int:
        """E."""
        return self.lora_b.shape[0]

    @property
    def padding_idx(self) -> int | None:
        """The bare embedding's."""
        bare: Any = bare_module(self)
        return bare.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., E] in the dtype of the base's output, for token ids [...]."""
        result: Tensor = self.base(ids)
        if not self.takes_part:
            return result
        rows = F.embedding(ids, self.lora_a.T, padding_idx=self.padding_idx)  # which gets no gradient, as in the base
        change = F.linear(rows, self.lora_b) * self.scaling
        factor = getattr(bare_module(self), "embed_scale", None)
        return (result + (change if factor is None else change * factor)).to(result.dtype)
