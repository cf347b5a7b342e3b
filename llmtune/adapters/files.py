"""Adapters as files, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The default adapter lies in the folder itself, any other in a sub-folder of its name. Nothing is ever unpickled and
nothing is fetched from a network.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers, adapter_names, attach, detach, record_of
from llmtune.adapters.config import LoRA
from llmtune.adapters.dora import DoRALinear
from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.adapters.lora import LoRAEmbedding, LowRankLayer, lora_scaling
from llmtune.adapters.peft_config import config_of, read_config
from llmtune.adapters.report import LoadReport
from llmtune.adapters.targets import pattern_value
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy
from llmtune.errors import did_you_mean
from llmtune.modules import unwrap

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save(model: nn.Module, folder: str | Path, name: str = "default") -> Path:
    """Write an adapter as PEFT does; `peft.PeftModel.from_pretrained` and transformers' `load_adapter` read it.

    Each of the two files is written beside its place and moved there, the tensors first. The dtype is kept.

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
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in _tensors(model, name).items()}
    empty = [key for key, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(f"{empty[0]} is empty: gather the model's shards before saving")
    described = json.dumps(config_of(model, config, name), indent=2)
    folder = Path(folder) if name == "default" else Path(folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    temporary = [folder / f".{file}.{os.getpid()}.tmp" for file in (WEIGHTS, CONFIG)]
    try:
        save_file(tensors, temporary[0], metadata={"format": "pt"})
        temporary[1].write_text(described, encoding="utf-8")
        for path, file in zip(temporary, (WEIGHTS, CONFIG), strict=True):
            os.replace(path, folder / file)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return folder


def load(model: nn.Module, folder: str | Path, name: str = "default", *, strict: bool = True) -> LoadReport:
    """Read an adapter that `save` or PEFT wrote; attaches it first where the model has no adapter of that name.

    Args:
        model: a bare model, one with other adapters, or one with this adapter attached.
        folder: where the two files are; for another name than "default", its sub-folder of that name, or the folder
            itself where it holds one adapter only.
        name: what the adapter is called in the model.
        strict: raise where a tensor is missing, unexpected or of another shape; else only report it.

    Returns:
        What was loaded, missing, unexpected and mismatched, and which patterns of the configuration match nothing here.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration asks for something that is not offered here, or scales otherwise than the adapter
            of that name that is attached; that adapter is merged; no target is in the model; the folder holds several
            adapters and none of that name; (strict) the tensors do not fit. The model is then as it was.
    """
    from safetensors.torch import load_file

    model = unwrap(model)
    folder = _folder_of(Path(folder), name)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            pickled = " There is an adapter_model.bin, which is a pickle and is not read: save it as safetensors first."
            hint = pickled if (folder / "adapter_model.bin").is_file() else ""
            raise FileNotFoundError(f"{folder} holds no {file}: give the folder that an adapter was saved into.{hint}")
    tensors = load_file(folder / WEIGHTS)
    fresh = name not in adapter_names(model)
    config, unmatched = read_config(folder / CONFIG, model, _dtype(tensors))
    if fresh:
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):  # what attaching draws is overwritten
            attach(model, config, name)
    elif name in record_of(model, name).merged:
        raise ValueError(f'adapter "{name}" is merged into the weights: unmerge it before loading into it')
    else:
        _check_same_scaling(model, name, config, source=folder)
    try:
        report = _fill(model, name, tensors, strict=strict, source=folder)
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


def _check_same_scaling(model: nn.Module, name: str, config: LoRA, *, source: Path) -> None:
    """Raise where the file's tensors would be scaled otherwise than they were trained; another rank shows in shapes."""
    for place, module in named_places(model):
        for layer in adapter_chain(module):
            if layer.adapter_name != name or not isinstance(layer, LowRankLayer):
                continue
            rank = pattern_value(place, config.rank_pattern, config.rank)
            alpha = pattern_value(place, config.alpha_pattern, config.alpha)
            wanted = lora_scaling(alpha, rank, config.rslora)
            if rank == layer.rank and wanted != layer.scaling:
                raise ValueError(
                    f'the adapter in {source} scales {place} by {wanted:g}, the attached "{name}" by '
                    f"{layer.scaling:g}: detach it first, and loading attaches what the file describes"
                )


def _fill(model: nn.Module, name: str, tensors: dict[str, Tensor], *, strict: bool, source: Path) -> LoadReport:
    own = _tensors(model, name)
    tensors = {key: tensor for key, tensor in tensors.items() if not _is_base_weight(model, key, tensor)}
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    report = LoadReport(
        name=name,
        loaded=len(own.keys() & tensors.keys()) - len(wrong),
        missing=tuple(key for key in own if key not in tensors),
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
    """Return the adapter's parameters by PEFT's names; with train_bias="all" a tied bias by each of its names."""
    found: dict[str, Tensor] = {}
    biases: dict[int, list[str]] = {}
    if record_of(model, name).configs[name].train_bias == "all":
        for place, module in named_places(model):
            bias = bare_module(module)._parameters.get("bias")
            if bias is not None:
                biases.setdefault(id(bias), []).append(f"{PREFIX}{place}.bias")
    low_rank = {id(bare_module(layer)) for layer in adapter_layers(model, name) if isinstance(layer, LowRankLayer)}
    for place, module in named_places(model):
        layer = module
        while isinstance(layer, AdapterLayer):
            if layer.adapter_name == name:
                found |= _layer_tensors(PREFIX + place, layer, under_lora=id(bare_module(layer)) in low_rank)
                if isinstance(layer, TrainedBias):
                    others = biases.get(id(bare_module(layer)._parameters["bias"]), [])
                    found |= {key: layer.trained_bias for key in others if key != f"{PREFIX}{place}.bias"}
            layer = layer.base
    return found


def _layer_tensors(prefix: str, layer: AdapterLayer, *, under_lora: bool) -> dict[str, Tensor]:
    if isinstance(layer, LoRAEmbedding):
        return {f"{prefix}.lora_embedding_A": layer.lora_a, f"{prefix}.lora_embedding_B": layer.lora_b}
    if isinstance(layer, LowRankLayer):
        found: dict[str, Tensor] = {f"{prefix}.lora_A.weight": layer.lora_a, f"{prefix}.lora_B.weight": layer.lora_b}
        if layer.lora_bias is not None:
            found[f"{prefix}.lora_B.bias"] = layer.lora_bias
        if isinstance(layer, DoRALinear):
            found[f"{prefix}.lora_magnitude_vector"] = layer.magnitude
        return found
    if isinstance(layer, TrainedBias):
        return {f"{prefix}.base_layer.bias" if under_lora else f"{prefix}.bias": layer.trained_bias}
    assert isinstance(layer, TrainedCopy)
    return {f"{prefix}.{local}": value for local, value in layer.copy.state_dict(keep_vars=True).items()}


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    low_rank = [tensor.dtype for key, tensor in tensors.items() if ".lora_" in key]
    return low_rank[0] if low_rank else torch.float32
