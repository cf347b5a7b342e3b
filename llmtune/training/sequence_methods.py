"""Methods against forgetting for a sequence of tasks, each a few lines around a part that works alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from llmtune.adapters.anchor import check_strength
from llmtune.adapters.effective import anchor_of, choose_parameters
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import check_kind, diagonal_fisher
from llmtune.forgetting.importance import check_storage
from llmtune.losses.classification import classification_loss
from llmtune.losses.own_classes import OwnClassesLoss
from llmtune.regularizers.l2sp import L2SP
from llmtune.training.part_trains import check_whole
from llmtune.training.sequence_task import TaskMethod, TaskRun
from llmtune.types import Callback


class EWCPerTask(TaskMethod):
    """Elastic weight consolidation with a penalty for every earlier task, each task's Fisher information and anchor
    kept.

    The loss of task t plus strength / 2 * sum over tasks k < t of sum_i F_ki (theta_i - anchor_ki)^2. Memory and cost
    grow with the number of tasks: each keeps two tensors the size of what is trained.

    Args:
        strength: 0 or more, the same for all tasks.
        kind: of the Fisher information, as in `diagonal_fisher`.
        unit: as in `diagonal_fisher`.
        examples: of how many of a task's rows it is taken, drawn at random; None for all.
        parameters: bare names, or a function of one, that says what is held; left out, all that the task trains, as
            the methods before this one have arranged it.
        dtype, device: what is held is rounded to and where it stays, as in `EWC`.

    Raises:
        ValueError: strength is negative or not finite, `examples` is no whole number of at least 1, kind or unit is
            unknown, or `dtype` is none of floats.

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", equation 3; that old tasks'
        penalties are summed rather than replaced is said in section 2.1 there. Huszar 2018 shows that this counts early
        tasks too often; one running penalty is `OnlineEWC`'s.
    """

    def __init__(
        self,
        strength: float,
        *,
        kind: Literal["sampled", "exact", "empirical"] = "sampled",
        unit: Literal["sequence", "token"] = "sequence",
        examples: int | None = None,
        parameters: Collection[str] | Callable[[str], bool] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.strength, self.dtype, self.device = check_storage(strength, dtype, device)
        if examples is not None:
            check_whole("examples", examples)
        check_kind(kind, unit)
        self.kind, self.unit = kind, unit
        self.examples, self.parameters = examples, parameters
        self.held: dict[str, dict[str, Mapping[str, Any]]] = {}  # by task: "fisher" and "anchor"
        self._chosen: list[str] = []

    def before_task(self, run: TaskRun) -> None:
        """Add a penalty for each earlier task, and note what this one trains."""
        self._chosen = list(choose_parameters(run.model, self.parameters))
        run.penalties += [self._penalty(past["fisher"], past["anchor"]) for past in self.held.values()]

    def after_task(self, run: TaskRun) -> None:
        """Take the Fisher information and the anchor of the trained task."""
        fisher = diagonal_fisher(
            run.model, run.batches(self.examples), kind=self.kind, unit=self.unit, parameters=self._chosen
        )
        made = self._penalty(fisher, anchor_of(run.model, self._chosen))  # rounds, and takes them where they stay
        self.held[run.task.name] = {"fisher": made.fisher, "anchor": {n: a.base for n, a in made.anchors.items()}}

    def _penalty(self, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> EWC:
        return EWC(fisher, anchor, self.strength, dtype=self.dtype, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return each finished task's Fisher information and anchor."""
        return {"tasks": list(self.held), "held": list(self.held.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.held = dict(zip(state["tasks"], state["held"], strict=True))


class L2SPToLast(TaskMethod):
    """Holds each task but the first to the weights that the one before left: `L2SP` with a new anchor every task.

    Args:
        strength: 0 or more.
        new: names of parameters, or a function of one, that are not held, as in `L2SP`: those of a head.

    Raises:
        ValueError: strength is negative or not finite.
    """

    def __init__(self, strength: float, *, new: Collection[str] | Callable[[str], bool] | None = None) -> None:
        check_strength("strength", strength)
        self.strength, self.new = float(strength), new

    def before_task(self, run: TaskRun) -> None:
        """Add the penalty, anchored at the model as it is."""
        if run.index:
            run.penalties.append(L2SP(run.model, self.strength, new=self.new))


class OwnClasses(TaskMethod):
    """Each task's rows are told apart among the task's own classes: `OwnClassesLoss`, of the labels of its rows.

    For a head over the classes of all tasks. It stands in the place of `classification_loss`, so before the methods
    that put something around the loss; rows that a buffer replays are told from all classes.
    """

    def before_task(self, run: TaskRun) -> None:
        """Set the loss.

        Raises:
            ValueError: a row has no labels, the rows are of fewer than two classes, or the loss is another one, which
                would be lost.
            TypeError: the labels are no integers.
        """
        if run.loss != classification_loss:
            raise ValueError(
                f"OwnClasses stands in the place of classification_loss, and the loss here is {run.loss!r:.80}, which "
                "would be lost: give the sequence loss=classification_loss, and put OwnClasses before the methods that "
                "put something around the loss"
            )
        labels: set[int] = set()
        for place in range(len(run.task.train)):
            row = run.task.train[place]
            if "labels" not in row:
                raise ValueError(f'row {place} of task "{run.task.name}" has no "labels"; it has {sorted(row)}')
            labels.update(torch.as_tensor(row["labels"]).flatten().tolist())
        if len(labels - {-100}) < 2:
            raise ValueError(
                f'OwnClasses tells two or more classes apart, and the rows of task "{run.task.name}" are of '
                f"{sorted(labels - {-100})}: leave the method out, or give a task more classes"
            )
        run.loss = OwnClassesLoss(tuple(sorted(labels - {-100})))


class OverTasks(TaskMethod):
    """One part for all tasks that learns from each: a penalty or a callback that is told when a task ends.

    Args:
        part: a `Penalty`, which may be a `Callback` too, or a `Callback` that is none; with `state_dict` and
            `load_state_dict`.
        finish: called after each task with the part and the `TaskRun`: what the part takes from the trained task, as in
            `lambda part, run: part.finish_task(run.model, run.batches(100))`.
        start: called before each task with the same; left out, the part needs no telling.

    Raises:
        TypeError: the part is neither, or has no state to save; or `finish` or `start` cannot be called.

    Example:
        >>> class Count:
        ...     seen = 0
        ...     def __call__(self, model):
        ...         return 0.0 * sum(parameter.sum() for parameter in model.parameters())
        ...     def finish_task(self, batches):
        ...         self.seen += sum(len(batch["labels"]) for batch in batches)
        ...     def state_dict(self):
        ...         return {"seen": self.seen}
        ...     def load_state_dict(self, state):
        ...         self.seen = state["seen"]
        >>> method = OverTasks(Count(), lambda part, run: part.finish_task(run.batches()))
    """

    def __init__(
        self, part: Any, finish: Callable[[Any, TaskRun], Any], *, start: Callable[[Any, TaskRun], Any] | None = None
    ) -> None:
        if isinstance(part, type) or (not callable(part) and not isinstance(part, Callback)):
            raise TypeError(f"a penalty, called with the model, or a Callback is expected; got {part!r}")
        if not callable(finish) or not (start is None or callable(start)):
            raise TypeError(f"finish and start are called with the part and the run; got {finish!r} and {start!r}")
        for name in ("state_dict", "load_state_dict"):
            if not callable(getattr(part, name, None)):
                raise TypeError(f"the part must have state_dict and load_state_dict; {part!r} has no {name}")
        self.part, self.finish, self.start = part, finish, start

    def before_task(self, run: TaskRun) -> None:
        """Give the part to the task's loop."""
        if self.start is not None:
            self.start(self.part, run)
        (run.penalties if callable(self.part) else run.callbacks).append(self.part)

    def after_task(self, run: TaskRun) -> None:
        """Tell the part that the task has ended."""
        self.finish(self.part, run)

    def state_dict(self) -> dict[str, Any]:
        """Return the part's state."""
        return dict(self.part.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back."""
        self.part.load_state_dict(state)


class Replay(TaskMethod):
    """Rows of earlier tasks, kept in a buffer, are mixed into each task but the first.

    Args:
        buffer: with a length, `add(rows)`, `state_dict` and `load_state_dict`. One whose `per_task` is true is told the
            task: `add(rows, task=name)`.
        mix: called with the task's rows and the buffer, returns the rows to train on.

    Raises:
        TypeError: the buffer lacks one of these.

    Example:
        >>> class First(list):  # keeps the first row of each task
        ...     def add(self, rows):
        ...         self.append(rows[0])
        ...     def state_dict(self):
        ...         return {"rows": list(self)}
        ...     def load_state_dict(self, state):
        ...         self[:] = state["rows"]
        >>> method = Replay(First(), lambda new, old: [*new, *old])
    """

    def __init__(self, buffer: Any, mix: Callable[[Any, Any], Any]) -> None:
        for name in ("__len__", "add", "state_dict", "load_state_dict"):
            if not callable(getattr(buffer, name, None)):
                raise TypeError(
                    f"a buffer with a length, add, state_dict and load_state_dict is expected; got {buffer!r}"
                )
        self.buffer, self.mix = buffer, mix

    def before_task(self, run: TaskRun) -> None:
        """Mix the buffer's rows into the task's."""
        if len(self.buffer):
            run.train_data = self.mix(run.train_data, self.buffer)

    def after_task(self, run: TaskRun) -> None:
        """Show the task's own rows to the buffer."""
        named = {"task": run.task.name} if getattr(self.buffer, "per_task", False) else {}
        self.buffer.add(run.task.train, **named)

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer's state."""
        return dict(self.buffer.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back."""
        self.buffer.load_state_dict(state)
