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
from llmtune.data import MixedBatches, ReplayBuffer, collate_padded
from llmtune.forgetting import (
    SLAO,
    AveragedGEM,
    DERLoss,
    OrthogonalLoRA,
    inflora_start,
    input_basis,
    with_teacher,
)
from llmtune.losses import classification_loss, kl_divergence
from llmtune.training import Replay, Task, TaskMethod, TaskRun
from llmtune.training.sequence_adapters import adapter_name
from llmtune.types import Batch
from llmtune.weights import interpolate

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


class Rehearsal(Replay):
    """Replay; with own classes in the loss of new rows alone, as in ER-ACE (Caccia et al. 2022)."""

    def __init__(
        self, stages: Sequence[Stage], knobs: Mapping[str, Any], mix: Callable[..., Any] | None = None
    ) -> None:
        self.stages = stages
        capacity = round(knobs["share"] * sum(len(stage.train) for stage in stages))
        super().__init__(ReplayBuffer(capacity, per_task=True), mix or partial(MixedBatches, ratio=knobs["ratio"]))

    def after_task(self, run: TaskRun) -> None:
        """Keep some rows."""
        self.buffer.add(kept(self.stages, run.task.train), task=run.task.name)


class DarkReplay(Rehearsal):
    """DER++: replayed rows are held to the logits they had when they came."""

    def __init__(self, stages: Sequence[Stage], knobs: Mapping[str, Any]) -> None:
        super().__init__(stages, knobs)
        self.loss = DERLoss(classification_loss, alpha=knobs["alpha"], beta=knobs["beta"])

    def before_task(self, run: TaskRun) -> None:
        """Mix in the rows, and learn by both."""
        super().before_task(run)
        if run.index:
            run.loss = self.loss

    def after_task(self, run: TaskRun) -> None:
        """Keep rows with the model's logits."""
        rows = kept(self.stages, run.task.train)
        self.buffer.add(rows, task=run.task.name, prepare=lambda some: with_teacher(some, run.model))


class AGEM(Rehearsal):
    """A-GEM, on the optimizer's update or on the gradient: no step may go against the buffer's rows."""

    def __init__(self, stages: Sequence[Stage], knobs: Mapping[str, Any], space: str) -> None:
        super().__init__(stages, knobs, lambda new, old: new)
        self.space = space

    def before_task(self, run: TaskRun) -> None:
        """Add the projection."""
        if run.index:
            rows = self.buffer.rows()

            def memory(step: int) -> list[Batch]:
                draw = torch.Generator().manual_seed(step)
                places = torch.randperm(len(rows), generator=draw)[:16].tolist()
                return [collate_padded([rows[place] for place in places])]

            run.callbacks.append(AveragedGEM(memory, space=self.space))


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


class Orthogonal(TaskMethod):
    """O-LoRA's penalty, behind `AdapterPerTask`."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def before_task(self, run: TaskRun) -> None:
        """Add the penalty."""
        if run.index:
            run.penalties.append(OrthogonalLoRA(self.strength))


class InfLoRA(TaskMethod):
    """InfLoRA's start and its memory of inputs, behind `AdapterPerTask`."""

    def __init__(self, energy: float) -> None:
        self.energy, self.protected, self.places = energy, {}, []

    def before_task(self, run: TaskRun) -> None:
        """Set A."""
        name = adapter_name(run.task.name)
        report = inflora_start(run.model, name, run.batches(EXAMPLES), protected=self.protected or None)
        self.places = list(report.rows)

    def after_task(self, run: TaskRun) -> None:
        """Protect the task's inputs."""
        batches = run.batches(EXAMPLES)
        self.protected = input_basis(run.model, batches, energy=self.energy, modules=self.places, extend=self.protected)

    def state_dict(self) -> dict[str, Any]:
        """Return the bases."""
        return {"protected": self.protected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.protected = dict(state["protected"])


class Between(TaskMethod):
    """WiSE-FT after every task but the first: the encoder goes only `alpha` of the way."""

    def __init__(self, alpha: float) -> None:
        self.alpha, self.before = alpha, {}

    def before_task(self, run: TaskRun) -> None:
        """Keep the weights."""
        self.before = {name: value.clone() for name, value in run.model.state_dict().items()}

    def after_task(self, run: TaskRun) -> None:
        """Go back some of the way; the head, whose rows are the task's own, stays."""
        if run.index:
            state = run.model.state_dict()
            body = {name for name in state if not name.startswith(HEAD)}
            between = interpolate({n: self.before[n] for n in body}, {n: state[n] for n in body}, self.alpha)
            run.model.load_state_dict({**state, **between})


class HeadOnly(TaskMethod):
    """The frozen probe: the encoder as it came."""

    def before_task(self, run: TaskRun) -> None:
        """Freeze it."""
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD))
