"""Projection over a sequence of tasks: what is protected grows with each task, and the loop's optimizer keeps to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.errors import CheckpointError
from llmtune.forgetting.gradient_directions import Logits, gradient_directions
from llmtune.forgetting.orthogonal import Modules, check_extent, chosen_places, input_basis
from llmtune.forgetting.protected import protected_parameters, trained_lora
from llmtune.modules import unwrap
from llmtune.optim.changed_update import ChangedUpdate
from llmtune.optim.joint_projection import JointProjection
from llmtune.optim.update_projection import Directions, UpdateProjection
from llmtune.types import Batch, Callback


class Projected(Callback, ABC):
    """What both memories share: tensors by name that grow with each task, and hooks on an optimizer that keep to them.

    In a `TrainingLoop` it is one of the callbacks; in another loop, or for Hugging Face's `Trainer`, `attach` puts the
    hooks on the optimizer that is stepped. Before the first task is finished nothing is protected, and attaching does
    nothing.

    Attributes:
        kept: {name: tensor}, what is protected; empty before the first task is finished.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self._projection: ChangedUpdate | None = None

    @abstractmethod
    def projection(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> ChangedUpdate:
        """Return hooks that keep the optimizer's steps to what is protected."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the optimizer's steps to what is protected, from now on.

        Args:
            model: that was trained on the earlier tasks.
            optimizer: of its parameters.

        Raises:
            ValueError: it is attached already; or what is protected does not fit the model or the optimizer.
        """
        if self._projection is not None:
            raise ValueError(f"this {type(self).__name__} is attached already: detach it first")
        if self.kept:
            self._projection = self.projection(unwrap(model), optimizer)

    def detach(self) -> None:
        """Take the hooks off; nothing where there are none."""
        if self._projection is not None:
            self._projection.detach()
        self._projection = None

    def on_fit_start(self, loop: Any) -> None:
        """Attach to the loop's model and optimizer."""
        self.attach(loop.model, loop.optimizer)

    def on_fit_end(self, loop: Any) -> None:
        """Detach."""
        self.detach()

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Detach."""
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return what is protected, tensors by name."""
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; before it is attached.

        Raises:
            CheckpointError: the state is of something else.
            ValueError: it is attached, so that the hooks would go on with what was protected before.
        """
        if set(state) != {"kept"} or not all(isinstance(value, Tensor) for value in state["kept"].values()):
            raise CheckpointError(f"a state of {type(self).__name__} holds tensors under 'kept'; got {sorted(state)}")
        if self._projection is not None:
            raise ValueError(f"this {type(self).__name__} is attached: detach it before it takes another state")
        self.kept = {name: value.clone() for name, value in state["kept"].items()}


class GradientProjectionMemory(Projected):
    """GPM over a sequence of tasks: layers' outputs on the inputs of earlier tasks stay, whatever the optimizer.

    After each task `finish_task` adds to each layer's basis what the task's inputs span (`input_basis`); during the
    next ones no step changes a weight along it (`protected_parameters`, `UpdateProjection`). Under LoRA call
    `project_lora_a(model, memory.kept)` after attaching a task's new adapter.

    Where we differ: the paper projects gradients and uses SGD; here it is the update, so AdamW and weight decay keep to
    it as well. Biases of these layers are held after the first task; the paper's networks have none.

    Args:
        energy: the share of a layer's inputs to protect; left out, 0.95. The paper raises it from task to task.
        rank: in place of energy: how many directions a layer gets with each task.
        modules: which layers, by bare name; left out, all linear layers that are trained.

    Raises:
        ValueError: energy or rank is out of range, or both are given.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> memory = GradientProjectionMemory(energy=1.0)
        >>> memory.finish_task(model, [(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0]))])
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> memory.attach(model, optimizer)  # a TrainingLoop with callbacks=[memory] does that by itself
        >>> old = model(torch.tensor([1.0, 2.0, 0.0])).detach()
        >>> model(torch.tensor([1.0, 1.0, 1.0])).sum().backward()
        >>> optimizer.step()
        >>> bool((model(torch.tensor([1.0, 2.0, 0.0])) - old).abs().max() < 1e-6)
        True

    Saha et al. 2021, "Gradient projection memory for continual learning", algorithm 1.
    """

    def __init__(self, *, energy: float | None = None, rank: int | None = None, modules: Modules = None) -> None:
        check_extent(energy, rank)
        super().__init__()
        self.energy, self.rank, self.modules = energy, rank, modules
        self._of_b: dict[str, Tensor] = {}  # of LoRA's B, by name: made of A as it was when it was attached
        self._loaded: dict[str, Tensor] = {}  # the same of a run that goes on, until it is attached

    def finish_task(self, model: nn.Module, batches: Iterable[Batch | tuple[Tensor, Tensor]]) -> None:
        """Protect what the layers' inputs on some examples of the task span, beside what is protected already.

        Args:
            model: as the task has left it.
            batches: some 100 examples of the task: dicts, or pairs (inputs [n, ...], targets), as for `input_basis`.

        Raises:
            ValueError: a layer has had no input, or none but 0 or NaN, or a basis does not fit it; or a trained adapter
                other than LoRA, a head's copy among them, which nothing could keep to a basis later.
            TypeError: `batches` is a single batch, or holds something else.
        """
        for name, place in chosen_places(unwrap(model), self.modules).items():
            trained_lora(name, place)
        self._loaded = {}
        extent: dict[str, Any] = {"energy": self.energy, "rank": self.rank}
        self.kept = input_basis(model, batches, modules=self.modules, extend=self.kept, **extent)

    def projection(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> UpdateProjection:
        """See `Projected.projection`."""
        found = protected_parameters(model, self.kept)
        of_b: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            now = found.get(p) if name.endswith("lora_b") else None
            if now is not None:
                then = self._loaded.get(name, now.basis).to(now.basis)
                of_b[name] = then if _same_span(then, now.basis) else now.basis  # a run that goes on: to the bit
                found[p] = Directions(of_b[name])
        hooks = UpdateProjection(optimizer, found)
        self._of_b, self._loaded = of_b, {}
        return hooks

    def detach(self) -> None:
        """Take the hooks off; nothing where there are none."""
        super().detach()
        self._of_b = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what is protected, tensors by name; while it is attached, what LoRA's B keeps to as well."""
        return super().state_dict() | ({"of_b": dict(self._of_b)} if self._of_b else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; see `Projected.load_state_dict`."""
        of_b = state.get("of_b", {})
        if not isinstance(of_b, Mapping) or not all(isinstance(value, Tensor) for value in of_b.values()):
            raise CheckpointError(f"'of_b' of a GradientProjectionMemory holds tensors by name; got {of_b!r:.60}")
        super().load_state_dict({key: value for key, value in state.items() if key != "of_b"})
        self._loaded = {name: value.clone() for name, value in of_b.items()}


def _same_span(one: Tensor, other: Tensor) -> bool:
    """Return whether two orthonormal bases [r, k] span the same but for rounding."""
    return one.shape == other.shape and float((other - one @ (one.T @ other)).norm()) < 1e-3


class OrthogonalGradientDescent(Projected):
    """OGD over a sequence of tasks: to first order, logits of stored examples stay, whatever the optimizer.

    After each task `finish_task` adds the gradients of its examples' logits to the directions
    (`gradient_directions`); during the next ones no step moves along them (`JointProjection`). The parameters must be
    the same from task to task. It holds, and each checkpoint too, a copy of the trained parameters for each direction.

    Where we differ: the paper projects gradients and uses SGD; here it is the update.

    Args:
        most: how many directions a task may add, at least 1.
        logits: "label" or "all", as for `gradient_directions`.
        parameters: which, by the model's own names; left out, all that is trained.

    Raises:
        ValueError: `most` is no whole number of at least 1.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> memory = OrthogonalGradientDescent(most=8)
        >>> memory.finish_task(model, [(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0]))])
        >>> {name: list(value.shape) for name, value in memory.state_dict()["kept"].items()}
        {'weight': [1, 2, 3], 'bias': [1, 2]}

    Farajtabar et al. 2020, "Orthogonal gradient descent for continual learning", algorithm 1.
    """

    def __init__(
        self, *, most: int, logits: Logits = "label",
        parameters: Collection[str] | Callable[[str], bool] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(f"most must be a whole number of at least 1; got {most!r}")
        super().__init__()
        self.most, self.logits, self.parameters = most, logits, parameters

    def finish_task(self, model: nn.Module, batches: Iterable[Batch | tuple[Tensor, Tensor]]) -> None:
        """Protect the logits of some examples of the task, beside what is protected already.

        Args:
            model: as the task has left it.
            batches: the examples: dicts with "labels", or pairs (inputs [n, ...], targets [n]).

        Raises:
            ValueError: no example has a target, or what is trained is not what it was in the earlier tasks.
            TypeError: `batches` is a single batch, or holds something else.
        """
        chosen: dict[str, Any] = {"most": self.most, "logits": self.logits, "parameters": self.parameters}
        self.kept = gradient_directions(model, batches, extend=self.kept or None, **chosen)

    def projection(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> JointProjection:
        """See `Projected.projection`.

        Raises:
            ValueError: a parameter that has directions is not trained, or they do not fit it.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        missing = sorted(self.kept.keys() - trained.keys())
        if missing:
            raise ValueError(f"{missing[0]} has directions and is not trained: is it another model's, or frozen since?")
        return JointProjection(optimizer, {trained[name]: value for name, value in self.kept.items()})
