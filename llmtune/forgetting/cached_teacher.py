"""A teacher that is run once: its predictions are kept with the rows, and compared with the student's in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.data.teacher_fields import INDICES, LOGITS, LOGPROBS, NOTHING, TEACHER_FIELDS, TEMPERATURE, teacher_fields
from llmtune.forgetting.likelihood import predicts_next, with_decoder_inputs
from llmtune.forgetting.student import (
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
from llmtune.losses.chunked import at_least_float32, default_chunk_rows
from llmtune.losses.divergence import kl_divergence
from llmtune.losses.head import Head, hidden_before_head, model_inputs
from llmtune.losses.packed import check_documents_apart
from llmtune.losses.top_k import top_k_kl_divergence, top_k_log_probabilities
from llmtune.modules import check_module, reference_pass, unwrap
from llmtune.types import Batch, LossFunction, Rows


def with_teacher(
    rows: Rows, model: nn.Module, *, k: int | None = None, temperature: float = 1.0, rows_per_batch: int = 8
) -> list[dict[str, Any]]:
    """Return the rows with the model's predictions added, for `DistillFromCache`, `DERLoss` and a `ReplayBuffer`.

    The model is run as it stands (with the adapters that are on; `disabled(model)` around the call leaves them out), in
    eval mode and on the rows as they are given: keep predictions of rows that are not augmented. A language model's
    are its k largest log-probabilities at each place with a target; its logits are made a few rows at a time and never
    all held. A classifier's are all its logits. They stand in the row itself, so neither shuffling nor packing nor
    another batch size can part them from it; rows that have some get new ones.

    Args:
        rows: with "input_ids" and integer "labels", as the loss will take them. Rows with "position_ids" are packed.
        model: the teacher.
        k: of a language model, how many classes a place keeps, 1 to V; each costs 8 bytes. None for a classifier.
        temperature: of a language model's log-probabilities: that of the loss they are made for.
        rows_per_batch: how many rows go through the model at once.

    Returns:
        New rows: of a language model with "teacher_logprobs" [n, k] float32, "teacher_indices" [n, k] int32 (-1 where
        no label is) and "teacher_temperature" [n], one entry a label; of a classifier with "teacher_logits" [C], or
        [n, C] where it labels tokens.

    Raises:
        ValueError: k is missing, or given for a classifier; a temperature is given for a classifier, whose logits take
            any; k, the temperature or rows_per_batch is out of range; or labels are missing or no integers.
        TypeError: the model is no module.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> (row,) = with_teacher([{"input_ids": [5, 7, 11], "labels": [-100, 7, 11]}], tiny_llama(), k=3)
        >>> row["teacher_indices"].shape, (row["teacher_indices"] == -1).all(-1).tolist()
        (torch.Size([3, 3]), [True, False, False])

    Where we differ: TRACE keeps its teacher's logits, [B, T, V], by the number of the batch, and then shuffles the
    batches anew, so that texts are compared with the predictions for others. mammoth keeps, for the plain input, the
    logits that an augmented one got in train mode.
    """
    check_module(model)
    check_factor("temperature", temperature, positive=True)
    if rows_per_batch < 1:
        raise ValueError(f"rows_per_batch must be 1 or more; got {rows_per_batch}")
    inner, done = unwrap(model), []
    device = next(inner.parameters()).device
    plain = [{name: value for name, value in rows[at].items() if name not in TEACHER_FIELDS} for at in range(len(rows))]
    packed = [row for row in plain if "position_ids" in row]
    if packed:
        check_documents_apart(inner, _on(collate_packed(packed[:1]), device))
    for start in range(0, len(plain), 1 if packed else rows_per_batch):
        some = plain[start : start + (1 if packed else rows_per_batch)]
        batch = _on(collate_packed(some) if packed else collate_padded(some), device)
        if packed:
            batch["labels"] = torch.as_tensor(some[0]["labels"], device=device)[None]
        for row, made in zip(some, _predictions(inner, batch, k, temperature), strict=True):
            n = torch.as_tensor(row["labels"]).numel()
            cut = made if made.keys() == {LOGITS} and made[LOGITS].ndim == 1 else _cut(made, n)
            done.append({**row, **cut})
    return done


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
            f"the batch needs {', '.join(names)} for this model, and {came}: make its rows with with_teacher(rows, model"
            f"{', k=...' if of_tokens else ''}), and mix them with others by MixedBatches"
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


def _predictions(inner: nn.Module, batch: Batch, k: int | None, temperature: float) -> list[dict[str, Tensor]]:
    """Return for each row of the batch what the model predicts, padded to the batch's length, on the CPU."""
    labels = check_labels(batch, "keeping a teacher's predictions")
    of_tokens = is_language_model(inner, labels)
    if of_tokens != (k is not None) or (not of_tokens and temperature != 1.0):
        raise ValueError(
            "k is needed for a language model: how many classes a place keeps, such as k=64"
            if of_tokens
            else "k and temperature are for language models: a classifier's logits are all kept, for any temperature"
        )
    with reference_pass(inner):
        if not of_tokens:
            logits = class_logits(inner(**model_inputs(inner, batch)), labels)
            return [{LOGITS: row} for row in at_least_float32(logits).float().cpu()]
        assert k is not None
        mask = target_mask(inner, labels)
        hidden, head = hidden_before_head(inner, with_decoder_inputs(inner, batch))
        rows = rows_at(hidden, mask, labels.shape[1])
        size = default_chunk_rows(rows.new_empty(head.classes, 0), buffers=4)
        made = [top_k_log_probabilities(head.logits(some), k, temperature=temperature) for some in rows.split(size)]
    where = torch.zeros_like(labels, dtype=torch.bool)
    where[:, labels.shape[1] - mask.shape[1] :] = mask
    values = torch.zeros(*labels.shape, k)
    indices = torch.full((*labels.shape, k), NOTHING, dtype=torch.int32)
    values[where.cpu()] = torch.cat([value.float() for value, _ in made]).cpu()
    indices[where.cpu()] = torch.cat([index for _, index in made]).cpu().int()
    at = torch.where(where.cpu(), temperature, 0.0)
    return [
        {LOGPROBS: values[row], INDICES: indices[row], TEMPERATURE: at[row]} for row in range(len(labels))
    ]  # of one row, a view of all: `_cut` copies


def _cut(made: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    return {name: value[:length].clone() for name, value in made.items()}


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
