"""Nested state parted into JSON values and tensors, and put together again.

Where a tensor stood there is `{"__tensor__": its name}`, and where a number is not finite, which JSON cannot say,
`{"__float__": "nan"}`. Everything else is JSON as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmtune.errors import CheckpointError

MOST_DEPTH = 100
_TENSOR, _FLOAT = "__tensor__", "__float__"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DTYPES = frozenset(
    f"torch.{name}"
    for name in (
        "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
        "float32", "float64", "complex64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    )
)  # fmt: skip


def split_tensors(state: Any, *, clone: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """Part nested dicts and lists into JSON values, with a mark where a tensor stood, and those tensors by name.

    Args:
        state: what to part.
        clone: copy the tensors to the CPU, contiguous and each in a storage of its own; False leaves them as they are.

    Returns:
        (values, tensors); a tensor's name is its path in the state.

    Raises:
        TypeError: a value is neither a tensor that safetensors can hold nor JSON, or a dict's key is no string.
        ValueError: the state is nested more than 100 deep.
    """
    tensors: dict[str, Tensor] = {}
    return _split(state, "", tensors, clone, 0), tensors


def join_tensors(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors back where `split_tensors` left a mark.

    Args:
        values: JSON values, as `split_tensors` gave them; from a file, they may be anything.
        tensors: those tensors by name, of any shapes.

    Raises:
        CheckpointError: a mark names no tensor, or one that another mark names; a tensor is left over; a number is not
            finite; or the values are nested more than 100 deep.
    """
    left = set(tensors)
    joined = _join(values, tensors, left, "", 0)
    if left:
        raise CheckpointError(f"the tensor {min(left)!r} stands nowhere in the state")
    return joined


def _split(value: Any, path: str, tensors: dict[str, Tensor], clone: bool, depth: int) -> Any:
    where = path or "the root"
    if depth > MOST_DEPTH:
        raise ValueError(f"saved state must be nested at most {MOST_DEPTH} deep; {path[:80]}... is deeper")
    if isinstance(value, Tensor):
        _check_storable(value, where)
        name = path
        while name in tensors or name in ("", "__metadata__"):  # {"a.b": ...} and {"a": {"b": ...}} have one path
            name += "~"
        tensors[name] = _copy(value) if clone else value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key in (_TENSOR, _FLOAT):
                raise TypeError(f"keys of saved state must be strings of your own; {where} has {key!r}")
        dot = f"{path}." if path else ""
        return {key: _split(inner, f"{dot}{key}", tensors, clone, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_split(inner, f"{path}.{at}", tensors, clone, depth + 1) for at, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"saved state must be tensors and JSON values; {where} is a {type(value).__name__}")


def _check_storable(tensor: Tensor, where: str) -> None:
    odd = "sparse" if tensor.layout != torch.strided else "without data" if tensor.is_meta else ""
    if odd or str(tensor.dtype) not in _DTYPES:
        raise TypeError(
            f"saved tensors must be dense, of a dtype that safetensors holds; {where} is {odd or tensor.dtype}"
        )


def _copy(tensor: Tensor) -> Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _join(value: Any, tensors: Mapping[str, Tensor], left: set[str], path: str, depth: int) -> Any:
    where = path or "the root"
    if depth > MOST_DEPTH:
        raise CheckpointError(f"the state is nested more than {MOST_DEPTH} deep")
    if isinstance(value, dict):
        if _TENSOR in value or _FLOAT in value:
            return _marked(value, tensors, left, where)
        dot = f"{path}." if path else ""
        return {key: _join(inner, tensors, left, f"{dot}{key}", depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_join(inner, tensors, left, f"{path}.{at}", depth + 1) for at, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where} is a number that is not finite")
    return value


def _marked(value: dict[str, Any], tensors: Mapping[str, Tensor], left: set[str], where: str) -> Any:
    (mark, name), *rest = value.items()
    if rest or not isinstance(name, str):
        raise CheckpointError(f"{where} holds a mark of the file format beside something else")
    if mark == _FLOAT:
        if name not in _NOT_FINITE:
            raise CheckpointError(f"{where} is to be the number {name[:80]!r}, which is none")
        return _NOT_FINITE[name]
    if name not in left:
        fault = "is named twice" if name in tensors else "is not in the file of tensors"
        raise CheckpointError(f"{where} is to be the tensor {name[:80]!r}, which {fault}")
    left.discard(name)
    return tensors[name]
