"""The log-probability of whole sequences, without a language model's logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmtune.losses.head import hidden_before_head
from llmtune.losses.packed import is_packed
from llmtune.losses.sequence_to_sequence import decoder_inputs
from llmtune.losses.token_loss import check_language_model, head_cross_entropy, token_labels
from llmtune.modules import unwrap
from llmtune.types import Batch


def sequence_log_probabilities(model: nn.Module, batch: Batch, *, per_token: bool = False) -> Tensor:
    """Return the log-probability that the model gives each row's labels.

    log p(row) = sum over labelled t of log p(label[t] | tokens before t)

    Labels come unshifted, as in Hugging Face; a causal model's are shifted here, an encoder-decoder's are not. The
    [B, T, V] logits are never held: the head is computed at labelled positions only, a few at a time. What the model
    does to its logits (soft cap, factor, bias) is included, and so is an adapter on the head.

    Args:
        model: a causal language model or an encoder-decoder, wrapped or not.
        batch: "input_ids" [B, S] and "labels" [B, T], -100 where there is no target (S = T for a causal model), and
            whatever else the model's forward takes; padded on either side, one sequence a row.
        per_token: divide each row's sum by its number of labels: the mean log-probability of a token.

    Returns:
        [B], in at least float32, 0 or less; with gradient.

    Raises:
        ValueError: a row has no label that is predicted, a label is out of range, the batch is packed, or the model's
            head cannot be found.

    Example:
        >>> import torch
        >>> from llmtune.testing.models import tiny_llama
        >>> ids = torch.tensor([[5, 7, 11, 13], [5, 7, 3, 2]])
        >>> labels = torch.tensor([[-100, -100, 11, 13], [-100, -100, 3, -100]])
        >>> sequence_log_probabilities(tiny_llama(), {"input_ids": ids, "labels": labels}).shape
        torch.Size([2])
    """
    labels, inner = token_labels(batch), unwrap(model)
    config: Any = getattr(inner, "config", None)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    check_language_model(model, encoder_decoder=encoder_decoder, causal=not encoder_decoder)
    targets = labels if encoder_decoder else labels[:, 1:]
    counts = (targets != -100).sum(1)
    if not bool(counts.all()):
        raise ValueError(
            f"row {int((counts == 0).nonzero()[0])} has no label that is predicted (all are -100, or only the first "
            "token has one): there is nothing whose probability could be given"
        )
    if is_packed(batch):
        raise ValueError(
            "the batch is packed (position_ids start again within a row), and a row's probability would be that of "
            "several sequences: pad one sequence a row"
        )
    if encoder_decoder and "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
        batch = {**batch, "decoder_input_ids": decoder_inputs(inner, labels)}
    hidden, head = hidden_before_head(model, batch)
    if not encoder_decoder:
        hidden = hidden[:, -labels.shape[1] : -1]  # from the end: virtual tokens stand before the first
    total = -head_cross_entropy(hidden, head, targets, reduction="none").sum(1)
    return total / counts if per_token else total
