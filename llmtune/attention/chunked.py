"""Attention a few queries at a time: takes every knob and every mask, in memory that is linear in the length.

The scores of a block of queries are made, used and dropped; the backward pass makes them anew, with the same dropout
(one seed is drawn for a call). Soft-capping, sinks, learned biases, dropout and values of their own size cost no
[T, S] table. Keys that the mask rules out for a whole block are skipped.
"""

from __future__ import annotations

from torch import Tensor

from llmtune.attention.banded import any_plan
from llmtune.attention.case import AttentionCase
from llmtune.attention.recompute import attend_blockwise

NAME = "chunked"


def refusal(case: AttentionCase) -> str | None:
    """Return None: it takes every case."""
    return None


def attend(case: AttentionCase) -> tuple[Tensor, Tensor | None]:
    """Compute one attention call.

    Args:
        case: query [B, H, T, D], key [B, K, S, D], value [B, K, S, Dv] and the knobs.

    Returns:
        (out, lse): [B, H, T, Dv] in the query's dtype; [B, H, T] in float32 (float64 for float64 inputs), or None where
        it was not asked for.
    """
    return attend_blockwise(case, any_plan(case))
