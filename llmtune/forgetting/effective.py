"""Effective parameters: what the bare model's parameters amount to under its active adapters, by their bare names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.errors import did_you_mean
from llmtune.modules import unwrap


@dataclass(frozen=True)
class EffectiveParameter:
    """One parameter of the bare model and what active adapters add to it.

    Attributes:
        name: its bare name.
        parameter: the bare model's own tensor.
        local: its name in its module.
        layers: the active adapter layers at its place, outermost first; those without a delta for it included.
        tied: the name of another place where the same tensor stands and only one of the two is adapted, or None.
    """

    name: str
    parameter: nn.Parameter
    local: str
    layers: tuple[AdapterLayer, ...] = ()
    tied: str | None = None

    def changing(self) -> list[tuple[AdapterLayer, Tensor | None]]:
        """Return the active layers that add to it: (layer, None) where the sum is `low_rank`, else (layer, its delta)."""
        found: list[tuple[AdapterLayer, Tensor | None]] = []
        for layer in self.layers:
            if self.local == "weight" and layer.low_rank() is not None:
                found.append((layer, None))
            elif (delta := layer.deltas().get(self.local)) is not None:
                found.append((layer, delta))
        return found

    def check(self) -> None:
        """Raise `ValueError` where an active adapter changes a tied tensor in one of its places only."""
        if self.tied is not None:
            raise ValueError(
                f"{self.name} and {self.tied} are one tied tensor, and an active adapter changes it in one place: it has "
                "no single effective value. Leave it out of the parameters or of the adapter's targets, or untie it"
            )

    def value(self) -> Tensor:
        """Return the parameter plus all active deltas; the parameter itself where there are none."""
        total: Tensor = self.parameter
        for layer, delta in self.changing():
            total = total + (layer.deltas()[self.local] if delta is None else delta)
        return total


def effective_parameters(model: nn.Module) -> dict[str, EffectiveParameter]:
    """Return every parameter of the bare model by its bare name, tied ones once under their first name.

    Args:
        model: any module, with or without adapters and wrappers.
    """
    found: dict[int, EffectiveParameter] = {}
    for place, module in named_places(unwrap(model)):
        layers = tuple(layer for layer in adapter_chain(module) if layer.active)
        for local, parameter in bare_module(module)._parameters.items():
            if parameter is None:
                continue
            entry = EffectiveParameter(f"{place}.{local}" if place else local, parameter, local, layers)
            first = found.setdefault(id(parameter), entry)
            if first is not entry and (first.changing() or entry.changing()):
                found[id(parameter)] = replace(first, tied=entry.name, layers=first.layers or layers)
    return {entry.name: entry for entry in found.values()}


def choose_parameters(
    model: nn.Module, parameters: Collection[str] | Callable[[str], bool] | None
) -> Mapping[str, EffectiveParameter]:
    """Return the effective parameters that are meant.

    Args:
        model: any module, with or without adapters and wrappers.
        parameters: bare names; or a function of a bare name; or None for what is trained: every parameter that requires a
            gradient, and every one that an active adapter changes.

    Raises:
        ValueError: a name is not the model's (names the nearest), nothing is chosen, or a chosen tensor is tied and
            adapted in one place only.
        TypeError: `parameters` is one string.
    """
    every = effective_parameters(model)
    if parameters is None:
        chosen = {name: p for name, p in every.items() if p.parameter.requires_grad or p.changing()}
    elif callable(parameters):
        chosen = {name: p for name, p in every.items() if parameters(name)}
    elif isinstance(parameters, str):
        raise TypeError(f"parameters must be a list of names or a function of a name; got the one string {parameters!r}")
    else:
        for name in parameters:
            if name not in every:
                raise ValueError(f'the bare model has no parameter "{name}".{did_you_mean(name, every)}')
        chosen = {name: every[name] for name in parameters}
    if not chosen:
        raise ValueError(
            f"none of the model's {len(every)} parameters is chosen: "
            + ("none requires a gradient and no active adapter changes one" if parameters is None else "nothing matches")
        )
    for entry in chosen.values():
        entry.check()
    return chosen


def anchor_of(model: nn.Module, names: Collection[str] | Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Return copies of the model's effective parameters as they are now: W, or W + s B A under active adapters.

    Args:
        model: any module, with or without adapters and wrappers.
        names: bare names, or a function of a bare name; left out, what is trained or changed by an active adapter.

    Returns:
        Detached copies by bare name, on the parameters' device; in the parameter's dtype where no adapter changes it,
        else in at least float32.

    Raises:
        ValueError: a name is not the model's, or nothing is chosen.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> anchor = anchor_of(layer)
        >>> sorted(anchor), anchor["weight"] is layer.weight
        (['bias', 'weight'], False)
    """
    return {name: entry.value().detach().clone() for name, entry in choose_parameters(model, names).items()}
