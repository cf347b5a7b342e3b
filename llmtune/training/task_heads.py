"""A head for each task: only the one of the task at hand is run, and only that one learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from llmtune.errors import did_you_mean
from llmtune.training.sequence_task import Task, TaskMethod, TaskRun


class TaskHeads(nn.Module):
    """One linear head a task, of which `current` is run; stands where a classifier's head stood.

    All heads are there from the start, under names of their own, so that a penalty on one task's head says nothing of
    another's, and saving and resuming need no thought.

    Args:
        classes: how many classes each task has, 2 or more, by the task's name; in the order of the sequence.
        features: E, the width of what the heads are given.
        std: of the weights' normal start; biases start at 0.

    Raises:
        ValueError: there is no task, a name has a dot in it, or a task has fewer than two classes.

    Example:
        >>> import torch
        >>> heads = TaskHeads({"questions": 6, "intents": 7}, features=5)
        >>> heads.use("intents")
        >>> heads(torch.randn(2, 5)).shape
        torch.Size([2, 7])
    """

    def __init__(self, classes: Mapping[str, int], features: int, *, std: float = 0.02) -> None:
        super().__init__()
        if not classes:
            raise ValueError("heads for no task: give {task's name: number of classes}")
        for name, count in classes.items():
            if "." in name or not name:
                raise ValueError(f'a head is called by its task, and "{name}" is no name of a module: leave dots out')
            if not isinstance(count, int) or count < 2:
                raise ValueError(f'the head of "{name}" needs 2 classes or more; got {count!r}')
        self.heads = nn.ModuleDict({f"task_{name}": nn.Linear(features, count) for name, count in classes.items()})
        for head in self.heads.values():
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=std)
            nn.init.zeros_(head.bias)
        self.current = next(iter(classes))

    def use(self, name: str) -> None:
        """Let the head of this task be the one that is run.

        Raises:
            ValueError: there is no head of that name.
        """
        if f"task_{name}" not in self.heads:
            names = [key.removeprefix("task_") for key in self.heads]
            raise ValueError(f'no head is called "{name}"; there are {", ".join(names)}.{did_you_mean(name, names)}')
        self.current = name

    def forward(self, features: Tensor) -> Tensor:
        """Return the current task's logits [..., C] for features [..., E]."""
        logits: Tensor = self.heads[f"task_{self.current}"](features)
        return logits


class HeadPerTask(TaskMethod):
    """Trains and scores each task by its own head; the model has a `TaskHeads` in the place of its head.

    The other heads are frozen meanwhile. Where an adapter's `train_modules` names the heads, they are the copy that it
    trains; `AdapterPerTask` stands before this method, with the heads in `also`.

    What is known of a text is then which task it is of (task-incremental learning). Without this method a classifier
    has one head over the classes of all tasks (class-incremental learning), labelled through.
    """

    def before_task(self, run: TaskRun) -> None:
        """Switch to the task's head, and let it train alone of all heads.

        Raises:
            ValueError: the model has no `TaskHeads`, or none for the task, or they are frozen.
        """
        found = _heads_of(run.model)
        trained = [heads for heads in found if any(p.requires_grad for p in heads.parameters())]
        if not trained:
            raise ValueError(
                "the heads are frozen, and a task would be learned through a random one: name them in the adapter's "
                "train_modules, or in AdapterPerTask(also=...) before this method"
            )
        for heads in found:
            heads.use(run.task.name)
        for heads in trained:
            for name, head in heads.heads.items():
                head.requires_grad_(name == f"task_{run.task.name}")

    def around_scoring(self, model: nn.Module, task: Task) -> AbstractContextManager[Any]:
        """Switch to the task's head, and back."""
        return _using(_heads_of(model), task.name)


def refuse_task_heads(model: nn.Module, what: str) -> None:
    """Raise ValueError where a model has a head for each task, and what a method does would go through a wrong one."""
    if any(isinstance(module, TaskHeads) for module in model.modules()):
        raise ValueError(
            f"{what}, and the model has TaskHeads, of which the task's own is in use: take a penalty or a projection "
            "(EWCPerTask, GradientProjectionMemory), or one head over the classes of all tasks"
        )


@contextmanager
def _using(found: list[TaskHeads], name: str) -> Iterator[None]:
    before = [heads.current for heads in found]
    try:
        for heads in found:
            heads.use(name)
        yield
    finally:
        for heads, had in zip(found, before, strict=True):
            heads.current = had


def _heads_of(model: nn.Module) -> list[TaskHeads]:
    """Return the model's task heads: an adapter that trains the head has a copy of it."""
    found = [module for module in model.modules() if isinstance(module, TaskHeads)]
    if not found:
        raise ValueError(
            "the model has no heads to choose from: put TaskHeads({task: classes, ...}, features) where its head is, "
            "as in model.classifier = TaskHeads(...)"
        )
    return found
