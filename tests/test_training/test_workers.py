"""Batches made ahead by other processes are those that are made here."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from llmtune.data.collate import collate_padded
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2
from llmtune.training.loop import TrainingLoop
from llmtune.training.randomness import random_state, seed_everything
from llmtune.training.settings import LoopSettings
from llmtune.training.signals import StopSignals
from llmtune.training.workers import BatchesAhead
from llmtune.types import Callback


def draws(step):
    return [{"step": step, "drawn": (random.random(), float(np.random.rand()), float(torch.rand(())))}]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_in_any_number_of_processes_the_batches_are_the_same(workers):
    ahead = BatchesAhead(draws, seed=7, workers=workers, end=9)
    here = BatchesAhead(draws, seed=7, workers=0, end=9)
    assert [ahead.get(step, 4) for step in range(2, 9)] == [here.get(step, 4) for step in range(2, 9)]
    assert here.get(5, 4) != BatchesAhead(draws, seed=8, workers=0, end=9).get(5, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_may_be_asked_for_again_and_out_of_order(workers):
    ahead = BatchesAhead(draws, seed=7, workers=workers, end=9)
    wanted = [BatchesAhead(draws, seed=7, workers=0, end=9).get(step, 4) for step in range(9)]
    for step in (0, 0, 1, 2, 2, 7, 8, 3, 4, 0):
        assert ahead.get(step, 4) == wanted[step]


def test_others_make_them_and_where_the_size_changes_they_are_made_anew():
    size = [4]

    def make(step):
        return [{"step": step, "size": size[0], "process": os.getpid()}]

    ahead = BatchesAhead(make, seed=7, workers=2, end=9)
    first = [ahead.get(step, 4)[0] for step in range(3)]
    assert os.getpid() not in {batch["process"] for batch in first}
    size[0] = 2
    assert [ahead.get(step, 2)[0]["size"] for step in (3, 4)] == [2, 2]
    assert [batch["size"] for batch in first] == [4] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_as_they_were_made(workers):
    def make(step):
        return [{"array": np.arange(3), "pair": (1, 2.5), "text": "x", "none": None, "ids": torch.arange(step + 2)}]

    batch = BatchesAhead(make, seed=7, workers=workers, end=9).get(3, 4)[0]
    assert isinstance(batch["array"], np.ndarray)
    assert batch["pair"] == (1, 2.5)
    assert (batch["text"], batch["none"], batch["ids"].tolist()) == ("x", None, [0, 1, 2, 3, 4])


def test_workers_leave_the_global_state_alone():
    before = random_state()
    BatchesAhead(draws, seed=7, workers=2, end=9).get(3, 4)
    after = random_state()
    assert all(torch.equal(before[name], after[name]) for name in ("torch", "numpy", "python"))


class DrawsAtTheStart(Callback):
    def on_fit_start(self, loop):
        self.drawn = [float(torch.rand(())), float(np.random.rand()), random.random()]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_callbacks_draw_before_the_first_step_depends_on_seed_and_step_alone(workers):
    torch.manual_seed(11 + workers)
    callback = DrawsAtTheStart()
    run(tiny_gpt2(dropout=0.0), callbacks=[callback], data_workers=workers).fit()
    seed_everything(0, "start", 0)
    assert callback.drawn == [float(torch.rand(())), float(np.random.rand()), random.random()]


def run(model, folder=None, *, callbacks=(), **changed):
    base = {"max_steps": 6, "rows_per_step": 4, "rows_per_micro_batch": 2, "progress": False, "learning_rate": 1e-2}
    return TrainingLoop(
        model, uneven_rows(13), settings=LoopSettings(**(base | {"folder": folder} | changed)), collate=noisy,
        callbacks=callbacks,
    )  # fmt: skip


def noisy(rows):
    batch = collate_padded(rows)
    return batch | {"input_ids": batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.3, 5)}


def test_a_run_is_the_same_bit_for_bit(tmp_path):
    """Without workers, with two, and with two where it was stopped and goes on with none."""

    class Stop(Callback):
        def on_step_end(self, loop, metrics):
            if loop.step == 3:
                raise KeyboardInterrupt

    losses = []
    for workers in (0, 2):
        losses.append([row["loss"] for row in run(tiny_gpt2(dropout=0.3), data_workers=workers).fit()])
    with pytest.raises(KeyboardInterrupt):
        run(tiny_gpt2(dropout=0.3), tmp_path, data_workers=2, save_every=1, callbacks=[Stop()]).fit()
    losses.append([row["loss"] for row in run(tiny_gpt2(dropout=0.3), tmp_path).fit(resume=True)])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_worker_is_raised_here_as_it_is(workers):
    """At a later step, made ahead: raised when that step is asked for, and not before."""

    def make(step):
        if step == 5:
            raise LookupError("row 3 is not there")
        return draws(step)

    ahead = BatchesAhead(make, seed=7, workers=workers, end=9)
    for step in range(2, 5):
        ahead.get(step, 4)
    with pytest.raises(LookupError) as caught:
        ahead.get(5, 4)
    assert str(caught.value) == "row 3 is not there"
    assert workers == 0 or "in a data worker" in str(caught.value.__cause__)
    assert workers == 0 or 'raise LookupError("row 3' in str(caught.value.__cause__)


def test_an_error_that_cannot_be_sent_is_told_in_its_words():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def make(step):
        raise Odd("this", "that")

    with pytest.raises(RuntimeError, match="Odd: this and that"):
        BatchesAhead(make, seed=7, workers=1, end=9).get(0, 4)


def test_a_batch_that_cannot_be_sent_is_told_of():
    def make(step):
        return [{"ids": torch.arange(3), "note": lambda: step}]

    assert BatchesAhead(make, seed=7, workers=0, end=9).get(3, 4)[0]["note"]() == 3
    with pytest.raises(
        TypeError, match=r"a batch's 'note', a function, cannot be sent from a data worker: .*set data_w"
    ):
        BatchesAhead(make, seed=7, workers=1, end=9).get(3, 4)


def test_workers_hear_no_interrupt_and_can_be_ended():
    def make(step):
        return [{"handlers": [int(signal.getsignal(number) or 0) for number in (signal.SIGINT, signal.SIGTERM)]}]

    with StopSignals():
        batch = BatchesAhead(make, seed=7, workers=1, end=9).get(3, 4)[0]
    assert batch["handlers"] == [signal.SIG_IGN, signal.SIG_DFL]


def test_no_worker_is_left_after_the_run():
    import multiprocessing

    run(tiny_gpt2(), data_workers=2).fit()
    assert multiprocessing.active_children() == []
