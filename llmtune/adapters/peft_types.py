"""Types of the entries of PEFT's `adapter_config.json`: a wrong one would fail deep inside, or be taken for true."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmtune.adapters.record import check_expressions, check_flag, check_mapping, check_suffixes
from llmtune.adapters.token_ids import read_tokens


def _check_ids(name: str, value: Any) -> None:
    read_tokens(value)


def _check_start(name: str, value: Any) -> None:
    if not isinstance(value, bool | str):
        raise TypeError(f"{name} must be true, false or the name of a start; got {value!r}")


TYPES: dict[str, Callable[[str, Any], None]] = {
    "target_modules": check_expressions,
    "exclude_modules": check_expressions,
    "feedforward_modules": check_expressions,
    "modules_to_save": check_suffixes,
    "target_parameters": check_suffixes,
    "rank_pattern": check_mapping,
    "alpha_pattern": check_mapping,
    "fan_in_fan_out": check_flag,
    "lora_bias": check_flag,
    "prefix_projection": check_flag,
    "save_projection": check_flag,
    "use_dora": check_flag,
    "use_rslora": check_flag,
    "init_lora_weights": _check_start,
    "token_indices": _check_ids,
    "trainable_token_indices": _check_ids,
}


def check_types(read: Mapping[str, Any]) -> None:
    """Raise where an entry is of another type than PEFT writes; one that is null is not set.

    Args:
        read: the entries of a file.

    Raises:
        ValueError: an entry is; names it.
    """
    for key, check in TYPES.items():
        if read.get(key) is None:
            continue
        try:
            check(key, read[key])
        except (TypeError, ValueError) as error:
            raise ValueError(str(error) if str(error).startswith(key) else f"{key}: {error}") from error
