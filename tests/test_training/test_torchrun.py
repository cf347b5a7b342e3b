"""What torchrun starts: processes that join, end together, and start again where one was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmtune.training.checkpoint_folder import list_checkpoints
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.training.distributed import join_processes

SCRIPT = Path(__file__).with_name("torchrun_worker.py")


def torchrun(how, folder, *options, **variables):
    """Start the script in two processes; return what runs."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options,
         str(SCRIPT), how, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(started, seconds=150):
    try:
        printed, _ = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGINT)
        raise
    return started.returncode, printed


def state(folder):
    return read_checkpoint(list_checkpoints(folder)[-1])


def same_bits(one, other):
    for part in ("model", "random"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            same = (
                torch.equal(value, other[part][name]) if isinstance(value, torch.Tensor) else value == other[part][name]
            )
            assert same, name
    losses = [[row["loss"] for row in state["history"]] for state in (one, other)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_script_joins_trains_and_ends(tmp_path):
    code, printed = ended(torchrun("plain", tmp_path / "run"))
    assert code == 0, printed
    assert "process 0 is done" in printed
    assert "process 1 is done" in printed
    assert "terminate called" not in printed
    assert state(tmp_path / "run")["run"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "sharded "])
def test_killed_twice_and_started_again_it_ends_with_the_same_bits(how, tmp_path):
    code, printed = ended(torchrun(f"{how}leaves", tmp_path / "whole"))
    assert code == 0, printed
    again = torchrun(
        f"{how}dies leaves", tmp_path / "killed", "--max-restarts=2", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
    )
    code, printed = ended(again, seconds=200)
    assert code == 0, printed
    assert printed.count("is done") == 2
    assert printed.count("exitcode: -9") == 2
    same_bits(state(tmp_path / "killed"), state(tmp_path / "whole"))
    assert [path.name for path in list_checkpoints(tmp_path / "killed")] == ["step-00000008", "step-00000010"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "sharded raises"])
def test_an_error_in_one_process_ends_all(how, tmp_path):
    began = time.monotonic()
    code, printed = ended(torchrun(how, tmp_path / "run"))
    assert code == 1
    assert "ValueError: seeded" in printed
    assert "is done" not in printed
    assert time.monotonic() - began < 100


@pytest.mark.slow
def test_torchrun_told_to_stop_lets_all_save_and_leave(tmp_path):
    started = torchrun("slowly", tmp_path / "run")
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    code, printed = ended(started)
    assert code != 0
    assert printed.count("stopped by SIGTERM after step") == 2, printed
    steps = {
        line.split("after step ")[1].split(";")[0] for line in printed.splitlines() if "stopped by SIGTERM" in line
    }
    assert len(steps) == 1
    assert state(tmp_path / "run")["step"] == int(steps.pop())


def test_restarts_that_could_not_meet_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match=r"with --max-restarts=2 torchrun keeps the .* set TORCH_DISABLE_SHARE"):
        join_processes()
