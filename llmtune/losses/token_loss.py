"""Cross-entropy of labelled token positions through any language-model head: what the language-model losses share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtune.losses.chunked import at_least_float32, default_chunk_rows, linear_row_loss
from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.head import Head
from llmtune.losses.row_loss import RowLoss
from llmtune.losses.rows import Reduction, check_reduction, is_integer, labelled_rows, reduced
from llmtune.modules import unwrap
from llmtune.types import Batch


class TargetLoss(RowLoss, Protocol):
    """A `RowLoss` whose one tensor beside the logits are the targets, none of them ignored."""

    def after_head(self, softcap: float | None, logit_scale: float) -> TargetLoss:
        """Return the same loss of logits that are scaled and soft-capped first."""
        ...


def head_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the cross-entropy of the head's logits at the positions that carry a label, their mean by default.

    A plain linear head goes through `linear_cross_entropy`. Any other (an adapter on the head, a quantized head) is
    called as it stands on the labelled rows, chunk by chunk, and called again in the backward pass, with the same
    dropout: its logits are never all held either.

    Args:
        hidden: [..., E], what enters the head.
        head: from `hidden_before_head`.
        targets: [...] integers, the class of each position, -100 where there is none.
        label_smoothing: as in `linear_cross_entropy`.
        z_loss: as in `linear_cross_entropy`.
        reduction: "mean" over the positions with a label, "sum", or "none": [...], with 0 where there is no label.

    Returns:
        A scalar, or [...] for "none", in at least float32.

    Raises:
        ValueError: a label or an option is out of range, or no position carries a label and the mean is asked for.
    """
    return head_loss(hidden, head, targets, CrossEntropy(label_smoothing, z_loss), reduction=reduction)


def head_loss(
    hidden: Tensor, head: Head, targets: Tensor, loss: TargetLoss, *, reduction: Reduction = "mean"
) -> Tensor:
    """Return a loss of the head's logits at the positions that carry a label; see `head_cross_entropy`.

    Args:
        hidden: [..., E], what enters the head.
        head: from `hidden_before_head`.
        targets: [...] integers, the class of each position, -100 where there is none.
        loss: of a row of logits and its target.
        reduction: "mean" over the positions with a label, "sum", or "none": [...], with 0 where there is no label.

    Returns:
        A scalar, or [...] for "none", in at least float32.

    Raises:
        ValueError: a label is out of range, or no position carries a label and the mean is asked for.
    """
    check_reduction(reduction)
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"the model's head is given hidden states {[*hidden.shape]}, which do not match the targets "
            f"{[*targets.shape]}: this model cannot be trained with labels of that shape"
        )
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    labelled = labelled_rows(wanted, head.classes)
    if labelled is not None:
        rows, wanted = rows.index_select(0, labelled), wanted.index_select(0, labelled)
    if len(wanted) == 0 and reduction == "mean":
        raise ValueError(f"the mean needs at least one target: all {targets.numel()} are ignored (labels all -100)")
    plain, factor = head.linear(), 1 / len(wanted) if reduction == "mean" else 1.0
    if plain is not None:
        loss = loss.after_head(head.softcap, head.logit_scale)
        losses = linear_row_loss(rows, *plain, loss, (wanted,), per_row=reduction == "none", factor=factor)
    else:
        losses = _losses_in_chunks(rows, head, wanted, loss)
        losses = losses if reduction == "none" else losses.sum() * factor
    return reduced(losses, labelled, targets.shape, "none") if reduction == "none" else losses


def _losses_in_chunks(rows: Tensor, head: Head, targets: Tensor, loss: TargetLoss) -> Tensor:
    """Return the losses [N], the head called as it stands and once more in the backward pass, a few rows at a time."""

    def chunk_loss(h: Tensor, t: Tensor) -> Tensor:
        return loss.plain(at_least_float32(head.logits(h)), (t,))

    size = default_chunk_rows(rows.new_empty(head.classes, 0), buffers=loss.buffers + 3)  # and what autograd keeps
    parts = [
        checkpoint(chunk_loss, h, t, use_reentrant=False)
        for h, t in zip(rows.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


def check_language_model(model: nn.Module, *, encoder_decoder: bool = False, causal: bool = False) -> None:
    """Raise where a loss of the head's logits would not be the loss the model stands for.

    Args:
        model: the model to train, wrapped or not.
        encoder_decoder: whether the loss is for encoder-decoders.
        causal: whether the loss has each token predict the next.

    Raises:
        ValueError: the model is an encoder-decoder and the loss is not for such (some then make up decoder inputs from
            the encoder's); the loss is causal and the model sees the tokens it would predict; or its configuration
            asks for a router's balancing loss, which is not in the logits.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False) and not encoder_decoder:
        raise ValueError(f"{type(inner).__name__} is an encoder-decoder: use sequence_to_sequence_loss")
    generates, head = getattr(inner, "can_generate", None), getattr(inner, "get_output_embeddings", None)
    if causal and callable(generates) and not generates() and callable(head) and head() is not None:
        raise ValueError(
            f"{type(inner).__name__} sees the tokens after a place as well, so predicting the next teaches it nothing: "
            "use masked_lm_loss, or load the model as a causal one (AutoModelForCausalLM)"
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{type(inner).__name__} is configured with output_router_logits=True, which adds a balancing loss of its "
            "router to its own loss; this loss would leave it out. Set model.config.output_router_logits = False"
        )


def token_labels(batch: Batch) -> Tensor:
    """Return the batch's labels [B, T], one integer a token.

    Raises:
        ValueError: the batch has no "labels" [B, T] of integers.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and is_integer(labels):
        return labels.long()  # in a narrower type a token may look like -100
    came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
    raise ValueError(f'the loss needs integer "labels" [B, T] in the batch, one a token; got {came}')
