"""The products of a language-model head with a few rows: hidden states to logits, and logits' gradient back.

On a CPU in float32, oneDNN can compute a product of few rows and a large matrix faster than MKL, which torch's matrix
product calls there; by how much is measured by `benchmarks/bench_head.py --parts products`. torch hands a product in
float32 to oneDNN only by the function it compiles linear layers to; where that is missing, nothing but speed is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FEW = 1024  # rows of the head's gradient at a time
FEWEST_FOR_ONEDNN = 32  # with fewer rows of logits torch's own product makes the head's gradient as fast
PIECE_BYTES = 4 * 2**20  # oneDNN makes its result itself: pieces this small come out of memory that is used again


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Write hidden @ weight.T into `out` and return it.

    Args:
        out: [n, V], overwritten.
        hidden: [n, E], of the same type.
        weight: [V, E], of the same type.
    """
    linear = _onednn_linear(hidden)
    if linear is None:
        return torch.mm(hidden, weight.T, out=out)
    step = max(1, PIECE_BYTES // max(1, 4 * len(hidden)))
    for start in range(0, len(weight), step):
        out[:, start : start + step] = linear(hidden, weight[start : start + step], None, "none", [], "")
    return out


def gradient_into(out: Tensor, gradient: Tensor, weight: Tensor, factor: float) -> Tensor:
    """Write factor * gradient @ weight into `out` and return it.

    Args:
        out: [n, E], overwritten.
        gradient: [n, V], of the same type.
        weight: [V, E], of the same type.
        factor: a number.
    """
    linear = _onednn_linear(gradient)
    if linear is None:
        return torch.addmm(out, gradient, weight, beta=0, alpha=factor, out=out)
    return torch.mul(linear(gradient, weight.T, None, "none", [], ""), factor, out=out)


def add_head_gradient(d_weight: Tensor, gradient: Tensor, hidden: Tensor, factor: float, *, first: bool) -> None:
    """Add factor * gradient.T @ hidden to `d_weight`, or write it there where it is the first.

    Args:
        d_weight: [V, E], of the same type or float32.
        gradient: [n, V].
        hidden: [n, E], of the same type.
        factor: a number.
        first: whether `d_weight` holds nothing yet.
    """
    linear = _onednn_linear(gradient) if len(gradient) >= FEWEST_FOR_ONEDNN else None
    if linear is None and gradient.dtype == d_weight.dtype:
        torch.addmm(d_weight, gradient.T, hidden, beta=0 if first else 1, alpha=factor, out=d_weight)
        return
    if linear is None:  # half precision, where a factor of one's own would be one more rounding
        step, nothing = 8 * FEW, gradient.new_zeros(1, 1)
    else:
        step, scaled = FEW, (hidden * factor).T
    for start in range(0, len(d_weight), step):  # a piece is in the cache still when it is added
        columns, here = gradient[:, start : start + step], slice(start, start + step)
        if linear is None:
            product = torch.addmm(nothing, columns.T, hidden, beta=0, alpha=factor)
        else:  # oneDNN wants rows: torch turns a whole tensor faster than a part of one
            product = linear(columns.contiguous().T, scaled, None, "none", [], "")
        if first:
            d_weight[here] = product
        else:
            d_weight[here] += product


def _onednn_linear(rows: Tensor) -> Any:
    """Return oneDNN's linear layer where it is there and serves such rows, else None."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or len(rows) == 0:
        return None
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
