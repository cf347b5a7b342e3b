"""LoReFT: hidden states are edited, in a subspace of r dimensions, at the prompt's first and last tokens.

    h + R^T (W h + b - R h)        R [r, E] with orthonormal rows

Wu et al., "ReFT: Representation Finetuning for Language Models" (2024), section 3.2, equation 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.adapters.around import OutputLayer, width_of
from llmtune.adapters.layer import adapter_chain, bare_module, named_places
from llmtune.adapters.plan import Build, Plan, copied_places, finish
from llmtune.adapters.prompt_layer import PromptLayer
from llmtune.adapters.prompt_positions import BlockInputs, prompt_positions
from llmtune.adapters.record import (
    AdapterConfig,
    Targets,
    check_expressions,
    check_names,
    check_probability,
    check_whole,
)
from llmtune.adapters.sublayers import find_sublayers
from llmtune.adapters.targets import ALL_LINEAR, inside, linear_sizes, matching

Positions = tuple[int, int] | Literal["all"]
TOGETHER = """LoReFT at a prompt's first and last tokens would take the virtual tokens of {prompt} for the prompt's: \
use LoReFT(..., positions="all"), or PrefixTuning"""


def loreft_change(
    hidden: Tensor, rotation: Tensor, weight: Tensor, bias: Tensor, *, dropout_p: float = 0.0
) -> Tensor:  # fmt: skip
    """Return R^T (W h + b - R h): what LoReFT adds to a hidden state.

    It is computed as R^T ((W - R) h + b), which is exactly 0 where W is R and b is 0.

    Args:
        hidden: h, [..., E].
        rotation: R, [r, E], its rows orthonormal.
        weight: W, [r, E].
        bias: b, [r].
        dropout_p: probability with which one of the r coordinates is dropped. (The paper's code drops entries of the
            whole output, the model's own part of it included.)

    Returns:
        [..., E], in the dtype of `rotation` (in autocast's, under autocast).

    >>> import torch
    >>> from llmtune.adapters import loreft_change
    >>> h, rotation = torch.tensor([[3.0, 5.0]]), torch.tensor([[0.0, 1.0]])
    >>> loreft_change(h, rotation, torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]))  # 0.5 + 3 where 5 was
    tensor([[ 0.0000, -1.5000]])

    Wu et al., "ReFT" (2024), equation 2.
    """
    dtype = rotation.dtype  # a model that was made bf16 as a whole has W and b in that
    edit = F.linear(hidden.to(dtype), weight.to(dtype) - rotation, bias.to(dtype))
    return F.linear(F.dropout(edit, dropout_p), rotation.T)


class LoReFTLayer(OutputLayer):
    """A layer that edits what a block returns: h + R^T (W h + b - R h), at a prompt's first and last tokens or at all.

    Which tokens of a batch are real is read off the mask that the block is called with, and the documents of a packed
    row off its position ids. In generation the tokens that come after the prompt are left alone, as in the paper. In
    training the answer stands in the same row as the prompt: there a `prompt_mask` [B, T], given to the model like its
    attention mask, says which tokens are the prompt's (models that hand further keywords on to their blocks bring it
    here, as Llama, GPT-2 and BERT do); without it the last tokens are the row's.

    The paper starts with a random W. Here W starts as R and b as 0, so that the output is the block's to the bit; the
    functions that can be learned are the same.

    Args:
        base: any module that returns [B, T, E] ([..., E] for all positions), or a tuple that begins with it.
        rank: r, from 1 to E.
        width: E; left out, the base must tell it by `out_features`.
        positions: (first, last), how many tokens at either end of the prompt, one R, W and b for all of them; or "all".
        dropout: probability with which one of the r coordinates is dropped, in training mode.
        dtype: of the parameters; float32 or float64, for rows in fewer digits are not orthonormal.
        adapter_name: the adapter the layer belongs to.

    Raises:
        ValueError: a value is out of its range, or the width is not told.
        TypeError: the block is told of padding in a way that is not known.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = LoReFTLayer(base, rank=2)
        >>> x = torch.randn(2, 7, 5)
        >>> torch.equal(layer(x), base(x))
        True
    """

    def __init__(
        self, base: nn.Module, *, rank: int, width: int | None = None, positions: Positions = "all",
        dropout: float = 0.0, dtype: torch.dtype = torch.float32, adapter_name: str = "default",
    ) -> None:  # fmt: skip
        super().__init__(base, adapter_name=adapter_name)
        check_whole("rank", rank)
        check_probability("dropout", dropout)
        check_reft_dtype(dtype)
        sizes = linear_sizes(base)
        if width is None and sizes is None:
            raise ValueError(f"a {type(bare_module(base)).__name__} does not tell the width of its output: give width")
        E = width if width is not None else sizes[1] if sizes is not None else 0
        if rank > E:
            raise ValueError(f"the rank {rank} is larger than the width {E} of what is edited")
        self.rank, self.positions, self.dropout = rank, check_positions(positions), dropout
        self.inputs = None if self.positions == "all" else BlockInputs(base)
        device = next((p.device for p in bare_module(base).parameters()), torch.device("cpu"))
        self.directions = nn.Parameter(torch.empty(rank, E, dtype=dtype, device=device))
        nn.init.orthogonal_(self.directions)
        self.weight_in = nn.Parameter(self.rotation().detach().clone())
        self.bias_in = nn.Parameter(torch.zeros(rank, dtype=dtype, device=device))
        self.training = base.training

    def rotation(self) -> Tensor:
        """Return R, [r, E], with orthonormal rows: `directions`, each row made orthogonal to the ones before it."""
        # QR costs E r^2 and its factors are few lines to read. A parametrization of torch's would exchange the layer's
        # class, and put what is trained under names that no file of an adapter should have to know.
        wide = torch.promote_types(self.directions.dtype, torch.float32)
        columns, triangle = torch.linalg.qr(self.directions.to(wide).T)
        return (columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(wide)).T

    def applies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether this is a prompt; see `OutputLayer.applies`."""
        return self.inputs is None or not self.inputs.goes_on(args, kwargs)

    def changed(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return [..., E] in the dtype of `hidden`; see `OutputLayer.changed`.

        Raises:
            ValueError: `hidden` is not [B, T, E], and not all positions are edited.
        """
        added = loreft_change(
            hidden, self.rotation(), self.weight_in, self.bias_in, dropout_p=self.dropout if self.training else 0.0
        )
        edited = (hidden + added).to(hidden.dtype)
        if self.inputs is None or self.positions == "all":
            return edited
        if hidden.ndim != 3:
            raise ValueError(f"to tell positions, the block's output must be [B, T, E]; it is {[*hidden.shape]}")
        first, last = self.positions
        real, starts = self.inputs.real(hidden, args, kwargs), self.inputs.starts(hidden, args, kwargs)
        return torch.where(prompt_positions(real, first, last, starts)[..., None], edited, hidden)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"adapter={self.adapter_name}, rank={self.rank}, positions={self.positions}, active={self.active}"


def check_positions(value: Any) -> Positions:
    """Return the positions as (first, last) or "all".

    Raises:
        ValueError: they are neither.
    """
    if value == "all":
        return "all"
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    whole = [isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in pair]
    if len(pair) != 2 or not all(whole) or not any(pair):
        raise ValueError(
            f'positions must be "all", or (first, last), how many tokens at either end of the prompt; got {value!r}'
        )
    return pair


def check_reft_dtype(value: Any) -> None:
    """Raise ValueError where `value` is neither float32 nor float64."""
    if value not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, in which rows can be orthonormal; got {value}")


@dataclass(frozen=True, kw_only=True)
class LoReFT(AdapterConfig):
    """LoReFT on the output of a model's blocks; see `LoReFTLayer` for the formula and for `prompt_mask`.

    The blocks are found by the names that the families of transformers have for their attention and feed-forward; any
    others can be named. In an encoder-decoder model the prompt is what the encoder reads, and its blocks are meant.

    An edit of hidden states is no change of weights, so `merge` refuses it. `output_hidden_states` of transformers
    gives what the blocks themselves return, before the edit. PEFT has no LoReFT: the files are of our own format.

    In generation with a cache only the prompt is edited; with `use_cache=False` every step edits the grown row anew,
    its newest tokens as its last: the two differ. A prefix is no part of the prompt; beside PromptTuning and PTuning
    only positions="all" goes.

    Args:
        rank: r.
        layers: which blocks, counted from 0; or "all".
        positions: (first, last), how many tokens at either end of the prompt; or "all".
        dropout: probability with which one of the r coordinates is dropped, in training mode.
        blocks: the blocks to count, where they are not found or others are wanted: suffixes of names, or one regular
            expression for whole names.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the parameters; float32 or float64.

    Raises:
        ValueError: a value is out of its range; the sentence names it.
        TypeError: a value has a wrong type.

    Example:
        >>> from llmtune.adapters import LoReFT, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> print(attach(tiny_llama(), LoReFT(rank=2, layers=[1], positions=(3, 3))))
        adapter "default": 1 modules (blocks 1)
        trainable params: 114 || all params: 21,310 || trainable%: 0.5350
    """

    rank: int
    layers: Sequence[int] | Literal["all"] = "all"
    positions: Positions = (1, 1)
    dropout: float = 0.0
    blocks: Targets | None = None
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        object.__setattr__(self, "positions", check_positions(self.positions))
        check_probability("dropout", self.dropout)
        check_reft_dtype(self.dtype)
        if self.blocks is not None:
            check_expressions("blocks", self.blocks)
        check_names(ALL_LINEAR, (), self.train_modules)
        if self.layers != "all":
            numbers = tuple(self.layers) if isinstance(self.layers, list | tuple | range) else ()
            whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
            if not numbers or not whole or len(set(numbers)) < len(numbers):
                raise ValueError(f'layers must be "all" or different whole numbers from 0; got {self.layers!r}')
            object.__setattr__(self, "layers", numbers)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`."""
        places = dict(named_places(model))
        plan = Plan(copied=copied_places(self.train_modules, places))
        blocks = self._blocks(model, places)
        if self.layers != "all":
            beyond = [number for number in self.layers if number >= len(blocks)]
            if beyond:
                raise ValueError(f"layers names {beyond[0]}, and the blocks count from 0 to {len(blocks) - 1}")
            blocks = [blocks[number] for number in self.layers]
        prompts = [place for place in places if any(isinstance(x, PromptLayer) for x in adapter_chain(places[place]))]
        if self.positions != "all" and any(inside(place, prompts) for place in blocks):
            raise ValueError(TOGETHER.format(prompt="PromptTuning or PTuning"))
        plan.adapted, plan.counts = blocks, {"blocks": len(blocks)}
        builders = [(place, self._build(place, places, name)) for place in blocks]
        finish(model, plan, name)
        plan.builders += builders
        return plan

    def _blocks(self, model: nn.Module, places: dict[str, nn.Module]) -> list[str]:
        if self.blocks is not None:
            found = matching(self.blocks, [place for place in places if place], what="blocks")
            return list(dict.fromkeys(place for some in found.values() for place in some))
        stacks = find_sublayers(places).stacks
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder = bare_module(model.get_encoder())  # type: ignore[operator]
            inner = [place for place, module in places.items() if bare_module(module) is encoder]
            stacks = {place: some for place, some in stacks.items() if inside(place, inner)}
        if len(stacks) == 1:
            return next(iter(stacks.values()))
        if not stacks:
            raise ValueError(
                f"this {type(model).__name__} has no blocks by a name that is known here: name them, such as "
                "LoReFT(..., blocks=[...])"
            )
        raise ValueError(
            f"this {type(model).__name__} has several stacks of blocks, {', '.join(stacks)}: name the blocks that are "
            "meant, such as LoReFT(..., blocks=[...])"
        )

    def _build(self, place: str, places: dict[str, nn.Module], name: str) -> Build:
        width = width_of(place, places)
        if width is None:
            raise ValueError(
                f"the width of what {place} returns is not to be told: it holds neither a norm nor a linear layer"
            )
        if self.rank > width:
            raise ValueError(f"the rank {self.rank} is larger than the width {width} of what {place} returns")
        if self.positions != "all":
            BlockInputs(places[place])  # a block that does not tell its padding is refused before anything is changed

        def build(base: nn.Module) -> LoReFTLayer:
            return LoReFTLayer(
                base, rank=self.rank, width=width, positions=self.positions, dropout=self.dropout, dtype=self.dtype,
                adapter_name=name,
            )  # fmt: skip

        return build
