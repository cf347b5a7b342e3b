"""Random state: pure functions of keys, and held still."""

import random

import numpy as np
import torch

from llmtune.training.randomness import (
    derive_seed,
    fixed_randomness,
    permutation,
    random_state,
    rows_of_step,
    seed_everything,
    set_random_state,
)


def draw():
    return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def test_derived_seeds_are_fixed_and_differ():
    assert derive_seed(0, "order", 1) == derive_seed(0, "order", 1)
    assert len({derive_seed(seed, name) for seed in range(11) for name in ("a", "b")}) == 22
    assert 0 <= derive_seed("x") < 2**63


def test_every_epoch_sees_every_row_once():
    rows = [row for step in range(5) for row in rows_of_step(step, length=7, size=3, seed=0, epochs=2)]
    assert sorted(rows[:7]) == list(range(7)) == sorted(rows[7:])
    assert len(rows) == 14
    assert rows[:7] != rows[7:]
    assert permutation(7, 0, 1) == rows[7:]


def test_without_an_end_every_step_is_full():
    assert [len(rows_of_step(step, length=5, size=13, seed=1)) for step in range(3)] == [13, 13, 13]


def test_state_goes_round_and_fixed_randomness_repeats():
    seed_everything(3)
    np.random.randn()  # leaves half of a pair behind, which is part of the state
    state = random_state()
    first = draw()
    set_random_state(state)
    assert draw() == first
    before = random_state()
    with fixed_randomness() as kept:
        one = draw()
    with fixed_randomness(kept):
        assert draw() == one
    set_random_state(before)
    assert draw() == one, "the block's draws are those of the state before it, which it leaves alone"
    seed_everything(4)
    assert draw() != first
