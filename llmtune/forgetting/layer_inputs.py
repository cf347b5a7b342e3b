"""Linear layers by name, and the second moment of what enters each: one way for all parts that look at inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import bare_module, named_places
from llmtune.forgetting.likelihood import INPUTS, with_decoder_inputs
from llmtune.gradients.examples import split_examples
from llmtune.losses.head import model_inputs
from llmtune.modules import reference_pass, unwrap
from llmtune.types import Batch


class SecondMoment:
    """C = sum x x^T of the vectors that have come, in float64 (float32 on Apple's GPUs, which have no other).

    Vectors wait until there are as many as they are long, so that C is not read and written for a few at a time.

    Attributes:
        rows: how many vectors have come.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sum: Tensor | None = None
        self._waiting: list[Tensor] = []

    def add(self, vectors: Tensor) -> None:
        """Add vectors [..., in]."""
        x = vectors.detach().reshape(-1, vectors.shape[-1])
        self._waiting.append(x.to(torch.float32 if x.device.type == "mps" else torch.float64))
        self.rows += len(x)
        if sum(map(len, self._waiting)) >= x.shape[1]:
            self._take()

    def total(self) -> Tensor:
        """Return C, [in, in], of one vector or more."""
        self._take()
        assert self._sum is not None
        return self._sum

    def _take(self) -> None:
        if not self._waiting:
            return
        x, self._waiting = torch.cat(self._waiting), []
        with torch.autocast(x.device.type, enabled=False):
            self._sum = x.T @ x if self._sum is None else self._sum.addmm_(x.T, x)


@torch.no_grad()
def second_moments(
    model: nn.Module, places: Mapping[str, nn.Module], batches: Iterable[Batch | tuple[Tensor, Tensor]]
) -> dict[str, SecondMoment]:
    """Return the second moment of the inputs of layers on some examples.

    Each example is run alone, in eval mode, without padding, so batch size, order and padding change nothing; pairs are
    run as they come. Modes and the random state are as before.

    Args:
        model: the bare model.
        places: {bare name: the layer as it stands now, with its adapters}.
        batches: dicts for `model(**batch)`, labels not needed, padded or packed; or pairs (inputs [n, ...], targets)
            for `model(inputs)`. Read once.

    Raises:
        ValueError: a layer is not called, or not with a tensor.
        TypeError: `batches` is a single batch, or a batch is neither dict nor pair.
    """
    if isinstance(batches, Mapping | Tensor | str):
        raise TypeError("batches must be a list, or another iterable, of batches; got a single one")
    found = {name: SecondMoment() for name in places}
    device = next(model.parameters()).device

    def watch(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise ValueError(f"{name} is called without a tensor as its first argument: leave it out of modules")
            found[name].add(args[0])

        return add

    with ExitStack() as stack, reference_pass(model):
        for name, place in places.items():
            stack.callback(place.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            for example in _examples(model, batch, device):
                model(example[INPUTS]) if INPUTS in example else model(**model_inputs(model, example))
    for name, one in found.items():
        if one.rows == 0:
            raise ValueError(f"{name} has had no input: there are no batches, or the model does not call it")
    return found


def linear_places(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer, as it stands now with its adapters, by its bare name.

    Args:
        model: any module, with or without adapters and wrappers.
    """
    return {name: module for name, module in named_places(unwrap(model)) if is_linear(bare_module(module))}


def is_linear(module: nn.Module) -> bool:
    """Return whether a bare module is a linear layer: `nn.Linear` or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or has_inputs_first(module)


def has_inputs_first(module: nn.Module) -> bool:
    """Return whether a bare module keeps its weight as [in, out]: GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def inputs_of(place: nn.Module) -> int:
    """Return how many inputs a linear layer has, with its adapters or without."""
    bare: Any = bare_module(place)
    return int(bare.weight.shape[0] if has_inputs_first(bare) else bare.in_features)


def _examples(model: nn.Module, batch: Any, device: torch.device) -> Iterator[Batch]:
    """Yield what the model is run on: a dict's examples one by one, a pair's inputs as they are."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor):
        yield {INPUTS: batch[0].to(device)}
        return
    if not isinstance(batch, dict):
        raise TypeError(f"a batch must be a dict of tensors or a pair (inputs, targets); got {type(batch).__name__}")
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    for example in split_examples(model, moved):
        yield with_decoder_inputs(model, example) if "labels" in example else example
