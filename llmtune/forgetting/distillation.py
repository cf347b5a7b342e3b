"""Distillation from a teacher that is run beside the model: learning may move the predictions no further than it must.

The teacher is the same model without its adapters (`DistillToBase`), or another one (`DistillToModel`). Where it is too
dear to be run at every step, `cached_teacher.py` keeps its predictions with the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtune.adapters.attach import active, adapter_names
from llmtune.data.teacher_fields import TEACHER_FIELDS
from llmtune.forgetting.likelihood import with_decoder_inputs
from llmtune.forgetting.student import (
    Student,
    check_factor,
    check_labels,
    check_loss,
    class_logits,
    is_language_model,
    rows_at,
    student_pass,
    target_mask,
)
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.chunked import default_chunk_rows
from llmtune.losses.divergence import kl_divergence, linear_kl_divergence
from llmtune.losses.head import Head, hidden_before_head, model_inputs
from llmtune.modules import reference_pass, unwrap
from llmtune.types import Batch, LossFunction


class Distillation(ABC):
    """A loss plus strength * temperature^2 * KL(teacher || student); what its two forms below share.

    A language model's logits are never held: the student's hidden states are taken out of the loss's own forward pass,
    and the divergence is computed from them a few rows at a time. So a step costs one forward and backward pass of the
    student, one forward pass of the teacher, and two multiplications by the head more.
    """

    loss: LossFunction
    strength: float
    temperature: float
    classes: int | tuple[int, ...] | None = None

    @abstractmethod
    def _teacher_of(self, inner: nn.Module) -> nn.Module:
        """Return the bare module that is run as the teacher; raise ValueError where there is none."""

    @abstractmethod
    def _as_teacher(self, inner: nn.Module) -> AbstractContextManager[Any]:
        """Return what the teacher is run within: eval mode, no gradients, and the adapters that it has."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Return (total, parts): the loss's own parts, "task_loss" and "distillation" (before its strength), scalars.

        Args:
            model: the student, wrapped or not.
            batch: what the loss takes; "labels" of integers, [B] or [B, T], -100 where there is no target.

        Raises:
            ValueError: there is no teacher in this model, or it is no other than the student; the labels are no
                integers; the two sides' classes do not fit; or the loss does not run the model exactly once.
        """
        inner = unwrap(model)
        teacher = self._teacher_of(inner)
        labels = check_labels(batch)
        if self.classes is not None and is_language_model(inner, labels):
            raise ValueError(
                "classes choose among those of a classifier; a language model's teacher has all its tokens"
            )
        rows, head = self._teacher_rows(inner, teacher, batch, labels)
        student = student_pass(self.loss, model, inner, batch, labels)
        divergence = self._divergence(inner, student, rows, head)
        task_loss, parts = student.result if isinstance(student.result, tuple) else (student.result, {})
        total = task_loss + self.strength * divergence
        return total, {**parts, "task_loss": task_loss.detach(), "distillation": divergence.detach()}

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count."""
        return self.loss.count_targets(batch)

    def _teacher_rows(
        self, inner: nn.Module, teacher: nn.Module, batch: Batch, labels: Tensor
    ) -> tuple[Tensor, Head | None]:
        """Return the teacher's rows at the places with a target: [m, E] before its head, or [m, C] logits."""
        mask = target_mask(inner, labels)
        batch = {name: value for name, value in batch.items() if name not in TEACHER_FIELDS}  # of replayed rows
        with self._as_teacher(inner):
            if not is_language_model(inner, labels):
                return class_logits(teacher(**model_inputs(teacher, batch)), labels)[mask], None
            hidden, head = hidden_before_head(teacher, with_decoder_inputs(teacher, batch))
            return rows_at(hidden, mask, labels.shape[1]), head

    def _divergence(self, inner: nn.Module, student: Student, rows: Tensor, head: Head | None) -> Tensor:
        if student.head is None or head is None:
            return kl_divergence(*chosen_classes(student.rows, rows, self.classes), temperature=self.temperature)
        with self._as_teacher(inner):
            theirs = head.linear()
        ours = student.head.linear()
        alike = (head.softcap, head.logit_scale) == (student.head.softcap, student.head.logit_scale)
        if ours is None or theirs is None or not alike:
            return self._chunked(inner, student, rows, head)
        return linear_kl_divergence(
            student.rows, ours[0], rows, theirs[0], temperature=self.temperature, bias=ours[1],
            teacher_bias=theirs[1], softcap=head.softcap, logit_scale=head.logit_scale,
        )  # fmt: skip

    def _chunked(self, inner: nn.Module, student: Student, rows: Tensor, head: Head) -> Tensor:
        """Return the divergence through heads that are no two plain linear layers (adapted, quantized) [m rows]."""
        own = student.head
        assert own is not None

        def chunk(s: Tensor, t: Tensor) -> Tensor:
            with self._as_teacher(inner):
                wanted = head.logits(t)
            return kl_divergence(own.logits(s), wanted, temperature=self.temperature, reduction="sum")

        size = default_chunk_rows(student.rows.new_empty(own.classes, 0), buffers=8)
        pairs = zip(student.rows.split(size), rows.split(size), strict=True)
        parts = [checkpoint(chunk, s, t, use_reentrant=False) for s, t in pairs]
        return torch.stack(parts).sum() / len(rows)

    def _check(self) -> None:
        check_factor("strength", self.strength)
        check_factor("temperature", self.temperature, positive=True)
        check_loss(self.loss)


@dataclass(frozen=True)
class DistillToBase(Distillation):
    """A loss plus the divergence of the model's predictions from those it makes without its adapters.

    loss(model, batch) + strength * temperature^2 * KL(teacher || student), the divergence being a mean over the batch's
    targets, as the loss is. The teacher is the same model with only the adapters named in `teacher` left on: it needs
    no second copy of the weights and nothing stored. It runs in eval mode, without gradients, and leaves modes and
    random state alone. At the start of LoRA (B = 0, no dropout) the divergence and its gradient are exactly 0.

    A language model's logits are never held: the student's hidden states are taken out of the loss's own forward pass,
    and the divergence is computed from them a few rows at a time. So a step costs one forward and backward pass of the
    student, one forward pass of the teacher, and two multiplications by the head more.

    Attributes:
        loss: what to learn by; it must run the model once. For a classifier `classification_loss`, for an
            encoder-decoder `sequence_to_sequence_loss`, or your own.
        strength: factor of the divergence, 0 or more.
        temperature: both sides' logits are divided by it, larger than 0 (Hinton et al. 2015, section 2).
        teacher: names of the adapters that stay on in the teacher; none for the bare model.

    Raises:
        ValueError: strength or temperature is out of range.
        TypeError: `teacher` is one string, or the loss has no `count_targets`.

    Example:
        >>> from llmtune.adapters.attach import attach
        >>> from llmtune.adapters.config import LoRA
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> _ = attach(model, LoRA(rank=4, alpha=8))
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> loss, parts = DistillToBase(strength=1.0)(model, {"input_ids": ids, "labels": ids})
        >>> parts["distillation"].item()
        0.0

    Reference:
        Li and Hoiem 2016, "Learning without forgetting", with the old tasks' outputs replaced by the base model's, the
        direction KL(teacher || student) and the factor temperature^2, which public implementations often swap or leave
        out.
    """

    loss: LossFunction = causal_lm_loss
    strength: float = field(kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    teacher: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.teacher, str):
            raise TypeError(f"teacher must be a tuple of adapters' names; got the one string {self.teacher!r}")
        object.__setattr__(self, "teacher", tuple(self.teacher))

    def _teacher_of(self, inner: nn.Module) -> nn.Module:
        if not adapter_names(inner):
            raise ValueError(
                "DistillToBase compares a model with itself without its adapters, and this one has none: "
                "attach one first"
            )
        return inner

    def _as_teacher(self, inner: nn.Module) -> AbstractContextManager[Any]:
        entered = ExitStack()
        entered.enter_context(active(inner, self.teacher))
        entered.enter_context(reference_pass(inner))
        return entered


def chosen_classes(student: Tensor, teacher: Tensor, classes: int | tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Return both sides' logits [m, C] of the classes that are compared; raise ValueError where one lacks some."""
    if classes is None:
        if student.shape != teacher.shape:
            raise ValueError(
                f"the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}: say which ones both "
                f"have, such as classes={min(student.shape[-1], teacher.shape[-1])} for the first ones"
            )
        return student, teacher
    numbers = list(range(classes)) if isinstance(classes, int) else list(classes)
    fewest = min(student.shape[-1], teacher.shape[-1])
    if max(numbers) >= fewest:
        raise ValueError(f"classes name class {max(numbers)}, and one of the two models has only {fewest}")
    return student[..., numbers], teacher[..., numbers]
