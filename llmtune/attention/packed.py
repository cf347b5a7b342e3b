"""Attention within documents and between padding, without a table: only what may meet is computed.

Documents are cut into blocks of queries, each with the keys it sees; blocks of one shape are computed together, from
whichever document or row they come. The cutting is planned once for a mask, and all layers that share the mask share
the plan. On a batch of short documents this costs what the documents cost by themselves.
"""

from __future__ import annotations

from torch import Tensor

from llmtune.attention.banded import banded_refusal, plan_of_bands
from llmtune.attention.bands import has_part
from llmtune.attention.case import AttentionCase
from llmtune.attention.recompute import attend_blockwise
from llmtune.attention.window import SlidingWindow

NAME = "packed"


def refusal(case: AttentionCase) -> str | None:
    """Return what this backend cannot take in `case`, in words, or None where it takes the case."""
    if has_part(case.mask, SlidingWindow):
        return "a sliding window"
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
