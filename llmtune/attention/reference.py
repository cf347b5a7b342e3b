"""Attention as its formula says: the truth the other backends are measured against.

    scores = softcap(scale * Q K^T) + bias,   -inf where the mask does not allow
    LSE    = log(sum over keys of exp(scores) + exp(sink))
    O      = dropout(exp(scores - LSE)) V

It holds [B, H, T, S] tables, takes every knob and any dtype (float64 stays float64, anything narrower is computed in
float32), and can be differentiated twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.attention.case import AttentionCase

NAME = "reference"


def refusal(case: AttentionCase) -> str | None:
    """Return None: the formula takes every case."""
    return None


def attend(case: AttentionCase) -> tuple[Tensor, Tensor | None]:
    """Compute one attention call.

    Args:
        case: query [B, H, T, D], key [B, K, S, D], value [B, K, S, Dv] and the knobs.

    Returns:
        (out, lse): out [B, H, T, Dv] in the query's dtype; lse [B, H, T] in float32 (float64 for float64 inputs), or
        None where it was not asked for.
    """
    B, H, T, _ = case.query.shape
    S = case.key.shape[2]
    wide = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    query, key, value = case.query.to(wide), _each_head(case.key, H).to(wide), _each_head(case.value, H).to(wide)

    scores = query @ key.transpose(-2, -1) * case.factor
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    bias = case.bias_tensor()
    if bias is not None:
        scores = scores + bias
    if case.mask is not None:
        scores = scores.masked_fill(~case.mask.dense(T, S, device=scores.device), float("-inf"))
    if case.sinks is not None:  # one more key, whose value is zero
        scores = torch.cat([scores, case.sinks.to(wide)[None, :, None, None].expand(B, H, T, 1)], dim=-1)

    # A row of -inf has no softmax. Computing it on zeros and dropping the result keeps NaN out of the gradient too.
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores[..., :S] - lse).masked_fill(empty, 0.0)
    if case.dropout_p > 0.0:
        weights = _dropout(weights, case.dropout_p, case.generator)
    out = (weights @ value).to(case.query.dtype)
    return out, lse.masked_fill(empty, float("-inf"))[..., 0] if case.return_lse else None


def _each_head(tensor: Tensor, H: int) -> Tensor:
    """[B, K, S, D] -> [B, H, S, D]: query heads 0 ... H/K - 1 share key head 0, and so on."""
    return tensor.repeat_interleave(H // tensor.shape[1], dim=1)


def _dropout(weights: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= p
    return weights * kept / (1.0 - p) if p < 1.0 else weights * 0.0
