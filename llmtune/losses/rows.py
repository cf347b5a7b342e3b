"""Which rows of a loss count, and how their losses become one number: what the losses of rows share."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: str) -> None:
    """Raise ValueError where the reduction is unknown."""
    if reduction not in get_args(Reduction):
        raise ValueError(f'reduction must be "mean", "sum" or "none"; got {reduction!r}')


def check_temperature(temperature: float) -> None:
    """Raise ValueError where the temperature is not finite and larger than 0."""
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a finite number larger than 0; got {temperature}")


def is_integer(tensor: Tensor) -> bool:
    """Return whether a tensor holds integers; booleans are none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def labelled_rows(targets: Tensor, V: int, *, ignore_index: int = -100) -> Tensor | None:
    """Return the indices [n] of the rows that carry a label, or None where all do.

    Args:
        targets: [N] integers.
        V: the number of classes.
        ignore_index: the target of a row without a label.

    Raises:
        ValueError: a target is neither `ignore_index` nor in 0 ... V - 1; names the first.
        TypeError: the targets are no integers.
    """
    if not is_integer(targets):
        raise TypeError(f"targets must be integers; got {targets.dtype}")
    targets = targets.long()  # a narrower type may not hold V, or the index of what is ignored
    valid = targets != ignore_index
    wrong = valid & ((targets < 0) | (targets >= V))
    labelled, misplaced = torch.stack([valid.sum(), wrong.sum()]).tolist()  # one wait for the device instead of two
    if misplaced:
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets must be in 0 ... {V - 1} or ignore_index={ignore_index}; target {first} is {int(targets[first])}"
        )
    return None if labelled == len(targets) else valid.nonzero().squeeze(1)


def labelled_logits(
    logits: Tensor, targets: Tensor, *, ignore_index: int, reduction: Reduction
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (logits [n, C], targets [n], rows) of the rows that carry a label; `rows` as `labelled_rows` gives it.

    Args:
        logits: [..., C]: classes last.
        targets: [...] integers in 0 ... C - 1, or `ignore_index`.
        ignore_index: the target of a row without a label.
        reduction: a mean needs at least one row.

    Raises:
        ValueError: a shape does not fit, a target is out of range, or no row carries a label and the mean is asked for.
        TypeError: the targets are no integers.
    """
    C = logits.shape[-1] if logits.ndim else 0
    if targets.shape != logits.shape[:-1] or logits.ndim < 1:
        raise ValueError(f"expected logits [..., C] and targets [...]; got {[*logits.shape]} and {[*targets.shape]}")
    z, t = logits.reshape(-1, C), targets.flatten()
    rows = labelled_rows(t, C, ignore_index=ignore_index)
    if rows is not None:
        z, t = z.index_select(0, rows), t.index_select(0, rows)
    if len(t) == 0 and reduction == "mean":
        raise ValueError(f"the mean needs at least one target: all {targets.numel()} are ignored (all {ignore_index})")
    return z, t.long(), rows


def rows_that_count(mask: Tensor | None, shape: torch.Size, reduction: Reduction) -> Tensor | None:
    """Return the indices [n] of the rows, in one dimension, that the mask keeps; None where there is no mask.

    Args:
        mask: [...] booleans, True for the rows that count; or None.
        shape: that of the rows, [...].
        reduction: a mean needs at least one row.

    Raises:
        ValueError: the mask is no booleans of that shape, or leaves no row for a mean.
    """
    N = shape.numel()
    rows = None
    if mask is not None:
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be booleans {[*shape]}, one a row; got {mask.dtype} {[*mask.shape]}")
        rows = mask.flatten().nonzero().squeeze(1)
    if reduction == "mean" and (N if rows is None else len(rows)) == 0:
        raise ValueError(f"the mean needs at least one row: the mask leaves none of {N}")
    return rows


def counted(given: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows [n, C] that count of a tensor [..., C]."""
    flat = given.reshape(-1, given.shape[-1])
    return flat if rows is None else flat.index_select(0, rows)


def reduced(value: Tensor, rows: Tensor | None, shape: torch.Size, reduction: Reduction) -> Tensor:
    """Return the mean or sum of the rows' losses, or all of them in their places.

    Args:
        value: [n] losses of the rows that count.
        rows: [n] their indices, or None where all count.
        shape: that of all rows, [...].
        reduction: "mean", "sum", or "none": [...], with 0 where a row does not count.
    """
    if reduction == "none":
        whole = value if rows is None else value.new_zeros(shape.numel()).index_copy(0, rows, value)
        return whole.reshape(shape)
    return value.mean() if reduction == "mean" else value.sum()


def log_sum_outside(z: Tensor, index: Tensor) -> Tensor:
    """Return log sum exp [n] of the entries [n, C] outside index [n, k]; -inf, without slope, where there are none."""
    others = z.scatter(-1, index, -torch.inf)
    none = others.amax(-1) == -torch.inf
    return others.masked_fill_(none[:, None], 0.0).logsumexp(-1).masked_fill(none, -torch.inf)
