"""Which parameters a record's `target_parameters` means on a model, and which experts are left frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from llmtune.adapters.layer import bare_module
from llmtune.adapters.targets import ends_in, inside
from llmtune.errors import did_you_mean


def named_locals(places: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Return (place of the module, local name) for every parameter by its bare name, tied ones under each name.

    Args:
        places: the modules by bare name, in the model's order.
    """
    return {
        (f"{place}.{local}" if place else local): (place, local)
        for place, module in places.items()
        for local, parameter in bare_module(module)._parameters.items()
        if parameter is not None
    }


def matching_parameters(patterns: Sequence[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters that each suffix matches, in the model's order.

    Args:
        patterns: ends of parameter names, from a dot on: PEFT's meaning.
        names: the bare names of the model's parameters.

    Raises:
        ValueError: a pattern matches none; names the nearest.
    """
    listed = list(names)
    found = {pattern: [name for name in listed if ends_in(name, pattern)] for pattern in patterns}
    for pattern, some in found.items():
        if not some:
            near = did_you_mean(pattern, list(dict.fromkeys([*map(end_of, listed), *listed])))
            raise ValueError(f'target_parameters: "{pattern}" matches no parameter\'s name or its end.{near}')
    return found


def frozen_experts(places: Mapping[str, nn.Module], copied: Sequence[str]) -> list[str]:
    """Return the names of three-dimensional parameters that no linear layer owns: stacks of experts.

    Convolutions, and what has one row only (a token put before an image's), are none.

    Args:
        places: the modules by bare name.
        copied: the places of modules that are trained whole.
    """
    return [
        name
        for name, (place, local) in named_locals(places).items()
        if not inside(place, copied)
        and not isinstance(bare_module(places[place]), _ConvNd | nn.Bilinear | ParametrizationList)
        and (parameter := bare_module(places[place])._parameters[local]) is not None
        and parameter.ndim == 3
        and parameter.shape[0] > 1
    ]


def end_of(name: str) -> str:
    """Return a parameter's name from behind the last number in it, which is what its likes in other layers share."""
    parts = name.split(".")
    last = max((index for index, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def counted(names: Iterable[str]) -> str:
    """Return "mlp.experts.gate_up_proj 2, mlp.experts.down_proj 2" for the names of parameters."""
    counts: dict[str, int] = {}
    for name in names:
        counts[end_of(name)] = counts.get(end_of(name), 0) + 1
    return ", ".join(f"{end} {count}" for end, count in counts.items())
