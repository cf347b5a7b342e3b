"""Adapters as files, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The default adapter lies in the folder itself, any other in a sub-folder of its name. Nothing is unpickled unless asked
for, and nothing is ever fetched from a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_names, attach, check_new_name, detach, record_of
from llmtune.adapters.layer import PREFIX, adapter_chain, bare_module, named_places
from llmtune.adapters.parameters import LoRAParameter
from llmtune.adapters.record import (
    CONFIG,
    METHODS,
    OWN_TYPE,
    PEFT_TYPES,
    UNFINISHED,
    WEIGHTS,
    AdapterConfig,
    check_adapter_name,
    check_flag,
)
from llmtune.adapters.report import LoadReport
from llmtune.adapters.tensor_file import read_tensors, renamed
from llmtune.adapters.token_rows import TokenRows
from llmtune.adapters.trained_copy import TrainedBias
from llmtune.errors import did_you_mean
from llmtune.modules import check_module, unwrap


def save(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write an adapter as PEFT does; `peft.PeftModel.from_pretrained` and transformers' `load_adapter` read it.

    Each of the two files is written beside its place and moved there, the tensors first. Where that is cut off between
    the two, `load` says so and does not take the new tensors for the old adapter's. The dtype is kept. Where the model
    is spread over processes, all of them call this, and the first writes.

    Args:
        model: a model with the adapter.
        folder: the default adapter goes into it, any other into a sub-folder of its name; made where it is missing.
        name: the adapter's name.

    Returns:
        The folder the two files are in.

    Raises:
        ValueError: there is no such adapter, or one of its tensors is empty (a sharded model's, for instance).
    """
    from safetensors.torch import save_file

    model = unwrap(model)
    config = record_of(model, name).configs[name]
    found, spare = config.to_file(_tensors(model, name)), config.spare_tensors(model, name)
    spread = any(hasattr(tensor, "full_tensor") for tensor in found.values())
    tensors = {key: _whole(tensor).cpu().contiguous().clone() for key, tensor in found.items() if key not in spare}
    empty = [key for key, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(f"{empty[0]} is empty: gather the model's shards before saving")
    described = json.dumps(config.file_entries(model, name), indent=2)
    folder = Path(folder) if name == "default" else Path(folder) / name
    if spread and torch.distributed.get_rank() != 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    temporary = [folder / f".{file}.{os.getpid()}.tmp" for file in (WEIGHTS, CONFIG)]
    try:
        save_file(tensors, temporary[0], metadata={"format": "pt"})
        temporary[1].write_text(described, encoding="utf-8")
        (folder / UNFINISHED).touch()
        for path, file in zip(temporary, (WEIGHTS, CONFIG), strict=True):
            os.replace(path, folder / file)
        (folder / UNFINISHED).unlink()
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return folder


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
    return whole


def load(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    allow_bin: bool = False,
) -> LoadReport:
    """Read an adapter that `save` or PEFT wrote; attaches it first where the model has no adapter of that name.

    Args:
        model: a bare model, one with other adapters, or one with this adapter attached.
        folder: where the two files are; for another name than "default", its sub-folder of that name, or the folder
            itself where it holds one adapter only.
        name: what the adapter is called in the model.
        strict: raise where a tensor is missing, unexpected or of another shape; else only report it.
        rename: for models whose modules are named otherwise than when the file was written: regular expressions and
            what stands for them, put through `re.sub` on the names of the file's tensors, in order; each must match.
        allow_bin: read `adapter_model.bin` where there is no safetensors file. It is a pickle; torch reads it with
            `weights_only=True`, which makes nothing but tensors.

    Returns:
        What was loaded, missing, unexpected and mismatched, and which patterns of the configuration match nothing here.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: an argument has a wrong type.
        ValueError: a file is damaged, or an entry in it has a wrong type; the configuration asks for something that is
            not offered here, or scales otherwise than the adapter of that name that is attached; that adapter is
            merged; no target is in the model; the folder holds several adapters and none of that name; (strict) the
            tensors do not fit. The model is then as it was.
    """
    check_module(model)
    check_adapter_name(name)
    check_flag("strict", strict)
    check_flag("allow_bin", allow_bin)
    model = unwrap(model)
    folder = _folder_of(Path(folder), name)
    tensors = renamed(read_tensors(folder, allow_bin=allow_bin), {} if rename is None else rename, source=folder)
    fresh = name not in adapter_names(model)
    if fresh:
        check_new_name(model, name)
    entries = _read_entries(folder / CONFIG)
    try:
        config, unmatched = _method(entries).from_file(entries, model, tensors)
        if fresh:
            devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
            with torch.random.fork_rng(devices=list(devices)):  # what attaching draws is overwritten
                attach(model, config, name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if not fresh:
        if name in record_of(model, name).merged:
            raise ValueError(f'adapter "{name}" is merged into the weights: unmerge it before loading into it')
        config.check_attached(model, name, record_of(model, name).configs[name], source=folder)
    try:
        spare = config.spare_tensors(model, name)
        report = _fill(model, name, config.of_file(tensors), spare=spare, strict=strict, source=folder)
    except BaseException:
        if fresh:
            detach(model, name)
        raise
    return replace(report, unmatched=unmatched)


def _folder_of(folder: Path, name: str) -> Path:
    """Return the folder an adapter's files are in; another adapter's is never taken for a mistyped name's."""
    if name == "default":
        return folder
    if (folder / name / CONFIG).is_file():
        return folder / name
    others = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if others:
        raise ValueError(
            f'{folder} holds several adapters and none called "{name}": {", ".join(others)}.'
            f"{did_you_mean(name, others)} To load one under another name, give its own folder"
        )
    return folder


def _fill(
    model: nn.Module, name: str, tensors: dict[str, Tensor], *, spare: Collection[str], strict: bool, source: Path
) -> LoadReport:
    own = _tensors(model, name)
    tensors = {key: tensor for key, tensor in tensors.items() if not _is_base_weight(model, key, tensor)}
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    report = LoadReport(
        name=name,
        loaded=len(own.keys() & tensors.keys()) - len(wrong),
        missing=tuple(key for key in own if key not in tensors and key not in spare),
        unexpected=tuple(key for key in tensors if key not in own),
        mismatched=tuple(
            f"{k} {tuple(tensors[k].shape)} in the file, {tuple(own[k].shape)} in the model" for k in wrong
        ),
    )
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise ValueError(f"the adapter in {source} does not fit the model: {report}. strict=False loads what fits")
    with torch.no_grad():
        for key in own.keys() & tensors.keys() - set(wrong):
            own[key].copy_(tensors[key])
    return report


def _is_base_weight(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """Return whether the tensor is a weight that the model has already; PEFT writes those of adapted embeddings."""
    place = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    if not key.endswith(".base_layer.weight"):
        return False
    weight = getattr(bare_module(dict(named_places(model)).get(place, nn.Identity())), "weight", None)
    return isinstance(weight, Tensor) and torch.equal(weight.cpu(), tensor.to(weight.dtype))


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the adapter's tensors by PEFT's names; with train_bias="all" a tied bias by each of its names."""
    found: dict[str, Tensor] = {}
    biases: dict[int, list[str]] = {}
    if getattr(record_of(model, name).configs[name], "train_bias", "none") == "all":
        for place, module in named_places(model):
            bias = bare_module(module)._parameters.get("bias")
            if bias is not None:
                biases.setdefault(id(bias), []).append(f"{PREFIX}{place}.bias")
    around: dict[str, int] = {}  # how often PEFT has wrapped what stands around other modules
    for place, module in named_places(model):
        layers = [layer for layer in adapter_chain(module) if layer.adapter_name == name]
        for layer in layers:
            tensors = layer.file_tensors(_wrapped(place, around))
            if isinstance(layer, TrainedBias):
                others = biases.get(id(bare_module(layer)._parameters["bias"]), [])
                tensors |= dict.fromkeys(others, layer.trained_bias)
                if any(not isinstance(other, TrainedBias) for other in layers):  # PEFT has wrapped this module as well
                    inner = "token_adapter." if any(isinstance(other, TokenRows) for other in layers) else ""
                    tensors[f"{PREFIX}{place}.{inner}base_layer.bias"] = tensors.pop(f"{PREFIX}{place}.bias")
            found |= tensors
        around[place] = sum(isinstance(layer, LoRAParameter) for layer in layers)
    return found


def _wrapped(place: str, around: dict[str, int]) -> str:
    """Return a module's name as PEFT writes it where modules around it have parameters adapted: ".base_layer" goes in
    once for each."""
    parts = place.split(".")
    outer = [".".join(parts[: end + 1]) for end in range(len(parts) - 1)]
    shown = [part + ".base_layer" * around.get(name, 0) for part, name in zip(parts, outer, strict=False)]
    return ".".join([*shown, parts[-1]])


def _read_entries(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {type(error).__name__}: {error}") from error
    if not isinstance(read, dict) or "peft_type" not in read:
        raise ValueError(f'{path} is no adapter configuration: it must be a JSON object with "peft_type"')
    return read


def _method(entries: dict[str, Any]) -> type[AdapterConfig]:
    """Return the record that a file's entries are for; a name in a file is looked up, never imported."""
    kind = entries["peft_type"]
    if kind == OWN_TYPE:
        known, wanted, what = METHODS, str(entries.get("method")), '"method"'
    else:
        known, wanted, what = PEFT_TYPES, str(kind), '"peft_type"'
    if wanted not in known:
        raise ValueError(
            f"{what} is {wanted!r}, which is not known here; known are {', '.join(sorted(known))}."
            f"{did_you_mean(wanted, known)}"
        )
    return known[wanted]
