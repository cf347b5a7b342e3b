from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtune.data.masking import MaskedLMCollator

COLLATE = MaskedLMCollator(mask_token_id=4, vocab_size=97, special_ids=(0, 1, 2, 3, 4), pad_token_id=0, seed=7)


def rows(*lengths: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    middle = [torch.randint(5, 97, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": [1, *ids, 2]} for ids in middle]


def originals(batch: dict[str, Tensor]) -> Tensor:
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def test_labels_are_the_hidden_tokens_and_nothing_else_changes() -> None:
    data = rows(31, 17, 5)
    batch = COLLATE(data)
    for index, row in enumerate(data):
        n = len(row["input_ids"])
        assert originals(batch)[index, :n].tolist() == row["input_ids"]
        assert batch["labels"][index, [0, n - 1]].tolist() == [-100, -100]
        assert batch["attention_mask"][index].tolist() == [1] * n + [0] * (33 - n)
        assert (batch["labels"][index, n:] == -100).all()


def test_shares_of_what_becomes_of_a_token() -> None:
    batch = COLLATE(rows(*[499] * 40))
    chosen = batch["labels"] != -100
    n = 499 * 40
    assert abs(chosen.sum().item() / n - 0.15) < 0.01
    masked = batch["input_ids"][chosen] == 4
    kept = batch["input_ids"][chosen] == batch["labels"][chosen]
    assert abs(masked.float().mean().item() - 0.8) < 0.03
    assert abs(kept.float().mean().item() - 0.1 - 0.1 / 92) < 0.02  # a random token may be the very one
    replaced = batch["input_ids"][chosen][~masked & ~kept]
    assert replaced.min() >= 5
    assert len(replaced.unique()) > 80


def test_a_row_is_masked_the_same_wherever_it_stands() -> None:
    data = rows(31, 17, 5)
    together, alone = COLLATE(data), COLLATE(data[1:2])
    torch.manual_seed(99)
    assert torch.equal(together["input_ids"][1, :19], alone["input_ids"][0])
    assert torch.equal(together["labels"][1, :19], alone["labels"][0])
    assert torch.equal(COLLATE(data)["input_ids"], together["input_ids"])
    tensors = [{"input_ids": torch.tensor(row["input_ids"])} for row in data]
    assert torch.equal(COLLATE(tensors)["input_ids"], together["input_ids"])
    assert not torch.equal(replace(COLLATE, seed=8)(data)["labels"], together["labels"])
    assert not torch.equal(COLLATE(rows(31, seed=1))["labels"] == -100, COLLATE(rows(31))["labels"] == -100)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    COLLATE(rows(31))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_row_has_a_target() -> None:
    for seed in range(30):
        assert (COLLATE(rows(1, seed=seed))["labels"] != -100).sum() == 1


def test_padding_that_is_a_common_token_is_still_learned_inside_a_row() -> None:
    collate = replace(COLLATE, pad_token_id=50, probability=0.999)
    batch = collate([{"input_ids": [1, 50, 50, 50, 2]}, {"input_ids": [1, 50, 2]}])
    assert batch["labels"].tolist() == [[-100, 50, 50, 50, -100], [-100, 50, -100, -100, -100]]


def test_special_tokens_mask_and_further_fields() -> None:
    batch = replace(COLLATE, probability=0.999)(
        [{"input_ids": [9, 8, 7], "special_tokens_mask": [1, 0, 1], "token_type_ids": [0, 1, 1]}]
    )
    assert batch["labels"].tolist() == [[-100, 8, -100]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1]]
    assert "special_tokens_mask" not in batch


def test_from_a_tokenizer() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "a": 4, "b": 5}, "a"))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    collate = MaskedLMCollator.from_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=core, mask_token="[MASK]", **names), probability=0.3, seed=5
    )
    assert (collate.mask_token_id, collate.vocab_size, sorted(collate.special_ids)) == (3, 6, [0, 1, 2, 3])
    assert (collate.probability, collate.seed) == (0.3, 5)
    with pytest.raises(ValueError, match="has no mask token"):
        MaskedLMCollator.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, **names))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="probability must be above 0 and below 1; got 1"):
        replace(COLLATE, probability=1)
    with pytest.raises(ValueError, match="all 3 tokens are special"):
        replace(COLLATE, vocab_size=3)
    with pytest.raises(ValueError, match='row 0 has "labels", which masking makes itself'):
        COLLATE([{"input_ids": [9], "labels": [9]}])
    with pytest.raises(ValueError, match="row 1 has nothing but special tokens"):
        COLLATE([*rows(3), {"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match="there are no rows"):
        COLLATE([])
