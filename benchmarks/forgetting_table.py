"""The table of methods that `forgetting.py` compares, with the strengths and rates that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forgetting_data import Stage
from forgetting_methods import (
    ADAPTER,
    AGEM,
    EXAMPLES,
    HEAD,
    Between,
    DarkReplay,
    HeadOnly,
    InfLoRA,
    LwF,
    OneAdapter,
    Orthogonal,
    Rehearsal,
)

from llmtune.forgetting import (
    GradientProjectionMemory,
    MemoryAwareSynapses,
    OnlineEWC,
    OrthogonalGradientDescent,
    SynapticIntelligence,
)
from llmtune.training import AdapterPerTask, HeadFromStatistics, L2SPToLast, OverTasks, TaskMethod


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


def _statistics(adapt_first: bool) -> list[TaskMethod]:
    return [HeadFromStatistics("classifier", adapt_first=adapt_first)]


SHARE = {"share": 0.01}
REPLAY = {"share": 0.01, "ratio": 0.5}


def _own(**more: Any) -> dict[str, dict[str, Any]]:
    """What was chosen for the stream whose tasks are not known: training rows keep theirs, so that loss and importances
    are of the task's own classes alone."""
    return {"clinc150": {"own": True, **more}}


METHODS: dict[str, Method] = {
    "joint": Method(lambda stages, knobs: [], rate=3e-4),
    "joint, longer": Method(lambda stages, knobs: [], rate=3e-4, settings={"times": 3}),
    "frozen probe": Method(lambda stages, knobs: [HeadOnly()], rate=1e-2),
    "sequential": Method(lambda stages, knobs: []),
    "own classes": Method(lambda stages, knobs: [], streams=_own()),
    "head alone": Method(lambda stages, knobs: [HeadOnly()], rate=1e-2),
    "class statistics": Method(lambda stages, knobs: _statistics(False)),
    "first task, then statistics": Method(lambda stages, knobs: _statistics(True)),
    "L2-SP": Method(lambda stages, knobs: [L2SPToLast(knobs["strength"], new=_in_head)], settings={"strength": 1.0},
                    streams=_own()),
    "EWC": Method(lambda stages, knobs: _over(lambda: OnlineEWC(knobs["strength"])), settings={"strength": 1e4},
                  streams=_own(strength=3e4)),
    "SI": Method(lambda s, knobs: _over(lambda: SynapticIntelligence(knobs["strength"]), data=False),
                 settings={"strength": 1e4}, streams=_own(strength=1e5)),
    "MAS": Method(lambda s, knobs: _over(lambda: MemoryAwareSynapses(knobs["strength"])), settings={"strength": 10.0},
                  streams=_own()),
    "LwF": Method(lambda stages, knobs: [LwF(stages, knobs["strength"])], settings={"strength": 1.0},
                  streams=_own(strength=10.0)),
    "replay": Method(lambda stages, knobs: [Rehearsal(stages, knobs)], settings=REPLAY),
    "replay and LwF": Method(lambda stages, knobs: [LwF(stages, knobs["strength"]), Rehearsal(stages, knobs)],
                             settings={**SHARE, "ratio": 0.3, "strength": 1.0}, streams=_own()),
    "DER++": Method(lambda stages, knobs: [DarkReplay(stages, knobs)],
                    settings={**SHARE, "ratio": 0.3, "alpha": 0.2, "beta": 1.0}),
    "A-GEM, gradient": Method(lambda s, knobs: [AGEM(s, knobs, "gradient")], settings=SHARE, streams=_own()),
    "A-GEM, update": Method(lambda s, knobs: [AGEM(s, knobs, "update")], settings=SHARE, streams=_own()),
    "GPM, update": Method(lambda s, knobs: _over(lambda: GradientProjectionMemory(energy=knobs["energy"])),
                          settings={"energy": 0.8}, streams=_own()),
    "OGD, update": Method(_orthogonal, settings={"per_task": 5}, streams=_own()),
    "WiSE-FT": Method(lambda stages, knobs: [Between(knobs["alpha"])], settings={"alpha": 0.7}, streams=_own()),
    "SeqLoRA": Method(lambda stages, knobs: [OneAdapter()], rate=1e-3, streams=_own(rate=3e-3)),
    "SLAO": Method(lambda stages, knobs: [OneAdapter(slao=True)], rate=1e-3, streams=_own()),
    "IncLoRA": Method(lambda stages, knobs: _adapters(), rate=1e-3, streams=_own(rate=3e-3)),
    "merged LoRA": Method(lambda stages, knobs: _adapters(merge=True), rate=1e-3, streams=_own()),
    "a LoRA a task": Method(lambda stages, knobs: _adapters(alone=True), rate=1e-3),
    "O-LoRA": Method(lambda s, knobs: _adapters(Orthogonal(knobs["strength"])), rate=1e-3, settings={"strength": 0.1},
                     streams=_own(rate=3e-3, strength=1.0)),
    "InfLoRA": Method(lambda s, knobs: _adapters(InfLoRA(knobs["energy"])), rate=1e-3, settings={"energy": 0.95},
                      streams=_own()),
}  # fmt: skip
JOINT = ("joint", "joint, longer", "frozen probe")  # on the rows of all tasks at once
KNOWN = ("a LoRA a task",)  # only where a row's task is known


def _in_head(name: str) -> bool:
    return name.startswith(HEAD)


def _in_layers(name: str) -> bool:
    return ".layer." in name
