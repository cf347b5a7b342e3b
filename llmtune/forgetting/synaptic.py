"""Synaptic intelligence: importance collected along the path of training, without a pass over the data afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import Anchor
from llmtune.adapters.effective import Choice, EffectiveParameter, choose_parameters, only_adds
from llmtune.forgetting.importance import ImportancePenalty
from llmtune.forgetting.step_change import StepChange, trained_parts
from llmtune.modules import unwrap
from llmtune.optim.wrapped import inner_optimizer


def path_importance(path: Tensor, change: Tensor, *, damping: float) -> Tensor:
    """Return max(path, 0) / (change^2 + damping), the importance of entries for the task along whose path they moved.

    A negative path says that an entry's moves raised the loss (noise, momentum, or a loss that other entries lowered).
    As an importance it would push the entry away from its anchor, ever faster: it counts as 0.

    Args:
        path: any shape; how much of the loss's fall is an entry's own, the sum over steps of -gradient * change.
        change: the same shape; from the start of the task to its end.
        damping: above 0.

    Example:
        >>> path_importance(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 1.0]), damping=0.25)
        tensor([0.4000, 0.0000])
    """
    return path.clamp(min=0) / (change.square() + damping)


class SynapticIntelligence(ImportancePenalty):
    """A penalty that holds each parameter as strongly as its moves have lowered the loss of the tasks so far.

    penalty(model) = strength / 2 * sum_i Omega_i (theta_i - anchor_i)^2
    Omega_i = sum over tasks of max(omega_i, 0) / ((theta_i at its end - at its start)^2 + damping)
    omega_i = sum over steps of -g_i * (theta_i after - before),   g the gradient of the task's loss alone

    The gradient is taken before penalties are added and before clipping, and the step's change leaves decoupled weight
    decay out (AdamW's and others'; what SGD or Adam add to the gradient cannot be told apart). So for small steps the
    sum of omega over all entries is the fall of the task's loss. Of several gradients in a step (`SharpnessAware`) the
    first counts, the one at the weights themselves. A step that is passed over counts nothing.

    theta is the effective parameter, as in `EWC`. Under LoRA that is W + s B A, and omega needs its gradient: during
    the task's passes W requires one, which costs what full fine-tuning does (`OnlineEWC` and `MemoryAwareSynapses` cost
    nothing while training). Under dropout of the adapter that gradient is W's, and stands for the sum's.

    In a `TrainingLoop` it is one of `penalties`, and `finish_task(model)` after `fit` is all there is to do. In a plain
    loop `attach` it, and call `start_step()` before the forward pass and `task_gradients()` between the backward passes
    of loss and penalty. Hugging Face's Trainer adds both into one backward pass; there it is refused.
    All of it, tensors included, is in `state_dict`: a run stopped within a task goes on bit for bit.

    Args:
        strength: 0 or more; twice the paper's c, which stands without 1/2.
        damping: the paper's xi, above 0: bounds the importance of what hardly moved.
        parameters: bare names, or a function of one; left out, what is trained, or changed by an active adapter.
        dtype: as in `EWC`. The path stays in at least float32: its sums are of many small terms.
        device: as in `EWC`, but for the path, which is where the parameters are.

    Raises:
        ValueError: a number is out of its range.
        TypeError: `parameters` is one string.

    Example:
        >>> model, penalty = nn.Linear(3, 1), SynapticIntelligence(strength=2.0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> penalty.attach(model, optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     penalty.start_step()
        ...     model(torch.ones(2, 3)).square().mean().backward()
        ...     penalty.task_gradients()
        ...     penalty(model).backward()
        ...     optimizer.step()
        >>> penalty.finish_task(model)
        >>> penalty.detach()
        >>> penalty.tasks, penalty(model).item()
        (1, 0.0)

    Reference:
        Zenke, Poole and Ganguli 2017, "Continual learning through synaptic intelligence", section 3. avalanche takes
        the gradient after the step, with the penalty in it, and clamps the importance from above, at 0.001, alone;
        mammoth takes lr * g^2 of the clipped sum of both, which is the path of plain SGD only.
    """

    source = "the path"
    at_the_weights = True

    def __init__(
        self, strength: float, *, damping: float = 0.1, parameters: Choice = None, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(strength, parameters=parameters, dtype=dtype, device=device)
        if not 0 < damping < float("inf"):
            raise ValueError(f"damping must be a finite number above 0; got {damping}")
        self.damping = float(damping)
        self.path: dict[str, Tensor] = {}
        self.steps = 0
        self._entries: dict[str, EffectiveParameter] = {}
        self._handles: list[Any] = []
        self._raised: list[nn.Parameter] = []
        self._gradients: dict[str, Tensor] | None = None
        self._began = False
        self._change: StepChange | None = None
        self._moved: dict[str, Tensor] = {}  # how far the task went in weights under adapters, when it was detached

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Follow every step of the optimizer from now on; a task that was begun before goes on.

        Args:
            model: what is trained.
            optimizer: of its parameters.

        Raises:
            ValueError: it is attached already; no chosen parameter is trained; one that the task followed is frozen or
                of another shape now; one is under an adapter that does more than add, or tied and adapted in one place.
        """
        if self._handles:
            raise ValueError("this SynapticIntelligence is attached already: detach it first, or make another one")
        inner, entries = inner_optimizer(optimizer), choose_parameters(unwrap(model), self.parameters)
        followed = {name: entry for name, entry in entries.items() if trained_parts(entry)}
        if not followed:
            raise ValueError(
                f"SynapticIntelligence follows no parameter that is trained: all {len(entries)} are frozen (the first: "
                f"{next(iter(entries))})"
            )
        for name, entry in followed.items():
            if other := next((layer for layer in entry.layers if not only_adds(layer)), None):
                raise ValueError(
                    f'{name} is changed by adapter "{other.adapter_name}", which does more than add to it, so that its '
                    "gradient is not that of the effective weight: leave it out of the parameters, or use OnlineEWC"
                )
        for name, path in self.path.items():
            if self.steps and name not in followed:
                raise ValueError(
                    f"{name} was trained when this task began and is frozen now: unfreeze it, or call finish_task first"
                )
            if name in followed and path.shape != followed[name].parameter.shape:
                shape = [*followed[name].parameter.shape]
                raise ValueError(f"{name} is {shape} in the model and {[*path.shape]} in the path: another model's?")
        if not self.steps:
            self.path = {}
        for name, entry in followed.items():
            if name not in self.anchors:
                self.anchors[name] = Anchor.of(entry, dtype=self.dtype, device=self.device)
            if name not in self.path:
                wide = torch.promote_types(entry.parameter.dtype, torch.float32)
                self.path[name] = torch.zeros_like(entry.parameter, dtype=wide, requires_grad=False)
        self._entries, self._moved = followed, {}
        before, after = self._before_step, self._after_step
        self._handles = [inner.register_step_pre_hook(before), inner.register_step_post_hook(after)]

    def detach(self) -> None:
        """Follow no more; what was collected stays, so adapters may be merged now. Nothing where it is not attached."""
        entries = self._entries
        self._let_go()
        for name, entry in entries.items() if self.steps else ():
            if entry.layers and self.anchors[name].holds(entry.parameter):
                self._moved[name] = self.anchors[name].change(entry)

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._lower()
        self._entries, self._handles = {}, []
        self._gradients, self._change = None, None

    def start_step(self) -> None:
        """Call before a step's first forward pass: frozen weights under adapters get a gradient in it."""
        self._lower()
        self._gradients, self._began = None, True
        self._raised = [entry.parameter for entry in self._entries.values() if not entry.parameter.requires_grad]
        for parameter in self._raised:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def task_gradients(self) -> None:
        """Call when `.grad` holds the gradient of the task's loss alone, unscaled: it is copied.

        Raises:
            ValueError: a weight under an adapter had no gradient to give, since `start_step` was not called.
        """
        if self._gradients is not None:
            return
        for name, entry in self._entries.items():
            if not entry.parameter.requires_grad and not self._began:  # in a step that has begun it is asleep
                raise ValueError(
                    f"{name} is under an adapter and got no gradient: call start_step() before the forward"
                )
        self._gradients = {
            name: entry.parameter.grad.detach().clone()
            for name, entry in self._entries.items()
            if entry.parameter.grad is not None
        }
        self._lower()

    def finish_task(self, model: nn.Module) -> None:
        """Turn the path into importance, and hold the model where it is now.

        Args:
            model: as it is at the end of the task; an adapter may have been merged since `fit` or `detach`.

        Raises:
            ValueError: no step was followed, the model is another, or a frozen weight has changed; nothing was done.
        """
        if not self.steps:
            raise ValueError("SynapticIntelligence has followed no step of this task: attach it before training")
        names = list(dict.fromkeys([*self.importance, *self.path]))
        entries = choose_parameters(unwrap(model), names)
        found = {}
        for name in names:
            shape, parameter = self._shape(name), entries[name].parameter
            if parameter.shape != shape:
                raise ValueError(
                    f"{name} is {[*parameter.shape]} in the model and {[*shape]} in the path: another model's?"
                )
            path = self.path.get(name)
            merged = name in self._moved and not entries[name].layers and not self.anchors[name].holds(parameter)
            change = self._moved[name] if merged else self.anchors[name].change(entries[name])
            found[name] = (
                torch.zeros_like(change) if path is None
                else path_importance(path.to(change.device), change, damping=self.damping)
            )  # fmt: skip
        self._hold(unwrap(model), found, what="path's importance")
        self.path, self.steps, self._moved = {name: torch.zeros_like(path) for name, path in self.path.items()}, 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Return all it has learned: importances, anchors and the running task's path, and the numbers."""
        path = {name: value.clone() for name, value in self.path.items()}
        return {**super().state_dict(), "path": path, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, bit for bit; the tensors are copied.

        Raises:
            CheckpointError: the strength or another number was another one.
        """
        super().load_state_dict(state)
        self.path = {name: value.clone() for name, value in state["path"].items()}
        self.steps = int(state["steps"])

    def on_fit_start(self, loop: Any) -> None:
        """Attach to the loop's model and optimizer."""
        self.attach(loop.model, loop.optimizer)

    def on_step_start(self, loop: Any) -> None:
        """Let frozen weights under adapters have a gradient."""
        self.start_step()

    def on_task_gradients(self, loop: Any) -> None:
        """Copy the gradient of the task's loss."""
        self.task_gradients()

    def on_fit_end(self, loop: Any) -> None:
        """Detach."""
        self.detach()

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Detach."""
        self._let_go()

    def _numbers(self) -> dict[str, Any]:
        return {**super()._numbers(), "damping": self.damping}

    def _shape(self, name: str) -> torch.Size:
        return (self.path if name in self.path else self.importance)[name].shape

    def _lower(self) -> None:
        for parameter in self._raised:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._raised = []

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._gradients is None:
            raise ValueError(
                "SynapticIntelligence has no gradient of this step's task: call task_gradients() after the loss's "
                "backward pass and before the penalty's"
            )
        self._change = StepChange(optimizer, [self._entries[name] for name in self._gradients])
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._handles[1].id)  # last: what other hooks do to the step (a projection) is part of it

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer under a GradScaler steps, and does nothing
        gradients, self._gradients, self._began = self._gradients, None, False
        change, self._change = self._change, None
        if gradients is None or change is None or (overflow is not None and bool(overflow)):
            return
        for name, moved in change.by_name():
            path = self.path[name] = self.path[name].to(moved.device)
            path.addcmul_(gradients[name].to(path.dtype), moved.to(path.dtype), value=-1.0)
        self.steps += 1
