"""PEFT's `adapter_config.json`, written from a LoRA record and read back into one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers
from llmtune.adapters.layer import adapter_chain, bare_module, named_places
from llmtune.adapters.lora import LowRankLayer
from llmtune.adapters.record import Targets
from llmtune.adapters.targets import ALL_LINEAR, ends_in, fits, inside, is_conv1d, linear_places
from llmtune.adapters.token_plan import check_tied_together, token_groups
from llmtune.adapters.token_rows import TokenRows
from llmtune.adapters.trained_copy import TrainedCopy

if TYPE_CHECKING:
    from llmtune.adapters.config import LoRA

# What PEFT writes for a plain LoRA beside the entries that a record decides. Another value than these asks for a method
# or an option that is not offered here, and is refused by name.
PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_ga_config": None, "megatron_config": None,
    "monteclora_config": None, "qalora_group_size": 16, "target_parameters": None,
    "use_bdlora": None, "use_qalora": False, "velora_config": None,
}  # fmt: skip
# What says where an adapter came from, or how it is to be run, and changes nothing in its meaning.
ASIDE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "revision",
    "task_type", "runtime_config", "fan_in_fan_out", "qalora_group_size",
}  # fmt: skip
OWN = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "lora_alpha", "lora_bias", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "trainable_token_indices", "use_dora",
    "use_rslora",
}  # fmt: skip
# How PEFT drew the start, without touching the base: of no consequence once the tensors are read.
STARTS = (True, False, "gaussian", "orthogonal", "eva")
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def config_of(model: nn.Module, config: LoRA, name: str) -> dict[str, Any]:
    """Return the entries of `adapter_config.json` for an attached adapter, sorted; patterns keep their order, the first
    that fits decides.

    Args:
        model: the model it is attached to.
        config: its record.
        name: its name.
    """
    transposed = [is_conv1d(layer) for layer in adapter_layers(model, name) if isinstance(layer, LowRankLayer)]
    excludes = config.exclude if isinstance(config.exclude, str) else sorted(config.exclude)
    entries = (
        PLAIN
        | about_model(model)
        | {
            "alpha_pattern": dict(config.alpha_pattern),
            "bias": config.train_bias,
            "exclude_modules": excludes or None,
            "fan_in_fan_out": bool(transposed) and all(transposed),
            "init_lora_weights": "gaussian" if config.initialise == "gaussian" else True,
            "lora_alpha": config.alpha,
            "lora_bias": config.lora_bias,
            "lora_dropout": config.dropout,
            "megatron_core": "megatron.core",
            "modules_to_save": copied(model, name) or None,
            "peft_type": "LORA",
            "r": config.rank,
            "rank_pattern": dict(config.rank_pattern),
            "target_modules": _written_targets(model, config, name),
            "trainable_token_indices": _written_tokens(model, config, name),
            "use_dora": config.decomposes,
            "use_rslora": config.rslora,
        }
    )
    return dict(sorted(entries.items()))


def about_model(model: nn.Module) -> dict[str, Any]:
    """Return the entries that PEFT writes for every method: what the adapter is for."""
    kind = type(model)
    task = next((task for ending, task in TASKS.items() if kind.__name__.endswith(ending)), None)
    return {
        "auto_mapping": None if task else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "revision": None,
        "task_type": task,
    }


def read_lora(
    make: type[LoRA], read: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[LoRA, tuple[str, ...]]:
    """Return the LoRA record that PEFT's entries describe on a model, and the patterns in them that mean nothing there.

    PEFT's own files hold such patterns ("classifier" and "score" for every classifier), so they are left out here and
    reported; the tensors tell whether anything is amiss.

    Args:
        make: LoRA or DoRA.
        read: the entries of `adapter_config.json`.
        model: the model it is for; PEFT's modules_to_save are ends of names, "norm" being an end of "layernorm" too.
        tensors: the adapter's; they tell the dtype, which the entries do not.

    Raises:
        ValueError: the entries ask for an option that is not offered here.
    """
    check_entries(read, OWN, PLAIN)
    start = read.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} changed the base weights, which are not in the file. Convert the "
            "adapter to a plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    config = make(
        rank=read.get("r", 8),
        alpha=read.get("lora_alpha", 8),
        targets=names_of(read.get("target_modules") or ()),
        exclude=names_of(read.get("exclude_modules") or ()),
        dropout=read.get("lora_dropout", 0.0),
        rslora=read.get("use_rslora", False),
        lora_bias=read.get("lora_bias", False),
        initialise="gaussian" if start == "gaussian" else "kaiming",
        train_bias=read.get("bias", "none"),
        rank_pattern=read.get("rank_pattern") or {},
        alpha_pattern=read.get("alpha_pattern") or {},
        train_modules=tuple(read.get("modules_to_save") or ()),
        train_tokens=_read_tokens(model, read.get("trainable_token_indices")),
        dtype=next((tensor.dtype for key, tensor in tensors.items() if ".lora_" in key), torch.float32),
    )
    return _fitted(config, model)


def check_entries(read: Mapping[str, Any], own: Collection[str], plain: Mapping[str, Any]) -> None:
    """Raise where PEFT's entries ask for what a record cannot say.

    Args:
        read: the entries of a file.
        own: the keys that the record takes over.
        plain: other keys, each with the one value that asks for nothing.

    Raises:
        ValueError: any other key or value that is set; names it.
    """
    for key, value in read.items():
        unset = value is None or value is False or (isinstance(value, dict | list) and not value)
        if key not in ASIDE and key not in own and not unset and (key not in plain or value != plain[key]):
            raise ValueError(f"{key}={json.dumps(value)} asks for something that is not offered here")


def _written_tokens(model: nn.Module, config: LoRA, name: str) -> Any:
    """Return trainable_token_indices: ids of the input embedding, or by the full names of the places that hold rows."""
    if not isinstance(config.train_tokens, Mapping):
        return list(config.train_tokens) or None
    return {
        place: list(layer.tokens)
        for place, module in named_places(model)
        for layer in adapter_chain(module)
        if isinstance(layer, TokenRows) and layer.adapter_name == name and layer.origin is layer
    }


def _read_tokens(model: nn.Module, value: Any) -> Sequence[int] | dict[str, Sequence[int]]:
    """Return train_tokens; PEFT takes any end of a name, "norm" being an end of "layernorm" too.

    Raises:
        ValueError: rows are to be trained at some places of a tied weight only.
    """
    if not isinstance(value, Mapping):
        return tuple(value or ())
    names = [place for place, _ in named_places(model) if place]
    named = {end: [name for name in names if name.endswith(end)] or [end] for end in value}
    found: dict[str, Sequence[int]] = {name: tuple(value[end]) for end, some in named.items() for name in some}
    check_tied_together(model, token_groups(model, found), list(found))
    return found


def names_of(value: Any) -> Targets:
    """Return targets as an entry has them: an expression as it is, suffixes as a tuple."""
    return value if isinstance(value, str) else tuple(value)


def copied(model: nn.Module, name: str) -> list[str]:
    """Return the full names of the modules trained whole: PEFT's rule for short ones would match more."""
    whole = {id(bare_module(layer)) for layer in adapter_layers(model, name) if type(layer) is TrainedCopy}
    return sorted(place for place, module in named_places(model) if id(bare_module(module)) in whole)


@dataclass
class Fitted:
    """What PEFT's patterns come to on a model.

    Attributes:
        targets: those that match something.
        exclude: those that leave something out.
        copied: the full names of modules trained whole; PEFT's rule for them is any end of a name.
        adapted: the full names of the modules that the targets mean.
        idle: the patterns that match nothing, each after its entry's name.
    """

    targets: Targets
    exclude: Targets
    copied: tuple[str, ...]
    adapted: list[str]
    idle: list[str]

    def used(self, entry: str, given: Targets, among: Sequence[str], matches: Callable[[str, str], bool]) -> list[str]:
        """Return the patterns that match one of the names, and note the others as idle."""
        patterns = [given] if isinstance(given, str) else list(given)
        kept = [pattern for pattern in patterns if any(matches(pattern, name) for name in among)]
        self.idle += [f"{entry} {pattern}" for pattern in patterns if pattern not in kept]
        return kept


def fitted(model: nn.Module, targets: Targets, exclude: Targets, train_modules: Sequence[str]) -> Fitted | None:
    """Return what PEFT's entries come to on the model; None where no target matches anything, which attaching will say.

    Args:
        model: the model.
        targets: target_modules.
        exclude: exclude_modules.
        train_modules: modules_to_save.
    """
    places = dict(named_places(model))
    names = [place for place in places if place]
    found = Fitted(targets, exclude, (), [], [])
    wanted: Targets = linear_places(model, places) if targets == ALL_LINEAR else targets
    kept = found.used("target_modules", wanted, names, _rule(wanted))
    named = [name for name in names if any(_rule(wanted)(pattern, name) for pattern in kept)]
    if wanted and not named:
        return None
    excluding = found.used("exclude_modules", exclude, named, _rule(exclude))
    out = [name for name in named if any(_rule(exclude)(pattern, name) for pattern in excluding)]
    ends = found.used("modules_to_save", train_modules, names, lambda end, name: name.endswith(end))
    found.copied = tuple(name for name in names if any(name.endswith(end) for end in ends))
    found.adapted = [name for name in named if name not in out and not inside(name, found.copied)]
    if len(found.adapted) < len(named) - len(out):  # PEFT quietly leaves out what lies in modules_to_save
        kept, excluding = found.adapted, []
        wanted = ()
    found.targets = wanted if isinstance(wanted, str) else tuple(kept)
    found.exclude = exclude if excluding and isinstance(exclude, str) else tuple(excluding)
    return found


def _fitted(config: LoRA, model: nn.Module) -> tuple[LoRA, tuple[str, ...]]:
    """Return the record without the patterns that match nothing on the model, and those patterns."""
    found = fitted(model, config.targets, config.exclude, config.train_modules)
    if found is None:
        return config, ()
    ranks = found.used("rank_pattern", tuple(config.rank_pattern), found.adapted, fits)
    alphas = found.used("alpha_pattern", tuple(config.alpha_pattern), found.adapted, fits)
    return replace(
        config,
        targets=found.targets,
        exclude=found.exclude,
        train_modules=found.copied,
        rank_pattern={pattern: config.rank_pattern[pattern] for pattern in ranks},
        alpha_pattern={pattern: config.alpha_pattern[pattern] for pattern in alphas},
    ), tuple(found.idle)


def _rule(patterns: Targets) -> Callable[[str, str], bool]:
    if isinstance(patterns, str):
        return lambda pattern, name: re.fullmatch(pattern, name) is not None
    return lambda pattern, name: ends_in(name, pattern)


def _written_targets(model: nn.Module, config: LoRA, name: str) -> str | list[str]:
    """Return targets that mean the same modules to PEFT; "all-linear" is written out, as PEFT does."""
    if isinstance(config.targets, str) and config.targets != ALL_LINEAR:
        return config.targets
    if config.targets != ALL_LINEAR:
        return sorted(config.targets)
    adapted = {id(bare_module(layer)) for layer in adapter_layers(model, name) if isinstance(layer, LowRankLayer)}
    places = {place: id(bare_module(module)) in adapted for place, module in named_places(model) if place}
    full = sorted(place for place, is_adapted in places.items() if is_adapted)
    ends = sorted({place.rsplit(".", 1)[-1] for place in full})
    same = all(is_adapted == any(ends_in(place, end) for end in ends) for place, is_adapted in places.items())
    return ends if same else full
