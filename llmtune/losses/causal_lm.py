"""The loss of a causal language model: each token predicts the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.head import Head, hidden_before_head
from llmtune.losses.token_loss import check_language_model, head_cross_entropy, token_labels
from llmtune.types import Batch


@dataclass(frozen=True)
class CausalLMLoss:
    """Mean over targets of -log p(label[t + 1] | tokens up to t): labels come unshifted, the loss shifts.

    Works for any Hugging Face causal language model, with the model's own soft-capping and logit scale, and equals the
    loss that the model itself returns. It never builds the [B, T, V] logits; positions without a label cost nothing in
    the head. Label smoothing acts after the shift, on labelled positions alone.

    Attributes:
        label_smoothing: share of every target spread evenly over the vocabulary, 0 to 1.
        z_loss: factor of the squared log-denominator of the softmax, added.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import torch
        >>> from llmtune.testing.models import tiny_llama
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> batch = {"input_ids": ids, "labels": ids}
        >>> causal_lm_loss.count_targets(batch)
        3
        >>> model = tiny_llama()
        >>> torch.allclose(causal_lm_loss(model, batch), model(**batch).loss)
        True
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        CrossEntropy(self.label_smoothing, self.z_loss)  # checks them

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over `count_targets(batch)` targets, a scalar in at least float32.

        Args:
            model: a causal language model, wrapped or not.
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
        targets = token_labels(batch)[:, 1:]
        check_language_model(model, causal=True)
        hidden, head = hidden_before_head(model, batch)
        T = targets.shape[1] + 1  # counted from the end: prompt tuning puts virtual tokens before the first
        return hidden[:, -T:-1], head, targets

    def count_targets(self, batch: Batch) -> int:
        """Return how many labels are not -100, each row's first left out: nothing predicts it."""
        return int((token_labels(batch)[:, 1:] != -100).sum())


causal_lm_loss = CausalLMLoss()
