"""Distillation of hidden states: the student's features are drawn towards a teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.chunked import at_least_float32
from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.masked_lm import MaskedLMLoss
from llmtune.losses.rows import Reduction, check_reduction, counted, reduced, rows_that_count
from llmtune.losses.sequence_to_sequence import SequenceToSequenceLoss
from llmtune.losses.token_loss import head_loss
from llmtune.modules import reference_pass
from llmtune.types import Batch

Kind = Literal["mse", "cosine"]


def feature_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    kind: Kind = "mse",
    projection: Callable[[Tensor], Tensor] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return how far the student's hidden states are from the teacher's, row by row.

    mse       mean over features of (student - teacher)^2
    cosine    1 - cos(student, teacher), computed as 1/2 |student/|student| - teacher/|teacher||^2

    Rows outside the mask change nothing, not even by NaN in them; `F.mse_loss` over padded hidden states averages over
    the padding as well, so that a longer neighbour in the batch makes the loss smaller. The cosine's form is exactly 0,
    with a gradient of exactly 0, where both agree; a row of zeros, which has no direction, is 1/2 away from any other.

    Args:
        student: hidden states [..., E].
        teacher: hidden states [..., E'], E' = E without a projection; they get no gradient.
        mask: [...] booleans, True for the rows that count (no padding); None for all.
        kind: "mse" or "cosine".
        projection: turns rows [n, E] into [n, E']; called on the rows that count alone. A learnt one is a module, such
            as `nn.Linear(E, E')`, whose parameters the optimizer must be given.
        reduction: "mean" over the rows that count, "sum", or "none": [...], with 0 where the mask is False.

    Returns:
        A scalar, or [...] for "none", in at least float32; 0 or more.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or no row counts and the mean is asked for.

    Example:
        >>> student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
        >>> project = nn.Linear(5, 7, bias=False)
        >>> feature_distillation_loss(student, teacher, projection=project).shape
        torch.Size([])
        >>> feature_distillation_loss(student, 2 * student, kind="cosine").item() < 1e-6
        True

    Jiao et al. 2020, "TinyBERT", equation 8 (mse, with a learnt projection); Sanh et al. 2019, "DistilBERT", section 2
    (cosine).
    """
    check_reduction(reduction)
    if kind not in get_args(Kind):
        raise ValueError(f'kind must be "mse" or "cosine"; got {kind!r}')
    if student.ndim < 1 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"expected student [..., E] and teacher [..., E'] with the same rows; got {[*student.shape]} and "
            f"{[*teacher.shape]}"
        )
    shape = student.shape[:-1]
    rows = rows_that_count(mask, shape, reduction)
    s, t = counted(student, rows), counted(teacher.detach(), rows)
    s = s if projection is None else projection(s)
    if s.shape != t.shape:
        what = "the student's features" if projection is None else "the projection of the student's features"
        raise ValueError(
            f"{what} [n, E] must be as wide as the teacher's; got {s.shape[-1]} and {t.shape[-1]}: give a projection, "
            f"such as nn.Linear({student.shape[-1]}, {t.shape[-1]})"
        )
    wide = torch.promote_types(at_least_float32(s).dtype, at_least_float32(t).dtype)
    s, t = s.to(wide), t.to(wide)
    value = (s - t).square().mean(-1) if kind == "mse" else (_direction(s) - _direction(t)).square().sum(-1) / 2
    return reduced(value, rows, shape, reduction)


@dataclass(frozen=True)
class FeatureDistillationLoss:
    """A language model's loss plus `strength` times the distance of its last hidden states from a teacher model's.

    The hidden states are those that enter the heads, at the labelled places alone, so that both terms are means over
    the same targets. The teacher runs in eval mode, without gradients, and leaves modes and random state alone. For
    other layers, and for classifiers, call `feature_distillation_loss`.

    Attributes:
        teacher: a model of the same tokens and kind as the student, on the same device.
        loss: `causal_lm_loss`, `masked_lm_loss` or `sequence_to_sequence_loss`, also with other options.
        strength: factor of the distance, 0 or more.
        kind: as in `feature_distillation_loss`.
        projection: from the student's width to the teacher's, where they differ: a module that is part of the student
            (`model.projection = nn.Linear(E, E')`), so that the optimizer trains it and checkpoints hold it.

    Raises:
        ValueError: strength or kind is out of range.
        TypeError: the teacher is no module, or the loss none of the three.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> model = tiny_llama()
        >>> loss, parts = FeatureDistillationLoss(model, strength=1.0)(model, {"input_ids": ids, "labels": ids})
        >>> parts["feature_distillation"].item()
        0.0
    """

    teacher: nn.Module
    loss: CausalLMLoss | MaskedLMLoss | SequenceToSequenceLoss = causal_lm_loss
    strength: float = field(kw_only=True)
    kind: Kind = field(default="mse", kw_only=True)
    projection: nn.Module | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module):
            raise TypeError(f"the teacher must be a model, that is a torch module; got {self.teacher!r}")
        if not isinstance(self.loss, CausalLMLoss | MaskedLMLoss | SequenceToSequenceLoss):
            raise TypeError(
                "the loss must be causal_lm_loss, masked_lm_loss or sequence_to_sequence_loss, also with other options;"
                f" got {self.loss!r}"
            )
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be a finite number, 0 or more; got {self.strength}")
        if self.kind not in get_args(Kind):
            raise ValueError(f'kind must be "mse" or "cosine"; got {self.kind!r}')

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (total, parts): "task_loss" and "feature_distillation" (before its strength), scalars.

        Args:
            model: the student, wrapped or not.
            batch: what `loss` takes.

        Raises:
            ValueError: what `loss` raises, the widths do not fit, or the projection has parameters to train that are no
                part of the model.
        """
        if self.projection is not None:
            known = {id(parameter) for parameter in model.parameters()}
            if any(p.requires_grad and id(p) not in known for p in self.projection.parameters()):
                raise ValueError(
                    "the projection is no part of the model, so nothing would train or save it: register it "
                    "(model.projection = projection) before the optimizer is made, or freeze it"
                )
        with reference_pass(self.teacher):
            wanted, _, _ = self.loss.before_head(self.teacher, batch)
        hidden, head, targets = self.loss.before_head(model, batch)
        task_loss = head_loss(hidden, head, targets, CrossEntropy(self.loss.label_smoothing, self.loss.z_loss))
        distance = feature_distillation_loss(
            hidden, wanted, mask=targets != -100, kind=self.kind, projection=self.projection
        )
        parts = {"task_loss": task_loss.detach(), "feature_distillation": distance.detach()}
        return task_loss + self.strength * distance, parts

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count."""
        return self.loss.count_targets(batch)


def _direction(x: Tensor) -> Tensor:
    """Return the rows of x [n, E] divided by their lengths, and zeros as they are."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length == 0, 1.0, length)
