"""Pairs of a preferred and another answer to batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from llmtune.data.collate import IGNORED, collate_padded
from llmtune.errors import did_you_mean
from llmtune.types import Batch

SIDES = ("chosen", "rejected")
REFERENCE = ("reference_chosen", "reference_rejected")
FIELDS = ("prompt", *SIDES, *REFERENCE)


def collate_preferences(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int = 0,
    side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """Return a batch of pairs: row 2i is pair i's preferred answer, row 2i + 1 the other one.

    Args:
        rows: each a pair, in one of two forms. With "prompt": token ids of prompt, "chosen" and "rejected" answers,
            without padding; the two are prompt + answer, with labels on the answer alone. Without it: "chosen" and
            "rejected" are each a row for `collate_padded`, "input_ids" and "labels" among it, such as
            `prompt_examples` gives; for an encoder-decoder the labels are the answer. Either form may have
            "reference_chosen" and "reference_rejected", numbers: the log-probabilities of the two under a reference.
        pad_token_id: the token to fill with.
        side: where the padding goes.
        pad_to_multiple_of: rounds the padded length up.

    Returns:
        What `collate_padded` gives for the 2B rows, "input_ids", "labels" and "attention_mask" [2B, T] among it;
        "chosen" [2B], booleans, True and False in turns; and the reference's numbers [B] where the rows have them.

    Raises:
        ValueError: there are no rows; a row lacks a side, has an unknown field, has an answer without labels, or has
            reference numbers that others lack or that are not finite; or `collate_padded` raises. Names row and field.

    Example:
        >>> pair = {"prompt": [5, 7], "chosen": [11, 2], "rejected": [13, 17, 2]}
        >>> batch = collate_preferences([pair])
        >>> batch["input_ids"].tolist(), batch["chosen"].tolist()
        ([[5, 7, 11, 2, 0], [5, 7, 13, 17, 2]], [True, False])
        >>> batch["labels"].tolist()
        [[-100, -100, 11, 2, -100], [-100, -100, 13, 17, 2]]
    """
    answers = [_answer(row, side_, index) for index, row in enumerate(rows) for side_ in SIDES]
    batch = collate_padded(answers, pad_token_id=pad_token_id, side=side, pad_to_multiple_of=pad_to_multiple_of)
    batch["chosen"] = torch.tensor([True, False]).repeat(len(rows))
    for name in REFERENCE:
        having = [name in row for row in rows]
        if any(having):
            if not all(having):
                raise ValueError(f'row {having.index(False)} has no "{name}" and others have: give it for all, or none')
            batch[name] = torch.tensor([_number(row[name], name, index) for index, row in enumerate(rows)])
    return batch


def _answer(row: Mapping[str, Any], side: str, index: int) -> dict[str, Any]:
    """Return one side of a pair as a row with "input_ids" and "labels"."""
    if not isinstance(row, Mapping):
        raise ValueError(f"pair {index} must be a dictionary of {', '.join(FIELDS)}; got {row!r:.80}")
    unknown = [name for name in row if name not in FIELDS]
    if unknown:
        raise ValueError(
            f'pair {index} has a field "{unknown[0]}"; the fields of a pair are {", ".join(FIELDS)}.'
            f"{did_you_mean(unknown[0], FIELDS)}"
        )
    if side not in row:
        raise ValueError(f'pair {index} has no "{side}"; its fields are {", ".join(sorted(row))}')
    answer = row[side]
    if "prompt" in row:
        prompt, ids = _ids(row["prompt"], "prompt", index), _ids(answer, side, index)
        return {"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids}
    if not isinstance(answer, Mapping) or "labels" not in answer or "input_ids" not in answer:
        raise ValueError(
            f'pair {index} has no "prompt", so "{side}" must be a row with "input_ids" and "labels"; got {answer!r:.80}'
        )
    if bool((torch.as_tensor(answer["labels"]) == IGNORED).all()):
        raise ValueError(f'pair {index}: "{side}" has no labels (all are {IGNORED}), so it cannot be compared')
    return dict(answer)


def _ids(value: Any, name: str, index: int) -> list[int]:
    """Return token ids as a list.

    Raises:
        ValueError: it is no non-empty sequence of integers.
    """
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool or bool((ids < 0).any()):
        raise ValueError(
            f'pair {index} has a "prompt", so "{name}" must be token ids [n], n > 0, none below 0; got {value!r:.80}. '
            'Whole rows with "input_ids" and "labels" go without "prompt"'
        )
    found: list[int] = ids.tolist()
    return found


def _number(value: Any, name: str, index: int) -> float:
    """Return a log-probability as a float.

    Raises:
        ValueError: it is no finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f'pair {index}: "{name}" must be a finite number, a log-probability; got {value!r:.80}')
    return number
