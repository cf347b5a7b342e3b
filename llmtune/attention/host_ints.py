"""Lengths, cuts and offsets as ints on the host, where backends plan with them."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def host_ints(values: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    """Return lengths or cuts, [n] integers, as ints on the host.

    Raises:
        TypeError: a value is no integer.
        ValueError: a tensor holds no integers, or is not [n].
    """
    if isinstance(values, Tensor):
        if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} must be integers [n], got {values.dtype} of shape {tuple(values.shape)}")
        return tuple(values.tolist())
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{name} must be integers [n], got {values!r}")
    return tuple(host_int(value, name) for value in values)


def host_int(value: int | Tensor, name: str) -> int:
    """Return one integer (a tensor of no dimensions counts) as an int on the host.

    Raises:
        TypeError: it is no integer; True and False are none either.
    """
    narrow = value.dtype == torch.bool if isinstance(value, Tensor) else isinstance(value, bool)
    if not narrow and not (isinstance(value, Tensor) and value.ndim):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be an integer, got {value!r}")


def one_or_each_row(value: int | Sequence[int] | Tensor, name: str) -> int | tuple[int, ...]:
    """Return an int for all rows, or [B] ints, one for each, on the host.

    Raises:
        TypeError: a value is no integer.
        ValueError: a tensor holds no integers, or has more than one dimension.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value[None]
        return host_ints(value, name)[0]
    if isinstance(value, Tensor) or (isinstance(value, Iterable) and not isinstance(value, str)):
        return host_ints(value, name)
    return host_int(value, name)


def known_ints(values: Sequence[int] | Tensor | None) -> tuple[int, ...]:
    """Return what `host_ints` made of a record's field, [n] ints."""
    assert isinstance(values, tuple)
    return values
