"""Mixtures of two rows: who is mixed with whom, the mixture, and its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.rows import labelled_rows


@dataclass(frozen=True)
class Pairs:
    """Which row each row of a batch is mixed with, and its own share.

    Attributes:
        weights: [B] each row's own share, 0 to 1, in float32.
        partners: [B] integers, the row that gives the rest.
    """

    weights: Tensor
    partners: Tensor


def mixup(x: Tensor, pairs: Pairs, *, real: Tensor | None = None) -> Tensor:
    """Return weight * x + (1 - weight) * x[partner], row by row.

    Where positions are padding in one row and a token in the other, padding gives a zero vector (Guo et al. 2019), so
    how much padding a batch has changes nothing.

    Args:
        x: [B, ...] floats; with `real` [B, T, ...].
        pairs: from `mixup_pairs`.
        real: [B, T] booleans, False on padding; None where there is none. What stands there, NaN included, is not read.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: the shapes do not fit.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018), section 2; of hidden states, Verma et al.,
    "Manifold Mixup" (2019).

    Example:
        >>> pairs = Pairs(torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))
        >>> mixup(torch.tensor([[0.0], [4.0]]), pairs)
        tensor([[1.],
                [4.]])
    """
    B = len(pairs.weights)
    if len(x) != B or (real is not None and real.shape != x.shape[:2]):
        of = "" if real is None else f" and real {[*real.shape]}"
        raise ValueError(f"expected {B} rows, and real of the first two dimensions; got x {[*x.shape]}{of}")
    weights = pairs.weights.to(x.dtype).reshape(B, *[1] * (x.ndim - 1))
    if real is not None:
        x = torch.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0.0)
    return weights * x + (1 - weights) * x[pairs.partners]


def mixup_pairs(
    targets: Tensor, *, alpha: float, generator: torch.Generator | None = None, ignore_index: int = -100
) -> Pairs:
    """Return a random partner and an own share for every row that carries a label; the others stay alone.

    Shares are drawn for each row by itself from Beta(alpha, alpha). Partners go round a random circle of the labelled
    rows, so no row is its own partner.

    Args:
        targets: [B] integers, `ignore_index` where a row has no label.
        alpha: of the Beta distribution, larger than 0: small for shares near 0 or 1, 1 for uniform ones.
        generator: of the draws; None for torch's own, on the CPU.
        ignore_index: the target of a row without a label.

    Returns:
        `Pairs`, on the targets' device.

    Raises:
        ValueError: alpha is out of range, targets are not [B], or fewer than two rows carry a label.

    Where we differ: Zhang et al. (2018) draw one share for a batch, and permute the batch, so that in a small one many
    rows meet themselves.

    Example:
        >>> pairs = mixup_pairs(torch.tensor([2, -100, 0, 1]), alpha=0.4)
        >>> pairs.weights[1].item(), pairs.partners[1].item()
        (1.0, 1)
    """
    check_alpha(alpha)
    if targets.ndim != 1:
        raise ValueError(f"rows are mixed whole, so targets must be [B], one class a row; got {[*targets.shape]}")
    rows = (targets != ignore_index).nonzero().squeeze(1)
    n, B = len(rows), len(targets)
    if n < 2:
        raise ValueError(
            f"mixup needs two rows or more with a label in a batch; got {n} of {B}. Make micro-batches larger "
            "(rows_per_micro_batch), or choose rows_per_step so that an epoch's last batch has more than one row"
        )
    where = "cpu" if generator is None else generator.device
    shares = torch._sample_dirichlet(torch.full((n, 2), alpha, dtype=torch.float64, device=where), generator)[:, 0]
    order = rows[torch.randperm(n, generator=generator, device=where).to(rows.device)]
    weights = torch.ones(B, device=targets.device)
    partners = torch.arange(B, device=targets.device)
    weights[rows] = shares.to(weights)
    partners[order] = order.roll(1)
    return Pairs(weights, partners)


def mixup_loss(logits: Tensor, targets: Tensor, pairs: Pairs, *, ignore_index: int = -100) -> Tensor:
    """Return the cross-entropy with each row's mixture of two classes, mean over the labelled rows.

        mean of weight * CE(logits, target) + (1 - weight) * CE(logits, partner's target)

    Args:
        logits: [B, C], of mixed rows.
        targets: [B] integers in 0 ... C - 1, of the rows before mixing, or `ignore_index`.
        pairs: from `mixup_pairs` on the same targets.
        ignore_index: the target of a row without a label.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: the shapes do not fit, a target is out of range, or a labelled row is mixed with one that has no
            label.

    Example:
        >>> logits, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> whole = Pairs(torch.ones(2), torch.tensor([1, 0]))
        >>> torch.allclose(mixup_loss(logits, targets, whole), F.cross_entropy(logits, targets))
        True
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or len(pairs.weights) != len(logits):
        raise ValueError(
            f"expected logits [B, C], targets [B] and {len(pairs.weights)} rows as in the pairs; got "
            f"{[*logits.shape]} and {[*targets.shape]}"
        )
    labelled = labelled_rows(targets, logits.shape[1], ignore_index=ignore_index)
    rows = torch.arange(len(targets), device=targets.device) if labelled is None else labelled
    first, second = targets[rows], targets[pairs.partners[rows]]
    if len(rows) == 0 or bool((second == ignore_index).any()):
        raise ValueError("a labelled row can only be mixed with a labelled row: make the pairs of these very targets")
    z = at_least_float32(logits[rows])
    weights = pairs.weights[rows].to(z.dtype)
    one, other = (F.cross_entropy(z, wanted.long(), reduction="none") for wanted in (first, second))
    return (weights * one + (1 - weights) * other).mean()


def check_alpha(alpha: float) -> None:
    """Raise ValueError where alpha is no finite number larger than 0."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number larger than 0; got {alpha}")
