"""R-Drop: two passes that differ by their dropout alone must agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.chunked import at_least_float32
from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.rows import labelled_rows
from llmtune.modules import unwrap
from llmtune.optim.draws import torch_states
from llmtune.regularizers.predictions import Kind, Predictions, check_kind, hard_loss, predictions_of, sum_over_rows
from llmtune.regularizers.random_state import same_state
from llmtune.regularizers.symmetric import symmetric_kl
from llmtune.types import Batch, LossResult


def r_drop_loss(
    logits_a: Tensor, logits_b: Tensor, targets: Tensor, *, alpha: float, ignore_index: int = -100
) -> Tensor:
    """Return the cross-entropy of two passes and their divergence from each other, means over the labelled rows.

        1/2 (CE_a + CE_b) + alpha * 1/2 (KL(a || b) + KL(b || a))

    Rows without a label change nothing, not even by NaN in them.

    Args:
        logits_a: [..., V], of one pass in train mode.
        logits_b: [..., V], of another on the same rows. Gradients flow to both.
        targets: [...] integers in 0 ... V - 1, or `ignore_index`. A causal model's are to be shifted before.
        alpha: factor of the divergence, 0 or more; 1 to 5 in the paper.
        ignore_index: the target of a row that carries no label.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: alpha or a target is out of range, shapes do not fit, or no row carries a label.
        TypeError: the targets are no integers.

    Liang et al., "R-Drop: Regularized Dropout for Neural Networks" (2021), section 2. Equation 4 sums the two
    cross-entropies; as in the authors' program they are averaged here, so this alpha is twice the paper's. Where we
    differ from that program: it sums the divergence over batch, positions and classes, padding included, and adds that
    to a mean; then the weight of the divergence grows with the batch and with its padding. Here both are means over the
    labelled rows.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> loss = r_drop_loss(logits, logits, torch.tensor([0, 1]), alpha=4.0)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])))
        True
    """
    _check_alpha(alpha)
    if logits_a.shape != logits_b.shape or logits_a.shape[:-1] != targets.shape:
        raise ValueError(
            f"expected two logits [..., V] and targets [...]; got {[*logits_a.shape]}, {[*logits_b.shape]} and "
            f"{[*targets.shape]}"
        )
    V = logits_a.shape[-1]
    a, b, wanted = logits_a.reshape(-1, V), logits_b.reshape(-1, V), targets.reshape(-1)
    rows = labelled_rows(wanted, V, ignore_index=ignore_index)
    if rows is not None:
        a, b, wanted = a.index_select(0, rows), b.index_select(0, rows), wanted.index_select(0, rows)
    if len(wanted) == 0:
        raise ValueError(f"the mean needs at least one target: all {targets.numel()} are ignored ({ignore_index})")
    hard, soft = _sums(at_least_float32(a), at_least_float32(b), wanted, CrossEntropy()) / len(wanted)
    return hard + alpha * soft


@dataclass(frozen=True)
class RDropLoss:
    """A loss made R-Drop: 1/2 (L_a + L_b) + alpha * 1/2 (KL(a || b) + KL(b || a)) of two passes in train mode.

    Each batch is run twice, one pass after the other, rather than once with its rows doubled: so any entry a batch may
    have goes through, packed documents and their offsets too, and each half has dropout of its own even where a mask is
    shared by a batch's rows. Both passes are held until the backward pass, as doubled rows would be. Only labelled
    places are compared. A language model's logits are never all held: they are made from the hidden states before its
    head, a few rows at a time.

    In eval mode, where there is no dropout to agree on, and without gradients, it is the plain loss, of one pass.

    Attributes:
        loss: what to learn by: `causal_lm_loss`, `masked_lm_loss`, `sequence_to_sequence_loss` or
            `classification_loss` with integer labels, with their options.
        alpha: factor of the divergence, 0 or more.

    Raises:
        ValueError: alpha is out of range.
        TypeError: the loss is none of the four.

    Example:
        >>> from llmtune.testing.models import tiny_gpt2
        >>> model = tiny_gpt2(dropout=0.1).train()
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> loss, parts = RDropLoss(alpha=1.0)(model, {"input_ids": ids, "labels": ids})
        >>> sorted(parts)
        ['r_drop', 'task_loss']

    Liang et al. 2021; see `r_drop_loss` for the scale of alpha and for where we differ.
    """

    loss: Kind = causal_lm_loss
    alpha: float = field(kw_only=True)

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)
        check_kind(self.loss, "R-Drop")

    def __call__(self, model: nn.Module, batch: Batch) -> LossResult:
        """Return (total, parts): "task_loss" and "r_drop", the divergence before its alpha, scalars; or the plain loss.

        Args:
            model: wrapped or not; in train mode, with dropout.
            batch: what the loss takes, with labels of integers.

        Raises:
            ValueError: the model has no dropout: in train mode it draws nothing at random and gives the same outputs to
                the bit; or the labels are missing, do not fit, or are all -100.
        """
        inner = unwrap(model)
        if not inner.training or not torch.is_grad_enabled():
            return self.loss(model, batch)
        before = torch_states(inner.parameters())
        a = predictions_of(self.loss, model, batch)
        drawn = not same_state(before, torch_states(inner.parameters()))
        b = predictions_of(self.loss, model, batch)
        self._check_apart(inner, a, b, drawn)
        hard = hard_loss(self.loss)
        task, divergence = sum_over_rows(lambda x, y, t: _sums(x, y, t, hard), a, b) / len(a.targets)
        return task + self.alpha * divergence, {"task_loss": task.detach(), "r_drop": divergence.detach()}

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count."""
        return self.loss.count_targets(batch)

    def _check_apart(self, inner: nn.Module, a: Predictions, b: Predictions, drawn: bool) -> None:
        # equal outputs alone prove nothing: an adapter with dropout changes no output at its start, B = 0
        if not drawn and torch.equal(a.rows, b.rows):
            raise ValueError(
                f"R-Drop compares two draws of dropout, and {type(inner).__name__} has none: in train mode it draws "
                "nothing at random and two passes are equal to the bit. Set dropout in its configuration (attention, "
                "residual), attach an adapter with dropout, or leave R-Drop out"
            )


def _sums(logits_a: Tensor, logits_b: Tensor, targets: Tensor, hard: CrossEntropy) -> Tensor:
    """Return [2]: the sums over rows of the two sides' mean cross-entropy and of half their symmetric divergence."""
    both = hard.plain(logits_a, (targets,)) + hard.plain(logits_b, (targets,))
    return torch.stack([both.sum(), symmetric_kl(logits_a, logits_b).sum()]) / 2


def _check_alpha(alpha: float) -> None:
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number, 0 or more; got {alpha}")
