"""Checkpoints written in the background: of the moment of the call, never seen half, no error lost."""

import subprocess
import sys
import threading

import pytest
import torch

from llmtune.errors import CheckpointError
from llmtune.training import checkpoint_write
from llmtune.training.background import CheckpointWriter
from llmtune.training.checkpoint import newest_valid
from llmtune.training.checkpoint_read import read_checkpoint


@pytest.fixture
def held(monkeypatch):
    """Hold every flush back until the event is set."""
    event, flush = threading.Event(), checkpoint_write.flush
    monkeypatch.setattr(checkpoint_write, "flush", lambda path: (event.wait(30), flush(path)))
    yield event
    event.set()


def test_what_is_written_is_the_moment_of_the_call(tmp_path, held):
    writer, weight, seen = CheckpointWriter(background=True), torch.ones(3, 5), []

    def files(folder):
        seen.append(threading.current_thread())
        (folder / "mean.txt").write_text(str(float(weight.mean())))

    writer.write(tmp_path, 7, {"weight": weight}, keep=1, files=files)
    weight.fill_(9.0)
    assert seen == [threading.main_thread()]
    assert newest_valid(tmp_path) is None  # nothing is seen before it is whole
    held.set()
    (path,) = writer.wait()
    assert path == tmp_path / "step-00000007"
    assert torch.equal(read_checkpoint(path)["weight"], torch.ones(3, 5))
    assert (path / "mean.txt").read_text() == "1.0"
    assert writer.wait() == []


def test_a_second_write_waits_for_the_first(tmp_path, held):
    writer = CheckpointWriter(background=True)
    writer.write(tmp_path, 1, {"x": 1}, keep=2)
    threading.Timer(0.05, held.set).start()
    writer.write(tmp_path, 2, {"x": 2}, keep=2)
    assert (tmp_path / "step-00000001").is_dir()
    assert [path.name for path in writer.wait()] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("asked", ["wait", "write"])
def test_a_threads_error_is_raised_once_by_whoever_asks_next(tmp_path, monkeypatch, asked):
    def full(path):
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(background=True)
    writer.write(tmp_path, 1, {"x": 1}, keep=2)
    writer.wait()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_write, "flush", full)
        writer.write(tmp_path, 2, {"x": 2}, keep=2)
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: .*No space left on device"):
            writer.wait() if asked == "wait" else writer.write(tmp_path, 3, {"x": 3}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    writer.write(tmp_path, 3, {"x": 3}, keep=1)
    assert [path.name for path in writer.wait()] == ["step-00000003"]


@pytest.mark.parametrize("background", [True, False])
def test_what_is_wrong_at_once_is_raised_at_once(tmp_path, background):
    writer = CheckpointWriter(background=background)
    with pytest.raises(TypeError, match="a is a set"):
        writer.write(tmp_path, 1, {"a": {1}}, keep=1)
    with pytest.raises(ValueError, match="keep must be a whole number of at least 1"):
        writer.write(tmp_path, 1, {}, keep=0)
    assert writer.wait() == []
    assert list(tmp_path.iterdir()) == []


def test_in_the_foreground_it_is_done_when_write_returns(tmp_path):
    writer = CheckpointWriter(background=False)
    writer.write(tmp_path, 1, {"x": 1}, keep=1)
    assert newest_valid(tmp_path)[1] == {"x": 1}
    assert writer.wait() == [tmp_path / "step-00000001"]


PROGRAM = """
import sys, time
from llmtune.training import checkpoint_write
from llmtune.training.background import CheckpointWriter
flush = checkpoint_write.flush
def slow(path):
    time.sleep(0.05)
    if sys.argv[2] == "full":
        raise OSError(28, "No space left on device")
    flush(path)
checkpoint_write.flush = slow
CheckpointWriter(background=True).write(sys.argv[1], 5, {"x": 1}, keep=1)
if sys.argv[2] == "error":
    raise SystemExit("the run's own error")
"""


@pytest.mark.parametrize("ending", ["end", "error", "full"])
def test_at_exit_the_write_is_finished_and_its_error_told(tmp_path, ending):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), ending]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == (1 if ending == "error" else 0)
    if ending == "full":
        assert "CheckpointError: " in ran.stderr
        assert "step-00000005 could not be written: [Errno 28] No space left on device" in ran.stderr
        assert list(tmp_path.iterdir()) == []
    else:
        assert newest_valid(tmp_path)[1] == {"x": 1}
        assert ("the run's own error" in ran.stderr) == (ending == "error")
