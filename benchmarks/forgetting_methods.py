"""What `forgetting.py` puts around tasks: `TaskMethod`s of the library's parts, where none is ready."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from forgetting_data import MASKED, Rows, Stage
from torch import Tensor, nn

from llmtune.adapters import LoRA, attach
from llmtune.data import MixedBatches, ReplayBuffer
from llmtune.forgetting import SLAO
from llmtune.losses import classification_loss, kl_divergence
from llmtune.training import Task, TaskMethod, TaskRun
from llmtune.types import Batch

EXAMPLES = 100  # of a task, for what is estimated from its data
HEAD = ("classifier",)
ADAPTER = LoRA(rank=8, alpha=16, targets="all-linear")


def known(stages: Sequence[Stage]) -> bool:
    """Return whether a row's task is known when it is scored."""
    return "task" in stages[0].test[0]


def kept(stages: Sequence[Stage], rows: Rows) -> Rows:
    """Return rows as a buffer keeps them: to be told from the classes of all tasks, where the task is not known."""
    return rows if known(stages) or "task" not in rows[0] else [{**row, "task": -1} for row in rows]


def own_heads(stages: Sequence[Stage], upto: int) -> list[slice]:
    """Return the columns of each of the first `upto` tasks' classes."""
    return [slice(stage.classes[0], stage.classes[-1] + 1) for stage in stages[:upto]]


class LwF(TaskMethod):
    """Learning without forgetting: a frozen copy of the model before the task teaches the old classes.

    Where rows know their task when scored, each old task's head is compared by itself; else all old classes as one
    softmax.
    """

    def __init__(self, stages: Sequence[Stage], strength: float) -> None:
        self.stages, self.strength = stages, strength

    def before_task(self, run: TaskRun) -> None:
        """Put the distillation around the loss."""
        if not run.index:
            return
        heads = own_heads(self.stages, run.index)
        if not known(self.stages):
            heads = [slice(0, heads[-1].stop)]
        run.loss = HeadsLoss(copy.deepcopy(run.model).requires_grad_(False), heads, self.strength)


@dataclass(frozen=True)
class HeadsLoss:
    """Cross-entropy, of the task's own classes where a row knows it, and the divergence of each group of old classes
    from a teacher's."""

    teacher: nn.Module
    heads: Sequence[slice]
    strength: float

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (total, parts)."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "task")}
        with torch.no_grad():
            wanted = self.teacher.eval()(**inputs).logits
        logits = model(**inputs).logits
        own = logits.float()
        if "task" in batch:
            own = own.masked_fill(~model.own[batch["task"]], MASKED)
        task = nn.functional.cross_entropy(own, batch["labels"])
        terms = [kl_divergence(logits[:, head], wanted[:, head], temperature=2.0) for head in self.heads]
        divergence = torch.stack(terms).sum()
        return task + self.strength * divergence, {"distillation": divergence.detach()}

    def count_targets(self, batch: Batch) -> int:
        """Return the number of rows."""
        return classification_loss.count_targets(batch)


class Kept(ReplayBuffer):
    """A share of all training rows, parted by task; where the task is not known, to be told from all classes.

    With own classes in the loss of new rows alone, replay is as in ER-ACE (Caccia et al. 2022).
    """

    def __init__(self, stages: Sequence[Stage], share: float) -> None:
        super().__init__(round(share * sum(len(stage.train) for stage in stages)), per_task=True)
        self.stages = stages

    def add(self, rows: Rows, **more: Any) -> None:
        """Show rows to the buffer."""
        super().add(kept(self.stages, rows), **more)


def mixed(knobs: Mapping[str, Any]) -> Callable[[Any, Any], MixedBatches]:
    """Return what mixes replayed rows in."""
    return partial(MixedBatches, ratio=knobs["ratio"])


class OneAdapter(TaskMethod):
    """SeqLoRA: the same adapter, and the head, for all tasks; with `slao` merged after each."""

    def __init__(self, *, slao: bool = False) -> None:
        self.slao, self.part, self.state = slao, None, None

    def before_task(self, run: TaskRun) -> None:
        """Attach it before the first."""
        if not run.index:
            self._attach(run.model)
        if self.slao:
            if self.part is None:
                self.part = SLAO(run.model)
                if self.state:
                    self.part.load_state_dict(self.state)
            if not self.part.training:
                self.part.start_task()
            run.callbacks.append(self.part)

    def after_task(self, run: TaskRun) -> None:
        """Merge."""
        if self.part is not None:
            self.part.finish_task()

    def rebuild(self, model: nn.Module, finished: Sequence[Task]) -> None:
        """Attach it again."""
        if finished:
            self._attach(model)

    def state_dict(self) -> dict[str, Any]:
        """Return SLAO's."""
        return {} if self.part is None else self.part.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep it until the adapter is there."""
        self.state = state

    def _attach(self, model: nn.Module) -> None:
        attach(model, ADAPTER)
        for name, parameter in model.named_parameters():
            if name.startswith(HEAD):
                parameter.requires_grad_(True)


class HeadOnly(TaskMethod):
    """The frozen probe: the encoder as it came."""

    def before_task(self, run: TaskRun) -> None:
        """Freeze it."""
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD))
