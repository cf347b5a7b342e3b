import pytest
import torch
from torch import nn

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.gradients.examples import split_examples, stack_examples
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama, tiny_t5

LLAMA, T5 = tiny_llama(), tiny_t5()


@pytest.mark.parametrize("collate", [collate_packed, collate_padded, lambda rows: collate_padded(rows, side="left")])
def test_examples_are_the_rows_that_went_in(collate):
    rows = uneven_rows(5)
    examples = split_examples(LLAMA, collate(rows))
    assert [example["input_ids"][0].tolist() for example in examples] == [row["input_ids"] for row in rows]
    assert [example["labels"][0, 1:].tolist() for example in examples] == [row["labels"][1:] for row in rows]
    for example in examples:
        if "position_ids" in example:
            assert example["position_ids"].tolist() == [list(range(example["input_ids"].shape[1]))]
        else:
            assert bool(example["attention_mask"].all())


def test_several_packed_rows_and_what_describes_the_pack():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    ids = torch.arange(10).view(2, 5)
    batch = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": torch.ones(2, 5),
        "max_length_q": 4,
        "flag": 7,
    }
    examples = split_examples(LLAMA, {**batch, "cu_seq_lens_q": torch.tensor([0, 3, 5, 6, 10])})
    assert [e["input_ids"].tolist() for e in examples] == [[[0, 1, 2]], [[3, 4]], [[5]], [[6, 7, 8, 9]]]
    assert all(set(e) == {"input_ids", "position_ids", "flag"} for e in examples)


def test_left_padded_positions_that_look_packed_are_not():
    batch = {
        "input_ids": torch.tensor([[9, 9, 4, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2]]),
    }
    (example,) = split_examples(LLAMA, batch)
    assert example["input_ids"].tolist() == [[4, 5, 6]]
    assert example["position_ids"].tolist() == [[0, 1, 2]]


def test_classes_and_shared_numbers_stay_and_floats_are_not_cut():
    batch = {
        "input_ids": torch.tensor([[4, 5, 0], [6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "labels": torch.tensor([2, 0]),
        "features": torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
        "scale": torch.tensor(3.0),
    }
    first, second = split_examples(LLAMA, batch)
    assert first["input_ids"].tolist() == [[4, 5]]
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([2], [0])
    assert first["features"].shape == (1, 3)
    assert first["scale"].item() == 3.0


def test_an_encoder_decoders_labels_are_cut_by_themselves():
    """Also where they are, by chance, as wide as the inputs."""
    batch = {
        "input_ids": torch.tensor([[4, 0, 0], [6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]]),
        "labels": torch.tensor([[3, 2, 1], [5, -100, -100]]),
        "decoder_input_ids": torch.tensor([[0, 3, 2], [0, 5, 1]]),
    }
    first, second = split_examples(T5, batch)
    assert (first["input_ids"].tolist(), first["labels"].tolist()) == ([[4]], [[3, 2, 1]])
    assert (second["labels"].tolist(), second["decoder_input_ids"].tolist()) == ([[5]], [[0]])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([1, 2], TypeError, "a batch is a dict of tensors; got list"),
        ({"input_ids": [1, 2]}, TypeError, "a batch is a dict of tensors"),
        ({"a": torch.tensor(1)}, ValueError, "all of its tensors are single numbers"),
        (
            {"input_ids": torch.ones(3, 5), "labels": torch.ones(2)},
            ValueError,
            'every field must have one row an example: "input_ids" has 3 rows, "labels" has 2',
        ),
        (
            {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])},
            ValueError,
            "row 1 of the batch is nothing but padding",
        ),
        (
            {"position_ids": torch.tensor([[0, 1, 0]]), "labels": torch.tensor([1])},
            ValueError,
            r'a packed batch must have one value a token, \[1, 3\], in every field; "labels" has \[1\]',
        ),
    ],
)
def test_bad_batches(batch, error, message):
    with pytest.raises(error, match=message):
        split_examples(nn.Linear(1, 1), batch)


def test_stacking_pads_right_under_a_mask():
    examples = split_examples(LLAMA, collate_packed(uneven_rows(2)))
    stacked = stack_examples(examples)
    assert stacked["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert stacked["labels"][0].tolist()[-1] == -100
    again = split_examples(LLAMA, {k: v for k, v in stacked.items() if k != "position_ids"})
    assert [e["input_ids"].tolist() for e in again] == [e["input_ids"].tolist() for e in examples]


def test_stacking_what_cannot_be_stacked():
    one, two = {"input_ids": torch.ones(1, 2), "depth": 3}, {"input_ids": torch.ones(1, 2), "depth": 4}
    assert stack_examples([one, two]) is None
    assert stack_examples([one, {"input_ids": torch.ones(1, 2)}]) is None
    assert stack_examples([{"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}]) is None
    assert stack_examples([one, dict(one)])["input_ids"].shape == (2, 2)
