"""The loss of a classifier or regressor over whole sequences, or over tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.head import model_inputs
from llmtune.losses.rows import is_integer, labelled_rows
from llmtune.modules import unwrap
from llmtune.types import Batch


@dataclass(frozen=True)
class ClassificationLoss:
    """Mean over targets of what the labels ask for, decided by their type and shape.

    Integers [B], one class a row, and integers [B, T], one class a token: cross-entropy; -100 is no target. Floats [B]
    or [B, 1], with one logit a row: squared error. Floats [B, C], with C logits a row: binary cross-entropy of each
    class, the mean over classes. A model whose configuration says `problem_type="regression"` gets the squared error
    for floats [B, C] too. The same as transformers' own choice, but never by guess: integer labels for one logit raise.

    Attributes:
        label_smoothing: share of every class target spread evenly over the classes, 0 to 1; for integer labels only.

    Raises:
        ValueError: label_smoothing is out of range.

    Example:
        >>> import torch
        >>> from llmtune.testing.models import tiny_bert
        >>> batch = {"input_ids": torch.tensor([[5, 7, 11], [3, 2, 1]]), "labels": torch.tensor([2, 0])}
        >>> model = tiny_bert(labels=3)
        >>> torch.allclose(classification_loss(model, batch), model(**batch).loss)
        True
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        CrossEntropy(self.label_smoothing)  # checks it

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over `count_targets(batch)` targets, a scalar in at least float32.

        Args:
            model: a sequence or token classifier whose output has `logits`, [B, C] or [B, T, C]; wrapped or not.
            batch: "labels", and whatever the model's forward takes.

        Raises:
            ValueError: the batch has no labels, they do not fit the logits, all of them are -100, or one is out of
                range.
        """
        labels = _labels(batch)
        problem = getattr(getattr(unwrap(model), "config", None), "problem_type", None)
        _check_kind(problem, labels)
        logits = at_least_float32(model(**model_inputs(model, batch)).logits)
        if not labels.is_floating_point():
            rows, targets = _labelled(logits, labels)
            return CrossEntropy(self.label_smoothing).plain(rows, (targets,)).mean()
        if self.label_smoothing:
            raise ValueError("label_smoothing is for integer labels, one class each; got floats")
        labels = labels.to(logits.dtype)
        if logits.numel() != labels.numel() or len(logits) != len(labels):
            raise ValueError(
                f"float labels {[*labels.shape]} do not fit logits {[*logits.shape]}: one for each is needed"
            )
        labels = labels.reshape(logits.shape)
        if logits.shape[-1] == 1 or problem == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: integer labels that are not -100, or rows of float labels."""
        labels = _labels(batch)
        return len(labels) if labels.is_floating_point() else int((labels != -100).sum())


def class_rows(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a classifier and return its logits [n, C], in at least float32, and targets [n] where there is a label.

    Args:
        model: a sequence or token classifier whose output has `logits`, [B, C] or [B, T, C]; wrapped or not.
        batch: "labels" of integers, [B] or [B, T], and whatever the model's forward takes.

    Raises:
        ValueError: the batch has no integer labels, they do not fit the logits, all of them are -100, or one is out of
            range.
    """
    labels = _labels(batch)
    if labels.is_floating_point():
        raise ValueError(f"the loss needs integer labels, one class each; got {labels.dtype} {[*labels.shape]}")
    _check_kind(getattr(getattr(unwrap(model), "config", None), "problem_type", None), labels)
    return _labelled(at_least_float32(model(**model_inputs(model, batch)).logits), labels)


def _labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of logits [n, C] and the targets [n] where integer labels [...] are not -100."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"integer labels {[*labels.shape]} do not fit logits {[*logits.shape]}: one class for each row of "
            "logits is needed. Several classes at once are given as floats [B, C] of 0 and 1"
        )
    C = logits.shape[-1]
    if C == 1:
        raise ValueError("the model has one logit, so there is nothing to choose from: regress on float labels instead")
    rows, targets = logits.flatten(0, -2), labels.flatten()
    labelled = labelled_rows(targets, C)
    if labelled is not None:
        rows, targets = rows.index_select(0, labelled), targets.index_select(0, labelled)
    if len(targets) == 0:
        raise ValueError(f"the mean needs at least one target: all {labels.numel()} are ignored (labels all -100)")
    return rows, targets


def _check_kind(problem: str | None, labels: Tensor) -> None:
    """Raise ValueError where the configuration's problem type wants labels of the other kind."""
    wanted = {"regression": "float", "multi_label_classification": "float", "single_label_classification": "integer"}
    kind = "float" if labels.is_floating_point() else "integer"
    if problem in wanted and wanted[problem] != kind:
        raise ValueError(
            f'the model\'s problem_type="{problem}" needs {wanted[problem]} labels; got {labels.dtype}. Change the '
            "labels, or set model.config.problem_type to None"
        )


def _labels(batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(f'the loss needs "labels" in the batch, a tensor with one row a row of inputs; got {came}')
    return labels.long() if is_integer(labels) else labels


classification_loss = ClassificationLoss()
