"""The Trainer in two processes is the Trainer in one: weights, logs and evaluation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_worker import CASES, run

SCRIPT = Path(__file__).with_name("trainer_worker.py")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes made."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    ended = subprocess.run(
        [*command, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, both, tmp_path):
    for accumulation in (1, 2):
        weights, logged, evaluated = run(name, accumulation, tmp_path)
        for made in both:
            theirs, _, loss = made[name, accumulation]
            for key, value in weights.items():
                torch.testing.assert_close(theirs[key], value, rtol=1e-7, atol=1e-8)
            if name != "of logits":  # whose evaluation is the Trainer's mean over rows
                assert loss == pytest.approx(evaluated, rel=1e-5)
        for row, other in zip(both[0][name, accumulation][1], logged, strict=True):
            assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_all_processes_say_what_is_wrong(both):
    for made in both:
        first, second = made["refused"]
        assert "in the 2 micro-batches of process 0 every label is ignored" in first
        assert "average_tokens_across_devices=False would be without effect" in second
