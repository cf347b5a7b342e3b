from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from llmtune.data.collate import collate_packed, collate_padded

ROWS = [{"input_ids": [5, 7], "labels": [5, 7]}, {"input_ids": [9, 8, 9], "labels": [-100, 8, 9]}]


def lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in batch.items()}


def test_packed_is_one_row_without_a_mask() -> None:
    assert lists(collate_packed(ROWS)) == {
        "input_ids": [[5, 7, 9, 8, 9]],
        "labels": [[-100, 7, -100, 8, 9]],
        "position_ids": [[0, 1, 0, 1, 2]],
    }


def test_packed_keeps_positions_and_masks_each_documents_first_label() -> None:
    pack = {"input_ids": [3, 4, 5, 6, 7], "labels": [3, 4, 5, 6, 7], "position_ids": [0, 1, 0, 1, 2]}
    assert lists(collate_packed([pack, {**ROWS[0], "position_ids": [0, 1]}])) == {
        "input_ids": [[3, 4, 5, 6, 7, 5, 7]],
        "labels": [[-100, 4, -100, 6, 7, -100, 7]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 1]],
    }


def test_packed_joins_further_fields_of_one_value_a_token() -> None:
    rows = [
        {**row, "token_type_ids": [1] * len(row["input_ids"]), "attention_mask": [1] * len(row["input_ids"])}
        for row in ROWS
    ]
    batch = collate_packed(rows)
    assert batch["token_type_ids"].tolist() == [[1] * 5]
    assert "attention_mask" not in batch


def test_packed_without_labels_makes_none_and_leaves_the_rows_alone() -> None:
    row = {"input_ids": torch.tensor([5, 7]), "labels": torch.tensor([5, 7])}
    collate_packed([row])
    assert row["labels"].tolist() == [5, 7]
    assert set(row) == {"input_ids", "labels"}
    assert set(collate_packed([{"input_ids": [5, 7]}])) == {"input_ids", "position_ids"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows to make a batch of"),
        ([ROWS[0], {"labels": [1]}], r'row 1 has no "input_ids"; its fields are \[\'labels\'\]'),
        ([{"input_ids": []}], r'row 0: "input_ids" must be \[n\] token ids, n > 0; got shape \[0\]'),
        ([{"input_ids": [[1, 2]]}], r"got shape \[1, 2\]"),
        ([{"input_ids": [1, 2], "text": "ab"}], 'row 0: field "text" is neither a number nor an array of numbers'),
        ([{"input_ids": [1]}, ROWS[0]], 'must have the same fields; "labels" is in only one of rows 0 and 1'),
        ([{"input_ids": [1, 2], "label": 3}], r'row 0: field "label" must have one value a token to be packed, \[2\]'),
        ([ROWS[0], {"input_ids": [1, 2], "labels": [1]}], 'row 1: field "labels" must have one value a token'),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], "row 0 is padded: its attention_mask has zeros"),
        ([{"input_ids": [1, 2], "position_ids": [1, 2]}], "row 0: position_ids must start at 0; got 1"),
    ],
)
def test_packed_names_bad_rows(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate_packed(rows)


def test_padded_by_length_never_by_token() -> None:
    rows = [{"input_ids": [5, 0], "labels": [5, 0]}, {"input_ids": [0, 8, 9], "labels": [-100, 8, 9]}]
    assert lists(collate_padded(rows, pad_token_id=0)) == {
        "input_ids": [[5, 0, 0], [0, 8, 9]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[5, 0, -100], [-100, 8, 9]],
    }


def test_padded_on_the_left_and_to_a_multiple() -> None:
    collate = partial(collate_padded, pad_token_id=2, side="left", pad_to_multiple_of=4)
    assert lists(collate(ROWS)) == {
        "input_ids": [[2, 2, 5, 7], [2, 9, 8, 9]],
        "attention_mask": [[0, 0, 1, 1], [0, 1, 1, 1]],
        "labels": [[-100, -100, 5, 7], [-100, -100, 8, 9]],
    }


def test_padded_stacks_labels_of_whole_rows() -> None:
    rows = [{"input_ids": [5], "labels": 1}, {"input_ids": [9, 8], "labels": 0}]
    batch = collate_padded(rows)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.long
    floats = collate_padded([{**row, "labels": float(row["labels"])} for row in rows])["labels"]
    assert floats.tolist() == [1.0, 0.0]
    assert floats.dtype == torch.float32
    several = collate_padded([{**row, "labels": np.array([0.0, 1.0, 0.0])} for row in rows])["labels"]
    assert several.tolist() == [[0.0, 1.0, 0.0]] * 2
    assert several.dtype == torch.float32
    with pytest.raises(
        ValueError, match=r'field "labels" must have one shape in all rows to be stacked; got \[\[1\], \[2\]\]'
    ):
        collate_padded([{"input_ids": [1], "labels": [0.5]}, {"input_ids": [1], "labels": [0.5, 1.0]}])


def test_padded_target_sequences_have_their_own_length() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [1, 2], "decoder_input_ids": [0, 1]},
        {"input_ids": [9], "labels": [3, 4, 5, 6, 7], "decoder_input_ids": [0, 3, 4, 5, 6]},
    ]
    assert lists(collate_padded(rows, pad_token_id=11, side="left")) == {
        "input_ids": [[5, 6, 7], [11, 11, 9]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "labels": [[1, 2, -100, -100, -100], [3, 4, 5, 6, 7]],
        "decoder_input_ids": [[0, 1, 11, 11, 11], [0, 3, 4, 5, 6]],
    }


def test_padded_further_fields() -> None:
    rows = [
        {
            "input_ids": [5, 6],
            "attention_mask": [0, 1],
            "token_type_ids": [1, 1],
            "weight": 0.5,
            "image": np.zeros((2, 3)),
        },
        {"input_ids": [9], "attention_mask": [1], "token_type_ids": [1], "weight": 2.0, "image": np.ones((2, 3))},
    ]
    batch = collate_padded(rows)
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 0]]
    assert batch["token_type_ids"].tolist() == [[1, 1], [1, 0]]
    assert batch["weight"].tolist() == [0.5, 2.0]
    assert batch["image"].shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "there are no rows"),
        (ROWS, {"side": "both"}, 'side must be "right" or "left"; got \'both\''),
        (ROWS, {"pad_to_multiple_of": 0}, "pad_to_multiple_of must be 1 or more; got 0"),
        ([{"input_ids": [1], "x": 1}, {"input_ids": [1], "x": [1]}], {}, 'field "x" must have one shape in all rows'),
        ([{"input_ids": [1], "x": [1]}, {"input_ids": [1], "x": 1}], {}, 'field "x" must have as many dimensions'),
    ],
)
def test_padded_names_bad_input(rows: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate_padded(rows, **options)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_of_several_kinds_become_what_holds_them_all(side: Any) -> None:
    """A row that happens to be whole numbers makes no whole numbers of the others."""
    rows = [{"input_ids": [5, 7], "x": [0, 1]}, {"input_ids": [9, 8, 9], "x": [0.25, 1.5, 2]}]
    rows.append({"input_ids": torch.tensor([3], dtype=torch.int32), "x": [True]})
    batch = collate_padded(rows, side=side)
    wanted = [[0, 1, 0], [0.25, 1.5, 2], [1, 0, 0]] if side == "right" else [[0, 0, 1], [0.25, 1.5, 2], [0, 0, 1]]
    assert batch["x"].tolist() == wanted
    assert (batch["x"].dtype, batch["input_ids"].dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("values", [
    [1, 2], [1, 2.5], [True, 2], [True, 0.5], [True, False], [], [2**62, -1], [2**53 + 1, 3], [16777217, 0.1],
    [float("nan"), float("inf"), 1], [2**70, 0.5], [np.float32(0.1), np.float32(2)], [np.float64(0.1), 2],
    [np.int32(3), 4], [torch.tensor(3), torch.tensor(4)], [torch.tensor(1.5, dtype=torch.bfloat16)],
    [torch.ones((), requires_grad=True), 2], [torch.tensor([1]), torch.tensor([2])],
], ids=str)  # fmt: skip
def test_a_list_is_what_torch_makes_of_it(values: list[Any]) -> None:
    wanted = torch.as_tensor(values)
    wanted = wanted.float() if wanted.dtype == torch.float64 else wanted
    found = collate_padded([{"input_ids": [1], "x": values}])["x"]
    torch.testing.assert_close(found, wanted[None], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("values", [[2**63, -1], [-3, 2**64 - 1], [2**70], [[2**63, -1]]], ids=str)
def test_whole_numbers_that_are_too_large_become_no_floats(values: list[Any]) -> None:
    with pytest.raises(
        ValueError, match='row 0: field "input_ids" is neither a number nor an array of numbers: Overfl'
    ):
        collate_padded([{"input_ids": values}])
