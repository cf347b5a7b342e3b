"""Dropout that is drawn again instead of being kept: a seed in place of a mask."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 1 << 16  # what is drawn for an entry: 16 bits


def seeded_dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Return x with entries dropped with probability p and the others scaled; the same seed drops the same entries.

    Four entries share one draw of 64 bits, so p acts in steps of 1/65536; the scaling is that of the step, so the mean
    is exact. Linear in x: applied to a gradient it is its own backward pass.

    Args:
        x: any shape, floating.
        p: probability, 0 to below 1.
        seed: of the draw, 0 to 2**63 - 1.

    Returns:
        A new tensor of x's shape and dtype; x itself where p is 0.
    """
    if p == 0.0:
        return x
    below = min(max(round(p * _STEPS), 1), _STEPS - 1)
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= below - _STEPS // 2
    return x * kept * (_STEPS / (_STEPS - below))
