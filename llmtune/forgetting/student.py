"""One forward pass for two terms: a loss, and the predictions it was made of, to be compared with a teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmtune.forgetting.likelihood import IGNORED, has_head, head_of, predicts_next
from llmtune.losses.head import Head, read_head
from llmtune.types import Batch, LossFunction


@dataclass(frozen=True)
class Student:
    """What a loss gave, and what the model predicts at the m places that have a target.

    Attributes:
        result: what the loss returned.
        rows: [m, C] logits; or, where there is a head, [m, E] hidden states that enter it; with gradient.
        head: a language model's head, or None.
    """

    result: Any
    rows: Tensor
    head: Head | None


def student_pass(loss: LossFunction, model: nn.Module, inner: nn.Module, batch: Batch, labels: Tensor) -> Student:
    """Run the loss, which must run the model once, and return what it gave and what the model predicted.

    Args:
        loss: what to learn by.
        model: as it is to be called.
        inner: the module inside its wrappers.
        batch: what the loss takes.
        labels: [B] or [B, T] integers, those of the batch.

    Raises:
        ValueError: the loss does not run the model exactly once, or the labels do not fit the logits.
    """
    with_head = is_language_model(inner, labels)
    with _watched(model, head_of(inner) if with_head else None) as (outputs, hidden, raw):
        result = loss(model, batch)
    calls = len(hidden) if with_head else len(outputs)
    if calls != 1:
        raise ValueError(
            f"the loss must run the model exactly once, so that its predictions can be compared; {loss!r} ran it "
            f"{calls} times"
        )
    mask = target_mask(inner, labels)
    if not with_head:
        return Student(result, class_logits(outputs[0], labels)[mask], None)
    return Student(result, rows_at(hidden[0], mask, labels.shape[1]), read_head(inner, raw[0], outputs[0]))


def is_language_model(inner: nn.Module, labels: Tensor) -> bool:
    """Return whether labels [B, T] are tokens that come out of a language-modelling head."""
    return labels.ndim == 2 and has_head(inner)


def target_mask(inner: nn.Module, labels: Tensor) -> Tensor:
    """Return [B] or [B, T'] booleans, where there is a target: T' = T - 1 in a causal model, whose labels shift."""
    shifts = is_language_model(inner, labels) and predicts_next(inner)
    return (labels[:, 1:] if shifts else labels) != IGNORED


def rows_at(hidden: Tensor, mask: Tensor, length: int) -> Tensor:
    """Return the rows [m, E] of hidden states [B, S, E] at the places of a mask [B, T'], out of labels of `length`."""
    return hidden[:, -length:][:, : mask.shape[1]][mask]  # from the end: virtual tokens stand before the first


def class_logits(output: Any, labels: Tensor) -> Tensor:
    """Return a classifier's logits [B, C] or [B, T, C]; raise ValueError where there is not one for each label."""
    logits: Tensor = output.logits
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels {[*labels.shape]} do not fit logits {[*logits.shape]}: one for each row is needed")
    return logits


def check_labels(batch: Batch, what: str = "distillation") -> Tensor:
    """Return the batch's labels; raise ValueError where they are no integers [B] or [B, T]."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim not in (1, 2):
        came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(f"{what} needs integer labels, one a row [B] or one a token [B, T]; got {came}")
    return labels.long()  # in a narrower type a class may look like -100


def check_factor(name: str, value: float, *, positive: bool = False) -> None:
    """Raise ValueError where a factor is not finite, or negative, or 0 where it must not be."""
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
        bound = "larger than 0" if positive else ", 0 or more"
        raise ValueError(f"{name} must be a finite number{' ' if positive else ''}{bound}; got {value}")


def check_loss(loss: Any) -> None:
    """Raise TypeError where a loss has no count of targets."""
    if not callable(getattr(loss, "count_targets", None)):
        raise TypeError(f"the loss needs a count_targets(batch) method, to be a mean over targets; {loss!r} has none")


@contextmanager
def _watched(model: nn.Module, head: nn.Module | None) -> Iterator[tuple[list[Any], list[Tensor], list[Tensor]]]:
    """Collect the model's outputs, what enters its head, and what leaves it."""
    outputs: list[Any] = []
    hidden: list[Tensor] = []
    raw: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].ndim == 3:  # the model's own call; a loss may call the head again on rows [n, E]
            hidden.append(args[0])

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if args[0].ndim == 3:
            raw.append(output)

    handles = [model.register_forward_hook(lambda _, args, output: outputs.append(output))]
    if head is not None:
        handles += [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield outputs, hidden, raw
    finally:
        for handle in handles:
            handle.remove()
