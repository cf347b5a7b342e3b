"""Attention in a sliding window: every block of queries meets its window of keys and nothing else.

The work is T * (window + block) instead of T * S, and no table is made: a block needs only the two corners of the band.
Documents, padding and a causal mask cut the window further.
"""

from __future__ import annotations

from torch import Tensor

from llmtune.attention.banded import banded_refusal, plan_of_bands
from llmtune.attention.case import AttentionCase
from llmtune.attention.recompute import attend_blockwise

NAME = "windowed"


def refusal(case: AttentionCase) -> str | None:
    """Return what this backend cannot take in `case`, in words, or None where it takes the case."""
    return banded_refusal(case)


def attend(case: AttentionCase) -> tuple[Tensor, Tensor | None]:
    """Compute one attention call.

    Args:
        case: query [B, H, T, D], key [B, K, S, D], value [B, K, S, Dv] and the knobs that `refusal` lets through.

    Returns:
        (out, lse): [B, H, T, Dv] in the query's dtype; [B, H, T] in float32 (float64 for float64 inputs), or None where
        it was not asked for.
    """
    plan = plan_of_bands(case)
    assert plan is not None
    return attend_blockwise(case, plan)
