"""What every projection of an optimizer's update shares: a copy before the step, and a correction after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmtune.optim.wrapped import inner_optimizer


class ChangedUpdate(ABC):
    """Hooks on a torch optimizer that correct what its steps do to some parameters.

    Subclass it and write `prepare` and `after`. Before each step the parameters are copied; after it `after` is given
    the copies, and the parameters hold what the optimizer made of them: gradient, clipping, momentum, preconditioning
    and decoupled weight decay are all in it. The copies are dropped with the step, so this costs one copy of the
    parameters while a step runs and nothing between.

    The optimizer stays the one that was given, and its own `step` is corrected: schedules, `GradScaler`, checkpoints,
    `TrainingLoop` and Hugging Face's `Trainer` take `.optimizer`. `step` and `zero_grad` here are its own. There is
    nothing to save beside its state. A copy of the optimizer (by deepcopy or pickle) has no hooks. What is written to
    weights outside the optimizer's step is not seen; what other hooks on the optimizer do before its step is.

    Args:
        optimizer: any torch optimizer that has been made.
        parameters: of any shapes, each one of the optimizer's.

    Raises:
        TypeError: `optimizer` is no torch optimizer; or a parameter is no tensor of floats, or spread over processes.
        ValueError: there are no parameters; or one is not the optimizer's, or has its update corrected already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        kind = type(self).__name__
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{kind} takes a torch optimizer that has been made; got {optimizer!r}")
        optimizer = inner_optimizer(optimizer)
        _check_parameters(kind, optimizer, parameters)
        self.optimizer, self.parameters = optimizer, list(parameters)
        self._before: dict[Tensor, Tensor] = {}
        before = optimizer.register_step_pre_hook(self._keep)
        # first, so that what other hooks do to the parameters before the step counts as part of it
        hooks: Any = optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(before.id, last=False)
        self._hooks = [before, optimizer.register_step_post_hook(self._correct)]

    @abstractmethod
    def after(self, before: dict[Tensor, Tensor]) -> None:
        """Correct the parameters after a step, in place.

        Called without gradient and in full float32.

        Args:
            before: what each of `parameters` was before the step, of its shape and dtype; may be written to.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Raise where a step must not be taken, or change gradients; called before each, nothing has moved then."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the optimizer take its step, corrected; return the closure's loss, None without one."""
        return self.optimizer.step(closure) if closure is not None else self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The optimizer's state by parameter."""
        return self.optimizer.state

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state; there is no other."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the optimizer its state back."""
        self.optimizer.load_state_dict(state_dict)

    def detach(self) -> None:
        """Correct no more; nothing where that has been done."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before = [], {}

    @torch.no_grad()
    def _keep(self, *_: Any) -> None:
        with full_float32(self.parameters[0].device):
            self.prepare()
        self._before = {parameter: parameter.detach().clone() for parameter in self.parameters}

    @torch.no_grad()
    def _correct(self, *_: Any) -> None:
        before, self._before = self._before, {}
        with full_float32(self.parameters[0].device):
            self.after(before)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices as float32 within the block, whatever TF32, bfloat16 or autocast is switched on.

    Rounded factors (TF32 keeps 11 bits) would leave 1e-4 to 1e-3 of a change in the subspace it is projected out of, a
    second projection included.
    """
    every: Any = torch.backends
    backends = [every.cuda.matmul, every.mkldnn.matmul]
    settings = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            backend.fp32_precision = setting


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor, of any shape, in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_parameters(kind: str, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise ValueError(f"{kind} is given no parameter: there is no update to project")
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    owners = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values()]
    taken = {id(p) for owner in owners if isinstance(owner, ChangedUpdate) for p in owner.parameters}
    for parameter in parameters:
        if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
            raise TypeError(f"{kind} takes parameters of floats, by themselves and not by name; got {parameter!r:.60}")
        if hasattr(parameter, "device_mesh"):
            raise TypeError(
                f"{kind} needs whole parameters, and one of {[*parameter.shape]} is spread over processes: train "
                "data-parallel, without sharding"
            )
        if id(parameter) not in owned:
            raise ValueError(
                f"a parameter of {[*parameter.shape]} is none of the optimizer's: is it frozen, or another model's?"
            )
        if id(parameter) in taken:
            raise ValueError(
                f"the update of a parameter of {[*parameter.shape]} is projected already, and the second projection "
                "would undo the first: detach that, or give one a basis of both"
            )
