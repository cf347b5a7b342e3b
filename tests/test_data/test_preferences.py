from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtune.data.collate import collate_padded
from llmtune.data.preferences import collate_preferences

PAIRS = [
    {"prompt": [5, 7, 11], "chosen": [13, 2], "rejected": [17, 19, 23, 2]},
    {"prompt": [29], "chosen": [31, 2], "rejected": [2]},
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_stands_before_both_answers_and_carries_no_label(side: Any) -> None:
    batch = collate_preferences(PAIRS, pad_token_id=3, side=side, pad_to_multiple_of=4)
    full = [
        {"input_ids": [5, 7, 11, 13, 2], "labels": [-100, -100, -100, 13, 2]},
        {"input_ids": [5, 7, 11, 17, 19, 23, 2], "labels": [-100, -100, -100, 17, 19, 23, 2]},
        {"input_ids": [29, 31, 2], "labels": [-100, 31, 2]},
        {"input_ids": [29, 2], "labels": [-100, 2]},
    ]
    expected = collate_padded(full, pad_token_id=3, side=side, pad_to_multiple_of=4)
    assert set(batch) == {*expected, "chosen"}
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    assert batch["input_ids"].shape == (4, 8)
    assert batch["chosen"].tolist() == [True, False, True, False]


def test_whole_rows_and_reference_numbers() -> None:
    def row(ids: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "labels": [-100, *ids[1:]], "token_type_ids": [1] * len(ids)}

    rows = [
        {"chosen": row([5, 7]), "rejected": row([5, 9, 11]), "reference_chosen": -1.5, "reference_rejected": -2},
        {
            "chosen": row([3, 4]),
            "rejected": row([3]) | {"labels": [3]},
            "reference_chosen": -4,
            "reference_rejected": 0,
        },
    ]
    batch = collate_preferences(rows)
    assert batch["input_ids"].tolist() == [[5, 7, 0], [5, 9, 11], [3, 4, 0], [3, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["reference_chosen"].tolist() == [-1.5, -4.0]
    assert batch["reference_rejected"].tolist() == [-2.0, 0.0]


def test_an_encoder_decoders_labels_have_their_own_length() -> None:
    prompt = [5, 7, 11, 13]
    pair = {
        "chosen": {"input_ids": prompt, "labels": [17, 1]},
        "rejected": {"input_ids": prompt, "labels": [19, 23, 29, 31, 1]},
    }
    batch = collate_preferences([pair])
    assert batch["input_ids"].tolist() == [prompt, prompt]
    assert batch["labels"].tolist() == [[17, 1, -100, -100, -100], [19, 23, 29, 31, 1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        ([{"prompt": [5], "chosen": [7]}], 'pair 0 has no "rejected"; its fields are chosen, prompt'),
        ([PAIRS[0], {**PAIRS[1], "choosen": [1]}], r'pair 1 has a field "choosen".*Did you mean "chosen"'),
        (
            [{"prompt": "Hi", "chosen": [5], "rejected": [7]}],
            r'so "prompt" must be token ids \[n\], n > 0, none below 0; got \'Hi\'',
        ),
        ([{"prompt": [5], "chosen": [], "rejected": [7]}], r'pair 0 has a "prompt", so "chosen" must be token ids'),
        ([{"chosen": [5], "rejected": [7]}], r'no "prompt", so "chosen" must be a row with "input_ids" and "labels"'),
        (
            [{"chosen": {"input_ids": [5, 7], "labels": [5, 7]}, "rejected": {"input_ids": [5], "labels": [-100]}}],
            r'pair 0: "rejected" has no labels \(all are -100\)',
        ),
        (
            [{**PAIRS[0], "reference_chosen": -1.0}, PAIRS[1]],
            'row 1 has no "reference_chosen" and others have: give it for all, or none',
        ),
        ([PAIRS[0], [5, 7]], r"pair 1 must be a dictionary of prompt, chosen, .*; got \[5, 7\]"),
        ([{"prompt": [5], "chosen": [-100], "rejected": [7]}], r'so "chosen" must be token ids .*; got \[-100\]'),
        *(
            (
                [PAIRS[0] | {"reference_chosen": value, "reference_rejected": -1.0}],
                f'pair 0: "reference_chosen" must be a finite number, a log-probability; got {value!r}',
            )
            for value in ("x", None, float("nan"), float("-inf"))
        ),
    ],
)
def test_pairs_that_cannot_be_compared(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate_preferences(rows)
