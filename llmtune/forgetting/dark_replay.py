"""Dark experience replay: replayed rows are held to the predictions that they once had."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmtune.data.teacher_fields import INDICES, LOGITS, NOTHING
from llmtune.forgetting.distill_from_cache import (
    common_classes,
    kept_predictions,
    top_k_divergence,
    without_teacher_fields,
)
from llmtune.forgetting.likelihood import IGNORED
from llmtune.forgetting.student import check_factor, check_labels
from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import ClassificationLoss, class_rows
from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.masked_lm import MaskedLMLoss
from llmtune.losses.sequence_to_sequence import SequenceToSequenceLoss
from llmtune.losses.token_loss import head_loss
from llmtune.modules import unwrap
from llmtune.types import Batch


def squared_logit_distance(student: Tensor, kept: Tensor) -> Tensor:
    """Return the sum over rows of ||student - kept||^2 over the classes for which there is a kept logit.

    Args:
        student: [m, C] logits.
        kept: [m, C'] logits, C' no more than C; NaN where there is none. Rows that are all NaN add 0.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: logits are kept of classes that the student has not.
    """
    ours, theirs = common_classes(student, kept)
    there = theirs != -torch.inf
    return torch.where(there, ours.masked_fill(~there, 0.0) - theirs.masked_fill(~there, 0.0), 0.0).square().sum()


@dataclass(frozen=True)
class DERLoss:
    """Dark experience replay (DER), and with `beta` DER++: new rows teach labels, replayed rows their old predictions.

    mean over the batch's targets of
        a new row's target          cross-entropy
        a replayed row's target     alpha * d  +  beta * cross-entropy

    A replayed row is one that has predictions (`with_teacher`); both kinds may stand in one batch, as `MixedBatches`
    makes them. d is, of a classifier, ||z - z_kept||^2, the squared distance of its logits from the kept ones, over
    the classes that had one. Of a language model, all of whose logits nobody can keep, it is KL(kept || now) over the
    kept k classes and one bucket for the rest: the paper's equation 3, of which the squared distance is the
    approximation (equation 4).

    Attributes:
        loss: the cross-entropy: one of `causal_lm_loss`, `masked_lm_loss`, `sequence_to_sequence_loss` and
            `classification_loss` (integer labels), with their options.
        alpha: factor of the distance, 0 or more; not both 0.
        beta: factor of the replayed rows' own cross-entropy, 0 or more; 0 is DER, more is DER++.

    Raises:
        ValueError: alpha or beta is out of range, or both are 0.
        TypeError: the loss is none of the four.

    Example:
        >>> from llmtune.data.collate import collate_padded
        >>> from llmtune.forgetting.cached_teacher import with_teacher
        >>> from llmtune.losses.classification import classification_loss
        >>> from llmtune.testing.models import tiny_bert
        >>> model = tiny_bert(labels=3)
        >>> rows = with_teacher([{"input_ids": [5, 7, 11], "labels": 1}, {"input_ids": [3, 4], "labels": 0}], model)
        >>> loss, parts = DERLoss(classification_loss, alpha=0.5)(model, collate_padded(rows))
        >>> loss.item() < 1e-9
        True

    Reference:
        Buzzega et al. 2020, "Dark experience for general continual learning", equations 4 to 6. Where we differ: one
        mean over all targets, so that batches add up, where the paper adds a mean of each kind: with a share r of
        replayed targets (the ratio of `MixedBatches`) its alpha is ours times r / (1 - r). One draw of replayed rows
        serves both terms; DER++ draws twice. mammoth's and avalanche's `F.mse_loss` divides by the number of classes:
        their alpha is C times ours. mammoth keeps the plain input and the logits of the augmented one, in train mode.
    """

    loss: CausalLMLoss | MaskedLMLoss | SequenceToSequenceLoss | ClassificationLoss = causal_lm_loss
    alpha: float = field(kw_only=True)
    beta: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.loss, CausalLMLoss | MaskedLMLoss | SequenceToSequenceLoss | ClassificationLoss):
            raise TypeError(
                "the loss must be causal_lm_loss, masked_lm_loss, sequence_to_sequence_loss or classification_loss, "
                f"also with other options; got {self.loss!r:.80}"
            )
        check_factor("alpha", self.alpha)
        check_factor("beta", self.beta)
        if self.alpha == self.beta == 0:
            raise ValueError("alpha and beta are both 0: replayed rows would teach nothing")

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (total, parts): "task_loss" of new rows, and before their factors "replay_loss" and "distillation".

        Args:
            model: what `loss` takes.
            batch: what `loss` takes, and a teacher's fields; "labels" of integers, [B] or [B, T].

        Returns:
            A scalar, and scalars: each a sum over its own targets, divided by the number of all.

        Raises:
            ValueError: what `loss` raises; or the batch has no field for predictions, or another model's.
        """
        inner, labels = unwrap(model), check_labels(batch, "dark experience replay")
        kept = kept_predictions(inner, batch, labels, temperature=1.0)
        plain = without_teacher_fields(batch)
        if isinstance(self.loss, ClassificationLoss):
            logits, targets = class_rows(model, plain)
            replayed = ~kept[LOGITS].isnan().all(-1) if kept[LOGITS].shape[-1] else torch.zeros_like(targets) > 0
            losses = CrossEntropy(self.loss.label_smoothing).plain(logits, (targets,))
            fresh, again = losses[~replayed].sum(), losses[replayed].sum()
            distance = squared_logit_distance(logits, kept[LOGITS])
        else:
            hidden, head, places = self.loss.before_head(model, plain)
            rows, targets = hidden[places != IGNORED], places[places != IGNORED]
            if len(targets) == 0:
                raise ValueError(
                    f"the mean needs at least one target: all {labels.numel()} are ignored (labels all -100)"
                )
            replayed = kept[INDICES][:, 0] != NOTHING
            cost = CrossEntropy(self.loss.label_smoothing, self.loss.z_loss)
            fresh = head_loss(rows, head, targets.masked_fill(replayed, IGNORED), cost, reduction="sum")
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.beta > 0):
                again = head_loss(rows, head, targets.masked_fill(~replayed, IGNORED), cost, reduction="sum")
            distance = top_k_divergence(rows, head, kept)
        total = (fresh + self.beta * again + self.alpha * distance) / len(targets)
        parts = {"task_loss": fresh, "replay_loss": again, "distillation": distance}
        return total, {name: part.detach() / len(targets) for name, part in parts.items()}

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count, new and replayed ones."""
        return self.loss.count_targets(without_teacher_fields(batch))
