"""What must agree before a run goes on from a checkpoint: the model, its adapters, the data, the settings.

Each difference is one `CheckpointError` that names it. Differences that change the result by rounding alone are told.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_names, record_of
from llmtune.errors import CheckpointError
from llmtune.training.checkpoint import fingerprint
from llmtune.training.randomness import keyed_randomness
from llmtune.training.settings import ROUNDING
from llmtune.training.sharding import whole
from llmtune.training.streams import is_stream
from llmtune.types import Rows

if TYPE_CHECKING:
    from llmtune.training.loop import TrainingLoop

LOOKED_AT = 16  # rows of the data that make its fingerprint


def same_model(model: nn.Module, state: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """Raise where the model differs from the checkpoint's.

    Args:
        model: the bare model.
        state: "shapes", "frozen" and "model" of the checkpoint.
        own: the tensors of the model that a checkpoint holds, by name.

    Raises:
        CheckpointError: a parameter is there in one only, has another shape or dtype, is trained in one only, or is
            frozen with other values; names the first.
    """
    shapes = {name: shape_of(parameter) for name, parameter in model.named_parameters()}
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
        stored = name in state["model"]
        if not parameter.requires_grad and not stored and fingerprint(whole(parameter)) != state["frozen"][name]:
            raise CheckpointError(f"the frozen parameter {name} has other values than in the checkpoint's run")
    frozen = set(state["frozen"])
    if set(own) - frozen != set(state["model"]) - frozen:
        name = sorted((set(own) ^ set(state["model"])) - frozen)[0]
        raise CheckpointError(f"the tensor {name} is in the {'model' if name in own else 'checkpoint'} only")
    for name, value in state["model"].items():
        if name in own and shape_of(own[name]) != shape_of(value):
            raise CheckpointError(f"{name} is {shape_of(own[name])} in the model, {shape_of(value)} in the checkpoint")


def same_adapters(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raise CheckpointError where an adapter has another configuration; names the first field."""
    for name in (*now, *then):
        for field in (*now.get(name, {"attached": True}), *then.get(name, {"attached": True})):
            here, there = now.get(name, {}).get(field), then.get(name, {}).get(field)
            if here != there:
                raise CheckpointError(f'adapter "{name}" has {field}={here} now and had {field}={there} in the run')


def same_run(loop: TrainingLoop, run: Mapping[str, Any]) -> list[str]:
    """Return what differs without changing the result but by rounding, a clause each.

    Raises:
        CheckpointError: the data or a setting is another.
    """
    if run["rows"] != row_count(loop.train_data):
        raise CheckpointError(f"the run had {run['rows']} rows of data; now there are {row_count(loop.train_data)}")
    if run["data"] != fingerprint_of_data(loop):
        raise CheckpointError(
            f"the data has as many rows as the run's, {run['rows']}, but other ones, or in another order: give the "
            "same data, or start a new run in another folder"
        )
    told = []
    now = loop.settings.what_changes_the_result()
    for name, value in run["settings"].items():
        if name not in now or now[name] == value:
            continue
        if name not in ROUNDING:
            raise CheckpointError(
                f"{name} was {value!r} in the run and is {now[name]!r} now, which changes the result: "
                "set it back, or start a new run in another folder"
            )
        told.append(f"{name} was {value!r} and is {now[name]!r}")
    if run["processes"] != loop.ranks.world:
        told.append(f"the data went to {run['processes']} processes and goes to {loop.ranks.world}")
    return told


def adapters_of(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return every adapter's configuration: the tensors' shapes do not tell its scaling."""
    configs = {name: record_of(model, name).configs[name] for name in adapter_names(model)}
    return {
        name: {field.name: repr(getattr(config, field.name)) for field in dataclasses.fields(config)}
        for name, config in configs.items()
    }


def row_count(data: Any) -> int | None:
    """Return how many rows there are; None for a stream."""
    return None if is_stream(data) else len(data)


def fingerprint_of_data(loop: TrainingLoop) -> str | None:
    """Return `data_fingerprint` of the loop's rows, for which they are fetched once."""
    known = loop.keeper.fingerprints
    if "data" not in known:
        known["data"] = data_fingerprint(loop.train_data)
    return known["data"]


def data_fingerprint(data: Rows | Any) -> str | None:
    """Return a short hash of up to 16 rows spread over the data, as fetched without chance; None for a stream.

    Values that are no numbers, texts, lists, dicts, arrays or tensors count by their type alone.
    """
    if row_count(data) is None:
        return None
    digest = hashlib.sha256()
    places = np.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).round().astype(int).tolist()
    with keyed_randomness("fingerprint"):
        for place in places:
            digest.update(json.dumps(_as_json(data[place]), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def shape_of(tensor: Tensor) -> list[Any]:
    """Return [shape, dtype] as JSON values."""
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        return [*shape_of(value), hashlib.sha256(value.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()]
    if isinstance(value, np.ndarray):
        return [list(value.shape), str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__
