"""The focal loss: cross-entropy that counts an example the less, the better it is already classified."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.classification import ClassificationLoss, class_rows
from llmtune.losses.rows import Reduction, check_reduction, labelled_logits, log_sum_outside, reduced
from llmtune.types import Batch


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return -w_t (1 - p_t)^gamma log p_t, with p = softmax(logits) and t the target.

    Cross-entropy at gamma = 0. What stands in ignored rows, NaN included, changes nothing.

    The paper has a sigmoid a class and a balance alpha between object and background; this is its softmax form, with
    alpha as a weight a class. Both log p_t and log(1 - p_t) are taken from the log-odds of the target: no cancellation,
    and the gradient is finite at p_t = 1 for every gamma, where (1 - softmax)^gamma has an infinite slope for gamma
    below 1. The mean is over the rows that carry a label, whatever their weights, so that a batch may be split; torch's
    `cross_entropy(weight=...)` divides by the sum of the weights.

    Args:
        logits: [..., C]: classes last.
        targets: [...] integers in 0 ... C - 1, or `ignore_index`.
        gamma: how fast the well classified lose weight, 0 or more; the paper's best is 2.
        class_weights: [C] floats, 0 or more: w; None for 1 each.
        ignore_index: the target of a row that carries no label.
        reduction: "mean" over the rows with a label, "sum", or "none": [...], with 0 where there is no label.

    Returns:
        A scalar, or [...] for "none", in at least float32.

    Raises:
        ValueError: a shape, a target or an option is out of range, or no row carries a label and the mean is asked for.
        TypeError: the targets are no integers.

    Example:
        >>> logits, targets = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 1])
        >>> rows = focal_loss(logits, targets, gamma=2.0, reduction="none")
        >>> round(rows[0].item(), 4)  # 1/4 of log 2
        0.1733

    Lin et al. 2017, "Focal loss for dense object detection", equations 4 and 5.
    """
    check_reduction(reduction)
    _check_gamma(gamma)
    z, t, rows = labelled_logits(logits, targets, ignore_index=ignore_index, reduction=reduction)
    if class_weights is not None:
        check_class_weights(class_weights, z.shape[1])
    return reduced(_rows(at_least_float32(z), t, gamma, class_weights), rows, targets.shape, reduction)


def _rows(z: Tensor, t: Tensor, gamma: float, class_weights: Tensor | None) -> Tensor:
    """Return the losses [n] of logits [n, C] with targets [n]."""
    index = t[:, None]
    odds = log_sum_outside(z, index) - z.gather(1, index).squeeze(1)  # log of (1 - p_t) / p_t
    loss = -F.logsigmoid(-odds)
    if gamma > 0:
        loss = loss * (gamma * F.logsigmoid(odds)).exp()
    return loss if class_weights is None else loss * class_weights.to(loss)[t]


@dataclass(frozen=True)
class FocalLoss:
    """The mean of `focal_loss` over the labels of a classifier: one class a row [B], or one a token [B, T].

    Attributes:
        gamma: as in `focal_loss`, 0 or more.
        class_weights: one number a class, 0 or more, or None for 1 each.

    Raises:
        ValueError: gamma or a weight is out of range.

    Example:
        >>> from llmtune.testing.models import tiny_bert
        >>> batch = {"input_ids": torch.tensor([[5, 7, 11], [3, 2, 1]]), "labels": torch.tensor([2, 0])}
        >>> model = tiny_bert(labels=3)
        >>> torch.allclose(FocalLoss(gamma=0.0)(model, batch), model(**batch).loss)
        True
        >>> bool(FocalLoss(gamma=2.0)(model, batch) < model(**batch).loss)
        True
    """

    gamma: float = 2.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)
        if self.class_weights is not None:
            object.__setattr__(self, "class_weights", tuple(float(w) for w in self.class_weights))
            weights = torch.tensor(self.class_weights)
            check_class_weights(weights, len(weights))

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over `count_targets(batch)` targets, a scalar in at least float32.

        Args:
            model: a sequence or token classifier whose output has `logits`, [B, C] or [B, T, C]; wrapped or not.
            batch: "labels" of integers, [B] or [B, T], and whatever the model's forward takes.

        Raises:
            ValueError: the batch has no integer labels, they or the weights do not fit the logits, all of them are
                -100, or one is out of range.
        """
        rows, targets = class_rows(model, batch)
        weights = None if self.class_weights is None else rows.new_tensor(self.class_weights)
        return focal_loss(rows, targets, gamma=self.gamma, class_weights=weights)

    def count_targets(self, batch: Batch) -> int:
        """Return how many labels are not -100."""
        return ClassificationLoss().count_targets(batch)


def check_class_weights(weights: Tensor, C: int) -> None:
    """Raise ValueError where the weights are not C finite numbers, 0 or more, and not all 0."""
    if weights.shape != (C,):
        raise ValueError(f"expected class_weights [{C}], one a class; got {[*weights.shape]}")
    if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool((weights > 0).any()):
        raise ValueError(f"class_weights must be finite, 0 or more and not all 0; got {weights.tolist()}")


def _check_gamma(gamma: float) -> None:
    if not (gamma >= 0.0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be a finite number, 0 or more; got {gamma}")
