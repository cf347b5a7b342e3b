"""A task of a sequence, what the methods arrange for its training, and the hooks by which they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmtune.errors import did_you_mean
from llmtune.training.checks import check_rows
from llmtune.training.part_trains import check_whole
from llmtune.training.settings import LoopSettings
from llmtune.types import Batch, Callback, LossFunction, Penalty, Rows


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        name: of any characters, another one for each task; adapters and heads of the task are called by it.
        train: rows to train on, one or more.
        evaluation: rows that the model is scored on; may be left out only where scoring is switched off.
        settings: the task's own settings by name, in the place of the sequence's: {"epochs": 3}.

    Raises:
        ValueError: the name is empty, there are no rows, or a setting is unknown, or `folder`, which is the sequence's.
        TypeError: the name is no string, or the rows have no length and index.

    Example:
        >>> rows = [{"input_ids": [5, 7], "labels": 0}, {"input_ids": [3, 2], "labels": 1}]
        >>> Task("questions", rows, rows, settings={"epochs": 3}).name
        'questions'
    """

    name: str
    train: Rows
    evaluation: Rows | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"a task's name must be a string; got {self.name!r}")
        if not self.name.strip():
            raise ValueError(f"a task needs a name; got {self.name!r}")
        check_rows(self.train, f'the training data of task "{self.name}"')
        if self.evaluation is not None:
            check_rows(self.evaluation, f'the evaluation data of task "{self.name}"')
        known = [knob.name for knob in dataclasses.fields(LoopSettings) if knob.name != "folder"]
        for name in self.settings:
            if name not in known:
                why = "folder is the sequence's" if name == "folder" else f'"{name}" is no setting of a loop'
                raise ValueError(f'task "{self.name}": {why}.{did_you_mean(name, known)}')

    def settings_of(self, base: LoopSettings) -> LoopSettings:
        """Return the sequence's settings with the task's own in their place; "epochs" and "max_steps" stand for each
        other."""
        own = dict(self.settings)
        for name, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
            if own.get(name) is not None:
                own.setdefault(other, None)
        return dataclasses.replace(base, **own)


@dataclass(kw_only=True)
class TaskRun:
    """One task's training as it is arranged: methods read and change it before the task, and read it after.

    Attributes:
        model: the model.
        task: the task.
        index: its place in the sequence, from 0.
        tasks: the names of all tasks, in order.
        train_data: what the loop will train on; at first `task.train`.
        collate: makes a batch of rows.
        loss: what the loop will learn by.
        settings: of the task's loop, its folder and seed included.
        penalties: of the task's loop.
        callbacks: of the task's loop.
        wrap_optimizer: functions of the optimizer; what they return stands in its place, in this order.
        make_loop: makes the loop, called as `TrainingLoop` is.
        train: whether the task is trained at all; a method that learns in its own way sets it to False, and no step is
            taken.
        loop: the loop; None before the task, and where none is run.
    """

    model: nn.Module
    task: Task
    index: int
    tasks: tuple[str, ...]
    train_data: Any
    collate: Callable[[list[Any]], Batch]
    loss: LossFunction
    settings: LoopSettings
    make_loop: Callable[..., Any]
    penalties: list[Penalty] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    wrap_optimizer: list[Callable[[torch.optim.Optimizer], torch.optim.Optimizer]] = field(default_factory=list)
    train: bool = True
    loop: Any = None

    def batches(self, examples: int | None = None, *, rows: int | None = None) -> Iterator[Batch]:
        """Yield the task's own training rows as batches, on the CPU; rows that a method has mixed in are not among
        them.

        Args:
            examples: how many rows, drawn at random without replacement by torch's global generator; left out, or where
                there are no more, all in order.
            rows: of a batch; left out, those of a micro-batch.

        Raises:
            ValueError: `examples` or `rows` is no whole number of at least 1.
        """
        for name, value in (("examples", examples), ("rows", rows)):
            if value is not None:
                check_whole(name, value)
        data, count = self.task.train, len(self.task.train)
        some = examples is not None and examples < count
        places = torch.randperm(count)[:examples].tolist() if some else list(range(count))
        size = rows or self.settings.rows_per_micro_batch or self.settings.rows_per_step
        for start in range(0, len(places), size):
            yield self.collate([data[place] for place in places[start : start + size]])

    def loop_of(self, evaluation: Rows | None) -> Any:
        """Make the loop, with the optimizer wrapped, and return it."""
        loop = self.make_loop(
            self.model, self.train_data, settings=self.settings, collate=self.collate, eval_data=evaluation,
            penalties=tuple(self.penalties), callbacks=tuple(self.callbacks), loss=self.loss,
        )  # fmt: skip
        if self.wrap_optimizer:
            configure = loop.configure_optimizer

            def wrapped() -> tuple[torch.optim.Optimizer, Any]:
                optimizer, scheduler = configure()
                for wrap in self.wrap_optimizer:
                    optimizer = wrap(optimizer)
                return optimizer, scheduler

            loop.configure_optimizer = wrapped
        self.loop = loop
        return loop


class TaskMethod:
    """What is done around the tasks of a sequence; subclass it and write what is needed, for every hook does nothing.

    A hook may draw from torch's, NumPy's and Python's random state, which is a function of (seed, task, hook) alone. So
    a sequence that is resumed does the same. What a method must know from one task to the next goes through
    `state_dict`. Weights need not, those of adapters included: the sequence itself keeps the model.
    """

    def before_task(self, run: TaskRun) -> None:
        """Arrange the task's training: attach an adapter, mix in rows, add penalties and callbacks, change the loss.

        Called again, on the model as it was, where a run that was killed in the task is resumed: whatever it changes
        must be a function of the model, the task and the method's state as loaded.
        """

    def after_task(self, run: TaskRun) -> None:
        """Take from the trained task what later ones need: a Fisher information, rows for a buffer, a basis.

        Called again where a run is killed in it.
        """

    def around_scoring(self, model: nn.Module, task: Task) -> AbstractContextManager[Any]:
        """Return what is entered while the model is scored on the task: its head, its adapter."""
        return nullcontext()

    def rebuild(self, model: nn.Module, finished: Sequence[Task]) -> None:
        """Give a model as it was before the first task the adapters that `before_task` and `after_task` had given it.

        Called when a sequence is resumed, after `load_state_dict`. Which parameters there are is what matters: their
        values, what is trained and which adapters are on is put back afterwards.
        """

    def state_dict(self) -> dict[str, Any]:
        """What later tasks need: tensors and JSON values under string keys."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, dropping what was there; tensors come on the CPU."""


def labels_of(task: Task) -> tuple[int, ...]:
    """Return the classes that a task's training rows have as labels, -100 left out, in order.

    Raises:
        ValueError: a row has no labels.
        TypeError: a row's labels are no integers.
    """
    found: set[int] = set()
    for place in range(len(task.train)):
        row = task.train[place]
        if "labels" not in row:
            raise ValueError(f'row {place} of task "{task.name}" has no "labels"; it has {sorted(row)}')
        labels = torch.as_tensor(row["labels"])
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(
                f'classes are whole numbers; the labels of row {place} of task "{task.name}" are {labels.dtype}'
            )
        found.update(labels.flatten().tolist())
    return tuple(sorted(found - {-100}))
