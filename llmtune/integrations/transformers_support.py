"""Which models of transformers take an attention function from outside, and what their masks may look like."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

from torch import nn

NAME = "llmtune"


def refusal(model_or_config: Any) -> str | None:
    """Return why `attn_implementation="llmtune"` cannot work for a model, or None where it can.

    Transformers accepts the name for every model, but some compute their attention by themselves: those that build a
    mask are refused with this sentence in their first forward pass (BLOOM, MPT, XGLM, MPNet, Longformer ...); those
    that build none keep their own attention without a word (DeBERTa, XLNet, XLM, OpenAI GPT, ProphetNet); those that
    look their layers up in a table raise KeyError when they are built (Falcon, GPT-Neo). Nothing is built or run here.

    Args:
        model_or_config: a Hugging Face model, or a configuration, such as `AutoConfig.from_pretrained(...)`.

    Raises:
        TypeError: it is neither.

    >>> from transformers import BloomConfig, LlamaConfig
    >>> from llmtune.integrations import refusal
    >>> refusal(LlamaConfig()) is None
    True
    >>> refusal(BloomConfig())
    'modeling_bloom computes its attention by itself and does not take attn_implementation="llmtune"'
    """
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "_attn_implementation"):
        raise TypeError(
            f"refusal takes a Hugging Face model or its configuration, got {type(model_or_config).__name__}"
        )
    file = modeling_file(type(config), load=True)
    if file is None and isinstance(model_or_config, nn.Module):
        file = sys.modules[type(model_or_config).__module__]
    why = refusal_of(file)
    if why is not None or hasattr(file, "ALL_ATTENTION_FUNCTIONS"):
        return why
    parts = [
        part for name in config.sub_configs if hasattr(part := getattr(config, name, None), "_attn_implementation")
    ]
    if parts:  # a model of models: each has a file of its own
        return next((why for part in parts if (why := refusal(part)) is not None), None)
    where = type(config).__name__ if file is None else _short(file)
    return f'{where} has no attention that attn_implementation="{NAME}" could replace'


@functools.cache
def refusal_of(file: ModuleType | None) -> str | None:
    """Return why the models of a modeling file cannot take our attention, or None where nothing speaks against it."""
    for name, table in vars(file).items() if file is not None else ():
        if name.endswith("ATTENTION_CLASSES") and isinstance(table, dict) and NAME not in table:
            assert file is not None
            return (
                f'{_short(file)} looks its attention up in {name}, which has no "{NAME}": building it raises KeyError'
            )
    if file is None or hasattr(file, "ALL_ATTENTION_FUNCTIONS"):
        return None
    if any("Attention" in kind.__name__ and issubclass(kind, nn.Module) for kind in _classes(file)):
        return f'{_short(file)} computes its attention by itself and does not take attn_implementation="{NAME}"'
    return None


@functools.cache
def _says(file: ModuleType | None, flag: str) -> bool:
    return any(getattr(kind, flag, False) for kind in _classes(file))


def carries_small_masks(config: Any) -> bool:
    """Return whether the model hands a 2-D mask to its attention layers untouched, as models written for flash do.

    Others may slice a table or add to it. So does Gemma 4, which drops queries before the layers that share their keys.
    """
    return _says(modeling_file(type(config)), "_supports_flash_attn") and not getattr(config, "num_kv_shared_layers", 0)


def tells_is_causal(config: Any) -> bool:
    """Return whether the model's layers know by themselves if they are causal, as models written for sdpa do.

    So do decoders written for flash attention (Gemma 2 and GPT-OSS, which sdpa cannot serve). Others leave it to the
    mask (BigBird-Pegasus, NLLB-MoE and Pegasus-X call their decoders' layers not causal), so theirs must say
    everything. A configuration whose modeling file is not known is trusted.
    """
    kind: Any = type(config)
    file, pair = modeling_file(kind), bool(getattr(kind, "is_encoder_decoder", False))
    return file is None or _says(file, "_supports_sdpa") or (_says(file, "_supports_flash_attn") and not pair)


def modeling_file(config: Any, *, load: bool = False) -> ModuleType | None:
    """Return the modeling_x.py beside a configuration class's configuration_x.py, where it has been imported.

    With `load` it is imported where it has not been.
    """
    for parent in config.__mro__:
        name = parent.__module__.replace(".configuration_", ".modeling_")
        if name == parent.__module__:
            continue
        if name in sys.modules:
            return sys.modules[name]
        if load:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError:
                continue
    return None


def _short(file: ModuleType) -> str:
    return file.__name__.rsplit(".", 1)[-1]


def _classes(file: ModuleType | None) -> list[type]:
    """The classes defined in a file, not those it imports."""
    found = [] if file is None else vars(file).values()
    return [kind for kind in found if isinstance(kind, type) and kind.__module__ == getattr(file, "__name__", None)]
