"""Cross-entropy of labelled token positions through any language-model head: what the language-model losses share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmtune.losses.cross_entropy import (
    CrossEntropy,
    cross_entropy_of_logits,
    default_chunk_rows,
    labelled_rows,
    linear_cross_entropy,
)
from llmtune.losses.head import Head


def head_cross_entropy(
    hidden: Tensor, head: Head, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Return the mean cross-entropy of the head's logits over the positions that carry a label.

    A plain linear head goes through `linear_cross_entropy`. Any other (an adapter on the head, a quantized head) is
    called as it stands on the labelled rows, chunk by chunk, and called again in the backward pass, with the same
    dropout: its logits are never all held either.

    Args:
        hidden: [..., E], what enters the head.
        head: from `hidden_before_head`.
        targets: [...] integers, the class of each position, -100 where there is none.
        label_smoothing: as in `linear_cross_entropy`.
        z_loss: as in `linear_cross_entropy`.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: no position carries a label, or a label is out of range.
    """
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    plain = head.linear()
    if plain is not None:
        weight, bias = plain
        return linear_cross_entropy(
            rows, weight, wanted, bias=bias, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=head.softcap, logit_scale=head.logit_scale,
        )  # fmt: skip
    V = head_classes(head)
    options = CrossEntropy(label_smoothing, z_loss)
    labelled = labelled_rows(wanted, V)
    if labelled is not None:
        rows, wanted = rows.index_select(0, labelled), wanted.index_select(0, labelled)
    if len(wanted) == 0:
        raise ValueError(f"the mean needs at least one target: all {targets.numel()} are ignored (labels all -100)")

    def chunk_loss(h: Tensor, t: Tensor) -> Tensor:
        return cross_entropy_of_logits(head.logits(h), t, options).sum()

    size = default_chunk_rows(rows.new_empty(V, 0), buffers=4)  # autograd keeps the logits, their softmax and gradients
    parts = [
        checkpoint(chunk_loss, h, t, use_reentrant=False)
        for h, t in zip(rows.split(size), wanted.split(size), strict=True)
    ]
    return torch.stack(parts).sum() / len(wanted)


def head_classes(head: Head) -> int:
    """Return V, the number of logits the head gives.

    Raises:
        ValueError: the head has no weight [V, E] and no `out_features` to tell.
    """
    size = getattr(head.module, "out_features", None)
    if size is None and isinstance(getattr(head.module, "weight", None), Tensor):
        size = head.module.weight.shape[0]
    if size is None:
        raise ValueError(f"cannot tell how many logits {type(head.module).__name__} gives: it has no out_features")
    return int(size)
