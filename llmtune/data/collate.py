"""Rows to batches: packed into one row without padding, or padded by length.

A row is a dict of lists or tensors: "input_ids", "labels", and whatever else the model takes. What is padding is known
from the rows' lengths, never from a token's id: many models pad with their end-of-text token, which is also a target.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from llmtune.data.teacher_fields import INDICES, LOGITS, NOTHING
from llmtune.types import Batch

IGNORED = -100
TEACHER = "teacher_"


def collate_packed(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Return one row that holds all `rows` behind each other, each document with positions from 0.

    Documents are kept apart by their positions alone, without an attention mask; the loop checks that the model does
    so. The first label of every document is masked, so that no document is asked to predict the next one's first token.

    Args:
        rows: each with "input_ids" [n]; "labels" [n] unshifted; "position_ids" [n] where the row itself holds several
            documents (as those of `pack` do), each starting at 0. Further fields must have [n] values too (those
            called "teacher_..." may be [n, k]). An "attention_mask" of ones is left out.

    Returns:
        "input_ids" and "position_ids" [1, T], and "labels" and further fields [1, T] (or [1, T, k]) where the rows have
        them; T is the sum of the lengths.

    Raises:
        ValueError: there are no rows; or a row has no tokens, is padded, has a field that others lack or that has not
            one value a token, or has positions that do not start at 0. Names row and field.

    Example:
        >>> rows = [{"input_ids": [5, 7], "labels": [5, 7]}, {"input_ids": [9, 9, 9], "labels": [9, 9, 9]}]
        >>> batch = collate_packed(rows)
        >>> batch["position_ids"].tolist(), batch["labels"].tolist()
        ([[0, 1, 0, 1, 2]], [[-100, 7, -100, 9, 9]])
    """
    tensors = _as_tensors(rows)
    for index, row in enumerate(tensors):
        n = len(row["input_ids"])
        for name, value in row.items():
            if value.shape[:1] != (n,) or (value.ndim > 1 and not name.startswith(TEACHER)):
                raise ValueError(
                    f'row {index}: field "{name}" must have one value a token to be packed, [{n}]; got '
                    f"{list(value.shape)}. Leave the field out, or use collate_padded"
                )
        if not bool(row.pop("attention_mask", torch.ones(1)).all()):
            raise ValueError(f"row {index} is padded: its attention_mask has zeros. Cut the padding off before packing")
        positions = row.setdefault("position_ids", torch.arange(n))
        if positions[0] != 0:
            raise ValueError(f"row {index}: position_ids must start at 0; got {int(positions[0])}")
        if "labels" in row:
            row["labels"] = row["labels"].masked_fill(positions == 0, IGNORED)
    return {name: torch.cat([row[name] for row in tensors])[None] for name in tensors[0]}


def collate_padded(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int = 0,
    side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Return the rows padded to one length, with an attention mask by length.

    Args:
        rows: each with "input_ids" [n] and what else the model takes. "labels" may be one number a row (a class, or a
            float to regress on), integers [n] a row (one a token, or a target sequence of its own length), or floats
            [C] (several classes at once).
        pad_token_id: the token to fill with; nothing is ever masked by comparing with it.
        side: where the padding goes; "left" for generation. A target sequence of its own length is always padded right.
        pad_to_multiple_of: rounds the padded length up.

    Returns:
        "input_ids" and "attention_mask" [B, T]; "labels" [B, T] padded with -100, [B], or [B, C]; further fields padded
        with 0 ("..._ids" of tokens with pad_token_id, "..._labels" with -100), or stacked where they are one number a
        row or arrays of one shape. A teacher's predictions (`llmtune.forgetting.with_teacher`) are padded with what
        says that there are none: "teacher_logits" [B, C] or [B, T, C] with NaN, "teacher_indices" [B, T, k] with -1.

    Raises:
        ValueError: there are no rows; a row has no tokens or lacks a field that others have; a field's shapes do not
            fit. Names row and field.

    Example:
        >>> batch = collate_padded([{"input_ids": [5, 7], "labels": 1}, {"input_ids": [9, 9, 9], "labels": 0}])
        >>> batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[1, 1, 0], [1, 1, 1]], [1, 0])
    """
    if side not in ("right", "left"):
        raise ValueError(f'side must be "right" or "left"; got {side!r}')
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be 1 or more; got {pad_to_multiple_of}")
    tensors = _as_tensors(rows)
    lengths = [len(row["input_ids"]) for row in tensors]
    batch = {
        name: _batched(name, [row[name] for row in tensors], lengths, pad_token_id, side, pad_to_multiple_of or 1)
        for name in tensors[0]
    }
    if "attention_mask" not in batch:
        T = batch["input_ids"].shape[1]
        places = torch.arange(T) if side == "right" else torch.arange(T - 1, -1, -1)
        batch["attention_mask"] = (places < torch.tensor(lengths)[:, None]).long()
    return batch


def _batched(
    name: str, values: list[Tensor], lengths: list[int], pad_token_id: int, side: str, multiple: int
) -> Tensor:
    shapes = [list(value.shape) for value in values]
    if name.startswith(TEACHER) and all(value.ndim in (1, 2) and value.ndim == values[0].ndim for value in values):
        return _kept_predictions(name, values, lengths, side, multiple)
    if values[0].ndim != 1 or (name == "labels" and values[0].is_floating_point()):
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f'field "{name}" must have one shape in all rows to be stacked; got {shapes}')
        return torch.stack(values)
    if any(value.ndim != 1 for value in values):
        raise ValueError(f'field "{name}" must have as many dimensions in all rows; got shapes {shapes}')
    fill = pad_token_id if name.endswith("input_ids") else IGNORED if name.endswith("labels") else 0
    own = [len(value) for value in values]
    if len({value.dtype for value in values}) > 1:  # pad_sequence would make them all what the first is
        common = functools.reduce(torch.promote_types, (value.dtype for value in values))
        values = [value.to(common) for value in values]
    left = side == "left" and own == lengths
    padded = pad_sequence(values, batch_first=True, padding_value=fill, padding_side="left" if left else "right")
    if short := -max(own) % multiple:
        padded = F.pad(padded, (short, 0) if left else (0, short), value=fill)
    return padded


def _kept_predictions(name: str, values: list[Tensor], lengths: list[int], side: str, multiple: int) -> Tensor:
    """Return a teacher's predictions, padded along the places; a classifier's logits [C] along the classes."""
    fill = torch.nan if name == LOGITS else NOTHING if name == INDICES else 0
    of_row = name == LOGITS and values[0].ndim == 1
    if values[0].ndim == 2 and len({value.shape[1] for value in values}) > 1:
        if name != LOGITS:
            raise ValueError(
                f'field "{name}" must keep as many classes a place in all rows of a batch; got shapes '
                f"{[list(value.shape) for value in values]}: make all with one k"
            )
        most = max(value.shape[1] for value in values)
        values = [F.pad(value, (0, most - value.shape[1]), value=fill) for value in values]
    left = side == "left" and not of_row and [len(value) for value in values] == lengths
    padded = pad_sequence(values, batch_first=True, padding_value=fill, padding_side="left" if left else "right")
    short = 0 if of_row else -padded.shape[1] % multiple
    return F.pad(padded, (0, 0) * (padded.ndim - 2) + ((short, 0) if left else (0, short)), value=fill)


def _as_tensors(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """Return the rows as dicts of tensors, all with the same fields, each with at least one token."""
    if not rows:
        raise ValueError("there are no rows to make a batch of")
    tensors = []
    for index, row in enumerate(rows):
        if "input_ids" not in row:
            raise ValueError(f'row {index} has no "input_ids"; its fields are {sorted(row)}')
        if set(row) != set(rows[0]):
            name = sorted(set(row) ^ set(rows[0]))[0]
            raise ValueError(
                f'all rows of a batch must have the same fields; "{name}" is in only one of rows 0 and {index}'
            )
        tensors.append({name: _as_tensor(value, name, index) for name, value in row.items()})
        if tensors[-1]["input_ids"].ndim != 1 or len(tensors[-1]["input_ids"]) == 0:
            shape = list(tensors[-1]["input_ids"].shape)
            raise ValueError(f'row {index}: "input_ids" must be [n] token ids, n > 0; got shape {shape}')
    return tensors


def _as_tensor(value: Any, name: str, index: int) -> Tensor:
    try:
        tensor = torch.as_tensor(_read(value) if isinstance(value, list) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f'row {index}: field "{name}" is neither a number nor an array of numbers: {error}. Leave it out'
        ) from error
    return tensor.float() if tensor.dtype == torch.float64 and not isinstance(value, Tensor) else tensor


def _read(values: list[Any]) -> Any:
    """Return a flat list of plain numbers as an array, which NumPy makes faster than torch does; others as is."""
    kinds = set(map(type, values))
    if kinds <= {int, float, bool}:
        array = np.asarray(values)
        if array.dtype in (np.int64, np.bool_) or (array.dtype == np.float64 and float in kinds):
            return array  # NumPy makes floats of whole numbers that are too large; torch refuses them
    return values
