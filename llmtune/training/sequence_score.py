"""The score of a model on a task, for a sequence's matrix: the higher the better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.forgetting.likelihood import has_head
from llmtune.losses.classification import class_rows
from llmtune.modules import eval_mode, unwrap
from llmtune.training.checks import loss_and_parts, targets_of
from llmtune.training.randomness import fetch_rows, fixed_randomness, seed_everything
from llmtune.training.sequence_task import Task
from llmtune.training.settings import LoopSettings
from llmtune.training.switches import autocast
from llmtune.types import Batch, LossFunction

Score = Callable[[nn.Module, Task], float]


def accuracy_score(
    model: nn.Module, task: Task, *, collate: Callable[[list[Any]], Batch], settings: LoopSettings
) -> float:
    """Return the share of the task's evaluation targets whose largest logit is the label's.

    Args:
        model: a sequence or token classifier.
        task: with evaluation rows, integer labels, -100 where there is no target.
        collate: makes a batch of rows.
        settings: say how many rows a batch has, and the precision.

    Raises:
        ValueError: the model has a language-modelling head, whose labels are shifted; or the labels are no classes.
    """
    if has_head(unwrap(model)):
        raise ValueError(
            'score="accuracy" is for classifiers, and this model predicts tokens: give score="loss", or a function'
        )
    right = total = 0
    for batch in _batches(model, task, collate, settings):
        if int((batch["labels"] != -100).sum()):
            with autocast(next(model.parameters()).device, settings.precision):
                logits, labels = class_rows(model, batch)
            right, total = right + int((logits.argmax(-1) == labels).sum()), total + len(labels)
    return right / _some(total, task)


def loss_score(
    model: nn.Module,
    task: Task,
    *,
    collate: Callable[[list[Any]], Batch],
    settings: LoopSettings,
    loss: LossFunction,
) -> float:
    """Return minus the mean loss over the task's evaluation targets, so that higher is better.

    Args:
        model: what the loss takes.
        task: with evaluation rows.
        collate: makes a batch of rows.
        settings: say how many rows a batch has, and the precision.
        loss: the sequence's loss, without what a method has added.
    """
    sum_, total = 0.0, 0
    for batch in _batches(model, task, collate, settings):
        if count := targets_of(loss, batch):
            with autocast(next(model.parameters()).device, settings.precision):
                mean, _ = loss_and_parts(loss(model, batch), trained=False)
            sum_ += float(mean) * count
            total += count
    return -sum_ / _some(total, task)


@torch.no_grad()
def score_of(score: Score, model: nn.Module, task: Task, *, seed: int) -> float:
    """Return `score(model, task)`, called in eval mode, without gradients, from one random state for every call.

    Raises:
        ValueError: it is no finite number.
    """
    with eval_mode(model), fixed_randomness():
        seed_everything(seed, "score", task.name)
        value = score(model, task)
    number = float(value) if isinstance(value, Tensor | int | float) or hasattr(value, "__float__") else math.nan
    if not math.isfinite(number):
        raise ValueError(f'the score of task "{task.name}" must be a finite number; got {value!r}')
    return number


def _batches(
    model: nn.Module, task: Task, collate: Callable[[list[Any]], Batch], settings: LoopSettings
) -> Iterator[Batch]:
    """Yield the evaluation rows as batches on the model's device."""
    assert task.evaluation is not None
    device = next(model.parameters()).device
    size = settings.rows_per_micro_batch or settings.rows_per_step
    for start in range(0, len(task.evaluation), size):
        places = range(start, min(start + size, len(task.evaluation)))
        batch = collate(fetch_rows(task.evaluation, places, seed=settings.seed, first=start))
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _some(total: int, task: Task) -> int:
    if total == 0:
        raise ValueError(
            f'no evaluation row of task "{task.name}" has a target: every label is ignored (-100), or none has what '
            "the loss asks for"
        )
    return total
