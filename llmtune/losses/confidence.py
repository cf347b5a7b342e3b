"""The confidence penalty: cross-entropy that pays for predictions of low entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.chunked import at_least_float32
from llmtune.losses.classification import ClassificationLoss, class_rows
from llmtune.losses.cross_entropy import CrossEntropy, scaled_and_capped
from llmtune.losses.masked_lm import MaskedLMLoss
from llmtune.losses.rows import Reduction, check_reduction, counted, reduced, rows_that_count
from llmtune.losses.sequence_to_sequence import SequenceToSequenceLoss
from llmtune.losses.token_loss import head_loss
from llmtune.types import Batch


def confidence_penalty(logits: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Return minus the entropy of softmax(logits): sum of p log p, between -log V (unsure) and 0 (sure).

    A logit of -inf is a probability of 0 and adds nothing. Rows outside the mask change nothing, not even by NaN.

    Args:
        logits: [..., V].
        mask: [...] booleans, True for the rows that count; None for all.
        reduction: "mean" over the rows that count, "sum", or "none": [...], with 0 where the mask is False.

    Returns:
        A scalar, or [...] for "none", in at least float32.

    Raises:
        ValueError: the mask or the reduction is wrong, or no row counts and the mean is asked for.

    Example:
        >>> round(confidence_penalty(torch.zeros(5, 8)).item() / math.log(2), 5)
        -3.0

    Pereyra et al. 2017, "Regularizing neural networks by penalizing confident output distributions", section 3.
    """
    check_reduction(reduction)
    if logits.ndim < 1:
        raise ValueError("expected logits [..., V]; got a scalar")
    shape = logits.shape[:-1]
    rows = rows_that_count(mask, shape, reduction)
    return reduced(_negative_entropy(at_least_float32(counted(logits, rows))), rows, shape, reduction)


@dataclass(frozen=True)
class ConfidencePenaltyLoss:
    """A loss of labels, less `strength` times the entropy of the predictions at the labelled places.

    mean over targets of  CE - strength * H(p),  or with a threshold  CE + strength * max(0, threshold - H(p))

    With a threshold, only predictions surer than it pay. The paper prints that term with a minus before it, and
    NetCal's `confidence_penalty` computes it so, which rewards confidence; here it is a penalty, as the text means it.

    A language model's logits are never held: the term and its gradient are formed with those of the cross-entropy, a
    few rows at a time.

    Attributes:
        loss: what the labels ask for: one of `causal_lm_loss`, `masked_lm_loss`, `sequence_to_sequence_loss` and
            `classification_loss` (integer labels), with their options.
        strength: factor of the entropy, in nats, 0 or more; the paper's are 0.1 to 10.
        threshold: the entropy below which a prediction pays, in nats, larger than 0; None where all pay.

    Raises:
        ValueError: strength or threshold is out of range.
        TypeError: the loss is none of the four.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> model, batch = tiny_llama(), {"input_ids": ids, "labels": ids}
        >>> entropy = -confidence_penalty(model(input_ids=ids).logits[:, :-1])
        >>> loss = ConfidencePenaltyLoss(strength=0.1)
        >>> torch.allclose(loss(model, batch), causal_lm_loss(model, batch) - 0.1 * entropy)
        True

    Pereyra et al. 2017, "Regularizing neural networks by penalizing confident output distributions", section 3.
    """

    loss: CausalLMLoss | MaskedLMLoss | SequenceToSequenceLoss | ClassificationLoss = causal_lm_loss
    strength: float = field(kw_only=True)
    threshold: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.loss, CausalLMLoss | MaskedLMLoss | SequenceToSequenceLoss | ClassificationLoss):
            raise TypeError(
                "the loss must be causal_lm_loss, masked_lm_loss, sequence_to_sequence_loss or classification_loss, "
                f"also with other options; got {self.loss!r}"
            )
        SureCrossEntropy(CrossEntropy(), self.strength, self.threshold)  # checks them

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean over `count_targets(batch)` targets, a scalar in at least float32.

        Args:
            model: what `loss` takes.
            batch: what `loss` takes.

        Raises:
            ValueError: what `loss` raises, or a classifier's labels are floats.
        """
        z_loss = 0.0 if isinstance(self.loss, ClassificationLoss) else self.loss.z_loss
        rows = SureCrossEntropy(CrossEntropy(self.loss.label_smoothing, z_loss), self.strength, self.threshold)
        if isinstance(self.loss, ClassificationLoss):
            logits, targets = class_rows(model, batch)
            return rows.plain(logits, (targets,)).mean()
        return head_loss(*self.loss.before_head(model, batch), rows)

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count."""
        return self.loss.count_targets(batch)


@dataclass(frozen=True)
class SureCrossEntropy:
    """The cross-entropy of a row of logits and what its confidence costs; a `RowLoss` with the targets [N].

    Attributes:
        cross_entropy: with the soft cap and the scale of the logits.
        strength: as in `ConfidencePenaltyLoss`.
        threshold: as in `ConfidencePenaltyLoss`.
    """

    cross_entropy: CrossEntropy
    strength: float
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be a finite number, 0 or more; got {self.strength}")
        if self.threshold is not None and not (self.threshold > 0 and math.isfinite(self.threshold)):
            raise ValueError(f"threshold must be a finite number larger than 0, or None; got {self.threshold}")

    def after_head(self, softcap: float | None, logit_scale: float) -> SureCrossEntropy:
        """Return the same for logits that are scaled and capped first."""
        return replace(self, cross_entropy=self.cross_entropy.after_head(softcap, logit_scale))

    @property
    def takes_few_rows(self) -> bool:
        return True

    @property
    def buffers(self) -> int:
        return self.cross_entropy.buffers + 3

    def in_place(self, z: Tensor, rows: slice, tensors: tuple[Tensor | None, ...], gradients: bool) -> Tensor:
        """Return the losses [n] and turn the logits z [n, V] into their gradient; see `RowLoss`."""
        scale, cap = self.cross_entropy.logit_scale, self.cross_entropy.softcap
        finished = scaled_and_capped(z, scale, cap)
        log_p = finished.log_softmax(-1)
        del finished
        p = log_p.exp()
        log_p.masked_fill_(p == 0, 0.0)
        value = (log_p * p).sum(-1)
        if gradients:
            paid = value.new_full(value.shape, self.strength)
            if self.threshold is not None:
                paid *= value > -self.threshold
            log_p.sub_(value[:, None]).mul_(p).mul_(paid[:, None] * scale)
            if cap is not None:
                torch.tanh(z * (scale / cap), out=p)
                log_p.mul_(p.square_().neg_().add_(1))
        del p
        losses = self.cross_entropy.in_place(z, rows, tensors, gradients)
        if gradients:
            z += log_p
        return losses + self._cost(value)

    def plain(self, z: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Return the losses [N] of logits z [N, V]; see `RowLoss`."""
        finished = scaled_and_capped(z, self.cross_entropy.logit_scale, self.cross_entropy.softcap)
        return self.cross_entropy.plain(z, tensors) + self._cost(_negative_entropy(finished))

    def _cost(self, negative_entropy: Tensor) -> Tensor:
        if self.threshold is not None:
            negative_entropy = (self.threshold + negative_entropy).clamp(min=0)
        return self.strength * negative_entropy


def _negative_entropy(z: Tensor) -> Tensor:
    """Return sum p log p [N] of logits z [N, V]."""
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p)).sum(-1)
