"""Trained copies: a module, or a bias, of which the adapter trains a copy while the original stays as it was."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmtune.adapters.layer import PREFIX, AdapterLayer, adapter_chain, bare_module, wide


class TrainedCopy(AdapterLayer):
    """A module trained whole, as a copy: PEFT's `modules_to_save`. Over another adapter's copy it starts from that one.

    Where the copy's dtype is not the base's, its parameters are rounded to the base's on use, so that the output keeps
    the dtype it had and starts as it was, to the bit.

    Args:
        base: any module, for instance a classification head that starts at random.
        dtype: of the copy's floating parameters, or a wider one where it cannot hold the base's; None keeps the base's.
        adapter_name: the adapter the copy belongs to.

    Raises:
        TypeError: a parameter of it is not floating (quantised).
    """

    def __init__(self, base: nn.Module, *, dtype: torch.dtype | None = None, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        integral = next((p for p in bare_module(base).parameters() if not p.is_floating_point()), None)
        if integral is not None:
            raise TypeError(
                f"a {type(bare_module(base)).__name__} with a weight of {integral.dtype} (quantised) cannot be trained "
                "whole: leave it out of train_modules"
            )
        self.copy = copy.deepcopy(running(base)).requires_grad_(True)
        if dtype is not None:
            for parameter in self.copy.parameters():
                parameter.data = parameter.data.to(torch.promote_types(dtype, parameter.dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy where the adapter takes part, else the base."""
        if not self.takes_part:
            return self.base(*args, **kwargs)
        original = dict(bare_module(self).named_parameters())
        rounded = {
            name: parameter.to(original[name].dtype)
            for name, parameter in self.copy.named_parameters()
            if parameter.dtype != original[name].dtype
        }
        return functional_call(self.copy, rounded, args, kwargs) if rounded else self.copy(*args, **kwargs)

    def deltas(self) -> dict[str, Tensor]:
        """Return copy - original for every parameter, by its name in the module; see `AdapterLayer`."""
        originals = _parameters(bare_module(self))
        return {name: wide(p) - wide(originals[name]) for name, p in _parameters(self.copy).items()}

    def replacements(self) -> dict[str, Tensor]:
        """Return the copy's parameters and buffers by their names in the module; see `AdapterLayer`."""
        return {**_parameters(self.copy), **dict(self.copy.named_buffers())}

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return the copy's parameters and buffers by the names of the originals; see `AdapterLayer`."""
        return {f"{PREFIX}{place}.{local}": value for local, value in self.copy.state_dict(keep_vars=True).items()}

    def __getattr__(self, name: str) -> Any:
        """Return what the module that is in use has under this name: code around it may ask for its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "copy" not in modules:
                raise
            return getattr(modules["copy"] if self.takes_part else modules["base"], name)


class TrainedBias(AdapterLayer):
    """A bias trained as a copy, beside a module that adds its bias last: base(x) + (copy - original).

    Args:
        base: a linear layer, `Conv1D` or layer norm with a bias [out].
        dtype: of the copy, or a wider one where it cannot hold the base's; None keeps the base's.
        adapter_name: the adapter the copy belongs to.

    Raises:
        TypeError: the module has no bias, or may not add it last.
    """

    original: Tensor | None

    def __init__(self, base: nn.Module, *, dtype: torch.dtype | None = None, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        bare: Any = bare_module(base)
        if not adds_bias_last(bare):
            raise TypeError(
                f"cannot train the bias of a {type(bare).__name__}: name the module in train_modules instead"
            )
        kind = bare.bias.dtype if dtype is None else torch.promote_types(dtype, bare.bias.dtype)
        self.trained_bias = nn.Parameter(bare.bias.detach().to(kind, copy=True))
        # a base on the meta device has no values yet: then what stands there later is the original
        self.register_buffer("original", None if bare.bias.is_meta else bare.bias.detach().clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.original is None and f"{prefix}original" in state_dict:
            self.original = torch.empty_like(cast(Tensor, bare_module(self).bias))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def weight(self) -> Any:
        """The bare module's weight."""
        return bare_module(self).weight

    @property
    def bias(self) -> Any:
        """The bias in use."""
        return self.trained_bias if self.takes_part else bare_module(self).bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output [..., out] with the trained bias, in its dtype, for x [..., in]."""
        result: Tensor = self.base(x)
        if not self.takes_part:
            return result
        return (result + self.deltas()["bias"]).to(result.dtype)

    def deltas(self) -> dict[str, Tensor]:
        """Return copy - original of the bias; see `AdapterLayer`."""
        original: Any = bare_module(self).bias if self.original is None else self.original
        return {"bias": wide(self.trained_bias) - wide(original)}

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return the bias by the name of the original; see `AdapterLayer`."""
        return {f"{PREFIX}{place}.bias": self.trained_bias}

    def replacements(self) -> dict[str, Tensor]:
        """Return the trained bias, unless another adapter's change stands in the original; see `AdapterLayer`."""
        bare: Any = bare_module(self)
        alone = self.original is None or torch.equal(bare.bias, self.original)
        return {"bias": self.trained_bias} if alone else {}


def running(module: nn.Module) -> nn.Module:
    """Return the module that runs at a place where nothing but copies may stand: the newest copy that takes part, or
    the bare one."""
    copies = (layer for layer in adapter_chain(module) if isinstance(layer, TrainedCopy) and layer.takes_part)
    layer = next(copies, None)
    return bare_module(module) if layer is None else layer.copy


def check_first(base: nn.Module, method: str, *, and_bias: bool = False) -> None:
    """Raise where a method that reads the bare weight would stand on another adapter; a `TrainedBias` may be there.

    Args:
        base: what the new layer would be put around.
        method: its name, for the sentence.
        and_bias: whether the method reads the bare bias as well, so that no `TrainedBias` may be there.

    Raises:
        TypeError: another adapter stands there already.
    """
    before = next((layer for layer in adapter_chain(base) if and_bias or not isinstance(layer, TrainedBias)), None)
    if before is not None:
        raise TypeError(
            f'{method} is made for the bare weight, but adapter "{before.adapter_name}" stands before it: '
            f"attach {method} first, or detach that one"
        )


def adds_bias_last(module: nn.Module) -> bool:
    """Return whether the module is one of those that add their bias [out] to what they return, at the very end."""
    known = isinstance(module, nn.Linear | nn.LayerNorm) or type(module).__name__ == "Conv1D"
    return known and isinstance(getattr(module, "bias", None), Tensor)


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's parameters, a tied one by each of its names."""
    return dict(module.named_parameters(remove_duplicate=False))
