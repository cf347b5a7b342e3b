"""A matrix product that is faster than torch's own where torch leaves speed lying."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 2**21  # multiplications; below, looking for another kernel costs more than it gains


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x @ matrix, in float32 through oneDNN's kernel where the CPU build of torch has it.

    torch takes MKL for float32 products on a CPU, which on some processors (AMD's, with AVX-512) reaches half of what
    oneDNN does. The kernel is reached through an operator that `torch.compile` uses; it computes in full float32 (no
    flag of the process is touched) and has no derivative, so this is for backward passes. The result differs from
    torch's by rounding.

    Args:
        x: [..., n].
        matrix: [n, m].

    Returns:
        [..., m].
    """
    fast = (
        x.device.type == "cpu"
        and x.dtype == matrix.dtype == torch.float32
        and x.ndim > 1
        and type(matrix) in (Tensor, torch.nn.Parameter)
        and x.numel() * matrix.shape[1] >= _FEW
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if fast:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), matrix.T, None, "none", [], "")
    return x @ matrix
