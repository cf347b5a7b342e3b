"""What a checkpoint of a run holds, and how it is put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmtune.errors import CheckpointError
from llmtune.modules import unwrap
from llmtune.training.agreement import (
    adapters_of,
    fingerprint_of_data,
    row_count,
    same_adapters,
    same_model,
    same_run,
    shape_of,
)
from llmtune.training.checkpoint import fingerprint
from llmtune.training.history import History
from llmtune.training.randomness import random_state, set_random_state
from llmtune.training.sharding import spread_like, whole
from llmtune.types import Callback

if TYPE_CHECKING:
    from llmtune.training.loop import TrainingLoop


def run_state(loop: TrainingLoop) -> dict[str, Any]:
    """Return the run as nested tensors and JSON values: what is trained, the optimizer, random states, what was seen.

    Frozen parameters are stored only where `save_frozen` says so; a short fingerprint of each makes sure that the same
    ones are there again. Tensors that are spread over processes come as they are; call it in all of them.
    """
    model = unwrap(loop.model)
    return {
        "step": loop.step,
        "run": {
            "rows": row_count(loop.train_data),
            "data": fingerprint_of_data(loop),
            "settings": loop.settings.what_changes_the_result(),
            "processes": loop.ranks.world,
        },
        "progress": {
            "rows_per_micro_batch": loop.rows_per_micro_batch,
            "evaluated": loop.evaluated,
            "stopped": loop.stopped,
            "protected": sorted(loop.keeper.protected),
        },
        "stream": None if loop.stream is None else loop.stream.state(loop.step),
        "adapters": adapters_of(model),
        "shapes": {name: shape_of(parameter) for name, parameter in model.named_parameters()},
        "frozen": {name: _frozen(loop, name, p) for name, p in model.named_parameters() if not p.requires_grad},
        "model": dict(changing(model, frozen=loop.settings.save_frozen)),
        "kinds": _kinds(loop),
        "optimizer": _optimizer_state(loop.optimizer),
        "scheduler": _plain(loop.scheduler.state_dict()),
        "scaler": loop.scaler.state_dict(),
        "random": random_state(),
        "history": list(loop.history),
        "watchers": [[type(watcher).__name__, watcher.state_dict()] for watcher in _watchers(loop)],
    }


def take_back(loop: TrainingLoop, state: Mapping[str, Any]) -> None:
    """Put `run_state` back into a loop, after checking everything that must agree; a refusal changes nothing.

    Raises:
        CheckpointError: the model, the data or a setting is another; the sentence names the first difference.
    """
    model = unwrap(loop.model)
    expected = {
        "step", "run", "progress", "stream", "adapters", "shapes", "frozen", "model", "kinds", "optimizer", "scheduler",
        "scaler", "random", "history", "watchers",
    }  # fmt: skip
    missing = sorted(expected - set(state))
    if missing:
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing)}: it is not one of a TrainingLoop")
    same_model(model, state, dict(changing(model)))
    same_adapters(adapters_of(model), state["adapters"])
    told = same_run(loop, state["run"])
    if state["kinds"] != _kinds(loop):
        raise CheckpointError(f"optimizer and schedule were {state['kinds']} in the run and are {_kinds(loop)} now")
    watchers = _watchers(loop)
    saved = [name for name, _ in state["watchers"]]
    if saved != [type(watcher).__name__ for watcher in watchers]:
        raise CheckpointError(
            f"the run's penalties and callbacks with state were {saved or 'none'}; now they are "
            f"{[type(watcher).__name__ for watcher in watchers] or 'none'}"
        )
    _load_watchers(watchers, [value for _, value in state["watchers"]])
    load_weights(model, state)
    _load_optimizer(loop.optimizer, state["optimizer"])
    loop.scheduler.load_state_dict(dict(state["scheduler"]))
    loop.scaler.load_state_dict(dict(state["scaler"]))
    loop.history[:] = History(state["history"])
    loop.step = int(state["step"])
    if loop.stream is not None:
        loop.stream.restore(state["stream"], loop.step)
    progress = state["progress"]
    loop.evaluated, loop.stopped = progress["evaluated"], progress["stopped"]
    loop.keeper.protected = set(progress["protected"])
    loop.keeper.saved_step, loop.keeper.wanted = loop.step, False
    if told and loop.ranks.main:
        print(f"going on with the same gradients, but not bit for bit: {'; '.join(told)}")
    then = state["run"]
    if then["settings"]["rows_per_micro_batch"] == loop.settings.rows_per_micro_batch and (
        then["processes"] == loop.ranks.world
    ):  # what memory allowed then
        loop.rows_per_micro_batch = progress["rows_per_micro_batch"]
    set_random_state(state["random"])


def load_weights(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put a checkpoint's trained parameters and buffers into the model it was made of, and nothing else."""
    own = dict(changing(unwrap(model), frozen=True))
    with torch.no_grad():
        for name, value in state["model"].items():
            own[name].copy_(spread_like(value, own[name]))


def changing(model: nn.Module, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield what training may change: parameters that require a gradient, and the buffers in the model's state.

    Args:
        model: the bare model.
        frozen: yield the frozen parameters too.
    """
    kept = model.state_dict(keep_vars=True)
    parameters = {id(parameter) for parameter in model.parameters()}
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad or frozen)
    yield from ((name, tensor) for name, tensor in kept.items() if id(tensor) not in parameters)


def _frozen(loop: TrainingLoop, name: str, parameter: Tensor) -> str:
    """Return the fingerprint of a frozen parameter, computed again only where it has been written to."""
    key, known = f"{name}@{parameter._version}", loop.keeper.fingerprints
    if key not in known:
        known[key] = fingerprint(whole(parameter))
    return str(known[key])


def _kinds(loop: TrainingLoop) -> list[Any]:
    groups = [len(group["params"]) for group in loop.optimizer.param_groups]
    return [type(loop.optimizer).__name__, groups, type(loop.scheduler).__name__]


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {
        "state": {str(key): dict(value) for key, value in state["state"].items()},
        "param_groups": [_plain(group) for group in state["param_groups"]],
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        int(key): {
            name: spread_like(entry, parameters[int(key)]) if isinstance(entry, Tensor) else entry
            for name, entry in value.items()
        }
        for key, value in saved["state"].items()
    }
    kernels = [{key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups]
    groups = [{**group, **own} for group, own in zip(saved["param_groups"], kernels, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for key, entries in state.items():  # torch casts them to the parameter's dtype, which loses float32 under bfloat16
        own = optimizer.state[parameters[key]]
        for name, entry in entries.items():
            cast = own.get(name)
            if isinstance(entry, Tensor) and isinstance(cast, Tensor) and cast.dtype != entry.dtype:
                own[name] = entry.to(cast.device, copy=True)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the functions a scheduler keeps beside its state."""
    return {key: value for key, value in state.items() if not callable(value)}


def _load_watchers(watchers: list[Any], states: list[Any]) -> None:
    """Give each its state; where one refuses, those before it get back what they had."""
    before = [watcher.state_dict() for watcher in watchers]
    for place, (watcher, state) in enumerate(zip(watchers, states, strict=True)):
        try:
            watcher.load_state_dict(state)
        except Exception:
            for earlier, had in zip(watchers[:place], before, strict=False):
                earlier.load_state_dict(had)
            raise


def _watchers(loop: TrainingLoop) -> list[Any]:
    """Return the penalties and callbacks that may have state, each once."""
    nothing = Callback.state_dict
    found = [*loop.penalties, *(callback for callback in loop.callbacks if callback not in loop.penalties)]
    return [watcher for watcher in found if getattr(type(watcher), "state_dict", nothing) is not nothing]
