"""The prototypical loss of a model's embeddings: each row is asked, the other rows of its batch are the examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.contrastive import (
    IGNORED,
    Distance,
    check_distance,
    has_classmate,
    nearness,
    prototypes_of,
    row_classes,
)
from llmtune.losses.embedding import Pooling, check_pooling, sentence_embeddings
from llmtune.losses.rows import check_temperature
from llmtune.types import Batch


@dataclass(frozen=True)
class PrototypicalLoss:
    """`prototypical_loss` of a model's sentence embeddings, each row of a batch against its other rows.

    loss of i = -log( exp(-d(z_i, c_y) / t) / sum over classes k of exp(-d(z_i, c_k) / t) )

    c_k is the mean of class k's rows in the batch, for i's own class y without i itself. So every row with a classmate
    is a query once and an example for all others, where the episodes of Snell et al. 2017 split a batch into examples
    and queries by chance; this is the "batch folding" of Wertheimer and Hariharan 2019.

    Rows couple, as in `SupervisedContrastiveLoss`: let `rows_per_micro_batch` hold the whole step, and overwrite the
    loop's `row_indices` to draw a few classes with several rows each. Rows without a classmate are examples alone. Of
    several processes each compares within its own share. The model needs no logits; for a classifier take
    `nearest_mean_head` after training.

    Attributes:
        distance: "euclidean" (squared) or "cosine".
        temperature: t, larger than 0; the paper's is 1, with "cosine" take 0.1 or so.
        pooling: "mean" over real tokens, "cls" or "last"; see `sentence_embeddings`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> from llmtune.testing.models import tiny_bert
        >>> batch = {"input_ids": torch.tensor([[5, 7], [3, 2], [5, 2], [3, 9]]), "labels": torch.tensor([4, 9, 4, 7])}
        >>> loss = PrototypicalLoss()
        >>> loss.count_targets(batch), loss(tiny_bert(labels=2), batch).shape
        (2, torch.Size([]))
    """

    distance: Distance = "euclidean"
    temperature: float = 1.0
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        check_distance(self.distance)
        check_temperature(self.temperature)
        check_pooling(self.pooling)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over the rows with a classmate, a scalar.

        Args:
            model: as `sentence_embeddings` takes it, wrapped or not.
            batch: "labels" [B], integers, -100 where there is none, and what the model's forward takes.

        Raises:
            ValueError: the labels are missing or no integers [B]; no row has a classmate, or the batch has one class
                alone; or `sentence_embeddings` raises.
        """
        labels = row_classes(batch)
        if self.count_targets(batch) == 0:
            raise ValueError(
                f"the mean needs two classes in a batch, one of them with two rows: the {len(labels)} rows have the "
                f"labels {labels.tolist()[:20]}. Draw batches of a few classes with several rows each"
            )
        embeddings = sentence_embeddings(model, batch, pooling=self.pooling)
        asked = has_classmate(labels).nonzero().squeeze(1)
        classes, prototypes, counts = prototypes_of(embeddings, labels)
        queries = at_least_float32(embeddings.index_select(0, asked))
        targets = torch.searchsorted(classes, labels.index_select(0, asked))
        n = counts[targets, None]
        own = (n * prototypes[targets] - queries) / (n - 1)  # the class's mean without the row itself
        if self.distance == "euclidean":
            to_own = -(queries - own).square().sum(-1)
        else:
            to_own = (F.normalize(queries, dim=1) * F.normalize(own, dim=1)).sum(1) - 1
        z = nearness(queries, prototypes, self.distance).scatter(1, targets[:, None], to_own[:, None])
        return F.cross_entropy(z / self.temperature, targets)

    def count_targets(self, batch: Batch) -> int:
        """Return the number of rows with a classmate, over which the mean is; 0 where there is one class alone."""
        labels = row_classes(batch)
        one_class = len(labels[labels != IGNORED].unique()) < 2
        return 0 if one_class else int(has_classmate(labels).sum())
