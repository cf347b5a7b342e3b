"""Attention through torch's own fused kernel, `torch.nn.functional.scaled_dot_product_attention`.

Three things are ours. A mask becomes one additive tensor that all layers with this mask share (torch turns a boolean
mask into a fresh float tensor in every call, and keeps each for the backward pass). A causal mask is handed over as
`is_causal` wherever torch's meaning of it, aligned to the first key, is the mask's. Rows without a key give 0.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmtune.attention.case import AttentionCase
from llmtune.attention.masks import Causal

NAME = "sdpa"


def refusal(case: AttentionCase) -> str | None:
    """Return the knobs of `case` that torch's kernel does not have, in words, or None where it takes the case."""
    missing = {
        f"softcap={case.softcap}": case.softcap is not None,
        "sinks": case.sinks is not None,
        "return_lse=True": case.return_lse,
        "dropout from a generator": case.dropout_p > 0.0 and case.generator is not None,
    }
    knobs = [knob for knob, wanted in missing.items() if wanted]
    return " and ".join(knobs) or None


def attend(case: AttentionCase) -> tuple[Tensor, None]:
    """Compute one attention call.

    Args:
        case: query [B, H, T, D], key [B, K, S, D], value [B, K, S, Dv] and the knobs that `refusal` lets through.

    Returns:
        (out, None): out [B, H, T, Dv] in the query's dtype.
    """
    query, key, value = case.query, case.key, case.value
    (_, H, T, _), (_, K, S, _) = query.shape, key.shape
    additive, seen, is_causal = case.bias, None, False
    if case.mask is not None and case.bias is None and _first_aligned(case, T, S):
        is_causal = True
    elif case.mask is not None and not _sees_all(case, T, S):
        values, seen = case.mask.additive(T, S, dtype=query.dtype, device=query.device)
        additive = values if additive is None else additive + values
    if additive is not None and query.is_cuda:
        # CUDA's kernels want the bias in the query's dtype, and no fused one takes a bias together with grouped heads.
        additive = additive.to(query.dtype)
        key, value = key.repeat_interleave(H // K, dim=1), value.repeat_interleave(H // K, dim=1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=additive, dropout_p=case.dropout_p, is_causal=is_causal, scale=case.scale,
        enable_gqa=key.shape[1] != H,
    )  # fmt: skip
    return (out if seen is None else out.masked_fill(~seen, 0.0)), None


def _offset(case: AttentionCase, T: int, S: int) -> int | None:
    """The offset of a purely causal mask that is one for the whole batch."""
    if not isinstance(case.mask, Causal):
        return None
    if case.mask.offset is None:
        return S - T
    return case.mask.offset if isinstance(case.mask.offset, int) else None


def _first_aligned(case: AttentionCase, T: int, S: int) -> bool:
    return _offset(case, T, S) == 0


def _sees_all(case: AttentionCase, T: int, S: int) -> bool:
    offset = _offset(case, T, S)
    return offset is not None and offset >= S - 1
