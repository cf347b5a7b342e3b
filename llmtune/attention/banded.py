"""What the backends that compute block by block share: which plan serves a case."""

from __future__ import annotations

from llmtune.attention.blocks import Plan, banded_plan, tabled_plan
from llmtune.attention.case import AttentionCase


def plan_of_bands(case: AttentionCase) -> Plan | None:
    """Return the plan of a case whose mask is made of bands (see `bands.py`), or None where it is not."""
    B, H, T, _ = case.query.shape
    return banded_plan(case.mask, B, H, T, case.key.shape[2], together=case.bias is None)


def any_plan(case: AttentionCase) -> Plan:
    """Return a plan for a case under any mask: bands where it has them, else spans and tables."""
    found = plan_of_bands(case)
    if found is None:
        assert case.mask is not None
        return tabled_plan(case.mask, case.query.shape[0], case.query.shape[2], case.key.shape[2])
    return found


def banded_refusal(case: AttentionCase) -> str | None:
    """Return why a backend that knows nothing but bands cannot take a case, in words, or None where it can."""
    knobs = [] if case.bias is None else ["a bias"]
    if plan_of_bands(case) is None:
        knobs.append("a mask that is no union of bands (a table, padding between real keys, a document in pieces)")
    return " and ".join(knobs) or None
