"""The methods that `forgetting.py` compares, each a list of `TaskMethod`s made of the library's parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from forgetting_data import MASKED, Stage
from torch import Tensor, nn

from llmtune.adapters import LoRA, attach
from llmtune.data import MixedBatches, ReplayBuffer, collate_padded
from llmtune.forgetting import (
    SLAO,
    AveragedGEM,
    DERLoss,
    DistillToModel,
    GradientProjectionMemory,
    MemoryAwareSynapses,
    OnlineEWC,
    OrthogonalGradientDescent,
    OrthogonalLoRA,
    SynapticIntelligence,
    inflora_start,
    input_basis,
    with_teacher,
)
from llmtune.losses import classification_loss, kl_divergence
from llmtune.training import AdapterPerTask, L2SPToLast, OverTasks, Replay, Task, TaskMethod, TaskRun
from llmtune.training.sequence_adapters import adapter_name
from llmtune.types import Batch, LossFunction
from llmtune.weights import interpolate

EXAMPLES = 200  # of a task, for what is estimated from its data
HEAD = ("classifier",)
ADAPTER = LoRA(rank=8, alpha=16, targets="all-linear")


@dataclass(frozen=True)
class Method:
    """A way through the tasks.

    Attributes:
        make: returns the methods for a stream.
        rate: the learning rate; of every method of its kind (full or LoRA) the same.
        settings: what else was chosen, as it stands in the run's file.
    """

    make: Callable[[Sequence[Stage], Mapping[str, Any]], list[TaskMethod]]
    rate: float = 1e-4
    settings: Mapping[str, Any] = field(default_factory=dict)


def own_heads(stages: Sequence[Stage], upto: int) -> list[slice]:
    """Return the columns of each of the first `upto` tasks' classes."""
    return [slice(stage.classes[0], stage.classes[-1] + 1) for stage in stages[:upto]]


class LwF(TaskMethod):
    """Learning without forgetting: a frozen copy of the model before the task teaches the old classes.

    Where rows know their task, each old task's head is compared by itself; else all old classes as one softmax.
    """

    def __init__(self, stages: Sequence[Stage], strength: float) -> None:
        self.stages, self.strength = stages, strength

    def before_task(self, run: TaskRun) -> None:
        """Put the distillation around the loss."""
        if not run.index:
            return
        teacher = copy.deepcopy(run.model).requires_grad_(False)
        if "task" in run.task.train[0]:
            run.loss = HeadsLoss(teacher, own_heads(self.stages, run.index), self.strength)
        else:
            seen = sum(len(stage.classes) for stage in self.stages[: run.index])
            run.loss = DistillToModel(teacher, run.loss, strength=self.strength, temperature=2.0, classes=seen)


@dataclass(frozen=True)
class HeadsLoss:
    """Cross-entropy of the task's own head, and the divergence of every old head from the teacher's."""

    teacher: nn.Module
    heads: Sequence[slice]
    strength: float

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (total, parts)."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "task")}
        with torch.no_grad():
            wanted = self.teacher.eval()(**inputs).logits
        logits = model(**inputs).logits
        own = model.own[batch["task"]]
        task = nn.functional.cross_entropy(logits.float().masked_fill(~own, MASKED), batch["labels"])
        terms = [kl_divergence(logits[:, head], wanted[:, head], temperature=2.0) for head in self.heads]
        divergence = torch.stack(terms).sum()
        return task + self.strength * divergence, {"distillation": divergence.detach()}

    def count_targets(self, batch: Batch) -> int:
        """Return the number of rows."""
        return classification_loss.count_targets(batch)


class DarkReplay(Replay):
    """DER++: replayed rows are held to the logits they had when they came."""

    def __init__(self, buffer: ReplayBuffer, mix: Callable[..., Any], loss: LossFunction) -> None:
        super().__init__(buffer, mix)
        self.loss = loss

    def before_task(self, run: TaskRun) -> None:
        """Mix in the rows, and learn by both."""
        super().before_task(run)
        if run.index:
            run.loss = self.loss

    def after_task(self, run: TaskRun) -> None:
        """Keep rows with the model's logits."""
        self.buffer.add(run.task.train, task=run.task.name, prepare=lambda kept: with_teacher(kept, run.model))


class AGEM(Replay):
    """A-GEM, on the optimizer's update or on the gradient: no step may go against the buffer's rows."""

    def __init__(self, buffer: ReplayBuffer, space: str) -> None:
        super().__init__(buffer, lambda new, old: new)
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


def _over(make: Callable[[], Any], *, data: bool = True) -> list[TaskMethod]:
    if data:
        return [OverTasks(make(), lambda part, run: part.finish_task(run.model, run.batches(EXAMPLES)))]
    return [OverTasks(make(), lambda part, run: part.finish_task(run.model))]


def _buffer(stages: Sequence[Stage], share: float) -> ReplayBuffer:
    return ReplayBuffer(round(share * sum(len(stage.train) for stage in stages)), per_task=True)


def _replay(stages: Sequence[Stage], knobs: Mapping[str, Any]) -> list[TaskMethod]:
    return [Replay(_buffer(stages, knobs["share"]), partial(MixedBatches, ratio=knobs["ratio"]))]


def _dark(stages: Sequence[Stage], knobs: Mapping[str, Any]) -> list[TaskMethod]:
    loss = DERLoss(classification_loss, alpha=knobs["alpha"], beta=knobs["beta"])
    return [DarkReplay(_buffer(stages, knobs["share"]), partial(MixedBatches, ratio=knobs["ratio"]), loss)]


def _orthogonal(stages: Sequence[Stage], knobs: Mapping[str, Any]) -> list[TaskMethod]:
    return _over(lambda: OrthogonalGradientDescent(most=knobs["per_task"], parameters=_in_layers))


def _adapters(*more: TaskMethod, merged: bool = False) -> list[TaskMethod]:
    return [AdapterPerTask(ADAPTER, also=HEAD, merge=merged), *more]


LORA = 1e-3
SHARE = {"share": 0.01}
METHODS: dict[str, Method] = {
    "sequential": Method(lambda stages, knobs: []),
    "frozen probe": Method(lambda stages, knobs: [HeadOnly()], rate=1e-2),
    "L2-SP": Method(lambda stages, knobs: [L2SPToLast(knobs["strength"], new=_in_head)], settings={"strength": 10.0}),
    "EWC": Method(lambda stages, knobs: _over(lambda: OnlineEWC(knobs["strength"])), settings={"strength": 1e3}),
    "SI": Method(lambda s, knobs: _over(lambda: SynapticIntelligence(knobs["strength"]), data=False),
                 settings={"strength": 1e2}),
    "MAS": Method(lambda s, knobs: _over(lambda: MemoryAwareSynapses(knobs["strength"])), settings={"strength": 1.0}),
    "LwF": Method(lambda stages, knobs: [LwF(stages, knobs["strength"])], settings={"strength": 1.0}),
    "replay": Method(_replay, settings={"share": 0.01, "ratio": 0.3}),
    "DER++": Method(_dark, settings={"share": 0.01, "ratio": 0.3, "alpha": 0.02, "beta": 1.0}),
    "A-GEM, gradient": Method(lambda s, knobs: [AGEM(_buffer(s, knobs["share"]), "gradient")], settings=SHARE),
    "A-GEM, update": Method(lambda s, knobs: [AGEM(_buffer(s, knobs["share"]), "update")], settings=SHARE),
    "GPM, update": Method(lambda s, knobs: _over(lambda: GradientProjectionMemory(energy=knobs["energy"])),
                          settings={"energy": 0.95}),
    "OGD, update": Method(_orthogonal, settings={"per_task": 5}),
    "WiSE-FT": Method(lambda stages, knobs: [Between(knobs["alpha"])], settings={"alpha": 0.5}),
    "SeqLoRA": Method(lambda stages, knobs: [OneAdapter()], rate=LORA),
    "SLAO": Method(lambda stages, knobs: [OneAdapter(slao=True)], rate=LORA),
    "IncLoRA": Method(lambda stages, knobs: _adapters(), rate=LORA),
    "merged LoRA": Method(lambda stages, knobs: _adapters(merged=True), rate=LORA),
    "O-LoRA": Method(lambda s, knobs: _adapters(Orthogonal(knobs["strength"])), rate=LORA, settings={"strength": 0.5}),
    "InfLoRA": Method(lambda s, knobs: _adapters(InfLoRA(knobs["energy"])), rate=LORA, settings={"energy": 0.95}),
}  # fmt: skip


def _in_head(name: str) -> bool:
    return name.startswith(HEAD)


def _in_layers(name: str) -> bool:
    return ".layer." in name
