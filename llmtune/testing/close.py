"""Comparing tensors so that a failure explains itself."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.errors import LawBroken

# Relative to the largest expected entry: what one rounding, and a sum of some hundred of them, may cost.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_close(actual: Tensor, expected: Tensor, *, rtol: float | None = None, what: str = "value") -> None:
    """Check that two tensors agree to `rtol` of the largest finite entry of `expected`.

    Entries that are infinite or NaN in `expected` must be the same in `actual`.

    Args:
        actual: any shape and dtype.
        expected: the same shape; its dtype may be wider (a float64 reference).
        rtol: allowed difference over the largest finite `|expected|` (over 1 where that is 0). Left out, it follows
            from the dtype of `actual`: 1e-10 float64, 1e-5 float32, 2e-2 bfloat16, 4e-3 float16, exact for integers.
        what: the name of the value in the message.

    Raises:
        LawBroken: the shapes differ, or an entry is further off; says where the worst entry is and by how much.
    """
    if actual.shape != expected.shape:
        raise LawBroken(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return
    if rtol is None:
        rtol = TOLERANCE.get(actual.dtype, 0.0)
    got, want = actual.detach().cpu().double(), expected.detach().cpu().double()
    finite = want.isfinite()
    odd = ~finite & ~((got == want) | (got.isnan() & want.isnan()))
    if odd.any():
        where = tuple(int(i) for i in odd.nonzero()[0])
        raise LawBroken(f"{what}: expected {want[where].item()} at {where}, got {got[where].item()}")
    scale = want[finite].abs().max().item() if finite.any() else 0.0
    allowed = rtol * (scale if scale > 0 else 1.0)
    difference = torch.where(finite, (got - want).abs(), torch.zeros_like(want))
    bad = ~(difference <= allowed)  # written so that a NaN in `actual` is bad
    if bad.any():
        worst = difference.nan_to_num(nan=float("inf")).flatten().argmax()
        where = tuple(int(i) for i in torch.unravel_index(worst, difference.shape))
        raise LawBroken(
            f"{what}: {int(bad.sum())} of {bad.numel()} entries differ by more than {allowed:.3g} "
            f"(rtol {rtol:.1g} of the largest, {scale:.3g}); the worst, at {where}: "
            f"expected {want[where].item():.9g}, got {got[where].item():.9g}, off by {difference[where].item():.3g}"
        )
