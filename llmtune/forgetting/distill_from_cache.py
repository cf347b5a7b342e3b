"""Distillation from predictions that are kept with the rows: the teacher is not run in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtune.data.teacher_fields import INDICES, LOGITS, LOGPROBS, NOTHING, TEACHER_FIELDS, TEMPERATURE, teacher_fields
from llmtune.forgetting.student import (
    check_factor,
    check_labels,
    check_loss,
    is_language_model,
    student_pass,
    target_mask,
)
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.chunked import at_least_float32, default_chunk_rows
from llmtune.losses.divergence import kl_divergence
from llmtune.losses.head import Head
from llmtune.losses.top_k import top_k_kl_divergence
from llmtune.modules import unwrap
from llmtune.types import Batch, LossFunction


@dataclass(frozen=True)
class DistillFromCache:
    """A loss plus the divergence of the model's predictions from those kept with the rows (`with_teacher`).

    loss(model, batch) + strength * temperature^2 * KL(teacher || student)

    of a language model over the kept classes and one bucket for all others (`top_k_kl_divergence`), of a classifier
    over the classes that the teacher had: where the head has grown, over the old ones, each side's softmax being over
    these alone. The divergence is a mean over all the batch's targets, in which rows without predictions count 0; so
    new rows and rows with a teacher may stand in one batch, and batches add up.

    With the old model's predictions for the new task's rows this is learning without forgetting; with predictions for
    replayed rows, distillation on a replay buffer.

    Attributes:
        loss: what to learn by; it must run the model once.
        strength: factor of the divergence, 0 or more.
        temperature: larger than 0; of a language model, that at which the predictions were made.

    Raises:
        ValueError: strength or temperature is out of range.
        TypeError: the loss has no `count_targets`.

    Example:
        >>> from llmtune.data.collate import collate_padded
        >>> from llmtune.forgetting.cached_teacher import with_teacher
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> rows = with_teacher([{"input_ids": [5, 7, 11], "labels": [5, 7, 11]}], model, k=97)
        >>> loss, parts = DistillFromCache(strength=1.0)(model, collate_padded(rows))
        >>> round(parts["distillation"].item(), 6)
        0.0

    Reference:
        Li and Hoiem 2016, "Learning without forgetting", section 3; Hinton et al. 2015, section 2, for temperature^2.
    """

    loss: LossFunction = causal_lm_loss
    strength: float = field(kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_factor("strength", self.strength)
        check_factor("temperature", self.temperature, positive=True)
        check_loss(self.loss)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Return (total, parts): the loss's own parts, "task_loss" and "distillation" (before its strength), scalars.

        Args:
            model: the student, wrapped or not.
            batch: what the loss takes, and the teacher's predictions; "labels" of integers, [B] or [B, T].

        Raises:
            ValueError: the batch has no field for predictions, or one of the other kind of model; they were made at
                another temperature, or of another number of classes; or the loss does not run the model exactly once.
        """
        inner, labels = unwrap(model), check_labels(batch)
        kept = kept_predictions(inner, batch, labels, temperature=self.temperature)
        student = student_pass(self.loss, model, inner, without_teacher_fields(batch), labels)
        if student.head is None:
            rows, wanted = common_classes(student.rows, kept[LOGITS])
            mask = (wanted != -torch.inf).any(-1)
            total = kl_divergence(rows, wanted, temperature=self.temperature, mask=mask, reduction="sum")
        else:
            total = top_k_divergence(student.rows, student.head, kept, temperature=self.temperature)
        divergence = total / len(student.rows)
        task_loss, parts = student.result if isinstance(student.result, tuple) else (student.result, {})
        parts = {**parts, "task_loss": task_loss.detach(), "distillation": divergence.detach()}
        return task_loss + self.strength * divergence, parts

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count."""
        return self.loss.count_targets(without_teacher_fields(batch))


def without_teacher_fields(batch: Batch) -> Batch:
    """Return the batch as a model takes it."""
    return {name: value for name, value in batch.items() if name not in TEACHER_FIELDS}


def kept_predictions(inner: nn.Module, batch: Batch, labels: Tensor, *, temperature: float) -> dict[str, Tensor]:
    """Return the batch's fields of a teacher at the m places that have a target, by name: [m, C], or [m, k].

    Args:
        inner: the bare student.
        batch: what the loss takes.
        labels: [B] or [B, T] integers.
        temperature: at which a language model's must have been made.

    Raises:
        ValueError: there are none, or others than this model needs; a shape does not fit the labels'; or they were made
            at another temperature.
    """
    of_tokens = is_language_model(inner, labels)
    names = (LOGPROBS, INDICES, TEMPERATURE) if of_tokens else (LOGITS,)
    given = teacher_fields(batch)
    if set(given) != set(names):
        came = f"it has {', '.join(sorted(given))}" if given else "it has no field of a teacher"
        raise ValueError(
            f"the batch needs {', '.join(names)} for this model, and {came}: make its rows with with_teacher(rows, "
            f"model{', k=...' if of_tokens else ''}), and mix them with others by MixedBatches"
        )
    for name, value in given.items():
        if value.shape[: labels.ndim] != labels.shape:
            raise ValueError(
                f"{name} {[*value.shape]} does not fit labels {[*labels.shape]}: one entry a label is needed"
            )
    mask = target_mask(inner, labels)
    kept = {name: (value[:, 1:] if mask.shape != labels.shape else value)[mask] for name, value in given.items()}
    if of_tokens:
        made = kept[TEMPERATURE][kept[INDICES][:, 0] != NOTHING]
        wrong = made[~torch.isclose(made, torch.tensor(temperature, dtype=made.dtype, device=made.device))]
        if len(wrong):
            raise ValueError(
                f"the teacher's log-probabilities were made at temperature {wrong[0].item():g}, and the loss has "
                f"temperature {temperature:g}: k of them cannot be turned into another's; make them again"
            )
    return kept


def top_k_divergence(rows: Tensor, head: Head, kept: Mapping[str, Tensor], *, temperature: float = 1.0) -> Tensor:
    """Return the sum of temperature^2 * KL(teacher || student) over the places for which predictions are kept.

    Args:
        rows: [m, E] the student's hidden states before its head.
        head: the student's.
        kept: "teacher_logprobs" and "teacher_indices" [m, k].
        temperature: that of the log-probabilities.
    """
    there = torch.nonzero(kept[INDICES][:, 0] != NOTHING).flatten()
    if len(there) == 0:
        return rows.sum() * 0.0

    def chunk(s: Tensor, log_p: Tensor, index: Tensor) -> Tensor:
        return top_k_kl_divergence(head.logits(s), log_p, index, temperature=temperature, reduction="sum")

    size = default_chunk_rows(rows.new_empty(head.classes, 0), buffers=8)
    parts = [value[there].split(size) for value in (rows, kept[LOGPROBS], kept[INDICES])]
    return torch.stack([checkpoint(chunk, *part, use_reentrant=False) for part in zip(*parts, strict=True)]).sum()


def common_classes(student: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides' logits [m, C] in at least float32, -inf at classes for which the teacher kept nothing (NaN).

    Args:
        student: [m, C].
        kept: [m, C'], C' no more than C but for columns of NaN.

    Raises:
        ValueError: the teacher knew classes that the student has not.
    """
    C = student.shape[-1]
    if not bool(kept[:, C:].isnan().all()):
        raise ValueError(f"teacher_logits are of {kept.shape[-1]} classes, and the model has only {C}")
    wanted = student.new_full(student.shape, torch.nan, dtype=at_least_float32(student).dtype)
    wanted[:, : kept.shape[-1]] = kept[:, :C].to(wanted.dtype)
    unknown = wanted.isnan()
    return at_least_float32(student).masked_fill(unknown, -torch.inf), wanted.masked_fill(unknown, -torch.inf)
