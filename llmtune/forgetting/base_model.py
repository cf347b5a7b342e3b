"""The base that a model is compared with: another module, or the model itself with only some of its adapters on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from llmtune.adapters.attach import active, adapter_layers, adapter_names
from llmtune.modules import check_module, unwrap

Base = nn.Module | Sequence[str]


def check_base(model: nn.Module, base: Base) -> None:
    """Raise where a model cannot be compared with its base.

    Args:
        model: any module, with or without wrappers.
        base: another module; or the names of the adapters that are on in it, () for the bare model.

    Raises:
        ValueError: the base is the model as it stands, or adapters are named and there are none.
        TypeError: the base is neither a module nor a list of names.
    """
    check_module(model)
    inner = unwrap(model)
    if isinstance(base, nn.Module):
        if unwrap(base) is inner:
            raise ValueError("base is the model itself: give the model of before the training, or a copy of it")
        return
    if isinstance(base, str) or not isinstance(base, Sequence) or not all(isinstance(name, str) for name in base):
        raise TypeError(f"base must be a module or a list of adapters' names, () for the bare model; got {base!r}")
    if not adapter_names(inner):
        raise ValueError("the model has no adapter to switch off: give the model of before the training as base")
    if {layer.adapter_name for layer in adapter_layers(inner) if layer.active} == set(base):
        raise ValueError(f"the adapters that are on are those of the base, {list(base)}: both are one model")


@contextmanager
def as_base(model: nn.Module, base: Base) -> Iterator[nn.Module]:
    """Yield the base's bare module, within the block as it is to be run.

    Args:
        model: any module, with or without wrappers.
        base: as in `check_base`.
    """
    if isinstance(base, nn.Module):
        yield unwrap(base)
        return
    inner = unwrap(model)
    with active(inner, base):
        yield inner
