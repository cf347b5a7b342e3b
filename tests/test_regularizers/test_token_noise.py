"""Token noise: how many tokens, which, and by what they are replaced."""

import pytest
import torch

from llmtune.regularizers.token_noise import token_noise

SPECIAL = (0, 1, 2)


def text(rows=53, length=59):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    ids[:, 0], ids[:, 5] = 1, 2
    mask = torch.ones_like(ids)
    mask[:, -7:], ids[:, -7:] = 0, 11  # padded with an ordinary token
    return ids, mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_by_a_mask_token(p, side):
    ids, mask = text()
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    before = ids.clone()
    noisy = token_noise(ids, mask, p, mask_token=98, special_tokens=SPECIAL)
    changed = noisy != ids
    fair = (mask == 1) & ~torch.isin(ids, torch.tensor(SPECIAL))
    assert not changed[~fair].any()
    assert bool((noisy[changed] == 98).all())
    n = int(fair.sum())
    assert abs(int(changed.sum()) / n - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(ids, before)
    assert noisy.dtype == ids.dtype


def test_by_random_tokens_each_as_likely():
    ids, mask = torch.full((101, 211), 50), torch.ones(101, 211)
    noisy = token_noise(ids, mask, 0.5, vocabulary=11, special_tokens=(0, 1, 2, 7))
    drawn = noisy[noisy != 50]
    share = torch.bincount(drawn, minlength=11).double() / len(drawn)
    assert share[[0, 1, 2, 7]].sum() == 0
    others = share[[3, 4, 5, 6, 8, 9, 10]]
    assert bool((abs(others - 1 / 7) < 5 * (1 / 7 * 6 / 7 / len(drawn)) ** 0.5).all())


def test_without_a_mask_all_tokens_are_real():
    ids, _ = text()
    noisy = token_noise(ids, None, 0.9, mask_token=98)
    assert bool((noisy[:, -7:] == 98).any())
    assert bool((noisy[:, 0] == 98).any())
    assert torch.equal(token_noise(ids, None, 0.0, mask_token=98), ids)


def test_draws_come_from_the_generator_or_the_global_state():
    ids, mask = text()
    state = torch.get_rng_state()
    pair = [token_noise(ids, mask, 0.3, vocabulary=97, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*pair)
    assert torch.equal(torch.get_rng_state(), state)
    first = token_noise(ids, mask, 0.3, vocabulary=97)
    assert not torch.equal(token_noise(ids, mask, 0.3, vocabulary=97), first)
    torch.set_rng_state(state)
    assert torch.equal(token_noise(ids, mask, 0.3, vocabulary=97), first)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "one of vocabulary and mask_token is expected; got None and None"),
        ({"vocabulary": 97, "mask_token": 3}, "one of vocabulary and mask_token is expected; got 97 and 3"),
        ({"mask_token": -1}, "a vocabulary from 1 or a mask_token from 0 is expected; got None and -1"),
        ({"vocabulary": 0}, "a vocabulary from 1 or a mask_token from 0 is expected; got 0 and None"),
        ({"p": 1.0, "mask_token": 3}, "p must be a probability from 0 to below 1; got 1.0"),
        ({"vocabulary": 3, "special_tokens": SPECIAL}, "all 3 tokens of the vocabulary are special"),
        ({"attention_mask": torch.ones(3, 5), "mask_token": 3}, r"ids' shape \[2, 3\]; got \[3, 5\]"),
    ],
)
def test_what_is_refused(knobs, message):
    knobs = {"attention_mask": None, "p": 0.1} | knobs
    with pytest.raises(ValueError, match=message):
        token_noise(torch.ones(2, 3, dtype=torch.long), knobs.pop("attention_mask"), knobs.pop("p"), **knobs)
