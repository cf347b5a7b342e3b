"""A teacher that is run once: its predictions are kept with the rows, so that nothing can part them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.data.teacher_fields import INDICES, LOGITS, LOGPROBS, NOTHING, TEACHER_FIELDS, TEMPERATURE
from llmtune.forgetting.likelihood import with_decoder_inputs
from llmtune.forgetting.student import (
    check_factor,
    check_labels,
    class_logits,
    is_language_model,
    rows_at,
    target_mask,
)
from llmtune.losses.chunked import at_least_float32, default_chunk_rows
from llmtune.losses.head import hidden_before_head, model_inputs
from llmtune.losses.packed import check_documents_apart
from llmtune.losses.top_k import top_k_log_probabilities
from llmtune.modules import check_module, reference_pass, unwrap
from llmtune.types import Batch, Rows


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
            any; k, the temperature or rows_per_batch is out of range; labels are missing or no integers; or a
            prediction is not finite.
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
    inner = unwrap(model)
    done: list[dict[str, Any]] = []
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
            _check_finite(cut, len(done))
            done.append({**row, **cut})
    return done


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


def _check_finite(fields: Mapping[str, Tensor], number: int) -> None:
    """Raise where a row's predictions are not finite: later on NaN says that nothing is kept."""
    if not all(bool(fields[name].isfinite().all()) for name in (LOGITS, LOGPROBS) if name in fields):
        raise ValueError(f"the teacher's predictions for row {number} are not finite: its logits hold NaN or infinity")


def _cut(made: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    return {name: value[:length].clone() for name, value in made.items()}


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
