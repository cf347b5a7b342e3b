"""Mixup for classification: learn from mixtures of two rows and of their classes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmtune.losses.classification import classification_loss
from llmtune.losses.head import model_inputs
from llmtune.regularizers.hidden_mixing import mixed_at
from llmtune.regularizers.mixing import Pairs, check_alpha, mixup_loss, mixup_pairs
from llmtune.regularizers.perturbation import real_tokens
from llmtune.types import Batch, LossResult


@dataclass(frozen=True)
class MixupLoss:
    """The loss of a classifier of whole rows on mixtures: hidden states mixed at a layer, classes in the same shares.

    Layer 0 mixes what the embeddings give to the first layer (Guo et al. 2019); a higher one, hidden states (Verma et
    al. 2019); of several, one is drawn for each batch. From that layer on a row attends to both rows' tokens, and
    where a classifier reads a row's last token, it reads that of the longer one. Padding gives a zero vector, so rows
    of like length make the cleanest mixtures. A row whose own share is 1 is as it was.

    Language models and taggers are refused: a mixture of two texts has no next token. Rows of a batch depend on each
    other here, so other micro-batches give other mixtures. Without gradients (evaluation) it is the plain loss.

    Attributes:
        alpha: of Beta(alpha, alpha), from which each row's own share is drawn, larger than 0.
        layer: number of the layer whose input is mixed, from 0; or several, to draw from.

    Raises:
        ValueError: alpha is out of range, or there is no layer, or a negative one.

    Example:
        >>> from llmtune.testing.models import tiny_bert
        >>> batch = {"input_ids": torch.tensor([[5, 7, 11], [3, 2, 1]]), "labels": torch.tensor([2, 0])}
        >>> MixupLoss(alpha=0.4, layer=(0, 1))(tiny_bert(labels=3), batch).shape
        torch.Size([])

    Zhang et al. 2018; Chen et al., "MixText" (2020), whose program attends with the mask of the first row alone and
    takes the mean over padding too.
    """

    alpha: float = field(kw_only=True)
    layer: int | tuple[int, ...] = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        layers = self._layers()
        if not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ValueError(f"layer must be a number from 0, or a tuple of one or more such; got {self.layer!r}")

    def __call__(self, model: nn.Module, batch: Batch) -> LossResult:
        """Return the mean loss over `count_targets(batch)` targets, a scalar in at least float32.

        Args:
            model: a classifier of whole rows whose output has `logits` [B, C], with one stack of layers; wrapped or
                not.
            batch: "input_ids" [B, T], "labels" [B] of integers, two or more of them not -100.

        Raises:
            ValueError: the labels are not one class a row, fewer than two rows have one, or the model's layers are not
                found or cannot be mixed.
        """
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
            raise ValueError(
                f"mixup is for classification of whole rows, so integer labels [B] are needed; got {came}. A mixture "
                "of two texts has no next token and no class for each of its places"
            )
        if not torch.is_grad_enabled():
            return classification_loss(model, batch)
        real, pairs = real_tokens(batch), mixup_pairs(labels, alpha=self.alpha)
        layer = self._layers()[int(torch.randint(len(self._layers()), ()))]
        with mixed_at(model, layer, pairs, real):
            logits = model(**model_inputs(model, _reaching_on(batch, pairs, real))).logits
        return mixup_loss(logits, labels, pairs)

    def count_targets(self, batch: Batch) -> int:
        """Return how many labels are not -100."""
        return classification_loss.count_targets(batch)

    def _layers(self) -> tuple[int, ...]:
        return tuple(self.layer) if isinstance(self.layer, tuple | list) else (self.layer,)


def _reaching_on(batch: Batch, pairs: Pairs, real: Tensor) -> Batch:
    """Return the batch with a longer partner's ids behind each row's own: classifiers look for the last token there.

    Nothing else reads them: the row's own mask hides these places below the mixed layer, and mixing gives them the
    weight 0.
    """
    behind = real.flip(1).cumsum(1).flip(1) == 0
    longer = behind & real[pairs.partners] & (pairs.weights < 1)[:, None]
    return {**batch, "input_ids": torch.where(longer, batch["input_ids"][pairs.partners], batch["input_ids"])}
