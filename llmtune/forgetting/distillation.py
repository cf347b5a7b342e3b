"""Distillation from the model without its adapters: learning may move the predictions no further than it must."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtune.adapters.attach import active, adapter_names
from llmtune.forgetting.likelihood import IGNORED, has_head, predicts_next, with_decoder_inputs
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.chunked import default_chunk_rows
from llmtune.losses.divergence import kl_divergence, linear_kl_divergence
from llmtune.losses.head import Head, hidden_before_head, model_inputs
from llmtune.modules import reference_pass, unwrap
from llmtune.types import Batch, LossFunction


@dataclass(frozen=True)
class DistillToBase:
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
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be a finite number, 0 or more; got {self.strength}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a finite number larger than 0; got {self.temperature}")
        if isinstance(self.teacher, str):
            raise TypeError(f"teacher must be a tuple of adapters' names; got the one string {self.teacher!r}")
        if not callable(getattr(self.loss, "count_targets", None)):
            raise TypeError(
                f"the loss needs a count_targets(batch) method, to be a mean over targets; {self.loss!r} has none"
            )
        object.__setattr__(self, "teacher", tuple(self.teacher))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Return (total, parts): the loss's own parts, "task_loss" and "distillation" (before its strength), scalars.

        Args:
            model: a model with at least one adapter attached, wrapped or not.
            batch: what the loss takes; "labels" of integers, [B] or [B, T], -100 where there is no target.

        Raises:
            ValueError: the model has no adapter, or none of a name in `teacher`; the labels are no integers; or the
                loss does not run the model exactly once.
        """
        inner = unwrap(model)
        if not adapter_names(inner):
            raise ValueError(
                "DistillToBase compares a model with itself without its adapters, and this one has none: "
                "attach one first"
            )
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim not in (1, 2):
            came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
            raise ValueError(f"distillation needs integer labels, one a row [B] or one a token [B, T]; got {came}")
        run = self._through_head if labels.ndim == 2 and has_head(inner) else self._through_logits
        result, divergence = run(model, inner, batch, labels)
        task_loss, parts = result if isinstance(result, tuple) else (result, {})
        total = task_loss + self.strength * divergence
        return total, {**parts, "task_loss": task_loss.detach(), "distillation": divergence.detach()}

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count."""
        return self.loss.count_targets(batch)

    @contextmanager
    def _as_teacher(self, inner: nn.Module) -> Iterator[None]:
        with active(inner, self.teacher), reference_pass(inner):
            yield

    def _through_head(self, model: nn.Module, inner: nn.Module, batch: Batch, labels: Tensor) -> tuple[Any, Tensor]:
        """Return (what the loss gave, the divergence) of a language model, from the hidden states before its head."""
        T = labels.shape[1]
        targets = labels[:, 1:] if predicts_next(inner) else labels
        mask = targets != IGNORED

        def rows(hidden: Tensor) -> Tensor:  # from the end: virtual tokens stand before the first
            return hidden[:, -T:][:, : mask.shape[1]][mask]

        with self._as_teacher(inner):
            hidden, head = hidden_before_head(inner, with_decoder_inputs(inner, batch))
            teacher_rows, teacher_head = rows(hidden), head.linear()
        seen: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].ndim == 3:  # the model's own call; a loss may call the head again on rows [n, E]
                seen.append(args[0])

        handle = head.module.register_forward_pre_hook(before)
        try:
            result = self.loss(model, batch)
        finally:
            handle.remove()
        self._check_once(len(seen))
        student_head = head.linear()
        if teacher_head is None or student_head is None:
            return result, self._chunked(inner, head, rows(seen[0]), teacher_rows)
        return result, linear_kl_divergence(
            rows(seen[0]), student_head[0], teacher_rows, teacher_head[0], temperature=self.temperature,
            bias=student_head[1], teacher_bias=teacher_head[1], softcap=head.softcap, logit_scale=head.logit_scale,
        )  # fmt: skip

    def _chunked(self, inner: nn.Module, head: Head, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence through a head that is no plain linear layer (it is adapted, or quantized).

        Args:
            inner: the bare module.
            head: its head.
            student: [m, E] hidden states with gradient.
            teacher: [m, E] hidden states.
        """

        def chunk(s: Tensor, t: Tensor) -> Tensor:
            with self._as_teacher(inner):
                wanted = head.logits(t)
            return kl_divergence(head.logits(s), wanted, temperature=self.temperature, reduction="sum")

        size = default_chunk_rows(student.new_empty(head.classes, 0), buffers=8)
        pairs = zip(student.split(size), teacher.split(size), strict=True)
        parts = [checkpoint(chunk, s, t, use_reentrant=False) for s, t in pairs]
        return torch.stack(parts).sum() / len(student)

    def _through_logits(self, model: nn.Module, inner: nn.Module, batch: Batch, labels: Tensor) -> tuple[Any, Tensor]:
        """Return (what the loss gave, the divergence) of a classifier, from its logits [B, C] or [B, T, C]."""
        with self._as_teacher(inner):
            teacher = inner(**model_inputs(inner, batch)).logits
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda _, args, output: seen.append(output))
        try:
            result = self.loss(model, batch)
        finally:
            handle.remove()
        self._check_once(len(seen))
        student = seen[0].logits
        if student.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels {[*labels.shape]} do not fit logits {[*student.shape]}: one for each row is needed"
            )
        return result, kl_divergence(student, teacher, temperature=self.temperature, mask=labels != IGNORED)

    def _check_once(self, calls: int) -> None:
        if calls != 1:
            raise ValueError(
                f"the loss must run the model exactly once, so that its predictions can be compared; {self.loss!r} "
                f"ran it {calls} times"
            )
