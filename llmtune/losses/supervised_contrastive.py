"""The supervised contrastive loss of a model's embeddings of texts, by itself or beside cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.contrastive import IGNORED, has_classmate, row_classes, supervised_contrastive_loss
from llmtune.losses.embedding import Pooling, check_pooling, embeddings_and_output
from llmtune.losses.rows import check_temperature, labelled_rows
from llmtune.types import Batch


@dataclass(frozen=True)
class SupervisedContrastiveLoss:
    """`supervised_contrastive_loss` of a model's sentence embeddings; with weight w < 1, (1 - w) CE + w SCL.

    The mixture is for sequence classifiers (Gunel et al. 2021, equation 1, with w for lambda; they take the "cls"
    embedding and find w = 0.9 and temperature 0.3 best on most tasks). By itself it is for any encoder.

    Rows couple: a row is compared with the rows of its own batch and no others. Splitting a step into micro-batches
    therefore changes the loss and its gradient, as it does for every contrastive loss: let `rows_per_micro_batch` hold
    the whole step, and mind that the loop makes it smaller where memory runs out. Of several processes each compares
    within its own share.

    Where we differ: the paper writes the contrastive term as a sum over rows beside a mean of cross-entropy, so that
    its share would grow with the batch; here both are means. Rows without a classmate in the batch count in
    cross-entropy alone; where no row has one, the contrastive term is 0 and the part "anchors" shows it.

    Attributes:
        temperature: larger than 0.
        weight: w, above 0 and at most 1; at 1 there is no cross-entropy and the model needs no logits.
        pooling: "mean" over real tokens, "cls" or "last"; see `sentence_embeddings`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import torch
        >>> from llmtune.testing.models import tiny_bert
        >>> batch = {"input_ids": torch.tensor([[5, 7, 11], [3, 2, 1], [5, 2, 9]]), "labels": torch.tensor([1, 0, 1])}
        >>> loss, parts = SupervisedContrastiveLoss(weight=0.9, temperature=0.3)(tiny_bert(labels=2), batch)
        >>> sorted(parts), round(parts["anchors"].item(), 3)
        (['anchors', 'contrastive', 'cross_entropy'], 0.667)
    """

    temperature: float = 0.1
    weight: float = 1.0
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if not 0.0 < self.weight <= 1.0:
            raise ValueError(
                f"weight must be above 0 and at most 1 (0 would be classification_loss); got {self.weight}"
            )
        check_pooling(self.pooling)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Return (mean loss, parts): "contrastive", below weight 1 "cross_entropy", and "anchors", scalars.

        "anchors" is the share of labelled rows that have a classmate in the batch.

        Args:
            model: as `sentence_embeddings` takes it; below weight 1 with `logits` [B, C]. Wrapped or not.
            batch: "labels" [B], integers, -100 where there is none, and what the model's forward takes.

        Raises:
            ValueError: the labels are missing or no integers [B] or do not fit the logits; none is left to take the
                mean over; or `sentence_embeddings` raises.
        """
        labels = row_classes(batch)
        if self.count_targets(batch) == 0:
            what = "has a classmate in the batch" if self.weight == 1.0 else "has a label (all are -100)"
            raise ValueError(f"the mean needs at least one target: none of the {len(labels)} rows {what}")
        embeddings, output = embeddings_and_output(model, batch, pooling=self.pooling)
        anchors, labelled = has_classmate(labels).sum(), (labels != IGNORED).sum()
        total = supervised_contrastive_loss(embeddings, labels, temperature=self.temperature, reduction="sum")
        contrastive = total / anchors.clamp(min=1)
        parts = {"contrastive": contrastive.detach(), "anchors": anchors / labelled}
        if self.weight == 1.0:
            return contrastive, parts
        hard = _cross_entropy(getattr(output, "logits", None), labels)
        parts["cross_entropy"] = hard.detach()
        return (1 - self.weight) * hard + self.weight * contrastive, parts

    def count_targets(self, batch: Batch) -> int:
        """Return over how many rows the mean is taken: at weight 1 those with a classmate, below it all with a label.

        The mean of the contrastive term is always over the rows with a classmate.
        """
        labels = row_classes(batch)
        return int((has_classmate(labels) if self.weight == 1.0 else labels != IGNORED).sum())


def _cross_entropy(logits: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [B, C] over rows with a label [B]."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        came = f"{[*logits.shape]}" if isinstance(logits, Tensor) else "none"
        raise ValueError(
            f"below weight 1 the model must give logits [{len(labels)}, C] of two classes or more; it gave {came}. "
            "Load it as a sequence classifier, or leave weight at 1"
        )
    rows = labelled_rows(labels, logits.shape[1])
    if rows is not None:
        logits, labels = logits.index_select(0, rows), labels.index_select(0, rows)
    return F.cross_entropy(at_least_float32(logits), labels)
