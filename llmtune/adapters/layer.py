"""What every adapter that wraps a module shares: where it sits, what it adds, and the model's names without it.

An adapter layer stands in the place of the module it adapts and keeps that module as `base`. Several adapters on one
module are nested, the newest outermost, so any kinds mix and each file reads alone. A parameter's *bare name* is its
name in the model as it was before any adapter, wrapper or `torch.compile`: penalties and merges speak in bare names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.modules import unwrap

PREFIX = "base_model.model."  # what PEFT puts before a module's name in its files


class AdapterLayer(nn.Module):
    """A module that stands in the place of `base`.

    Attributes:
        base: the module replaced; its own parameters are never written except by `merge`.
        adapter_name: the adapter this layer belongs to.
        active: whether the layer takes part in the forward pass; apart from whether its parameters are trained.
        merged: whether its change stands in the base's own parameters at the moment.
    """

    reads_weight = False  # whether what it adds depends on the bare weight, so that nobody may write to that under it
    reads_bias = False  # whether it depends on the bare bias as well
    reads_output = False  # whether it changes what the base returns by a function of that, and not by adding to it

    def __init__(self, base: nn.Module, *, adapter_name: str = "default") -> None:
        super().__init__()
        self.base = base
        self.training = base.training
        self.adapter_name = adapter_name
        self.active = True
        self.merged = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Hand a weight or bias that is set from outside (weights being tied) to the bare module, whose it is."""
        if name in ("weight", "bias") and isinstance(value, nn.Parameter):
            setattr(bare_module(self), name, value)
        else:
            super().__setattr__(name, value)

    @property
    def takes_part(self) -> bool:
        """Whether the forward pass adds this layer's change: it is active, and not already in the base's weights."""
        return self.active and not self.merged

    @property
    def origin(self) -> AdapterLayer:
        """The layer whose trained tensors this one uses at another place of a tied weight; itself where it has its own.

        Layers of one origin change all places of their tied weight alike.
        """
        return self

    def deltas(self) -> dict[str, Tensor]:
        """Return what this layer adds to each of the bare module's parameters, by that parameter's local name.

        Float32, differentiable, in the parameter's own shape ([out, in] for a linear weight, [in, out] for GPT-2's
        Conv1D, [V, E] for an embedding), whether the layer is active or not. Empty where the method is no change of
        parameters.
        """
        return {}

    def replacements(self) -> dict[str, Tensor]:
        """Return what `merge` puts in place as it stands: those of `deltas` whose outcome is known exactly, and buffers
        that have gone on in a copy."""
        return {}

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """Return (left, right, scaling) with `deltas()["weight"] == scaling * left @ right`, or None where there is no
        such form. left [rows, r] and right [r, columns] carry gradient to the trained tensors."""
        return None

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return this layer's tensors by the names they have in a file of adapters.

        Loading copies into them, so they are the layer's own, or views of them; they carry "base_model.model." before
        the place, as PEFT has it.

        Args:
            place: the bare name of the module adapted.
        """
        own = {name: p for name, p in self.named_parameters() if not name.startswith("base.")}
        return {f"{PREFIX}{place}.{name}": parameter for name, parameter in own.items()}


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor, of any shape, in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def bare_module(module: nn.Module) -> nn.Module:
    """Return the innermost module under any adapter layers; the module itself where it has none."""
    while isinstance(module, AdapterLayer):
        module = module.base
    return module


def plain_linear(module: nn.Module) -> nn.Linear | None:
    """Return the module where calling it is F.linear of its weight and bias and nothing else, so that a fused function
    may do it instead: exactly an `nn.Linear`, with a plain weight, without hooks, its forward its own. Else None."""
    if (
        type(module) is not nn.Linear
        or "forward" in module.__dict__
        or any(
            getattr(module, hooks)
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        )
    ):
        return None
    everywhere = nn.modules.module
    if any(
        getattr(everywhere, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
    ):
        return None
    return module if type(module.weight) is nn.Parameter and type(module.weight.data) is Tensor else None


def adapter_chain(module: nn.Module) -> list[AdapterLayer]:
    """Return the adapter layers nested at one place, outermost first; empty for a bare module."""
    chain: list[AdapterLayer] = []
    while isinstance(module, AdapterLayer):
        chain.append(module)
        module = module.base
    return chain


def named_places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (bare name, module as it stands now) for every module of the bare model.

    The module yielded is the outermost adapter layer where there is one; an adapter's own sub-modules are not yielded.
    A module that is used in two places is yielded once, under its first name, as `named_modules` does.
    """
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        inner = bare_module(module)
        if id(inner) in seen:
            return
        seen.add(id(inner))
        yield name, module
        for child_name, child in inner.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", model)


def bare_named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (bare name, parameter) for every parameter of the bare model, adapters' own left out.

    A parameter that is tied to another is yielded once, under its first name.
    """
    seen: set[int] = set()
    for name, module in named_places(model):
        for local, parameter in bare_module(module)._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield (f"{name}.{local}" if name else local), parameter
