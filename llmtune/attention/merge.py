"""Joining attention over two sets of keys, exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join what the same queries took from two disjoint sets of keys into attention over both.

    LSE = log(exp(lse_a) + exp(lse_b)),   O = exp(lse_a - LSE) out_a + exp(lse_b - LSE) out_b

    Exact, and differentiable in all four. A query that saw no key in either part gives 0, LSE -inf and no gradient.
    Sinks may have been given to one of the parts only, else they count twice; dropout is not affected.

    Args:
        out_a, out_b: [B, H, T, Dv], from `scaled_dot_product_attention(..., return_lse=True)`.
        lse_a, lse_b: [B, H, T], from the same calls.

    Returns:
        (out, lse): [B, H, T, Dv] in the dtype of `out_a`, and [B, H, T] in that of `lse_a`.

    Raises:
        TypeError: one of them is no tensor.
        ValueError: the shapes do not belong together.

    >>> from llmtune.attention import merge_attention, scaled_dot_product_attention
    >>> q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    >>> left = scaled_dot_product_attention(q, k[:, :, :2], k[:, :, :2], return_lse=True)
    >>> right = scaled_dot_product_attention(q, k[:, :, 2:], k[:, :, 2:], return_lse=True)
    >>> torch.allclose(merge_attention(*left, *right)[0], scaled_dot_product_attention(q, k, k), atol=1e-6)
    True

    Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), section 3.1.
    """
    for part in (out_a, lse_a, out_b, lse_b):
        if not isinstance(part, Tensor):
            raise TypeError(f"merge_attention takes four tensors (out, lse, out, lse), got {type(part).__name__}")
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:-1]:
        raise ValueError(
            "the parts must be [B, H, T, Dv] and [B, H, T] of the same queries, got "
            f"{tuple(out_a.shape)} and {tuple(lse_a.shape)}, {tuple(out_b.shape)} and {tuple(lse_b.shape)}"
        )
    largest = torch.maximum(lse_a, lse_b).detach()  # it cancels, so it needs no gradient
    empty = largest == float("-inf")
    largest = largest.masked_fill(empty, 0.0)
    weight_a, weight_b = torch.exp(lse_a - largest), torch.exp(lse_b - largest)
    total = (weight_a + weight_b).masked_fill(empty, 1.0)
    share_a, share_b = (weight_a / total)[..., None], (weight_b / total)[..., None]
    out = (share_a * out_a + share_b * out_b).to(out_a.dtype)
    return out, (largest + torch.log(total)).masked_fill(empty, float("-inf"))
