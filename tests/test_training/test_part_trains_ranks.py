"""A part that trains, and averages, in two processes: data-parallel and sharded, stopped and resumed."""

import pytest
import torch
from ranks_cases import make, off, weights
from ranks_worker import run
from runs import Stop

from llmtune.training import LISA, AverageWeights, LinearProbeFirst

PARTS = {
    "LISA": lambda: [LISA(1, every=2), AverageWeights(0.7)],
    "probe": lambda: [LinearProbeFirst(3, rate_factor=3.0), AverageWeights(None, start=2)],
}


def trained(rank, name, sharded, folder, stop=None):
    loop = make("full", sharded=sharded, folder=folder, save_every=1, max_steps=6, eval_every=2)
    loop.callbacks += [*([] if stop is None else [Stop(stop)]), *PARTS[name]()]
    try:
        loop.fit(resume=True)
    except KeyboardInterrupt:
        return None
    return weights(loop.model), loop.history.column("eval_loss")


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives_also_after_a_resume(name, sharded, tmp_path):
    alone, losses = trained(0, name, False, tmp_path / "alone")
    whole = run(2, trained, name, sharded, tmp_path / "whole", folder=tmp_path)[0]
    run(2, trained, name, sharded, tmp_path / "cut", 2, folder=tmp_path)
    resumed = run(2, trained, name, sharded, tmp_path / "cut", folder=tmp_path)[0]
    assert all(torch.equal(resumed[0][key], value) for key, value in whole[0].items())
    assert resumed[1] == whole[1] == pytest.approx(losses, rel=1e-5)
    assert off(whole[0], alone) < 1e-5
