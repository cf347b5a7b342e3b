"""Cross-entropy among a task's own classes, for a head that learns more classes with every task."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.classification import ClassificationLoss, class_rows
from llmtune.losses.rows import Reduction, check_reduction, labelled_logits, reduced
from llmtune.types import Batch


def own_classes_cross_entropy(
    logits: Tensor, targets: Tensor, own: Sequence[int], *, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """Return -log softmax over `own` at the target, where the target is one of them; over all classes elsewhere.

    A task's rows then say which of the task's classes they are, and nothing of the classes of other tasks: those
    logits have no gradient, while the usual softmax pushes every old class down in each step, since no row of the new
    task is one. Rows of old classes, as a buffer replays them, are told from all classes.

    Args:
        logits: [..., C]: classes last.
        targets: [...] integers in 0 ... C - 1, or `ignore_index`.
        own: the classes of the task at hand, two or more different ones.
        ignore_index: the target of a row that carries no label.
        reduction: "mean" over the rows with a label, "sum", or "none": [...], with 0 where there is no label.

    Returns:
        A scalar, or [...] for "none", in at least float32.

    Raises:
        ValueError: a shape, a target, a class or an option is out of range, or no row carries a label and the mean is
            asked for.
        TypeError: the targets or the classes are no integers.

    Example:
        >>> logits, targets = torch.tensor([[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]]), torch.tensor([0, 2])
        >>> rows = own_classes_cross_entropy(logits, targets, (0, 1), reduction="none")
        >>> [round(loss, 4) for loss in rows.tolist()]  # log 2; and against all three classes
        [0.6931, 0.0007]

    The "labels trick" of Zeno et al. 2018, "Task agnostic continual learning using online variational Bayes"; with
    replayed rows among all classes it is the asymmetric cross-entropy of Caccia et al. 2022, "New insights on reducing
    abrupt representation change in online continual learning" (ER-ACE).
    """
    check_reduction(reduction)
    z, t, rows = labelled_logits(logits, targets, ignore_index=ignore_index, reduction=reduction)
    C = z.shape[1]
    classes = check_own(own, C)
    mine = torch.zeros(C, dtype=torch.bool, device=z.device)
    mine[classes] = True
    left_out = mine[t][:, None] & ~mine
    losses = F.cross_entropy(at_least_float32(z).masked_fill(left_out, -torch.inf), t, reduction="none")
    return reduced(losses, rows, targets.shape, reduction)


@dataclass(frozen=True)
class OwnClassesLoss:
    """The mean of `own_classes_cross_entropy` over the labels of a classifier: one a row [B], or one a token [B, T].

    Attributes:
        own: the classes of the task at hand, two or more different ones.

    Raises:
        ValueError: fewer than two classes, one twice, or one below 0.
        TypeError: one is no whole number.

    Example:
        >>> from llmtune.testing.models import tiny_bert
        >>> batch = {"input_ids": torch.tensor([[5, 7, 11], [3, 2, 1]]), "labels": torch.tensor([2, 3])}
        >>> model = tiny_bert(labels=5)
        >>> bool(OwnClassesLoss((2, 3))(model, batch) < model(**batch).loss)
        True
    """

    own: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", tuple(check_own(self.own, None)))

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over `count_targets(batch)` targets, a scalar in at least float32.

        Args:
            model: a sequence or token classifier whose output has `logits`, [B, C] or [B, T, C]; wrapped or not.
            batch: "labels" of integers, [B] or [B, T], and whatever the model's forward takes.

        Raises:
            ValueError: the batch has no integer labels, they or the classes do not fit the logits, all of them are
                -100, or one is out of range.
        """
        rows, targets = class_rows(model, batch)
        return own_classes_cross_entropy(rows, targets, self.own)

    def count_targets(self, batch: Batch) -> int:
        """Return how many labels are not -100."""
        return ClassificationLoss().count_targets(batch)


def check_own(own: Sequence[int], C: int | None) -> list[int]:
    """Return the classes; raise ValueError where they are not two or more different ones of C, TypeError where one is
    no whole number."""
    try:
        classes = [operator.index(one) for one in own]
    except TypeError:
        raise TypeError(f"own must be the numbers of classes, whole ones; got {own!r:.80}") from None
    if len(set(classes)) < max(2, len(classes)) or min(classes) < 0 or (C is not None and max(classes) >= C):
        among = "from 0" if C is None else f"of 0 to {C - 1}"
        raise ValueError(f"own must be two or more different classes {among}; got {classes}")
    return classes
