"""What a checkpoint of a run holds, and what must agree before a run goes on from it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_names, record_of
from llmtune.errors import CheckpointError
from llmtune.modules import unwrap
from llmtune.training.checkpoint import fingerprint, list_checkpoints, newest_valid, split_tensors, write_checkpoint
from llmtune.training.history import History
from llmtune.training.randomness import random_state, seed_everything, set_random_state
from llmtune.types import Callback

if TYPE_CHECKING:
    from llmtune.training.loop import TrainingLoop


def save_run(loop: TrainingLoop) -> Path | None:
    """Write a checkpoint of the run as it stands and return its folder; None where the settings have no folder."""
    if loop.settings.folder is None:
        return None
    return write_checkpoint(Path(loop.settings.folder), loop.step, loop.state_dict(), keep=loop.settings.keep)


def refuse_used_folder(folder: str | Path | None) -> None:
    """Raise where a new run would write among another run's checkpoints.

    Raises:
        CheckpointError: the folder holds checkpoints; names both ways out.
    """
    found = [] if folder is None else list_checkpoints(Path(folder))
    if found:
        raise CheckpointError(
            f"{folder} already holds a run, up to {found[-1].name}: go on with it by fit(resume=True), "
            "or give another folder"
        )


def check_can_save(loop: TrainingLoop) -> None:
    """Find out before the first step what would keep the run from being saved after the last.

    Raises:
        CheckpointError: the folder cannot be made or written.
        TypeError: the state of the loop, its optimizer, schedule or callbacks holds what is neither tensor nor JSON.
    """
    if loop.settings.folder is None:
        return
    folder = Path(loop.settings.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoints into {folder}: {error}") from error
    split_tensors(loop.state_dict(), clone=False)


def load_newest(loop: TrainingLoop) -> None:
    """Load the newest whole checkpoint of the loop's folder into the loop; start afresh where there is none.

    Raises:
        CheckpointError: every checkpoint is damaged, or the newest whole one is of another run.
        ValueError: the settings have no folder to resume from.
    """
    if loop.settings.folder is None:
        raise ValueError("fit(resume=True) needs a folder to resume from: set LoopSettings(folder=...)")
    found = newest_valid(Path(loop.settings.folder))
    if found is None:
        seed_everything(loop.settings.seed)
        return
    path, state, skipped = found
    for reason in skipped:
        print(f"skipped a damaged checkpoint: {reason}")
    try:
        loop.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def run_state(loop: TrainingLoop) -> dict[str, Any]:
    """Return the run as nested tensors and JSON values: what is trained, the optimizer, random states, what was seen.

    Frozen parameters are not stored; a short fingerprint of each makes sure that the same ones are there again.
    """
    model = unwrap(loop.model)
    return {
        "step": loop.step,
        "run": {"rows": len(loop.train_data), "settings": loop.settings.what_changes_the_result()},
        "adapters": _adapters(model),
        "shapes": {name: _shape(parameter) for name, parameter in model.named_parameters()},
        "frozen": {name: fingerprint(p) for name, p in model.named_parameters() if not p.requires_grad},
        "model": dict(_changing(model)),
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
        "step", "run", "adapters", "shapes", "frozen", "model", "kinds", "optimizer", "scheduler", "scaler", "random",
        "history", "watchers",
    }  # fmt: skip
    missing = sorted(expected - set(state))
    if missing:
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing)}: it is not one of a TrainingLoop")
    _same_model(model, state)
    _same_adapters(_adapters(model), state["adapters"])
    _same_run(loop, state["run"])
    if state["kinds"] != _kinds(loop):
        raise CheckpointError(f"optimizer and schedule were {state['kinds']} in the run and are {_kinds(loop)} now")
    watchers = _watchers(loop)
    saved = [name for name, _ in state["watchers"]]
    if saved != [type(watcher).__name__ for watcher in watchers]:
        raise CheckpointError(
            f"the run's penalties and callbacks with state were {saved or 'none'}; now they are "
            f"{[type(watcher).__name__ for watcher in watchers] or 'none'}"
        )
    for watcher, (_, value) in zip(watchers, state["watchers"], strict=True):
        watcher.load_state_dict(value)
    own = dict(_changing(model))
    with torch.no_grad():
        for name, value in state["model"].items():
            own[name].copy_(value)
    optimizer = state["optimizer"]
    loop.optimizer.load_state_dict(
        {
            "state": {int(key): value for key, value in optimizer["state"].items()},
            "param_groups": optimizer["param_groups"],
        }
    )
    loop.scheduler.load_state_dict(dict(state["scheduler"]))
    loop.scaler.load_state_dict(dict(state["scaler"]))
    loop.history[:] = History(state["history"])
    loop.step = int(state["step"])
    set_random_state(state["random"])


def _same_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    shapes = {name: _shape(parameter) for name, parameter in model.named_parameters()}
    for name in (*shapes, *state["shapes"]):
        if name not in state["shapes"]:
            raise CheckpointError(
                f"the model has a parameter {name} {shapes[name]} that the checkpoint's model had not"
            )
        if name not in shapes:
            raise CheckpointError(
                f"the checkpoint's model had a parameter {name} {state['shapes'][name]}; this one has not"
            )
        if shapes[name] != state["shapes"][name]:
            raise CheckpointError(
                f"{name} is {shapes[name]} in the model and {state['shapes'][name]} in the checkpoint"
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name not in state["frozen"]):
            now, then = ("trained", "frozen") if parameter.requires_grad else ("frozen", "trained")
            raise CheckpointError(f"{name} is {now} now and was {then} in the checkpoint's run")
        if not parameter.requires_grad and fingerprint(parameter) != state["frozen"][name]:
            raise CheckpointError(f"the frozen parameter {name} has other values than in the checkpoint's run")
    own = dict(_changing(model))
    if set(own) != set(state["model"]):
        name = sorted(set(own) ^ set(state["model"]))[0]
        raise CheckpointError(f"the tensor {name} is in the {'model' if name in own else 'checkpoint'} only")
    for name, tensor in own.items():
        if _shape(tensor) != _shape(state["model"][name]):
            raise CheckpointError(
                f"{name} is {_shape(tensor)} in the model, {_shape(state['model'][name])} in the checkpoint"
            )


def _same_adapters(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    for name in (*now, *then):
        for field in (*now.get(name, {"attached": True}), *then.get(name, {"attached": True})):
            here, there = now.get(name, {}).get(field), then.get(name, {}).get(field)
            if here != there:
                raise CheckpointError(f'adapter "{name}" has {field}={here} now and had {field}={there} in the run')


def _adapters(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return every adapter's configuration: the tensors' shapes do not tell its scaling."""
    configs = {name: record_of(model, name).configs[name] for name in adapter_names(model)}
    return {
        name: {field.name: repr(getattr(config, field.name)) for field in dataclasses.fields(config)}
        for name, config in configs.items()
    }


def _same_run(loop: TrainingLoop, run: Mapping[str, Any]) -> None:
    if run["rows"] != len(loop.train_data):
        raise CheckpointError(f"the run had {run['rows']} rows of data; now there are {len(loop.train_data)}")
    now = loop.settings.what_changes_the_result()
    for name, value in run["settings"].items():
        if name in now and now[name] != value:
            raise CheckpointError(
                f"{name} was {value!r} in the run and is {now[name]!r} now, which changes the result: "
                "set it back, or start a new run in another folder"
            )


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what training may change: parameters that require a gradient, and the buffers in the model's state."""
    kept = model.state_dict(keep_vars=True)
    parameters = {id(parameter) for parameter in model.parameters()}
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from ((name, tensor) for name, tensor in kept.items() if id(tensor) not in parameters)


def _shape(parameter: Tensor) -> list[Any]:
    return [list(parameter.shape), str(parameter.dtype).removeprefix("torch.")]


def _kinds(loop: TrainingLoop) -> list[Any]:
    groups = [len(group["params"]) for group in loop.optimizer.param_groups]
    return [type(loop.optimizer).__name__, groups, type(loop.scheduler).__name__]


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {
        "state": {str(key): dict(value) for key, value in state["state"].items()},
        "param_groups": [_plain(group) for group in state["param_groups"]],
    }


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the functions a scheduler keeps beside its state."""
    return {key: value for key, value in state.items() if not callable(value)}


def _watchers(loop: TrainingLoop) -> list[Any]:
    """Return the penalties and callbacks that may have state, each once."""
    nothing = Callback.state_dict
    found = [*loop.penalties, *(callback for callback in loop.callbacks if callback not in loop.penalties)]
    return [watcher for watcher in found if getattr(type(watcher), "state_dict", nothing) is not nothing]
