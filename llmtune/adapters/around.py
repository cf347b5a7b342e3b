"""What layers share that stand around a module of any kind and change what it returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmtune.adapters.layer import AdapterLayer, bare_module
from llmtune.adapters.targets import linear_sizes


class OutputLayer(AdapterLayer):
    """A layer around a module of any kind: a subclass says what becomes of the tensor that the module returns.

    Arguments go through to the module untouched. Of a tuple only the first entry is changed: attention returns its
    weights beside it. Whatever code around it asks the module for (a `weight`, an `attention_type`), it finds.
    """

    reads_output = True

    def changed(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return what is to stand in the place of the module's output.

        Args:
            hidden: [..., E], the module's output.
            args, kwargs: what the module was called with.

        Returns:
            [..., E], in the dtype of `hidden`.
        """
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base returns, its tensor (the first of a tuple) changed."""
        if not self.takes_part or not self.applies(args, kwargs):
            return self.base(*args, **kwargs)
        output = self.base(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            raise TypeError(
                f'adapter "{self.adapter_name}" needs a module that returns a tensor, or a tuple that begins with one; '
                f"{type(bare_module(self)).__name__} returned a {type(first).__name__}"
            )
        hidden = self.changed(first, args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def applies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether this call's output is to be changed; asked before the base runs, which may fill a cache."""
        return True

    def __getattr__(self, name: str) -> Any:
        """Return what the bare module has under this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}) or (name.startswith("__") and name.endswith("__")):
                raise
            return getattr(bare_module(self), name)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a module was called with first, [..., in], by place or by name."""
    return next(iter((*args, *kwargs.values())))


def width_of(place: str, places: dict[str, nn.Module]) -> int | None:
    """Return E of a module that returns [..., E], as the modules tell it; None where they do not.

    A linear layer tells it by itself. Of a part of a transformer the norms beside it do (or right in it, where it is a
    whole block), else the last linear layer in it: experts, say, keep their weights in other shapes.

    Args:
        place: the module's bare name.
        places: the model's modules by bare name.
    """
    own = linear_sizes(places[place])
    if own is not None:
        return own[1]
    parent = places.get(place.rpartition(".")[0]) if place else None
    for around in (parent, places[place]):
        children = [] if around is None else list(bare_module(around).children())
        found = {width for child in children if (width := _norm_width(child)) is not None}
        if len(found) == 1:
            return found.pop()
    sizes = [linear_sizes(module) for name, module in places.items() if name.startswith(f"{place}.")]
    widths = [size[1] for size in sizes if size is not None]
    return widths[-1] if widths else None


def _norm_width(module: nn.Module) -> int | None:
    bare: Any = bare_module(module)
    if "norm" not in type(bare).__name__.lower():
        return None
    shape = getattr(bare, "normalized_shape", None) or getattr(getattr(bare, "weight", None), "shape", None)
    return int(shape[0]) if shape is not None and len(shape) == 1 else None
