"""The protocols every part agrees on, and nothing else.

A part never asks for one of our classes: anything with the right methods fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Batch = dict[str, Any]
"""What a collate function makes and a loss reads: names to tensors, first dimension the rows."""

LossResult = Tensor | tuple[Tensor, Mapping[str, Any]]
"""A mean loss (a scalar), or that and named parts to log (scalars: tensors or numbers)."""


class Rows(Protocol):
    """Rows of data by number: a list of dicts, what `pack` gives, any map-style data set."""

    def __len__(self) -> int:
        """Return how many rows there are."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return one row: names to lists, tensors or numbers."""
        ...


@runtime_checkable
class LossFunction(Protocol):
    """The loss of a batch: an ordinary mean over `count_targets(batch)` targets."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossResult:
        """Return the mean loss over the batch's targets, or (mean loss, named parts)."""
        ...

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken; 0 where the batch carries none."""
        ...


@runtime_checkable
class Penalty(Protocol):
    """A term added to the loss whatever the batch: its gradient is added once per optimizer step."""

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty as a scalar that carries gradient to the model's trainable parameters."""
        ...


class Callback:
    """What may watch a training loop, or act between its parts. Override what is needed; every method does nothing.

    `loop` is the running `TrainingLoop`: `loop.model`, `loop.optimizer`, `loop.step` (steps done so far) and
    `loop.history` are there to read.

    Attributes:
        at_the_weights: whether it is to hear `on_task_gradients` of each pass where a step takes several gradients
            (`SharpnessAware`), the first being that at the weights themselves; else of the last alone.
    """

    at_the_weights: bool = False

    def on_fit_start(self, loop: Any) -> None:
        """Before the first step, after a resume has been loaded."""

    def on_step_start(self, loop: Any) -> None:
        """Before an optimizer step's first forward pass."""

    def on_task_gradients(self, loop: Any) -> None:
        """The loss's gradient is complete, reduced and unscaled; the penalties' is not yet added.

        `loop.means` has the step's mean "loss" and the loss's parts, scalars.
        """

    def on_before_optimizer_step(self, loop: Any) -> None:
        """All gradients are in place, unclipped."""

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """After the update. `metrics` may be read and added to."""

    def around_evaluation(self, loop: Any) -> AbstractContextManager[Any]:
        """Return what is entered for the length of an evaluation; on the way out all must be as it was."""
        return nullcontext()

    def during_evaluation(self, loop: Any, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return more means of an evaluation, by name without "eval_" before it.

        Called within it, after the rows: in eval mode, with what `around_evaluation` has put in place, from a random
        state that does not matter. `means` are those so far. All processes call it, and must return the same.
        """
        return {}

    def on_eval_end(self, loop: Any, metrics: dict[str, float]) -> None:
        """After an evaluation."""

    def on_save(self, loop: Any, folder: Path) -> None:
        """After the checkpoint in `folder` has been published."""

    def on_fit_end(self, loop: Any) -> None:
        """After the last step."""

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """When `fit` is about to leave with `error`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and JSON values under string keys."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
