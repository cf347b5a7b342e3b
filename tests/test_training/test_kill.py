"""Runs that are killed, again and again, end bit for bit as the one that is left alone."""

import os
import random
import time
from functools import partial

import numpy as np
import pytest
import torch

from llmtune.errors import LawBroken
from llmtune.testing.kill import check_killed
from llmtune.testing.restless import RestlessRows, restless_run
from llmtune.training.loop import TrainingLoop

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork a process")


behind = partial(restless_run, background=True)


@pytest.mark.slow
def test_forty_kills_change_nothing():
    """At least 15 of the 40 must have left a save half done, and some must have come elsewhere."""
    reports = [check_killed(restless_run, kills=24, seed=1), check_killed(behind, kills=16, seed=2)]
    print(*reports, sep="\n")
    assert [report.kills for report in reports] == [24, 16]
    assert min(report.in_saves for report in reports) >= 5
    assert 15 <= sum(report.in_saves for report in reports) <= 38
    assert min(report.runs for report in reports) >= 2


def test_the_run_is_as_restless_as_it_is_said_to_be():
    """Each of the three random states alone changes what comes out of the rows."""
    rows, found = RestlessRows(), []
    for seeds in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        for seed, take in zip(seeds, (random.seed, np.random.seed, torch.manual_seed), strict=True):
            take(seed)
        found.append([rows[index]["input_ids"] for index in range(len(rows))])
    assert found[0] == found[1]
    assert all(other != found[0] for other in found[2:])


def test_a_few_kills_change_nothing():
    report = check_killed(partial(restless_run, steps=5), kills=3, seed=3)
    assert (report.kills, sum(report.ways.values())) == (3, 3)
    assert 1 <= report.runs <= 3


class ForgetsRandomness(TrainingLoop):
    """Draws from a generator of its own, which no checkpoint holds."""

    def training_step(self, batches):
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(0)
        metrics = super().training_step(batches)
        weight = self.model.lm_head.weight
        weight.data.add_(1e-3 * torch.randn(weight.shape, generator=self.generator))
        return metrics


class ForgetsMomentum(TrainingLoop):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.optimizer.state.clear()


class WillNotGoOn(TrainingLoop):
    def load_state_dict(self, state):
        raise ValueError("seeded")


class RemovesFirst(TrainingLoop):
    """Makes room before it writes."""

    def save(self):
        for path in self.settings.folder.glob("step-*"):
            path.rename(path.with_name(f"away-{time.time_ns()}-{path.name}"))
        super().save()


class ShowsEarly(TrainingLoop):
    """Writes where it will be seen."""

    def save(self):
        self.settings.folder.mkdir(exist_ok=True)
        (self.settings.folder / f"step-{self.step:08d}").mkdir()
        super().save()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ForgetsRandomness, "one result: after . kills .* is not what it is in the run that was left alone"),
        (ForgetsMomentum, "one result: after . kills .* is not what it is in the run that was left alone"),
        (WillNotGoOn, "one result: after . kills the resumed run stops with ValueError: seeded"),
        (RemovesFirst, r"nothing lost: the newest checkpoint was of step \d+; after a kill it is of -1"),
        # or the kill came a moment later, and the next try to show it early met the first one
        (ShowsEarly, r"nothing half: .* is not whole: .*manifest\.json is missing|FileExistsError"),
    ],
)
def test_a_loop_that_breaks_the_law_is_caught(kind, message):
    with pytest.raises(LawBroken, match=message):
        check_killed(partial(restless_run, kind=kind, steps=7), kills=40, seed=4)


def test_a_run_that_fails_by_itself_is_told():
    with pytest.raises(LawBroken, match="the run that is left alone stops with ValueError: the loss carries no gradi"):
        check_killed(partial(restless_run, kind=Detached), kills=1)


class Detached(TrainingLoop):
    def compute_loss(self, model, batch):
        return super().compute_loss(model, batch).detach()
