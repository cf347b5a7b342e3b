"""Attention through torch's own fused kernel, `torch.nn.functional.scaled_dot_product_attention`.

A few things are ours. A mask becomes one additive tensor that all layers with this mask share (torch turns a boolean
mask into a fresh float tensor in every call, and keeps each for the backward pass). A causal mask is handed over as
`is_causal` wherever torch's meaning of it, aligned to the first key, is the mask's. Rows without a key give 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtune.attention.banded import any_plan
from llmtune.attention.case import AttentionCase
from llmtune.attention.masks import Causal
from llmtune.attention.recompute import attend_blockwise

NAME = "sdpa"


def refusal(case: AttentionCase) -> str | None:
    """Return the knobs of `case` that torch's kernel does not have, in words, or None where it takes the case."""
    lse = case.return_lse or case.sinks is not None
    missing = {
        f"softcap={case.softcap}": case.softcap is not None,
        "dropout from a generator": case.dropout_p > 0.0 and case.generator is not None,
        "return_lse or sinks on an accelerator": lse and case.query.device.type != "cpu",
        "return_lse or sinks together with dropout": lse and case.dropout_p > 0.0,
        "return_lse or sinks together with values of another size": lse and _has_own_size(case),
        "return_lse or sinks together with a learned bias": lse and case.bias_is_learned(),
    }
    knobs = [knob for knob, wanted in missing.items() if wanted]
    return " and ".join(knobs) or None


def holds_all_scores(case: AttentionCase) -> str | None:
    """Return why torch's CPU kernel would hold all scores [B, H, T, S] at once, in words, or None if it is fused."""
    if case.query.device.type != "cpu":
        return None
    reasons = {
        "dropout": case.dropout_p > 0.0,
        "a learned bias": case.bias_is_learned(),
        "values of another size": _has_own_size(case),
    }
    return " and ".join(reason for reason, holds in reasons.items() if holds) or None


def needs_table(case: AttentionCase) -> bool:
    """Return whether the mask must be written out as a table for torch's kernel."""
    T, S = case.query.shape[2], case.key.shape[2]
    return case.mask is not None and not _is_causal(case, T, S) and not _sees_all(case, T, S)


def attend(case: AttentionCase) -> tuple[Tensor, Tensor | None]:
    """Compute one attention call.

    Args:
        case: query [B, H, T, D], key [B, K, S, D], value [B, K, S, Dv] and the knobs that `refusal` lets through.

    Returns:
        (out, lse): out [B, H, T, Dv] in the query's dtype; lse [B, H, T] in float32 (float64 for float64 inputs), or
        None where it was not asked for.
    """
    if case.return_lse or case.sinks is not None:
        return _with_lse(case)
    query, key, value = case.query, case.key, case.value
    H, K = query.shape[1], key.shape[1]
    additive, seen, is_causal = _additive(case)
    if additive is not None and query.is_cuda:
        # CUDA's kernels want the bias in the query's dtype, and no fused one takes a bias together with grouped heads.
        additive = additive.to(query.dtype)
        key, value = key.repeat_interleave(H // K, dim=1), value.repeat_interleave(H // K, dim=1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=additive, dropout_p=case.dropout_p, is_causal=is_causal, scale=case.scale,
        enable_gqa=key.shape[1] != H,
    )  # fmt: skip
    return (out if seen is None else out.masked_fill(~seen, 0.0)), None


def _additive(case: AttentionCase) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return what to add to the scores, where a query has a key (None: everywhere), and whether to say `is_causal`."""
    bias, T, S = case.bias_tensor(), case.query.shape[2], case.key.shape[2]
    if bias is not None and case.query.dtype == torch.float64:
        bias = bias.to(torch.float64)  # torch's kernel misreads a float32 bias beside float64 inputs
    if bias is None and _is_causal(case, T, S):
        return None, None, True
    if case.mask is None or _sees_all(case, T, S):
        return bias, None, False
    values, seen = case.mask.additive(T, S, dtype=case.query.dtype, device=case.query.device)
    return (values if bias is None else bias + values), seen, False


def _with_lse(case: AttentionCase) -> tuple[Tensor, Tensor | None]:
    """Torch's kernel gives its log-sum-exp to those who call it by its inner name, but no gradient of it."""

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel reads past a last dimension that is not contiguous.
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        additive, seen, is_causal = _additive(case)
        if additive is not None and case.bias is not None:  # which may hide keys by -inf, as a mask does
            left = (additive > float("-inf")).any(-1, keepdim=True)
            seen = left if seen is None else seen & left
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=additive, scale=case.scale
        )
        if seen is None:
            return out, lse
        return out.masked_fill(~seen, 0.0), lse.masked_fill(~seen[..., 0], float("-inf"))

    empty = case.scores == 0  # which makes the kernel divide by zero
    return attend_blockwise(case, any_plan(case), kernel=None if empty else kernel)


def _has_own_size(case: AttentionCase) -> bool:
    return case.value.shape[-1] != case.query.shape[-1]


def _offset(case: AttentionCase, T: int, S: int) -> int | None:
    """The offset of a purely causal mask that is one for the whole batch."""
    if not isinstance(case.mask, Causal):
        return None
    if case.mask.offset is None:
        return S - T
    return case.mask.offset if isinstance(case.mask.offset, int) else None


def _is_causal(case: AttentionCase, T: int, S: int) -> bool:
    """Whether torch's `is_causal` says it: aligned to the first key; it gives NaN where the scale is 0 or less."""
    return _offset(case, T, S) == 0 and case.factor > 0.0


def _sees_all(case: AttentionCase, T: int, S: int) -> bool:
    offset = _offset(case, T, S)
    return offset is not None and offset >= S - 1
