"""Effective parameters: what the bare model's parameters amount to under its active adapters, by their bare names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy
from llmtune.errors import did_you_mean
from llmtune.modules import unwrap

Choice = Collection[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class EffectiveParameter:
    """One parameter of the bare model and what its active adapters make of it: `parameter` plus the layers' deltas.

    Attributes:
        name: its bare name.
        parameter: the bare model's own tensor; or the copy that an adapter trains and uses in its place.
        local: its name in its module.
        layers: the adapter layers that add to it.
        tied: the name of another place where the same tensor stands with other layers, or None.
    """

    name: str
    parameter: nn.Parameter
    local: str
    layers: tuple[AdapterLayer, ...] = ()
    tied: str | None = None

    def factors(self) -> list[tuple[Tensor, Tensor, float]]:
        """Return (left [rows, r], right [r, columns], scaling) for each layer that adds scaling * left @ right."""
        found = (layer.low_rank() for layer in self.layers if self.local == "weight")
        return [factors for factors in found if factors is not None]

    def dense(self) -> list[Tensor]:
        """Return the deltas, of the parameter's shape, of the layers that add something else."""
        others = (layer for layer in self.layers if self.local != "weight" or layer.low_rank() is None)
        return [layer.deltas()[self.local] for layer in others]

    def added(self) -> Tensor:
        """Return the sum of all deltas, of the parameter's shape and in at least float32; 0 where there are none."""
        total = torch.zeros_like(self.parameter, dtype=torch.promote_types(self.parameter.dtype, torch.float32))
        for layer in self.layers:
            total = total + layer.deltas()[self.local]
        return total.detach()

    def value(self) -> Tensor:
        """Return the parameter, of its own shape, plus all deltas; the parameter itself where there are none."""
        total: Tensor = self.parameter
        for layer in self.layers:
            total = total + layer.deltas()[self.local]
        return total

    def check(self) -> None:
        """Raise `ValueError` where an adapter changes a tied tensor in one of its places only, or a quantised one."""
        if self.layers and not self.parameter.is_floating_point():
            raise ValueError(
                f"{self.name} is quantised: it has no effective value to take gradients of. Leave it out of the "
                "parameters, or merge the adapter with dequantize=True"
            )
        if self.tied is not None:
            raise ValueError(
                f"{self.name} and {self.tied} are one tied tensor, and an active adapter changes it in one place: it "
                "has no single effective value. Leave it out of the parameters or of the adapter's targets, or untie it"
            )


def effective_parameters(model: nn.Module) -> dict[str, EffectiveParameter]:
    """Return every parameter of the bare model by its bare name, tied ones once under their first name.

    A bias that an adapter trains where the bare module has none is not among them.

    Args:
        model: any module, with or without adapters and wrappers.
    """
    found: dict[int, EffectiveParameter] = {}
    copies: dict[str, tuple[nn.Parameter, tuple[AdapterLayer, ...]]] = {}  # bare name: what stands in its place
    for place, module in named_places(unwrap(model)):
        adding: list[AdapterLayer] = []
        for layer in adapter_chain(module):
            if isinstance(layer, TrainedCopy) and layer.takes_part:  # whatever is further inside does not run
                for local, copied in layer.copy.named_parameters():
                    copies.setdefault(_join(place, local), (copied, _changing(adding, local)))
                break
            if layer.takes_part:
                adding.append(layer)
        for local, parameter in bare_module(module)._parameters.items():
            if parameter is None:
                continue
            name = _join(place, local)
            own, layers = copies.get(name) or (parameter, _changing(adding, local))
            first = found.setdefault(id(own), EffectiveParameter(name, own, local, layers))
            if first.name != name and [a.origin for a in first.layers] != [b.origin for b in layers]:
                found[id(own)] = replace(first, tied=name, layers=first.layers or layers)
    return {entry.name: entry for entry in found.values()}


def choose_parameters(model: nn.Module, parameters: Choice) -> Mapping[str, EffectiveParameter]:
    """Return the effective parameters that are meant.

    Args:
        model: any module, with or without adapters and wrappers.
        parameters: bare names; or a function of a bare name; or None for what is trained: every parameter that requires
            a gradient, and every one that an active adapter changes.

    Raises:
        ValueError: a name is not the model's (names the nearest), nothing is chosen, or a chosen tensor is tied and
            adapted in one place only.
        TypeError: `parameters` is one string.
    """
    every = effective_parameters(model)
    if parameters is None:
        chosen = {name: entry for name, entry in every.items() if entry.parameter.requires_grad or entry.layers}
    elif callable(parameters):
        chosen = {name: entry for name, entry in every.items() if parameters(name)}
    elif isinstance(parameters, str):
        raise TypeError(
            f"parameters must be a list of names or a function of a name; got the one string {parameters!r}"
        )
    else:
        for name in parameters:
            if name not in every:
                raise ValueError(f'the bare model has no parameter "{name}".{did_you_mean(name, every)}')
        chosen = {name: every[name] for name in parameters}
    if not chosen:
        why = "none requires a gradient and no active adapter changes one" if parameters is None else "nothing matches"
        raise ValueError(f"none of the model's {len(every)} parameters is chosen: {why}")
    for entry in chosen.values():
        entry.check()
    return chosen


@contextmanager
def differentiable(model: nn.Module, chosen: Mapping[str, EffectiveParameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Yield, by name, tensors of the model whose gradients are those of the effective parameters.

    Where adapters only add to a parameter (a low-rank change, a trained bias), that is the bare parameter itself: the
    output depends on it as it does on the sum. Under any other adapter the bare module stands in the adapter's place
    for the length of the block, with the effective values as its parameters.

    Args:
        model: the bare module, in eval mode while the block runs.
        chosen: from `choose_parameters`.
    """
    every = effective_parameters(model)
    tied = {id(entry.parameter): entry for entry in every.values() if entry.tied is None}
    values: dict[str, nn.Parameter] = {}
    tensors = {name: entry.parameter for name, entry in chosen.items()}
    swapped: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
    replaced: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    try:
        for place, module in list(named_places(model)):
            chain = adapter_chain(module)
            if all(only_adds(layer) for layer in chain):
                continue
            lost = [layer for layer in chain if layer.takes_part and not _names_changed(layer)]
            if lost:
                raise ValueError(
                    f'{place} carries adapter "{lost[0].adapter_name}", which is no change of a parameter, beside one '
                    "that is none of low rank: its effective gradient is not offered. Detach one of them"
                )
            bare = bare_module(module)
            for local, parameter in list(bare._parameters.items()):
                entry = every.get(_join(place, local)) or tied.get(id(parameter))
                if parameter is None or entry is None:
                    continue
                if entry.name not in values:
                    made = entry.value().detach().to(parameter.dtype)
                    values[entry.name] = nn.Parameter(made, requires_grad=False)
                value = values[entry.name]
                replaced.append((bare._parameters, local, parameter))
                bare._parameters[local] = value
                if entry.name in tensors:
                    tensors[entry.name] = value
            for parent in model.modules():
                swapped += [
                    (parent._modules, name, child) for name, child in parent._modules.items() if child is module
                ]
        for modules, name, module in swapped:
            modules[name] = bare_module(module)
        yield tensors
    finally:
        for modules, name, module in swapped:
            modules[name] = module
        for parameters, local, parameter in replaced:
            parameters[local] = parameter


def anchor_of(model: nn.Module, names: Choice = None) -> dict[str, Tensor]:
    """Return copies of the model's effective parameters as they are now: W, or W + s B A under active adapters.

    Args:
        model: any module, with or without adapters and wrappers.
        names: bare names, or a function of a bare name; left out, what is trained or changed by an active adapter.

    Returns:
        Detached copies by bare name, each of its parameter's shape and on its device; in the parameter's dtype where no
        adapter changes it, else in at least float32.

    Raises:
        ValueError: a name is not the model's, nothing is chosen, or a chosen tensor is tied and adapted in one place.
        TypeError: `names` is one string.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> anchor = anchor_of(layer)
        >>> sorted(anchor), anchor["weight"] is layer.weight
        (['bias', 'weight'], False)
    """
    return {name: entry.value().detach().clone() for name, entry in choose_parameters(model, names).items()}


_delta_names: WeakKeyDictionary[AdapterLayer, frozenset[str]] = WeakKeyDictionary()


def _changing(layers: list[AdapterLayer], local: str) -> tuple[AdapterLayer, ...]:
    """Return those of the layers that change the parameter of that local name."""
    return tuple(layer for layer in layers if local in _names_changed(layer))


def _names_changed(layer: AdapterLayer) -> frozenset[str]:
    """Return the local names of the parameters that a layer changes; asked once, deltas are as large as the weights."""
    if layer not in _delta_names:
        with torch.no_grad():
            _delta_names[layer] = frozenset(layer.deltas())
    return _delta_names[layer]


def only_adds(layer: AdapterLayer) -> bool:
    """Return whether the output depends on the layer's base as on the sum of base and change (or on no base at all);
    a layer that changes no parameter, but what the base returns, may stay where it is as well."""
    if not layer.takes_part or layer.low_rank() is not None or isinstance(layer, TrainedBias | TrainedCopy):
        return True
    return not _names_changed(layer)


def _join(place: str, local: str) -> str:
    return f"{place}.{local}" if place else local
