"""PEFT's `adapter_config.json`, written from a LoRA record and read back into one, and what other methods' share."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers
from llmtune.adapters.initialise import reads_weight
from llmtune.adapters.layer import AdapterLayer, bare_module, named_places
from llmtune.adapters.parameter_plan import named_locals
from llmtune.adapters.parameters import LoRAParameter
from llmtune.adapters.peft_tokens import read_train_tokens, written_tokens
from llmtune.adapters.peft_types import check_types
from llmtune.adapters.plan import Targeted
from llmtune.adapters.record import Targets
from llmtune.adapters.targets import ALL_LINEAR, ends_in, fits, inside, is_conv1d, linear_places
from llmtune.adapters.token_rows import TokenRows
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy

if TYPE_CHECKING:
    from llmtune.adapters.config import LoRA

Record = TypeVar("Record", bound=Targeted)

# What PEFT writes for a plain LoRA beside the entries that a record decides. Another value than these asks for a method
# or an option that is not offered here, and is refused by name.
PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_ga_config": None, "megatron_config": None,
    "monteclora_config": None, "qalora_group_size": 16,
    "use_bdlora": None, "use_qalora": False, "velora_config": None,
}  # fmt: skip
# What says where an adapter came from, or how it is to be run, and changes nothing in its meaning.
ASIDE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "revision",
    "task_type", "runtime_config", "fan_in_fan_out", "qalora_group_size",
}  # fmt: skip
OWN = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "lora_alpha", "lora_bias", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "target_parameters",
    "trainable_token_indices", "use_dora",
    "use_rslora",
}  # fmt: skip
# How PEFT drew the start, without touching the base: of no consequence once the tensors are read.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
PATTERNS = ("rank_pattern", "alpha_pattern")
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def config_of(model: nn.Module, config: LoRA, name: str) -> dict[str, Any]:
    """Return the entries of `adapter_config.json` for an attached adapter, sorted; patterns keep their order, the first
    that fits decides.

    Args:
        model: the model it is attached to.
        config: its record.
        name: its name.
    """
    config = _with_start(config)
    own = {
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": config.train_bias,
        "exclude_modules": written_exclude(config),
        "init_lora_weights": True if config.initialise == "kaiming" else config.initialise,
        "lora_alpha": config.alpha,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.dropout,
        "megatron_core": "megatron.core",
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
        "target_parameters": list(config.target_parameters) or None,
        "trainable_token_indices": written_tokens(model, config.train_tokens, name),
        "use_dora": config.decomposes,
        "use_rslora": config.rslora,
    }
    return dict(sorted((PLAIN | common_entries(model, config, name, config.peft_type) | own).items()))


def common_entries(
    model: nn.Module, config: Targeted, name: str, peft_type: str, *, excludes: bool = True
) -> dict[str, Any]:
    """Return the entries of `adapter_config.json` that PEFT's methods for named modules have in common.

    Args:
        model: the model the adapter is attached to.
        config: its record.
        name: its name.
        peft_type: PEFT's name of the method.
        excludes: whether the method has "exclude_modules" in PEFT; where not, the targets are written out.
    """
    transposed = [is_conv1d(layer) for layer in _method_layers(model, name)]
    return about_model(model) | {
        "fan_in_fan_out": bool(transposed) and all(transposed),
        "modules_to_save": copied(model, name) or None,
        "peft_type": peft_type,
        "target_modules": _written_targets(model, config, name, excludes=excludes),
    }


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


def written_exclude(config: Targeted) -> str | list[str] | None:
    """Return the entry "exclude_modules" for a record."""
    return (config.exclude if isinstance(config.exclude, str) else sorted(config.exclude)) or None


def _with_start(config: LoRA) -> LoRA:
    """Return the plain LoRA of twice the rank that a start taken from the weights amounts to once it is taken off."""
    if not reads_weight(config.initialise):
        return config
    more = math.sqrt(2) if config.rslora else 2
    return replace(
        config,
        rank=2 * config.rank,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha=more * config.alpha,
        alpha_pattern={pattern: more * alpha for pattern, alpha in config.alpha_pattern.items()},
        initialise="kaiming",
    )


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
        targets=as_targets(read.get("target_modules") or ()),
        exclude=as_targets(read.get("exclude_modules") or ()),
        dropout=read.get("lora_dropout", 0.0),
        rslora=bool(read.get("use_rslora")),
        lora_bias=bool(read.get("lora_bias")),
        initialise="gaussian" if start == "gaussian" else "kaiming",
        any_rank=True,
        train_bias=read.get("bias", "none"),
        rank_pattern=read.get("rank_pattern") or {},
        alpha_pattern=read.get("alpha_pattern") or {},
        train_modules=tuple(read.get("modules_to_save") or ()),
        target_parameters=tuple(read.get("target_parameters") or ()),
        train_tokens=read_train_tokens(model, read.get("trainable_token_indices")),
        dtype=next(
            (t.dtype for key, t in tensors.items() if ".lora_A." in key or ".lora_embedding_A" in key), torch.float32
        ),
    )
    return fitted(config, model)


def check_entries(read: Mapping[str, Any], own: Collection[str], plain: Mapping[str, Any]) -> None:
    """Raise where PEFT's entries have a wrong type or ask for what a record cannot say.

    Args:
        read: the entries of a file.
        own: the keys that the record takes over.
        plain: other keys, each with the one value that asks for nothing.

    Raises:
        ValueError: any other key or value that is set, or a value of a wrong type; names it.
    """
    check_types(read)
    for key, value in read.items():
        unset = value is None or value is False or (isinstance(value, dict | list) and not value)
        if key not in ASIDE and key not in own and not unset and (key not in plain or value != plain[key]):
            raise ValueError(f"{key}={json.dumps(value)} asks for something that is not offered here")


def as_targets(value: Any) -> Targets:
    """Return an entry that names modules as a record takes it: a string, or a tuple of suffixes."""
    return value if isinstance(value, str) else tuple(value)


def copied(model: nn.Module, name: str) -> list[str]:
    """Return the full names of the modules trained whole: PEFT's rule for short ones would match more."""
    whole = {id(bare_module(layer)) for layer in adapter_layers(model, name) if type(layer) is TrainedCopy}
    return sorted(place for place, module in named_places(model) if id(bare_module(module)) in whole)


def fitted(config: Record, model: nn.Module) -> tuple[Record, tuple[str, ...]]:
    """Return the record without the patterns that match nothing on the model, and those patterns.

    Where no target matches anything they are all left, and attaching says so.

    Args:
        config: a record as read from PEFT's entries; its rank_pattern and alpha_pattern too, where it has them.
        model: the model it is for.
    """
    places = dict(named_places(model))
    names = [place for place in places if place]
    parameters = list(named_locals(places))
    idle: list[str] = []

    def used(key: str, given: Targets, among: Sequence[str], matches: Callable[[str, str], bool]) -> list[str]:
        patterns = [given] if isinstance(given, str) else list(given)
        kept = [pattern for pattern in patterns if any(matches(pattern, name) for name in among)]
        idle.extend(f"{key} {pattern}" for pattern in patterns if pattern not in kept)
        return kept

    targets: Targets = linear_places(model, places) if config.targets == ALL_LINEAR else config.targets
    kept = used("target_modules", targets, names, _rule(targets))
    found = [name for name in names if any(_rule(targets)(pattern, name) for pattern in kept)]
    if targets and not found:
        return config, ()
    excluding = used("exclude_modules", config.exclude, found, _rule(config.exclude))
    out = [name for name in found if any(_rule(config.exclude)(pattern, name) for pattern in excluding)]
    ends = used("modules_to_save", config.train_modules, names, lambda end, name: name.endswith(end))
    whole = [name for name in names if any(name.endswith(end) for end in ends)]
    adapted = [name for name in found if name not in out and not inside(name, whole)]
    stacks = used("target_parameters", getattr(config, "target_parameters", ()), parameters, _ends)
    changed = [*adapted, *(name for name in parameters if any(_ends(end, name) for end in stacks))]
    patterns: dict[str, Any] = {key: getattr(config, key) for key in PATTERNS if hasattr(config, key)}
    for key, given in patterns.items():
        patterns[key] = {pattern: given[pattern] for pattern in used(key, tuple(given), changed, fits)}
    if stacks:
        patterns["target_parameters"] = tuple(stacks)
    if len(adapted) < len(found) - len(out):  # PEFT quietly leaves out what lies in modules_to_save
        kept, excluding = adapted, []
        targets = ()
    fitting = replace(
        cast(Any, config),
        targets=targets if isinstance(targets, str) else tuple(kept),
        exclude=config.exclude if excluding and isinstance(config.exclude, str) else tuple(excluding),
        train_modules=tuple(whole),
        **patterns,
    )
    return fitting, tuple(idle)


def _rule(patterns: Targets) -> Callable[[str, str], bool]:
    if isinstance(patterns, str):
        return lambda pattern, name: re.fullmatch(pattern, name) is not None
    return _ends


def _ends(pattern: str, name: str) -> bool:
    return ends_in(name, pattern)


def _method_layers(model: nn.Module, name: str) -> list[AdapterLayer]:
    others = TrainedBias | TrainedCopy | LoRAParameter | TokenRows
    return [layer for layer in adapter_layers(model, name) if not isinstance(layer, others)]


def _written_targets(model: nn.Module, config: Targeted, name: str, *, excludes: bool) -> str | list[str]:
    """Return targets that mean the same modules to PEFT; "all-linear" is written out, as PEFT does."""
    if config.targets != ALL_LINEAR and (excludes or not config.exclude):
        return config.targets if isinstance(config.targets, str) else sorted(config.targets)
    adapted = {id(bare_module(layer)) for layer in _method_layers(model, name)}
    places = {place: id(bare_module(module)) in adapted for place, module in named_places(model) if place}
    full = sorted(place for place, is_adapted in places.items() if is_adapted)
    ends = sorted({place.rsplit(".", 1)[-1] for place in full})
    same = all(is_adapted == any(ends_in(place, end) for end in ends) for place, is_adapted in places.items())
    return ends if same else full
