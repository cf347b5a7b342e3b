"""The table of methods that `forgetting.py` compares, with the strengths and rates that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from forgetting_data import Stage
from forgetting_methods import (
    ADAPTER,
    EXAMPLES,
    HEAD,
    HeadOnly,
    Kept,
    LwF,
    OneAdapter,
    mixed,
)

from llmtune.forgetting import (
    GradientProjectionMemory,
    MemoryAwareSynapses,
    OnlineEWC,
    OrthogonalGradientDescent,
    SynapticIntelligence,
)
from llmtune.training import (
    AdapterPerTask,
    AveragedGEMPerTask,
    DarkReplay,
    HeadFromStatistics,
    InfLoRAPerTask,
    InterpolatePerTask,
    L2SPToLast,
    OrthogonalLoRAPerTask,
    OverTasks,
    Replay,
    TaskMethod,
)


@dataclass(frozen=True)
class Method:
    """A way through the tasks.

    Attributes:
        make: returns the methods for a stream.
        rate: the learning rate; of every method of its kind (full or LoRA) the same.
        settings: what else was chosen, as it stands in the run's file.
        streams: what was chosen otherwise for a stream.
    """

    make: Callable[[Sequence[Stage], Mapping[str, Any]], list[TaskMethod]]
    rate: float = 1e-4
    settings: Mapping[str, Any] = field(default_factory=dict)
    streams: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _over(make: Callable[[], Any], *, data: bool = True) -> list[TaskMethod]:
    if data:
        return [OverTasks(make(), lambda part, run: part.finish_task(run.model, run.batches(EXAMPLES)))]
    return [OverTasks(make(), lambda part, run: part.finish_task(run.model))]


def _orthogonal(stages: Sequence[Stage], knobs: Mapping[str, Any]) -> list[TaskMethod]:
    return _over(lambda: OrthogonalGradientDescent(most=knobs["per_task"], parameters=_in_layers))


def _adapters(*more: TaskMethod, **options: bool) -> list[TaskMethod]:
    return [AdapterPerTask(ADAPTER, also=HEAD, **options), *more]


def _replay(stages: Sequence[Stage], knobs: Mapping[str, Any]) -> TaskMethod:
    return Replay(Kept(stages, knobs["share"]), mixed(knobs))


def _dark_replay(stages: Sequence[Stage], knobs: Mapping[str, Any]) -> TaskMethod:
    return DarkReplay(Kept(stages, knobs["share"]), mixed(knobs), alpha=knobs["alpha"], beta=knobs["beta"])


def _gem(stages: Sequence[Stage], knobs: Mapping[str, Any], space: Literal["update", "gradient"]) -> list[TaskMethod]:
    return [AveragedGEMPerTask(Kept(stages, knobs["share"]), space=space)]


def _statistics(adapt_first: bool) -> list[TaskMethod]:
    return [HeadFromStatistics("classifier", adapt_first=adapt_first)]


SHARE = {"share": 0.01}


def _chosen(five: Mapping[str, Any], **clinc150: Any) -> dict[str, dict[str, Any]]:
    """What was chosen for each stream.

    In "five", 100 steps a task, full fine-tuning has the rate 3e-4: at 1e-4 BANKING77 is not learned. Where the tasks
    are not known, training rows keep theirs, so that loss and importances are of the task's own classes alone. "known"
    is that stream and that training, but for what is scored.
    """
    return {"five": {"rate": 3e-4, **five}, "clinc150": {"own": True, **clinc150}, "known": clinc150}


FULL = _chosen({})
LORA = _chosen({"rate": 3e-3}, rate=3e-3)
FIVE = {"five": {"rate": 3e-4}}

METHODS: dict[str, Method] = {
    "joint": Method(lambda s, knobs: [], rate=3e-4),
    "joint, longer": Method(lambda s, knobs: [], rate=3e-4, settings={"times": 3}),
    "frozen probe": Method(lambda s, knobs: [HeadOnly()], rate=1e-2),
    "sequential": Method(lambda s, knobs: [], streams=FIVE),
    "own classes": Method(lambda s, knobs: [], streams=FULL),
    "head alone": Method(lambda s, knobs: [HeadOnly()], rate=1e-2),
    "class statistics": Method(lambda s, knobs: _statistics(False)),
    "first task, then statistics": Method(lambda s, knobs: _statistics(True), streams=FIVE),
    "L2-SP": Method(lambda s, knobs: [L2SPToLast(knobs["strength"], new=_in_head)], settings={"strength": 1.0},
                    streams=_chosen({"strength": 0.1})),
    "EWC": Method(lambda s, knobs: _over(lambda: OnlineEWC(knobs["strength"])), settings={"strength": 1e4},
                  streams=_chosen({"strength": 1e5}, strength=3e4)),
    "SI": Method(lambda s, knobs: _over(lambda: SynapticIntelligence(knobs["strength"]), data=False),
                 settings={"strength": 1e4}, streams=_chosen({}, strength=1e5)),
    "MAS": Method(lambda s, knobs: _over(lambda: MemoryAwareSynapses(knobs["strength"])), settings={"strength": 10.0},
                  streams=FULL),
    "LwF": Method(lambda s, knobs: [LwF(s, knobs["strength"])], settings={"strength": 1.0},
                  streams=_chosen({"strength": 0.3}, strength=10.0)),
    "replay": Method(lambda s, knobs: [_replay(s, knobs)], settings={**SHARE, "ratio": 0.5},
                     streams={"five": {"rate": 3e-4, "ratio": 0.1}}),
    "replay and LwF": Method(lambda s, knobs: [LwF(s, knobs["strength"]), _replay(s, knobs)],
                             settings={**SHARE, "ratio": 0.3, "strength": 1.0},
                             streams=_chosen({"ratio": 0.1, "strength": 0.3})),
    "DER++": Method(lambda s, knobs: [_dark_replay(s, knobs)],
                    settings={**SHARE, "ratio": 0.3, "alpha": 0.2, "beta": 1.0},
                    streams={"five": {"rate": 3e-4, "ratio": 0.2}}),
    "A-GEM, gradient": Method(lambda s, knobs: _gem(s, knobs, "gradient"), settings=SHARE, streams=FULL),
    "A-GEM, update": Method(lambda s, knobs: _gem(s, knobs, "update"), settings=SHARE, streams=FULL),
    "GPM, update": Method(lambda s, knobs: _over(lambda: GradientProjectionMemory(energy=knobs["energy"])),
                          settings={"energy": 0.8}, streams=_chosen({"energy": 0.95})),
    "OGD, update": Method(_orthogonal, settings={"per_task": 5}, streams=FULL),
    "WiSE-FT": Method(lambda s, knobs: [InterpolatePerTask(knobs["alpha"], parameters=_in_body)],
                      settings={"alpha": 0.7}, streams=_chosen({"alpha": 0.5})),
    "SeqLoRA": Method(lambda s, knobs: [OneAdapter()], rate=1e-3, streams=LORA),
    "SLAO": Method(lambda s, knobs: [OneAdapter(slao=True)], rate=1e-3, streams=_chosen({"rate": 3e-3})),
    "IncLoRA": Method(lambda s, knobs: _adapters(), rate=1e-3, streams=LORA),
    "merged LoRA": Method(lambda s, knobs: _adapters(merge=True), rate=1e-3, streams=_chosen({"rate": 3e-3})),
    "a LoRA a task": Method(lambda s, knobs: _adapters(alone=True), rate=1e-3, streams=LORA),
    "O-LoRA": Method(lambda s, knobs: _adapters(OrthogonalLoRAPerTask(knobs["strength"])), rate=1e-3,
                     settings={"strength": 0.1},
                     streams=_chosen({"rate": 3e-3, "strength": 1.0}, rate=3e-3, strength=1.0)),
    "InfLoRA": Method(lambda s, knobs: _adapters(InfLoRAPerTask(knobs["energy"])), rate=1e-3, settings={"energy": 0.95},
                      streams=_chosen({"rate": 3e-3})),
}  # fmt: skip
JOINT = ("joint", "joint, longer", "frozen probe")  # on the rows of all tasks at once
KNOWN = ("a LoRA a task",)  # only where a row's task is known


def _in_head(name: str) -> bool:
    return name.startswith(HEAD)


def _in_body(name: str) -> bool:
    return not name.startswith((*HEAD, "encoder.embeddings.word_embeddings"))  # the latter are frozen


def _in_layers(name: str) -> bool:
    return ".layer." in name
