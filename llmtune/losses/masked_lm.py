"""The loss of a masked language model: the hidden tokens are named where they stand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.head import Head, hidden_before_head
from llmtune.losses.token_loss import check_language_model, head_cross_entropy, token_labels
from llmtune.types import Batch


@dataclass(frozen=True)
class MaskedLMLoss:
    """Mean over labelled positions of -log p(label[t] | the masked text), without a shift.

    Works for any Hugging Face masked language model (its transform before the head included) and computes the head only
    at labelled positions: with 15 % of the tokens masked, a seventh of the logits. `llmtune.data.MaskedLMCollator`
    makes the batches.

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
            model: a masked language model, wrapped or not.
            batch: "input_ids" and "labels" [B, T], and whatever else the model's forward takes.

        Raises:
            ValueError: the batch has no labels, all of them are -100, one is out of range, the model's head cannot be
                found, or the model adds to its loss what is not in its logits.
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
        check_language_model(model)
        hidden, head = hidden_before_head(model, batch)
        return hidden, head, labels

    def count_targets(self, batch: Batch) -> int:
        """Return how many labels are not -100."""
        return int((token_labels(batch) != -100).sum())


masked_lm_loss = MaskedLMLoss()
