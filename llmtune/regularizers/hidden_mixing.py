"""Mix the hidden states of rows where they enter a layer, and let later layers see both rows' tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.modules import unwrap
from llmtune.regularizers.mixing import Pairs, mixup

STACK = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)$")  # as in `llmtune.optim.depth`


def layer_stack(model: nn.Module) -> nn.ModuleList:
    """Return the model's stack of layers: the one outermost module list named layers, layer, blocks, block or h.

    Raises:
        ValueError: there is none, or more than one (an encoder-decoder).
    """
    inner = unwrap(model)
    found: dict[str, nn.ModuleList] = {}
    for name, module in inner.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) and STACK.search(name) and not inside:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"hidden states are mixed in one stack of layers, a module list called layers, layer, blocks, block or h; "
            f"{type(inner).__name__} has {', '.join(found) or 'none'}"
        )
    return next(iter(found.values()))


@contextmanager
def mixed_at(model: nn.Module, layer: int, pairs: Pairs, real: Tensor) -> Iterator[None]:
    """Mix what enters layer number `layer` in the forward pass inside the block.

    From that layer on, a row attends to the tokens of both: each layer's attention mask is joined with the partner's
    (not where the row's own share is 1). Below it, rows are as they were. A stand-in takes each layer's place for the
    length of the block: unlike a hook it stays outside of what activation checkpointing runs again.

    Args:
        model: wrapped or not.
        layer: number of the layer, from 0.
        pairs: which rows.
        real: [B, T] booleans, False on padding.

    Raises:
        ValueError: the stack has no such layer; or its layers do not take hidden states and a mask in a known way.
    """
    stack = layer_stack(model)
    if not 0 <= layer < len(stack):
        raise ValueError(f"layer must be between 0 and {len(stack) - 1}, the model has {len(stack)}; got {layer}")
    padded = not bool(real.all())
    own = list(stack)
    for number in range(layer, len(own)):
        stack[number] = _StandIn(own[number], pairs, real if number == layer else None, padded)
    try:
        yield
    finally:
        for number, module in enumerate(own):
            stack[number] = module


class _StandIn(nn.Module):
    """A layer whose mask is joined with the partners', and whose input is mixed if `real` is given."""

    def __init__(self, layer: nn.Module, pairs: Pairs, real: Tensor | None, padded: bool) -> None:
        super().__init__()
        self.layer, self.pairs, self.real, self.padded = layer, pairs, real, padded
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # models ask layers for their kind of attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(enumerate(args)) | kwargs
        hidden_at = 0 if args else "hidden_states"
        if self.real is not None:
            hidden = given.get(hidden_at)
            if not isinstance(hidden, Tensor) or hidden.shape[:2] != self.real.shape:
                came = f"{[*hidden.shape]}" if isinstance(hidden, Tensor) else repr(hidden)
                raise ValueError(
                    f"{type(self.layer).__name__} is given {came} where hidden states {[*self.real.shape, 'E']} are "
                    "expected: a model with virtual tokens, or one that takes its layers' inputs apart, cannot be mixed"
                )
            given[hidden_at] = mixup(hidden, self.pairs, real=self.real)
        if self.padded:
            at = self._mask_at(len(args))
            given[at] = self._joined(given.get(at))
        return self.layer(*(given[i] for i in range(len(args))), **{k: given[k] for k in given if isinstance(k, str)})

    def _mask_at(self, positional: int) -> int | str:
        names = list(inspect.signature(self.layer.forward).parameters)
        place = names.index("attention_mask") if "attention_mask" in names else positional
        return place if place < positional else "attention_mask"

    def _joined(self, mask: Any) -> Tensor:
        if not isinstance(mask, Tensor) or len(mask) != len(self.pairs.partners):
            came = f"{[*mask.shape]}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"rows of different lengths are mixed, so their attention masks must be joined, and "
                f"{type(self.layer).__name__} is given no tensor with a mask for each row (got {came}): use "
                'attention "sdpa" or "eager", or rows of one length'
            )
        alone = (self.pairs.weights == 1).reshape(-1, *[1] * (mask.ndim - 1))
        other = torch.where(alone, mask, mask[self.pairs.partners])
        return mask | other if mask.dtype == torch.bool else torch.maximum(mask, other)
