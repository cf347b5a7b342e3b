"""A sequence between two tasks, as tensors and JSON, and put back: the model with its adapters, what methods hold.

Of the model only what differs from its start is written: a weight that is frozen and has every bit that it had then
counts by its checksum. So a sequence of LoRAs over a large model costs the adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import fingerprint
from llmtune.adapters.attach import adapter_names, detach, record_of, set_active
from llmtune.adapters.layer import bare_named_parameters
from llmtune.adapters.stack import AdapterStack
from llmtune.errors import CheckpointError
from llmtune.modules import unwrap
from llmtune.training.agreement import adapters_of, data_fingerprint, same_adapters, shape_of
from llmtune.training.sequence_task import Task, TaskMethod
from llmtune.training.settings import ROUNDING, LoopSettings


def checksums(model: nn.Module) -> dict[str, str]:
    """Return a checksum of all bits of every parameter of the bare model, by bare name."""
    return {name: fingerprint(parameter) for name, parameter in bare_named_parameters(model)}


def model_state(model: nn.Module, start: Mapping[str, str]) -> dict[str, Any]:
    """Return the model as nested tensors and JSON values.

    Args:
        model: the model, wrapped or not.
        start: its checksums from before the first task.

    Raises:
        ValueError: an adapter is merged into the weights and kept beside them, which no file can say.
    """
    model = unwrap(model)
    names = adapter_names(model)
    merged = record_of(model, names[-1]).merged if names else []
    if merged:
        raise ValueError(
            f'adapter "{merged[0]}" stands merged in the weights at the end of a task: unmerge it, or merge it for '
            "good (keep_base=False)"
        )
    bare = dict(bare_named_parameters(model))
    changed = {n: p for n, p in bare.items() if p.requires_grad or start.get(n) != fingerprint(p)}
    stack = AdapterStack(model)
    return {
        "bare": changed,
        "own": dict(_beside(model)),
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "adapters": adapters_of(model),
        "active": stack.active,
        "folded": stack.folded,
    }


def load_model(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    start: Mapping[str, str],
    given: Collection[str],
    methods: Sequence[TaskMethod],
    finished: Sequence[Task],
) -> None:
    """Make the model what it was, its adapters and what is trained included.

    Args:
        model: the model as it was before the first task, or as a run that failed has left it.
        state: of `model_state`.
        start: checksums from before the first task.
        given: names of the adapters that were there before the first task.
        methods: rebuild what they had attached, their own states loaded.
        finished: the tasks before the state.

    Raises:
        CheckpointError: the model is another than the sequence began with; names the first difference.
    """
    model = unwrap(model)
    for name in reversed([name for name in adapter_names(model) if name not in given]):
        detach(model, name)  # of a run that failed in this very process
    _check_bare(model, state, start)
    for method in methods:
        method.rebuild(model, finished)
    if lost := [name for name in state["adapters"] if name not in adapter_names(model)]:
        raise CheckpointError(
            f'the model had adapter "{lost[0]}" in the run, and now nothing has attached it: attach it before the '
            "sequence, or, where a method attaches it, write the method's rebuild(model, finished)"
        )
    same_adapters(adapters_of(model), state["adapters"])
    targets: dict[str, dict[str, Tensor]] = {"bare": dict(bare_named_parameters(model)), "own": dict(_beside(model))}
    for part, own in targets.items():
        for name in (*state[part], *(own if part == "own" else ())):
            if name not in own or name not in state[part] or shape_of(own[name]) != shape_of(state[part][name]):
                raise CheckpointError(f"{name} is another tensor in the model than in the sequence, or in one only")
    with torch.no_grad():
        for part, own in targets.items():
            for name, value in state[part].items():
                own[name].copy_(value)
    trained = set(state["trained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if state["adapters"]:
        set_active(model, state["active"])
        record_of(model, adapter_names(model)[-1]).folded = list(state["folded"])


def plan_state(
    tasks: Sequence[Task], settings: LoopSettings, methods: Sequence[TaskMethod], scoring: str
) -> dict[str, Any]:
    """Return what a resumed sequence must share with the one it goes on with, as JSON values."""
    own = [task.settings_of(settings).what_changes_the_result() for task in tasks]
    return {
        "tasks": [task.name for task in tasks],
        "settings": [{name: value for name, value in some.items() if name not in ROUNDING} for some in own],
        "train": [[len(task.train), data_fingerprint(task.train)] for task in tasks],
        "evaluation": [
            None if task.evaluation is None else [len(task.evaluation), data_fingerprint(task.evaluation)]
            for task in tasks
        ],
        "methods": [type(method).__name__ for method in methods],
        "scoring": scoring,
    }


def same_plan(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raise where a sequence is another than the one it is to go on with.

    Raises:
        CheckpointError: the tasks, their order or data, a setting or the methods are others; names the first.
    """
    for what in ("tasks", "methods", "scoring"):
        if now[what] != then[what]:
            raise CheckpointError(
                f"{what} of the sequence: {then[what]} in the run, {now[what]} now; give the same, or another folder"
            )
    for place, name in enumerate(now["tasks"]):
        for what in ("train", "evaluation"):
            if now[what][place] != then[what][place]:
                raise CheckpointError(f'task "{name}" has other {what} rows than in the run: give the same, in order')
        for knob, value in now["settings"][place].items():
            if (before := then["settings"][place].get(knob, value)) != value:
                raise CheckpointError(f'task "{name}": {knob} was {before!r} in the run and is {value!r} now')


def _check_bare(model: nn.Module, state: Mapping[str, Any], start: Mapping[str, str]) -> None:
    """Raise CheckpointError where a weight that the state does not hold is not the one of the start."""
    bare = dict(bare_named_parameters(model))
    for name in (*start, *bare):
        if name not in bare or name not in start:
            raise CheckpointError(f"the sequence began with another model: {name} is in one of the two only")
        if name not in state["bare"] and fingerprint(bare[name]) != start[name]:
            raise CheckpointError(
                f"{name} has other values than in the model that the sequence began with: make the model as it was "
                "made then, of the same weights and the same seed"
            )


def _beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what is no parameter of the bare model: the adapters' parameters, and the buffers in the state."""
    bare = {id(parameter) for _, parameter in bare_named_parameters(model)}
    seen = set(bare)
    for name, tensor in (*model.named_parameters(), *model.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen and isinstance(tensor, Tensor):
            seen.add(id(tensor))
            yield name, tensor
