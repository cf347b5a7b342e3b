"""Learning without forgetting over a sequence of tasks: the model of before a task is the teacher in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch

from llmtune.adapters.attach import adapter_parameters
from llmtune.adapters.stack import AdapterStack
from llmtune.forgetting.distill_to_model import DistillToModel
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.student import is_language_model
from llmtune.modules import unwrap
from llmtune.training.sequence_task import TaskMethod, TaskRun, labels_of
from llmtune.training.task_heads import refuse_task_heads


class DistillFromEarlier(TaskMethod):
    """Learning without forgetting: predictions may move no further than they must from those of the earlier model.

    The earlier model is this one with only those adapters left on that are not being trained: with an adapter a task
    (`AdapterPerTask`, which stands before this method) the model before the task; with one adapter for all of them, or
    with `alone`, the base. Needs adapters, and all that is trained must be in them: a head in their `train_modules`.
    See `DistillToBase`.

    Args:
        strength: 0 or more.
        temperature: larger than 0.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(self, strength: float, *, temperature: float = 1.0) -> None:
        DistillToBase(strength=strength, temperature=temperature)  # checks them
        self.strength, self.temperature = float(strength), float(temperature)

    def before_task(self, run: TaskRun) -> None:
        """Put the distillation around the loss.

        Raises:
            ValueError: something beside the adapters is trained, which the teacher would have as well.
        """
        stack = AdapterStack(unwrap(run.model))
        own = {id(p) for name in stack.trained for p in adapter_parameters(stack.model, name).values()}
        for name, parameter in stack.model.named_parameters():
            if stack.names and parameter.requires_grad and id(parameter) not in own:
                raise ValueError(
                    f"{name} is trained beside the adapters, so that the earlier model would change with it: name its "
                    "module in the adapter's train_modules, where each task has a copy"
                )
        teacher = tuple(name for name in stack.active if name not in stack.trained)
        run.loss = DistillToBase(run.loss, strength=self.strength, temperature=self.temperature, teacher=teacher)


class DistillFromCopy(TaskMethod):
    """Learning without forgetting: predictions may move no further than they must from those of a copy of the model.

    The copy is made before each task but the first and held until the next one is made. For full fine-tuning; under
    adapters `DistillFromEarlier` needs no copy. It stands after what sets the loss or the rows. See `DistillToModel`.

    Args:
        strength: 0 or more.
        temperature: larger than 0; Li and Hoiem take 2.
        classes: "all": what the teacher predicts as it stands. "earlier": of a classifier with one head for the classes
            of all tasks, those alone that the rows of earlier tasks have as labels; what the head says of classes
            still to come is not held.

    Raises:
        ValueError: a number is out of its range, or `classes` is neither; before a task, the model has a head for each
            task, or "earlier" is asked for of a language model or after rows of one class.

    Example:
        >>> method = DistillFromCopy(1.0, temperature=2.0, classes="earlier")

    Reference:
        Li and Hoiem 2016, "Learning without forgetting", section 3.
    """

    def __init__(
        self, strength: float, *, temperature: float = 1.0, classes: Literal["all", "earlier"] = "all"
    ) -> None:
        DistillToBase(strength=strength, temperature=temperature)  # checks them
        if classes not in ("all", "earlier"):
            raise ValueError(f'classes must be "all" or "earlier"; got {classes!r}')
        self.strength, self.temperature, self.classes = float(strength), float(temperature), classes
        self.seen: tuple[int, ...] = ()

    def before_task(self, run: TaskRun) -> None:
        """Put the distillation around the loss.

        Raises:
            ValueError: the model has a head for each task; with "earlier", it is a language model, a row of the task
                has no labels, or rows so far, the task's included, are of one class.
            TypeError: with "earlier", a row's labels are no integers.
        """
        refuse_task_heads(run.model, "the teacher would answer through the new task's head")
        if self.classes == "earlier":
            self._check_classes(run)
        if run.index:
            run.loss = DistillToModel(
                copy.deepcopy(unwrap(run.model)).requires_grad_(False), run.loss, strength=self.strength,
                temperature=self.temperature, classes=self.seen if self.classes == "earlier" else None,
            )  # fmt: skip

    def _check_classes(self, run: TaskRun) -> None:
        there = {*self.seen, *labels_of(run.task)}
        labels = torch.as_tensor(run.task.train[0]["labels"])
        if labels.ndim and is_language_model(unwrap(run.model), labels[None]):
            raise ValueError('classes="earlier" is for classifiers; of a language model all tokens are held: "all"')
        if len(there) < 2:
            raise ValueError(
                f'classes="earlier" compares two or more, and up to task "{run.task.name}" rows have the labels '
                f'{sorted(there)} alone: take classes="all"'
            )

    def after_task(self, run: TaskRun) -> None:
        """Note the task's classes."""
        if self.classes == "earlier":
            self.seen = tuple(sorted({*self.seen, *labels_of(run.task)}))

    def state_dict(self) -> dict[str, Any]:
        """Return the classes seen so far."""
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.seen = tuple(state["seen"])
