"""Random state: pure functions of keys, and held still."""

import json
import random

import numpy as np
import pytest
import torch

from llmtune.data.collate import collate_padded
from llmtune.testing.models import tiny_llama
from llmtune.training import randomness
from llmtune.training.checkpoint_state import join_tensors, split_tensors
from llmtune.training.loop import TrainingLoop
from llmtune.training.randomness import (
    derive_seed,
    fetch_rows,
    fixed_randomness,
    keyed_randomness,
    permutation,
    random_state,
    rows_of_step,
    seed_everything,
    set_random_state,
)
from llmtune.training.settings import LoopSettings
from llmtune.training.workers import BatchesAhead


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


class Augmented:
    """Rows that draw from all three sources when they are fetched, and remember what they gave."""

    def __init__(self, length=7):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"row": index, "drawn": draw(), "input_ids": [5, 7, 11], "labels": [5, 7, 11]}


def keep(rows):
    """A batch that still tells what each row drew."""
    return collate_padded([{name: row[name] for name in ("input_ids", "labels")} for row in rows]) | {"rows": rows}


def augmented(**changed):
    settings = LoopSettings(**({"max_steps": 5, "rows_per_step": 4, "progress": False} | changed))
    return TrainingLoop(tiny_llama(), Augmented(), settings=settings, collate=keep)


def draws_of(batches_by_step, size=4):
    """What each (epoch, row) drew; the chain of samples is 7 rows an epoch."""
    found = {}
    for step, batches in batches_by_step.items():
        rows = [row for batch in batches for row in batch["rows"]]
        for place, row in enumerate(rows):
            found[(step * size + place) // 7, row["row"]] = row["drawn"]
    return found


def test_every_sample_draws_its_own_and_no_two_the_same():
    loop = augmented()
    found = draws_of({step: loop.micro_batches(step) for step in range(7)})
    assert len(found) == 28
    assert sorted(found) == [(epoch, row) for epoch in range(4) for row in range(7)]
    assert all(len({drawn[source] for drawn in found.values()}) == 28 for source in range(4))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("order", [range(7), (6, 0, 3, 3, 5, 1, 4, 2)])
def test_a_sample_draws_the_same_however_the_step_is_cut_and_whenever_it_is_asked_for(size, order):
    wanted = augmented()
    wanted = draws_of({step: wanted.micro_batches(step) for step in range(7)})
    loop = augmented(rows_per_micro_batch=size)
    seed_everything(123, size)  # whatever was drawn before
    assert draws_of({step: loop.micro_batches(step) for step in order}) == wanted
    assert draws_of({2: augmented(seed=1).micro_batches(2)}) != draws_of({2: augmented().micro_batches(2)})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_draws_the_same_in_a_worker(workers):
    wanted = augmented()
    wanted = draws_of({step: wanted.micro_batches(step) for step in range(1, 5)})
    loop = augmented()
    ahead = BatchesAhead(loop.micro_batches, seed=0, workers=workers, end=5)
    assert draws_of({step: ahead.get(step, 4) for step in range(1, 5)}) == wanted


def test_fetching_leaves_the_global_state_alone():
    before = random_state()
    augmented().micro_batches(3)
    assert same_state(before, random_state())


def same_state(one, other):
    tensors = [name for name in one if isinstance(one[name], torch.Tensor)]
    rest = [name for name in one if name not in tensors]
    return all(torch.equal(one[n], other[n]) for n in tensors) and all(one[n] == other[n] for n in rest)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_plain_list_costs_no_seeding(kind, monkeypatch):
    monkeypatch.setattr(randomness, "seed_cpu", None)  # calling it would raise
    rows = kind([{"a": 1}, {"a": 2}, {"a": 3}])
    assert fetch_rows(rows, [2, 0], seed=0, first=0) == [{"a": 3}, {"a": 1}]
    with pytest.raises(TypeError):
        fetch_rows(Augmented(), [2, 0], seed=0, first=0)


def test_a_class_made_of_a_list_may_draw():
    class Drawing(list):
        def __getitem__(self, place):
            return draw()

    rows = Drawing(range(5))
    assert fetch_rows(rows, [3, 1], seed=0, first=8)[1] == fetch_rows(rows, [1], seed=0, first=9)[0]


def test_keyed_randomness_depends_on_the_key_alone_and_puts_the_state_back():
    seed_everything(3)
    np.random.randn()
    with keyed_randomness(7, "x", 2):
        first = draw()
    seed_everything(4)
    np.random.randn()
    before = random_state()
    with keyed_randomness(7, "x", 2):
        assert draw() == first
    assert same_state(before, random_state())
    for key in ((7, "x", 3), (8, "x", 2), (7, "y", 2)):
        with keyed_randomness(*key):
            assert draw() != first
    with pytest.raises(KeyError), keyed_randomness(1):
        {}[draw()]
    assert same_state(before, random_state())


def test_fixed_randomness_nests_and_survives_an_error():
    seed_everything(5)
    before = random_state()
    with fixed_randomness() as outer:
        first = draw()
        with fixed_randomness(outer):
            assert draw() == first
        second = draw()
    with fixed_randomness(outer):
        assert (draw(), draw()) == (first, second)
    with pytest.raises(KeyError), fixed_randomness():
        {}[draw()]
    assert same_state(before, random_state())


def test_fixed_randomness_repeats_dropout():
    layer = torch.nn.Dropout(0.5)
    x = torch.ones(97)
    with fixed_randomness() as state:
        one = layer(x)
    with fixed_randomness(state):
        two = layer(x)
    assert torch.equal(one, two)
    assert torch.equal(layer(x), one), "the state of before is back"
    assert not torch.equal(layer(x), one)


def test_the_state_is_one_that_a_checkpoint_holds():
    seed_everything(3)
    np.random.randn()
    random.gauss(0, 1)  # leaves half a pair behind
    values, tensors = split_tensors(random_state())
    wanted = (random.gauss(0, 1), *draw())
    set_random_state(join_tensors(json.loads(json.dumps(values)), tensors))
    assert (random.gauss(0, 1), *draw()) == wanted
