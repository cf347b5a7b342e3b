"""Methods for a sequence of tasks that keep rows of each: replay, dark replay, and A-GEM."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.data.teacher_fields import TEACHER_FIELDS
from llmtune.forgetting.cached_teacher import with_teacher
from llmtune.forgetting.dark_replay import DERLoss
from llmtune.forgetting.gem import AveragedGEM
from llmtune.training.part_trains import check_whole
from llmtune.training.randomness import derive_seed
from llmtune.training.sequence_task import TaskMethod, TaskRun
from llmtune.training.task_heads import refuse_task_heads
from llmtune.types import Batch


class Replay(TaskMethod):
    """Rows of earlier tasks, kept in a buffer, are mixed into each task but the first.

    Args:
        buffer: with a length, `add(rows)`, `state_dict` and `load_state_dict`. One whose `per_task` is true is told the
            task: `add(rows, task=name)`.
        mix: called with the task's rows and the buffer, returns the rows to train on.

    Raises:
        TypeError: the buffer lacks one of these, or `mix` cannot be called.
        ValueError: before a task, the model has a head for each task: old rows would go through the new one.

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
        if not callable(mix):
            raise TypeError(f"mix is called with the task's rows and the buffer; got {mix!r}")
        self.buffer, self.mix = buffer, mix

    def before_task(self, run: TaskRun) -> None:
        """Mix the buffer's rows into the task's."""
        refuse_task_heads(run.model, "rows of earlier tasks would be replayed")
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
    with `beta` their labels too. The predictions stay what they were when the row came in. It stands before
    `DistillFromCopy`, and not beside `OwnClasses`, whose loss `DERLoss` does not take.

    Args:
        buffer: a `ReplayBuffer` of this method alone, or as for `Replay` with `add(rows, prepare=...)`.
        mix: called with the task's rows and the buffer; gives rows without predictions empty ones, as
            `partial(MixedBatches, ratio=0.3)` does.
        alpha: factor of the distance from the kept predictions, 0 or more.
        beta: factor of the replayed rows' own loss, 0 or more; 0 is DER, more is DER++.
        k: of a language model, how many predictions a place keeps, as in `with_teacher`; None for a classifier.

    Raises:
        TypeError: the buffer lacks what is needed; before the first task, the loss is none that `DERLoss` takes.
        ValueError: alpha or beta is out of range, both are 0, or k is no whole number of at least 1; before the first
            task, k is missing for a language model, or the rows go through a `collate` of one's own, which the
            predictions would not be of.

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
        takes = inspect.signature(buffer.add).parameters.values()
        if not any(one.name == "prepare" or one.kind is one.VAR_KEYWORD for one in takes):
            raise TypeError(f"a buffer is expected whose add takes prepare=, as ReplayBuffer's does; got {buffer!r}")
        DERLoss(alpha=alpha, beta=beta)  # checks them
        if k is not None:
            check_whole("k", k)
        self.alpha, self.beta, self.k = float(alpha), float(beta), k

    def before_task(self, run: TaskRun) -> None:
        """Mix the buffer's rows into the task's, and learn by both.

        Raises:
            TypeError: the loss is none that `DERLoss` takes.
            ValueError: the rows go through a `collate` of one's own; or as `with_teacher`, to which a first row is
                given before any training: `k` is missing, or given for a classifier.
        """
        super().before_task(run)
        if getattr(run.collate, "func", run.collate) not in (collate_padded, collate_packed):
            raise ValueError(
                "DarkReplay keeps predictions of rows as collate_padded or collate_packed takes them, and the "
                f"sequence's collate is {run.collate!r:.80}: make rows of input_ids and labels beforehand"
            )
        run.loss = _NewOrReplayed(run.loss, alpha=self.alpha, beta=self.beta)  # type: ignore[arg-type] # checked there
        if not len(self.buffer):
            with_teacher([run.task.train[0]], run.model, k=self.k)

    def after_task(self, run: TaskRun) -> None:
        """Show the task's own rows to the buffer, and keep the model's predictions with those that stay.

        Raises:
            ValueError: as `with_teacher`.
        """
        predict = partial(with_teacher, model=run.model, k=self.k)
        self.buffer.add(run.task.train, **self._named(run), prepare=predict)


class AveragedGEMPerTask(Replay):
    """No step of a task but the first may go against the gradient of stored rows: `AveragedGEM`, out of a buffer.

    The rows are not trained on. For each step some of those with a target are drawn, as a function of the task's seed
    and the step; they go through the model in micro-batches as the task's own rows do.

    Args:
        buffer: as for `Replay`, of this method alone, and a sequence of rows.
        rows: how many stored rows give a step's reference gradient.
        space: "update" or "gradient", as in `AveragedGEM`; the second guarantees nothing under Adam.

    Raises:
        TypeError: the buffer lacks what is needed.
        ValueError: `rows` is no whole number of at least 1, or `space` is neither; before a task, no stored row has a
            target, or the model has a head for each task.

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
        """Add the projection, once there are stored rows.

        Raises:
            ValueError: none of them has a target, or the model has a head for each task.
        """
        refuse_task_heads(run.model, "the reference gradient would be of earlier tasks' rows")
        if not len(self.buffer):
            return
        every = [self.buffer[place] for place in range(len(self.buffer))]
        stored = [row for row in every if run.loss.count_targets(run.collate([row]))]
        if not stored:
            raise ValueError(f"none of the {len(every)} stored rows has a target: there is no reference gradient")
        size = run.settings.rows_per_micro_batch or self.rows

        def drawn(step: int) -> list[Batch]:
            draw = torch.Generator().manual_seed(derive_seed(run.settings.seed, "stored rows", step))
            some = [stored[place] for place in torch.randperm(len(stored), generator=draw)[: self.rows].tolist()]
            return [run.collate(some[start : start + size]) for start in range(0, len(some), size)]

        run.callbacks.append(AveragedGEM(drawn, space=self.space))


@dataclass(frozen=True)
class _NewOrReplayed(DERLoss):
    """`DERLoss`, under which a batch without any predictions, as evaluation has it, is one of new rows."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (total, parts)."""
        if any(name in batch for name in TEACHER_FIELDS):
            return super().__call__(model, batch)
        result = self.loss(model, batch)
        total = result[0] if isinstance(result, tuple) else result
        return total, {"task_loss": total.detach()}
