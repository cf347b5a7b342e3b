"""Putting adapters onto a model, switching them, and taking them off without a trace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_named_parameters, named_places
from llmtune.adapters.quantized import allow_packing, keep_unpacked
from llmtune.adapters.record import BIN, CONFIG, WEIGHTS, AdapterConfig, check_adapter_name
from llmtune.adapters.report import AttachReport
from llmtune.errors import did_you_mean
from llmtune.modules import check_module, unwrap

ATTRIBUTE = "_llmtune_adapters"


@dataclass
class Record:
    """What the root keeps about its adapters; a copied model has its own.

    Attributes:
        configs: the attached adapters, oldest first.
        flags: for each adapter, what required a gradient when it came, by the names of `_flagged`.
        merged: the adapters that stand in the base's weights, in the order in which they were merged.
        kept: for each of these, what `unmerge` puts back.
        over: for each adapter, those that were merged when it came.
        folded: those merged for good, of which the weights are all that is left.
        packed: names of the quantised layers that are kept from packing their weights while there are adapters.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    flags: dict[str, dict[str, bool]] = field(default_factory=dict)
    merged: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    over: dict[str, list[str]] = field(default_factory=dict)
    packed: list[str] = field(default_factory=list)


def attach(model: nn.Module, config: AdapterConfig, name: str = "default") -> AttachReport:
    """Put an adapter onto a model and freeze everything else, earlier adapters included.

    The model's output is the same to the bit until training; prompts and prefixes, which have no such start, change it
    at once. Earlier adapters stay active.

    Args:
        model: any module; it is changed in place.
        config: what to adapt and how: a `LoRA`, or the record of another method.
        name: the adapter's name: letters, digits, "_", "-" and ".", at most 200 of them.

    Returns:
        What was adapted, to print.

    Raises:
        ValueError: the name is taken or not allowed, or the record does not fit the model, which is then as it was.
        TypeError: `config` is no record, a target cannot be adapted, or the model is wrapped for data parallelism.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> print(attach(tiny_llama(), LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"])))
        adapter "default": 4 modules (q_proj 2, v_proj 2)
        trainable params: 1,120 || all params: 22,316 || trainable%: 5.0188
    """
    if isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel):
        raise TypeError("DistributedDataParallel does not see parameters that come later: attach first, then wrap")
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"attach needs a record such as LoRA(rank=8, alpha=16); got {config!r}")
    model = unwrap(model)
    record = _record(model)
    check_new_name(model, name)
    plan = config.plan(model, name)
    before = dict(named_places(model))
    after = dict(before)
    for place, build in plan.builders:  # several at one place go around each other
        after[place] = build(after[place])
    layers = {id(module): after[place] for place, module in before.items() if after[place] is not module}
    for parent in model.modules():
        if id(getattr(parent, "_orig_mod", None)) in layers:
            raise ValueError(
                "a target has been compiled by itself, and would run on as it is: attach before compiling it"
            )
    packed = keep_unpacked(model)
    flags = {key: parameter.requires_grad for key, parameter in _flagged(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _put(model, layers)
    if record is None:
        record = Record()
        setattr(model, ATTRIBUTE, record)
    record.configs[name], record.flags[name], record.over[name] = config, flags, list(record.merged)
    record.packed += packed
    return AttachReport.of(model, name, plan)


def detach(model: nn.Module, name: str = "default") -> None:
    """Take an adapter off. What is left is the very model that came: classes, tensors, and what requires a gradient.

    Args:
        model: the model given to `attach`.
        name: the adapter's name.

    Raises:
        ValueError: there is no such adapter, or its change stands in the base's weights (`unmerge` it first).
    """
    model = unwrap(model)
    record = record_of(model, name)
    if name in record.merged:
        raise ValueError(f'adapter "{name}" is merged into the weights: unmerge it before detaching it')
    for parent in list(model.modules()):
        for local, child in list(parent._modules.items()):
            while isinstance(child, AdapterLayer) and child.adapter_name == name:
                child = child.base
            parent._modules[local] = child
    forget(model, name)


def forget(model: nn.Module, name: str) -> None:
    """Strike an adapter that has no layers left from the root's record, and undo its freezing.

    What the newest froze gets its flags back; what an earlier one froze is from now on taken as frozen by the next.
    """
    record = record_of(model, name)
    later = list(record.configs)[list(record.configs).index(name) + 1 :]
    del record.configs[name]
    flags = record.flags.pop(name)
    record.over.pop(name, None)
    if later:
        record.flags[later[0]].update(flags)
    else:
        for key, parameter in _flagged(model):
            parameter.requires_grad_(flags.get(key, parameter.requires_grad))
    if not record.configs:
        allow_packing(model, record.packed)
        delattr(model, ATTRIBUTE)


def set_active(model: nn.Module, names: str | Iterable[str]) -> None:
    """Let exactly these adapters take part from now on; says nothing about which are trained.

    Args:
        model: a model with adapters.
        names: one name or several; () for none.

    Raises:
        ValueError: there is no adapter of that name, or one whose change is merged would have to be left out.
        TypeError: `names` is no name and no list of names.
    """
    model = unwrap(model)
    if not isinstance(names, Iterable):
        raise TypeError(f"names must be an adapter's name or a list of names, () for none; got {names!r}")
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        record_of(model, name)
    record = _record(model)
    left_out = [name for name in (record.merged if record else []) if name not in wanted]
    if left_out:
        raise ValueError(
            f'adapter "{left_out[0]}" is merged into the weights and cannot be switched off: unmerge it first'
        )
    for layer in adapter_layers(model):
        layer.active = layer.adapter_name in wanted


@contextmanager
def active(model: nn.Module, names: str | Iterable[str]) -> Iterator[None]:
    """Let exactly these adapters take part within the block.

    Args:
        model: a model with adapters.
        names: one name or several; () for none.

    Raises:
        ValueError: as `set_active`.
    """
    before = [(layer, layer.active) for layer in adapter_layers(unwrap(model))]
    set_active(model, names)
    try:
        yield
    finally:
        for layer, was in before:
            layer.active = was


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch every adapter off within the block: the base model to the bit.

    Args:
        model: a model with adapters.

    Raises:
        ValueError: the model has no adapters, or one is merged.
    """
    if not adapter_names(model):
        raise ValueError("the model has no adapters to switch off: attach one first")
    with active(model, ()):
        yield


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the model's adapters, oldest first; empty where it has none."""
    record = _record(unwrap(model))
    return list(record.configs) if record else []


def adapter_layers(model: nn.Module, name: str | None = None) -> list[AdapterLayer]:
    """Return the model's adapter layers, of one adapter or of all."""
    found = (module for module in unwrap(model).modules() if isinstance(module, AdapterLayer))
    return [layer for layer in found if name is None or layer.adapter_name == name]


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Return an adapter's own parameters by their dotted names in the model.

    Args:
        model: a model with adapters.
        name: the adapter's name.

    Raises:
        ValueError: there is no such adapter.
    """
    model = unwrap(model)
    record_of(model, name)
    return {
        f"{place}.{local}" if place else local: parameter
        for place, module in model.named_modules()
        if isinstance(module, AdapterLayer) and module.adapter_name == name
        for local, parameter in module.named_parameters()
        if not local.startswith("base.")
    }


def record_of(model: nn.Module, name: str) -> Record:
    """Return the root's record, having made sure that it knows the adapter.

    Raises:
        ValueError: there is no such adapter; names the nearest.
    """
    check_adapter_name(name)
    record = _record(unwrap(model))
    if record is None or name not in record.configs:
        there = ", ".join(f'"{other}"' for other in record.configs) if record else "none"
        hint = did_you_mean(name, record.configs) if record else ""
        raise ValueError(f'the model has no adapter "{name}"; there are: {there}.{hint}')
    return record


def _record(model: nn.Module) -> Record | None:
    check_module(model)
    return getattr(model, ATTRIBUTE, None)


def _flagged(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter, the bare model's by its bare name, an adapter's by a name that nesting does not change."""
    yield from bare_named_parameters(model)
    for place, module in named_places(model):
        for layer in adapter_chain(module):
            for local, parameter in layer.named_parameters():
                if not local.startswith("base."):
                    yield f"{place}|{layer.adapter_name}|{local}", parameter


def _put(model: nn.Module, layers: Mapping[int, nn.Module]) -> None:
    """Set each layer in place of the module with that id, wherever it hangs: a module may be used in several places."""
    for parent in list(model.modules()):
        for local, child in parent._modules.items():
            if id(child) in layers:
                layer = parent._modules[local] = layers[id(child)]
                if isinstance(parent, nn.TransformerEncoderLayer) and not layer._forward_pre_hooks:
                    layer.register_forward_pre_hook(_keep_off_fast_path)


def _keep_off_fast_path(module: nn.Module, inputs: Any) -> None:
    """Do nothing: torch's encoder layer takes its layers' bare weights without calling them, unless one has a hook."""


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise ValueError where a new adapter cannot have this name."""
    record = _record(model)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or ".." in name:
        raise ValueError(
            f'the adapter name must be made of letters, digits, "_", "-" and ".", without ".."; got {name!r}'
        )
    if len(name) > 200 or name.lower() in (CONFIG, WEIGHTS, BIN):  # it is the name of a folder beside these files
        raise ValueError(
            f"the adapter name must have at most 200 characters and be none of the file names {CONFIG}, {WEIGHTS} and "
            f"{BIN}, since it names a folder when it is saved; got {name!r}"
        )
    if record is not None and name in record.configs:
        raise ValueError(f'the model already has an adapter "{name}": detach it first, or choose another name')
    segments = {part for place, _ in named_places(model) for part in place.split(".")}
    if name in segments or any(part in segments for part in name.split(".") if not part.isdigit()):
        raise ValueError(f'the adapter\'s name "{name}" is also the name of a module in the model; choose another')
