from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from llmtune.data.collate import collate_packed
from llmtune.data.packing import best_fit_decreasing, pack
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_llama


def documents(lengths: list[int]) -> list[dict[str, list[int]]]:
    made, first = [], 3
    for n in lengths:
        made.append({"input_ids": list(range(first, first + n))})
        first += n
    return made


def brute_force_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = [capacity - sum(sizes[i] for i in members) for members in bins]
        fits = [b for b in range(len(bins)) if room[b] >= sizes[item]]
        if fits:
            bins[min(fits, key=lambda b: room[b])].append(item)
        else:
            bins.append([item])
    return bins


def test_best_fit_decreasing_is_what_it_says() -> None:
    draw = random.Random(0)
    for _ in range(50):
        capacity = draw.randint(5, 60)
        sizes = [draw.randint(1, capacity) for _ in range(draw.randint(1, 80))]
        bins = best_fit_decreasing(sizes, capacity)
        assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in members) <= capacity for members in bins)
        expected = brute_force_best_fit(sizes, capacity)
        # of two rows with equal room either may be taken: what is filled stays the same, who stands where does not
        assert sorted(sum(sizes[i] for i in m) for m in bins) == sorted(sum(sizes[i] for i in m) for m in expected)
        assert bins == best_fit_decreasing(sizes, capacity)


def test_many_documents_are_packed_fast_and_full() -> None:
    draw = random.Random(1)
    sizes = [draw.randint(1, 512) for _ in range(50_000)]
    bins = best_fit_decreasing(sizes, 2048)
    assert sum(sizes) / (len(bins) * 2048) > 0.995


def test_rows_hold_whole_documents_with_their_own_positions() -> None:
    data = documents([3, 7, 2, 5, 4])
    packs = pack(data, 10)
    assert len(packs) == len(packs.lengths) == 3
    assert packs.lengths == [len(packs[i]["input_ids"]) for i in range(3)]
    assert packs[0]["input_ids"].tolist() == [*data[0]["input_ids"], *data[1]["input_ids"]]
    assert packs[0]["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    assert packs[0]["labels"].tolist() == [-100, 4, 5, -100, *data[1]["input_ids"][1:]]
    assert packs[-1]["input_ids"].dtype == torch.long
    seen = sorted(token for row in packs for token in row["input_ids"].tolist())
    assert seen == list(range(3, 3 + 21))


def test_given_labels_are_kept() -> None:
    packs = pack([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "attention_mask": [1, 1, 1]}], 8)
    assert packs[0]["labels"].tolist() == [-100, -100, 7]
    again = pack([{"input_ids": torch.tensor([5, 6, 7])}], 8)
    assert again[0]["labels"].tolist() == [-100, 6, 7]


def test_the_callers_tensors_are_not_written_to() -> None:
    ids = torch.tensor([5, 6, 7])
    packs = pack([{"input_ids": ids, "labels": ids}], 8)
    packs[0]["labels"][1] = -1
    assert ids.tolist() == [5, 6, 7]
    assert packs[0]["labels"].tolist() == [-100, 6, 7]


def test_the_representation_tells_how_full() -> None:
    assert repr(pack(documents([3, 7, 2, 5, 4]), 10)) == (
        "PackedDataset(5 documents in 3 rows of at most 10 tokens, 70.0% full)"
    )
    assert repr(pack(documents([3, 11]), 10, too_long="drop")).endswith("30.0% full, 1 too long and left out)")


def test_documents_that_are_too_long() -> None:
    data = documents([3, 11, 2])
    with pytest.raises(
        ValueError, match=r"row 1 has 11 tokens, more than max_tokens=4: pass .* too_long=.split. .* too_long=.drop."
    ):
        pack(data, 4)
    dropped = pack(data, 4, too_long="drop")
    assert (dropped.documents, dropped.dropped, sum(dropped.lengths)) == (2, 1, 5)
    split = pack(data, 4, too_long="split")
    assert (split.documents, split.dropped, sum(split.lengths)) == (5, 0, 16)
    rows = [row["input_ids"].tolist() for row in split]
    assert data[1]["input_ids"][:4] in rows
    piece = next(row for row in split if row["input_ids"][0] == data[1]["input_ids"][4])
    assert piece["labels"][0] == -100  # the piece does not see what stood before it
    assert piece["position_ids"][0] == 0
    with pytest.raises(ValueError, match="nothing is left to pack: all 1 documents are longer than max_tokens=4"):
        pack(data[1:2], 4, too_long="drop")


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "there is nothing to pack: the data has no documents"),
        ([{"input_ids": [1]}, {"ids": [1]}], {}, r'row 1 has no "input_ids"; its fields are \[\'ids\'\]'),
        ([{"input_ids": [1]}, {"input_ids": []}], {}, 'row 1: "input_ids" must be'),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, r"row 0: 2 input_ids need as many labels; got shape \[1\]"),
        ([{"input_ids": [1, 2], "text": "a"}], {}, 'row 0 has a field "text" that packing would lose'),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], {}, "row 0 is padded"),
        ([{"input_ids": [1, 2]}], {"max_tokens": 1}, "max_tokens must be 2 or more"),
        ([{"input_ids": [1, 2]}], {"too_long": "cut"}, 'too_long must be "raise", "split" or "drop"; got \'cut\''),
    ],
)
def test_bad_input_is_named(examples: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(examples, **{"max_tokens": 8, **options})


def test_the_loss_of_packs_is_that_of_the_documents() -> None:
    model = tiny_llama()
    data = documents([3, 7, 2, 5, 4])
    batch = collate_packed(list(pack(data, 10)))
    total = count = 0.0
    for document in data:
        ids = torch.tensor([document["input_ids"]])
        single = {"input_ids": ids, "labels": ids}
        total = total + causal_lm_loss(model, single) * causal_lm_loss.count_targets(single)
        count += causal_lm_loss.count_targets(single)
    assert causal_lm_loss.count_targets(batch) == count
    assert_close(causal_lm_loss(model, batch), total / count)
