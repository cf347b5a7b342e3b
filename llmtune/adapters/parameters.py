"""LoRA on a parameter itself: a stack of experts, or a matrix that a module uses in a way of its own.

    W'[e] = W[e] + scaling * B[e] A[e]     for every expert e; its transpose where the module keeps W as [E, in, out]

Mixture-of-experts models keep the weights of all experts in one parameter [E, out, in], which no linear layer owns, so
there is no output to add a change to: the module is called with the changed parameter in the place of its own. Hu et
al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1, for each expert by itself. The layout of
A and B is PEFT's on disk (`target_parameters`), of which the tensors here are other views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.autocast import no_autocast
from llmtune.adapters.layer import PREFIX, adapter_chain, bare_module
from llmtune.adapters.lora import lora_scaling
from llmtune.adapters.record import check_dtype, check_flag, check_positive, check_whole
from llmtune.adapters.scaled import ScaledLayer


def changed_experts(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor, *, transposed: bool = False
) -> Tensor:
    """Return W + scaling * B A for every expert, summed in at least float32 and rounded once to the dtype of W.

    Args:
        weight: W, [E, out, in]; with `transposed` [E, in, out].
        lora_a: A, [E, r, in].
        lora_b: B, [out, r, E], the expert last, as in PEFT's files.
        scaling: alpha / r, or alpha / sqrt(r): a number or a scalar tensor.
        transposed: whether W is kept as [E, in, out].

    Returns:
        A new tensor of W's shape and dtype; differentiable in all three.

    >>> import torch
    >>> from llmtune.adapters import changed_experts
    >>> weight, a, b = torch.zeros(2, 3, 5), torch.ones(2, 1, 5), torch.ones(3, 1, 2)
    >>> changed_experts(weight, a, b, 2.0).unique()
    tensor([2.])
    """
    left, right = expert_factors(lora_a, lora_b, transposed)
    wide = torch.promote_types(weight.dtype, torch.promote_types(lora_a.dtype, torch.float32))
    with no_autocast(weight.device):  # which would round the weight to its dtype
        if isinstance(scaling, Tensor):
            changed = torch.baddbmm(weight.to(wide), left.to(wide) * scaling, right.to(wide))
        else:
            changed = torch.baddbmm(weight.to(wide), left.to(wide), right.to(wide), alpha=scaling)
    return changed.to(weight.dtype)


def expert_factors(lora_a: Tensor, lora_b: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return views (left [E, rows, r], right [E, r, columns]) with the change of W as their product."""
    return (lora_a.mT, lora_b.permute(2, 1, 0)) if transposed else (lora_b.permute(2, 0, 1), lora_a)


class LoRAParameter(ScaledLayer):
    """A module that is called with one of its parameters changed by LoRA; see the top of this file.

    It stands in the place of the module that owns the parameter and passes on whatever that one is called with. For
    the length of the call W + scaling * B A stands where W stood; the same holds while another method of the module
    runs, and the parameter read from this layer is the changed one. Layers nest, for several parameters of one module
    and for several adapters.

    A parameter [E, x, y] is taken as E experts, a matrix [out, in] as one. Three-dimensional ones are [E, out, in],
    or [E, in, out] where the module has a true attribute `is_transposed`: PEFT's rule, which decides the side that A
    is on. Every expert has an A and a B of its own; one that no token reached gets a gradient of zero, not None.

    The changed parameter, as large as W, is kept from the forward pass to the backward pass, and its gradient is made
    on the way to those of A and B (W itself gets none). Gradient checkpointing keeps it to one layer at a time.

    Args:
        base: the module that owns the parameter, with or without adapters around it.
        parameter: its local name, such as "gate_up_proj".
        rank: r, at least 1.
        alpha: the change is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead.
        initialise: how A is drawn: "kaiming" (uniform, as `nn.Linear`) or "gaussian" (standard deviation 1 / r).
        dtype: of A and B.
        adapter_name: the adapter the layer belongs to.
        outside: how many layers of the same adapter stand around this one; PEFT's files tell parameters of one module
            apart by that alone.

    Attributes:
        lora_a: A, [E, r, in], drawn.
        lora_b: B, [out, r, E], zero at the start, so that the output is the base's to the bit.

    Raises:
        TypeError: the module has no such parameter, it is not floating or of other than two or three dimensions, or an
            adapter that reads the module's weight stands there.
        ValueError: the rank or `initialise` is out of range.

    Example:
        >>> from llmtune.testing.models import tiny_qwen3_moe
        >>> experts = tiny_qwen3_moe().model.layers[0].mlp.experts
        >>> layer = LoRAParameter(experts, parameter="down_proj", rank=2, alpha=4)
        >>> tuple(layer.lora_a.shape), tuple(layer.lora_b.shape)  # of [5, 28, 13]
        ((5, 2, 13), (28, 2, 5))
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(
        self, base: nn.Module, *, parameter: str, rank: int, alpha: float, rslora: bool = False,
        initialise: str = "kaiming", dtype: torch.dtype = torch.float32, adapter_name: str = "default",
        outside: int = 0,
    ) -> None:  # fmt: skip
        check_parameter(base, parameter, f"{type(bare_module(base)).__name__}.{parameter}")
        super().__init__(base, adapter_name=adapter_name)
        E, rows, columns = sizes_of(base, parameter)
        check_whole("the rank", rank)
        check_positive("alpha", alpha)
        check_flag("rslora", rslora)
        check_dtype(dtype)
        if initialise not in ("kaiming", "gaussian"):
            raise ValueError(f'initialise must be "kaiming" or "gaussian"; got {initialise!r}')
        self.parameter, self.outside = parameter, outside
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = lora_scaling(alpha, rank, rslora)
        weight = self._weight()
        self.transposed = weight.ndim == 3 and bool(getattr(bare_module(base), "is_transposed", False))
        size, out = (rows, columns) if self.transposed else (columns, rows)
        self.lora_a = nn.Parameter(torch.empty(E, rank, size, dtype=dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.empty(out, rank, E, dtype=dtype, device=weight.device))
        self.start(initialise)
        self.train(base.training)

    def start(self, initialise: str) -> None:
        """Draw A, every expert's rows alike, and set B to zero."""
        rows = self.lora_a.data.view(-1, self.lora_a.shape[-1])
        if initialise == "gaussian":
            nn.init.normal_(rows, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base returns, with the parameter changed where the adapter takes part."""
        return self.changed(self.base, *args, **kwargs)

    def changed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return call(*args, **kwargs), during which the module's parameter is W + scaling * B A."""
        if not self.takes_part:
            return call(*args, **kwargs)
        parameters: dict[str, Any] = bare_module(self)._parameters
        weight = parameters[self.parameter]
        parameters[self.parameter] = self._changed(weight)
        try:
            return call(*args, **kwargs)
        finally:  # also where checkpointing ends a second forward pass early, by an exception
            parameters[self.parameter] = weight

    def deltas(self) -> dict[str, Tensor]:
        """Return scaling * B A of the parameter's shape, by its local name; see `AdapterLayer`."""
        left, right = expert_factors(self.lora_a, self.lora_b, self.transposed)
        wide = torch.promote_types(left.dtype, torch.float32)
        change = self.scaling * (left.to(wide) @ right.to(wide))
        return {self.parameter: change.view(self._weight().shape)}

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names, which do not hold the parameter's, and views of the tensors; see `AdapterLayer`.

        A is [E * r, in] there, the expert slowest, and B [out, r * E], the expert fastest.
        """
        start = f"{PREFIX}{place}{'.base_layer' * self.outside}"
        return {
            f"{start}.lora_A.weight": self.lora_a.view(-1, self.lora_a.shape[-1]),
            f"{start}.lora_B.weight": self.lora_b.view(self.lora_b.shape[0], -1),
        }

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        settings = f"rank={self.rank}, scaling={self.scaling:g}, active={self.active}"
        return f"adapter={self.adapter_name}, parameter={self.parameter}, {settings}"

    def __getattr__(self, name: str) -> Any:
        """Return what the module has under this name: the parameter changed, and methods that see it changed."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            ready = "base" in self.__dict__.get("_modules", {}) and name not in ("lora_a", "lora_b")
            if not ready or not hasattr(bare_module(self), name):  # what adapters between have is theirs
                raise
        found = getattr(self.base, name)
        if name == self.parameter and self.takes_part:
            return self._changed(found)
        return partial(self.changed, found) if isinstance(found, MethodType | partial) else found

    def __setattr__(self, name: str, value: Any) -> None:
        """Hand a parameter that is set from outside to the bare module, whose it is."""
        if isinstance(value, nn.Parameter) and name not in ("lora_a", "lora_b"):
            setattr(bare_module(self), name, value)
        else:
            super().__setattr__(name, value)

    def _weight(self) -> Tensor:
        weight = bare_module(self)._parameters[self.parameter]
        assert weight is not None
        return weight

    def _changed(self, weight: Tensor) -> Tensor:
        """W + scaling * B A of the shape of W: of the bare parameter, or of what another layer has made of it."""
        experts = weight if weight.ndim == 3 else weight[None]
        changed = changed_experts(experts, self.lora_a, self.lora_b, self.factor(), transposed=self.transposed)
        return changed.view(weight.shape)


def sizes_of(module: nn.Module, parameter: str) -> tuple[int, int, int]:
    """Return (E, rows, columns) of a parameter that `check_parameter` has passed; E is 1 for a matrix."""
    shape = bare_module(module)._parameters[parameter].shape  # type: ignore[union-attr]
    return (shape[0] if len(shape) == 3 else 1), shape[-2], shape[-1]


def check_parameter(module: nn.Module, parameter: str, name: str) -> None:
    """Raise where LoRA cannot go to a parameter.

    Args:
        module: the module that owns it, with or without adapters around it.
        parameter: its local name.
        name: what to call it in the sentence.

    Raises:
        TypeError: there is none, it is not floating or of other than two or three dimensions, its module is never
            called, or an adapter around it reads the weight.
    """
    bare = bare_module(module)
    found = bare._parameters.get(parameter)
    if found is None:
        there = ", ".join(local for local, value in bare._parameters.items() if value is not None)
        raise TypeError(f"{name} is no parameter: the {type(bare).__name__} has {there or 'none'} of its own")
    if type(found) is not nn.Parameter or not found.is_floating_point():
        raise TypeError(
            f"{name} is a {type(found).__name__} of {found.dtype}: target_parameters takes plain floating parameters. "
            "Name its module in targets"
        )
    if found.ndim not in (2, 3):
        raise TypeError(
            f"{name} has the shape {tuple(found.shape)}: target_parameters takes matrices [out, in] and stacks of "
            "experts [E, out, in]"
        )
    if isinstance(bare, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{name} belongs to nn.MultiheadAttention, which takes it without calling its module, so an adapter there "
            "would do nothing: leave it out"
        )
    reader = next((layer for layer in adapter_chain(module) if layer.reads_weight), None)
    if reader is not None:
        raise TypeError(
            f'{name} cannot be changed under adapter "{reader.adapter_name}", which is made for the weights as they '
            "are: detach that one first"
        )
