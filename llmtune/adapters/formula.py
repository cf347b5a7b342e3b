"""LoRA and DoRA as their formulas say, by operations that autograd knows: what the fused functions are measured by.

LoRA  x W^T + bias + s (drop(x) A^T) B^T
DoRA  g * (x W^T + s (drop(x) A^T) B^T) + bias
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.adapters.seeded_dropout import seeded_dropout


class Knobs(NamedTuple):
    """How the low-rank part of a call is computed: `work` is the dtype of its products; a seed below 0 is torch's."""

    scaling: float | Tensor
    dropout_p: float
    seed: int
    work: torch.dtype


def lora_change(x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> Tensor:
    """Return scaling * (x A^T) B^T, the plain formula.

    Args:
        x: [..., in].
        lora_a: [r, in].
        lora_b: [out, r].
        scaling: alpha / r, or alpha / sqrt(r): a number or a scalar tensor.

    Returns:
        [..., out], in the dtype of `lora_a` (in autocast's, under autocast).
    """
    return F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b) * scaling


def low_rank_change(x: Tensor, a: Tensor, b: Tensor, knobs: Knobs) -> Tensor:
    """s (drop(x) A^T) B^T in the working dtype, by operations that autograd knows."""
    x = x.to(knobs.work)
    if knobs.dropout_p > 0.0:
        x = F.dropout(x, knobs.dropout_p) if knobs.seed < 0 else seeded_dropout(x, knobs.dropout_p, knobs.seed)
    return lora_change(x, a.to(knobs.work), b.to(knobs.work), knobs.scaling)


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    m: Tensor | None,
    norm: Tensor | None,
    knobs: Knobs,
) -> Tensor:
    """The whole, by operations that autograd knows."""
    bias = None if bias is None else bias.to(x.dtype)
    plain, change = F.linear(x, weight.to(x.dtype), bias), low_rank_change(x, a, b, knobs)
    if m is None or norm is None:
        return (plain + change).to(x.dtype)
    return decomposed(plain, bias, change, m / norm)[0]


def decomposed(plain: Tensor, bias: Tensor | None, change: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return DoRA's output and Z = plain - bias + change, in the dtype of `plain`; at ratio 1 the output is exact."""
    if bias is None:
        turned = (plain + change).to(plain.dtype)
        return (turned * ratio).to(plain.dtype), turned
    turned = plain - bias
    out = plain + ((ratio - 1) * turned + ratio * change)
    return out.to(plain.dtype), (turned + change).to(plain.dtype)
