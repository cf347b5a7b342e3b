"""Fields of a row in which a teacher's predictions are kept, so that no shuffle can part them from their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LOGITS, LOGPROBS, INDICES, TEMPERATURE = (
    "teacher_logits", "teacher_logprobs", "teacher_indices", "teacher_temperature",
)  # fmt: skip
TEACHER_FIELDS = (LOGITS, LOGPROBS, INDICES, TEMPERATURE)
NOTHING = -1
"""In "teacher_indices": no prediction is kept for this place."""


def teacher_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a row's entries in which a teacher's predictions are kept.

    "teacher_logits" of a classifier: [C], or [n, C] one vector a token. "teacher_logprobs" and "teacher_indices" [n, k]
    of a language model: at each of the n labels' places the k largest log-probabilities and their classes, -1 where
    nothing is kept; "teacher_temperature" [n] is the temperature they were made at.
    """
    return {name: row[name] for name in TEACHER_FIELDS if name in row}


def without_prediction(row: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with the teacher's fields that another row has, saying that nothing is kept.

    So rows with and without predictions may stand in one batch.

    Args:
        row: with "labels".
        like: the fields of another row, from `teacher_fields`; those that the row has itself stay.
    """
    labels = torch.as_tensor(row["labels"])
    made: dict[str, Tensor] = {}
    for name, value in like.items():
        given = torch.as_tensor(value)
        if name in row:
            continue
        if name == LOGITS and given.ndim == 1:
            made[name] = given.new_empty(0)  # padded with NaN by `collate_padded`
        else:
            fill = {LOGITS: torch.nan, INDICES: NOTHING}.get(name, 0.0)
            made[name] = given.new_full((len(labels), *given.shape[1:]), fill)
    return {**row, **made}
