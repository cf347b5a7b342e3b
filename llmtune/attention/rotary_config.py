"""Reading what a Hugging Face config says about rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.attention.rotary_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    RotaryScaling,
    YaRNScaling,
)
from llmtune.errors import did_you_mean

# What the config calls it -> what the record calls it.
_FACTOR, _LENGTH = {"factor": "factor"}, {"original_max_position_embeddings": "original_length"}
_BANDS = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"}
_NEEDED: dict[str, dict[str, str]] = {
    "default": {},
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "yarn": _FACTOR | _LENGTH,
    "llama3": _FACTOR | _LENGTH | _BANDS,
}
_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}
_NOT_OF_THE_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def scaling_from_config(
    rope_parameters: Mapping[str, Any], *, max_position_embeddings: int | None = None
) -> RotaryScaling | None:
    """Return the scaling that a Hugging Face config describes; None where its `rope_type` is "default".

    `rope_theta` and `partial_rotary_factor` say nothing about the scaling and are left to the caller: they are the
    `base` of `RotaryEmbedding`, and what the head size is multiplied by to give its `dim`.

    Args:
        rope_parameters: `config.rope_parameters`, of one kind of layer where a model has several.
        max_position_embeddings: the config's entry of that name; "dynamic" has its original length from there.

    Raises:
        ValueError: the type is unknown, a key is unknown or missing, or a number is out of its range.

    >>> from llmtune.attention.rotary_config import scaling_from_config
    >>> scaling_from_config({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    LinearScaling(factor=2.0)
    """
    kind = rope_parameters.get("rope_type", rope_parameters.get("type"))
    if kind is None and any(isinstance(value, Mapping) for value in rope_parameters.values()):
        raise ValueError(
            f"rope_parameters has an entry for each kind of layer ({', '.join(rope_parameters)}): hand over one of them"
        )
    if kind not in _NEEDED:
        raise ValueError(
            f"rope_type must be one of {', '.join(_NEEDED)}, got {kind!r}.{did_you_mean(str(kind), _NEEDED)}"
        )
    needed, optional = _NEEDED[kind], _OPTIONAL.get(kind, ())
    known = (*needed, *optional, *_NOT_OF_THE_SCALING)
    for key in rope_parameters:
        if key not in known:
            raise ValueError(f'rope_type "{kind}" has no entry "{key}".{did_you_mean(key, known)}')
    missing = [key for key in needed if rope_parameters.get(key) is None]
    if missing:
        raise ValueError(f'rope_type "{kind}" needs {" and ".join(missing)} in rope_parameters')
    fields = {needed[key]: rope_parameters[key] for key in needed}
    fields |= {key: rope_parameters[key] for key in optional if rope_parameters.get(key) is not None}
    if kind == "linear":
        return LinearScaling(**fields)
    if kind == "yarn":
        return YaRNScaling(**fields)
    if kind == "llama3":
        return Llama3Scaling(**fields)
    if kind == "dynamic":
        if max_position_embeddings is None:
            raise ValueError('rope_type "dynamic" needs max_position_embeddings, the config\'s entry of that name')
        return DynamicNTKScaling(**fields, original_length=max_position_embeddings)
    return None
