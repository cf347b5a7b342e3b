"""How far the weights have gone from those of the base, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from llmtune.adapters.effective import EffectiveParameter, effective_parameters
from llmtune.adapters.layer import wide
from llmtune.errors import did_you_mean
from llmtune.forgetting.base_model import Base, as_base, check_base
from llmtune.optim.depth import LAYER

By = Literal["layer", "parameter"]


@torch.no_grad()
def delta_norms(model: nn.Module, *, base: Base | Mapping[str, Tensor] = (), by: By = "layer") -> dict[str, float]:
    """Return how far each layer's weights lie from the base's: sqrt(sum ||theta - theta_0||_F^2).

    theta is the effective weight, W + s B A under an active adapter, so the number does not depend on how a change is
    split between B and A; those of A and of B say nothing (A starts at random, and B A is 0 there). The square root of
    the sum of all squares is the distance as a whole.

    Args:
        model: any module, with or without adapters and wrappers.
        base: the names of the adapters that belong to the base, () for the bare model; or another module; or its
            weights by bare names, of the same shapes, such as `anchor_of(model)` gave before the training: then what it
            names is what is measured.
        by: "layer", that is by the places that a Transformer's layers have, and for what lies in none by module; or
            "parameter", by bare names.

    Returns:
        0 or more, by name, in the model's order; 0 for what is as it was.

    Raises:
        ValueError: the base has other names or shapes than the model; it is the model itself; a tensor is tied and
            adapted in one place only; or `by` is unknown.
        TypeError: `base` is something else.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> _ = attach(model, LoRA(rank=2, alpha=4, targets=r"model\\.layers\\.1\\..*q_proj"))
        >>> for name, parameter in model.named_parameters():
        ...     if parameter.requires_grad:
        ...         _ = nn.init.ones_(parameter)
        >>> {name: round(norm, 1) for name, norm in delta_norms(model).items() if norm}
        {'model.layers.1': 158.4}
    """
    if by not in get_args(By):
        raise ValueError(f'by must be "layer" or "parameter"; got {by!r}')
    if not isinstance(base, Mapping):
        check_base(model, base)
    squares: dict[str, float] = {}
    for name, change in _changes(model, base):
        place = LAYER.match(name)
        layer = f"{place[1]}{place[2]}" if place else name.rpartition(".")[0] or name
        key = name if by == "parameter" else layer
        squares[key] = squares.get(key, 0.0) + (0.0 if change is None else float(change.square().sum()))
    return {key: math.sqrt(square) for key, square in squares.items()}


def _changes(model: nn.Module, base: Base | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """Yield (bare name, effective weight - the base's), None where there is no change."""
    own = effective_parameters(model)
    if isinstance(base, nn.Module | Mapping):
        yield from _from_values(own, base)
        return
    with as_base(model, base) as inner:
        others = effective_parameters(inner)
    for name, entry in own.items():
        _check_tied(entry)
        yield name, _between(entry, others[name])


def _between(entry: EffectiveParameter, other: EffectiveParameter) -> Tensor | None:
    """Return what two sets of adapters make different in one parameter; that itself may be quantised."""
    change = None if entry.parameter is other.parameter else wide(entry.parameter) - wide(other.parameter)
    for one, another, sign in ((entry, other, 1), (other, entry, -1)):
        for layer in one.layers:
            if layer not in another.layers:
                delta = sign * layer.deltas()[entry.local]
                change = delta if change is None else change + delta
    return change


def _from_values(
    own: Mapping[str, EffectiveParameter], base: nn.Module | Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    values = effective_parameters(base) if isinstance(base, nn.Module) else base
    missing = [name for name in own if name not in values] if isinstance(base, nn.Module) else []
    if odd := [name for name in values if name not in own] + missing:
        there = "model" if odd[0] in own else "base"
        raise ValueError(
            f"{odd[0]} is a parameter of the {there} only: they are no two states of one model."
            + did_you_mean(odd[0], values if there == "model" else own)
        )
    if not values:
        raise ValueError("base names no weight, so there is nothing to measure")
    for name, value in values.items():
        own[name].check()
        theta = own[name].value()
        theta_0 = value.value() if isinstance(value, EffectiveParameter) else value
        if theta.shape != theta_0.shape:
            raise ValueError(f"{name} is {[*theta.shape]} in the model and {[*theta_0.shape]} in the base")
        yield name, wide(theta) - wide(theta_0.to(theta.device))


def _check_tied(entry: EffectiveParameter) -> None:
    if entry.tied is not None:
        entry.check()
