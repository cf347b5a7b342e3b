"""The loss of an encoder-decoder: the decoder names the target sequence token by token."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.head import Head, hidden_before_head
from llmtune.losses.token_loss import check_language_model, head_cross_entropy, token_labels
from llmtune.modules import unwrap
from llmtune.types import Batch


@dataclass(frozen=True)
class SequenceToSequenceLoss:
    """Mean over targets of -log p(label[t] | input, labels before t).

    The decoder's inputs are the labels shifted right, as the model itself does it, unless the batch brings
    "decoder_input_ids". Whatever the model does around its head (T5's factor d_model ** -0.5,
    BART's `final_logits_bias`) is included.

    Attributes:
        label_smoothing: share of every target spread evenly over the vocabulary, 0 to 1.
        z_loss: factor of the squared log-denominator of the softmax, added.

    Raises:
        ValueError: an option is out of range.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        CrossEntropy(self.label_smoothing, self.z_loss)  # checks them

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over `count_targets(batch)` targets, a scalar in at least float32.

        Args:
            model: an encoder-decoder with a language-modelling head, wrapped or not.
            batch: "input_ids" [B, S], "labels" [B, T] (-100 where there is no target), and whatever else the model's
                forward takes.

        Raises:
            ValueError: the batch has no labels, all of them are -100, one is out of range, the decoder's inputs cannot
                be made, the model's head cannot be found, or the model adds to its loss what is not in its logits.
        """
        return head_cross_entropy(
            *self.before_head(model, batch), label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )

    def before_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Head, Tensor]:
        """Run the model; return what enters its head, the head, and the targets, which are -100 where there is none.

        Args:
            model: as for the loss.
            batch: as for the loss.

        Returns:
            (hidden [B, n, E], head, targets [B, n]).

        Raises:
            ValueError: as the loss does, but for the labels' range.
        """
        labels = token_labels(batch)
        check_language_model(model, encoder_decoder=True)
        if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
            batch = {**batch, "decoder_input_ids": decoder_inputs(unwrap(model), labels)}
        hidden, head = hidden_before_head(model, batch)
        return hidden, head, labels

    def count_targets(self, batch: Batch) -> int:
        """Return how many labels are not -100: every target token counts, the first too."""
        return int((token_labels(batch) != -100).sum())


def decoder_inputs(inner: nn.Module, labels: Tensor) -> Tensor:
    """Return the decoder's input ids [B, T] for labels [B, T]: shifted right by the model's own method or function.

    Args:
        inner: the encoder-decoder, unwrapped.
        labels: target token ids, -100 where there is no target.

    Raises:
        ValueError: the model has neither `prepare_decoder_input_ids_from_labels` nor a `shift_tokens_right`.
    """
    prepare = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return cast(Tensor, prepare(labels=labels))
    shift = getattr(sys.modules[type(inner).__module__], "shift_tokens_right", None)
    if shift is None or len(inspect.signature(shift).parameters) != 3:
        raise ValueError(
            f"{type(inner).__name__} cannot make the decoder's inputs from the labels (it has no "
            'prepare_decoder_input_ids_from_labels): put "decoder_input_ids" into the batch'
        )
    config: Any = inner.config
    return cast(Tensor, shift(labels, config.pad_token_id, config.decoder_start_token_id))


sequence_to_sequence_loss = SequenceToSequenceLoss()
