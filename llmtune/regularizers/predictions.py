"""What a model predicts at the labelled places of a batch, in a form that two passes can be compared in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtune.losses.causal_lm import CausalLMLoss
from llmtune.losses.chunked import at_least_float32, default_chunk_rows
from llmtune.losses.classification import ClassificationLoss
from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.head import Head, hidden_before_head, model_inputs
from llmtune.losses.masked_lm import MaskedLMLoss
from llmtune.losses.rows import labelled_rows
from llmtune.losses.sequence_to_sequence import SequenceToSequenceLoss, decoder_inputs
from llmtune.losses.token_loss import check_language_model, token_labels
from llmtune.modules import unwrap
from llmtune.types import Batch

KINDS = (CausalLMLoss, MaskedLMLoss, SequenceToSequenceLoss, ClassificationLoss)
Kind = CausalLMLoss | MaskedLMLoss | SequenceToSequenceLoss | ClassificationLoss
RowSums = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [n, V], logits [n, V], targets [n]) to sums over the rows, [k]."""
BUFFERS = 12  # logits, softmaxes and gradients of both sides


@dataclass(frozen=True)
class Predictions:
    """The predictions at the m labelled places of a batch.

    Attributes:
        rows: [m, C] logits; or, where there is a head, [m, E] hidden states that enter it.
        targets: [m] the labels.
        head: a language model's head, whose logits are made in chunks; or None.
    """

    rows: Tensor
    targets: Tensor
    head: Head | None

    def detached(self) -> Predictions:
        """Return the same without gradient (that of the head's own weights is still there)."""
        return replace(self, rows=self.rows.detach())


def check_kind(loss: Any, who: str) -> None:
    """Raise TypeError where it is not known of which logits `loss` is: it is none of the library's four."""
    if not isinstance(loss, KINDS):
        raise TypeError(
            f"{who} compares predictions, so its loss must be one that it knows the predictions of: "
            f"{', '.join(kind.__name__ for kind in KINDS)}; got {loss!r}"
        )


def hard_loss(loss: Kind) -> CrossEntropy:
    """Return the cross-entropy of a row of logits, with the loss's own options."""
    return CrossEntropy(loss.label_smoothing, getattr(loss, "z_loss", 0.0))


def predictions_of(loss: Kind, model: nn.Module, batch: Batch) -> Predictions:
    """Run the model once and return its predictions at the places whose labels `loss` counts.

    Args:
        loss: says where the labels stand; a causal one's are one place ahead.
        model: wrapped or not.
        batch: what the loss takes.

    Raises:
        ValueError: the labels are missing, do not fit the model, are out of range, or all of them are -100.
    """
    head: Head | None = None
    if isinstance(loss, ClassificationLoss):
        outputs, targets = _classified(model, batch)
        classes = outputs.shape[-1]
    else:
        outputs, targets, head = _named(loss, model, batch)
        classes = head.classes
    if outputs.shape[:-1] != targets.shape or classes < 2:
        raise ValueError(
            f"labels {[*targets.shape]} need one row of outputs each, over two classes or more; the model gave "
            f"{[*outputs.shape]}, over {classes}"
        )
    rows, targets = outputs.flatten(0, -2), targets.flatten()
    labelled = labelled_rows(targets, classes)
    if labelled is not None:
        rows, targets = rows.index_select(0, labelled), targets.index_select(0, labelled)
    if len(targets) == 0:
        raise ValueError("the mean needs at least one target: all labels of the batch are ignored (-100)")
    return Predictions(rows, targets, head)


def sum_over_rows(fn: RowSums, a: Predictions, b: Predictions) -> Tensor:
    """Return the sums [k] of `fn` over all places of two passes on one batch.

    A language model's logits are made chunk by chunk and made again in the backward pass, with the same dropout, so
    that they are never all held.

    Args:
        fn: a function of two sides' logits and the targets.
        a: of one pass.
        b: of the other.
    """
    one, other = a.head, b.head
    if one is None or other is None:
        return fn(at_least_float32(a.rows), at_least_float32(b.rows), a.targets)

    def chunk(hidden_a: Tensor, hidden_b: Tensor, targets: Tensor) -> Tensor:
        return fn(at_least_float32(one.logits(hidden_a)), at_least_float32(other.logits(hidden_b)), targets)

    size = default_chunk_rows(a.rows.new_empty(one.classes, 0), buffers=BUFFERS)
    chunks = zip(a.rows.split(size), b.rows.split(size), a.targets.split(size), strict=True)
    return torch.stack([checkpoint(chunk, *tensors, use_reentrant=False) for tensors in chunks]).sum(0)


def _classified(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim not in (1, 2):
        came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(
            f"distributions over classes are compared, so integer labels [B] or [B, T] are needed; got {came}"
        )
    return model(**model_inputs(model, batch)).logits, labels


def _named(
    loss: CausalLMLoss | MaskedLMLoss | SequenceToSequenceLoss, model: nn.Module, batch: Batch
) -> tuple[Tensor, Tensor, Head]:
    """Return (hidden [B, T', E], targets [B, T'], head) of a language model."""
    labels = token_labels(batch)
    causal = isinstance(loss, CausalLMLoss)
    check_language_model(model, causal=causal, encoder_decoder=isinstance(loss, SequenceToSequenceLoss))
    if isinstance(loss, SequenceToSequenceLoss):
        if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
            batch = {**batch, "decoder_input_ids": decoder_inputs(unwrap(model), labels)}
    hidden, head = hidden_before_head(model, batch)
    if causal:  # counted from the end, as the loss does
        return hidden[:, -labels.shape[1] : -1], labels[:, 1:], head
    return hidden, labels, head
