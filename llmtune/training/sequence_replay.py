"""Methods for a sequence of tasks that keep rows of each: replay, dark replay, and A-GEM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch

from llmtune.forgetting.cached_teacher import with_teacher
from llmtune.forgetting.dark_replay import DERLoss
from llmtune.forgetting.gem import AveragedGEM
from llmtune.training.part_trains import check_whole
from llmtune.training.randomness import derive_seed
from llmtune.training.sequence_task import TaskMethod, TaskRun
from llmtune.types import Batch


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
        self.buffer.add(run.task.train, **self._named(run))

    def _named(self, run: TaskRun) -> dict[str, str]:
        return {"task": run.task.name} if getattr(self.buffer, "per_task", False) else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer's state."""
        return dict(self.buffer.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back."""
        self.buffer.load_state_dict(state)


class DarkReplay(Replay):
    """Replay of rows with the predictions that the model made of them when their task ended: DER, DER++.

    From the second task on the loss is `DERLoss`: new rows teach their labels, replayed ones the kept predictions, and
    with `beta` their labels too. The predictions stay what they were when the row came in.

    Args:
        buffer: a `ReplayBuffer`, or as for `Replay` with `add(rows, prepare=...)`.
        mix: as for `Replay`: `partial(MixedBatches, ratio=0.3)`.
        alpha: factor of the distance from the kept predictions, 0 or more.
        beta: factor of the replayed rows' own loss, 0 or more; 0 is DER, more is DER++.
        k: of a language model, how many predictions a place keeps, as in `with_teacher`; None for a classifier.

    Raises:
        TypeError: the buffer lacks what is needed; before the first task, the loss is none that `DERLoss` takes.
        ValueError: alpha or beta is out of range, both are 0, or k is no whole number of at least 1.

    Example:
        >>> from llmtune.data import MixedBatches, ReplayBuffer
        >>> method = DarkReplay(ReplayBuffer(100), partial(MixedBatches, ratio=0.3), alpha=0.2, beta=1.0)

    Reference:
        Buzzega et al. 2020, "Dark experience for general continual learning". Where we differ: see `DERLoss`; the paper
        keeps a row's logits of the step in which the row came in, inside its task, here they are those of the task's
        end.
    """

    def __init__(
        self, buffer: Any, mix: Callable[[Any, Any], Any], *, alpha: float, beta: float = 0.0, k: int | None = None
    ) -> None:
        super().__init__(buffer, mix)
        DERLoss(alpha=alpha, beta=beta)  # checks them
        if k is not None:
            check_whole("k", k)
        self.alpha, self.beta, self.k = float(alpha), float(beta), k

    def before_task(self, run: TaskRun) -> None:
        """Mix the buffer's rows into the task's, and learn by both.

        Raises:
            TypeError: the loss is none that `DERLoss` takes.
            ValueError: as `with_teacher`: `k` is missing, or given for a classifier.
        """
        super().before_task(run)
        loss = DERLoss(run.loss, alpha=self.alpha, beta=self.beta)  # type: ignore[arg-type] # checked there
        if len(self.buffer):
            run.loss = loss
        else:
            with_teacher([run.task.train[0]], run.model, k=self.k)  # what will not do is told before any training

    def after_task(self, run: TaskRun) -> None:
        """Show the task's own rows to the buffer, and keep the model's predictions with those that stay.

        Raises:
            ValueError: as `with_teacher`.
        """
        predict = partial(with_teacher, model=run.model, k=self.k)
        self.buffer.add(run.task.train, **self._named(run), prepare=predict)


class AveragedGEMPerTask(Replay):
    """No step of a task but the first may go against the gradient of stored rows: `AveragedGEM`, out of a buffer.

    The rows are not trained on. For each step some are drawn, as a function of the task's seed and the step.

    Args:
        buffer: as for `Replay`, and a sequence of rows.
        rows: how many stored rows give a step's reference gradient.
        space: "update" or "gradient", as in `AveragedGEM`; the second guarantees nothing under Adam.

    Raises:
        TypeError: the buffer lacks what is needed.
        ValueError: `rows` is no whole number of at least 1, or `space` is neither.

    Example:
        >>> from llmtune.data import ReplayBuffer
        >>> method = AveragedGEMPerTask(ReplayBuffer(100, per_task=True), rows=16)

    Reference:
        Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM", algorithm 1.
    """

    def __init__(self, buffer: Any, *, rows: int = 16, space: Literal["update", "gradient"] = "update") -> None:
        super().__init__(buffer, lambda new, old: new)
        if not callable(getattr(buffer, "__getitem__", None)):
            raise TypeError(f"a buffer whose rows can be taken by number is expected; got {buffer!r}")
        check_whole("rows", rows)
        AveragedGEM(lambda step: [], space=space)  # checks it
        self.rows, self.space = rows, space

    def before_task(self, run: TaskRun) -> None:
        """Add the projection, once there are stored rows."""
        if len(self.buffer):
            run.callbacks.append(AveragedGEM(partial(self._drawn, run), space=self.space))

    def _drawn(self, run: TaskRun, step: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(derive_seed(run.settings.seed, "stored rows", step))
        places = torch.randperm(len(self.buffer), generator=draw)[: self.rows].tolist()
        return [run.collate([self.buffer[place] for place in places])]
