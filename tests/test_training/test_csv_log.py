"""A CSV that grows row by row, and that nothing leaves unreadable."""

import csv
import os
import signal
import subprocess
import sys
import warnings

import pytest

from llmtune.errors import LlmtuneWarning
from llmtune.training.csv_log import CsvLog
from llmtune.training.history import History


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows(first, last):
    return [{"step": step, "loss": 1 / step, "note": 'a "b",\nc'} for step in range(first, last + 1)]


def grow(log, history, more):
    for row in more:
        history.append(row)
        log.append(row)


def test_rows_come_one_by_one_without_a_rewrite(tmp_path):
    path = tmp_path / "run" / "history.csv"
    history, log = History(), CsvLog(path, flush_seconds=0.0)
    log.start(history)
    grow(log, history, rows(1, 1))
    inode = path.stat().st_ino
    for step in range(2, 14):
        grow(log, history, rows(step, step))
        assert [float(row["loss"]) for row in read(path)] == history.column("loss")
    assert path.stat().st_ino == inode, "no rewrite"
    grow(log, history, [{"step": 14, "loss": 0.5, "note": "", "eval_loss": 3.0}])
    assert path.stat().st_ino != inode, "a wider header needs one"
    inode = path.stat().st_ino
    grow(log, history, [{"step": 15, "loss": 0.25}, {"step": 16, "eval_loss": 2.0}])
    assert path.stat().st_ino == inode
    log.close()
    found = read(path)
    assert [row["eval_loss"] for row in found[12:]] == ["", "3.0", "", "2.0"]
    assert path.read_bytes() == history.to_csv(tmp_path / "whole.csv").read_bytes()
    assert sorted(child.name for child in path.parent.iterdir()) == ["history.csv"]


def test_rows_wait_for_one_another_and_close_writes_them(tmp_path):
    path = tmp_path / "history.csv"
    history, log = History(), CsvLog(path, flush_seconds=3600.0)
    log.start(history)
    grow(log, history, rows(1, 13))
    assert len(read(path)) == 1, "the first row is there at once"
    log.close()
    log.close()
    assert len(read(path)) == 13


def test_a_resumed_run_drops_what_lay_beyond(tmp_path):
    path = tmp_path / "history.csv"
    History(rows(1, 11)).to_csv(path)
    history, log = History(rows(1, 5)), CsvLog(path)
    log.start(history)
    assert [row["step"] for row in read(path)] == ["1", "2", "3", "4", "5"]
    grow(log, history, [{"step": 6, "loss": 9.0}])
    log.close()
    assert [float(row["loss"]) for row in read(path)] == [*(1 / step for step in range(1, 6)), 9.0]
    afresh = History()
    log.start(afresh)
    grow(log, afresh, rows(1, 2))
    log.close()
    assert [row["step"] for row in read(path)] == ["1", "2"]


PROGRAM = """
import os, signal, sys
from llmtune.training.csv_log import CsvLog
from llmtune.training.history import History
history, log = History(), CsvLog(sys.argv[1], flush_seconds=0.0)
log.start(history)
for step in range(1, 10**6):
    history.append({"step": step, "loss": 1 / step} | ({"eval_loss": 2.0} if step > 700 else {}))
    log.append(history[-1])
    if step == 1000:
        print("go on", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a system with SIGKILL")
def test_a_killed_run_leaves_whole_rows(tmp_path):
    path = tmp_path / "history.csv"
    running = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE)
    running.stdout.readline()
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    assert path.read_bytes().endswith(b"\r\n")
    found = read(path)
    assert len(found) >= 1000
    assert [int(row["step"]) for row in found] == list(range(1, len(found) + 1))
    assert all(float(row["loss"]) == 1 / int(row["step"]) for row in found)
    assert [row["eval_loss"] for row in found[699:701]] == ["", "2.0"]


@pytest.fixture
def full_disk():
    """Files can grow no longer than the bytes given: a write in the middle of a row fails."""
    resource = pytest.importorskip("resource", reason="needs a system with limits on the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most=before[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_once_and_loses_no_row(tmp_path, full_disk, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llmtune.training.csv_log.time.monotonic", lambda: now[0])
    path = tmp_path / "history.csv"
    history, log = History(), CsvLog(path, flush_seconds=0.0)
    log.start(history)
    grow(log, history, rows(1, 5))
    full_disk(path.stat().st_size + 7)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for row in [*rows(6, 17), {"step": 18, "eval_loss": 3.0}]:  # at last a wider header, which fails as well
            now[0] += 60.0
            grow(log, history, [row])
            assert [row["step"] for row in read(path)] == ["1", "2", "3", "4", "5"], "no torn row"
    assert [warning.category for warning in seen] == [LlmtuneWarning]
    assert "history.csv cannot be written, and training goes on; its rows wait for a later try" in str(seen[0].message)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["history.csv"], "no half-written copy stays"
    full_disk()
    log.close()
    assert path.read_bytes() == history.to_csv(tmp_path / "whole.csv").read_bytes()


def test_a_file_that_was_taken_away_comes_back_whole(tmp_path):
    path = tmp_path / "history.csv"
    history, log = History(), CsvLog(path, flush_seconds=0.0)
    log.start(history)
    grow(log, history, rows(1, 3))
    path.unlink()
    grow(log, history, rows(4, 4))
    assert len(read(path)) == 4
