"""Checkpoints are whole or not there: what is written, kept and swept."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from llmtune.errors import CheckpointError, LlmtuneWarning
from llmtune.training import checkpoint_folder, checkpoint_write
from llmtune.training.checkpoint import fingerprint, newest_valid, write_checkpoint
from llmtune.training.checkpoint_folder import list_checkpoints
from llmtune.training.checkpoint_read import read_checkpoint, verify_checkpoint
from llmtune.training.checkpoint_state import join_tensors, split_tensors

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork a process")


def state_of(step):
    return {
        "step": step,
        "tensors": [{"a": torch.full((3, 5), float(step)), "b": torch.tensor(7, dtype=torch.int64)}],
        "half": torch.arange(11, dtype=torch.bfloat16).view(11, 1).expand(11, 2),
        "rest": {"list": [1, 2.5, None, True, "x"], "empty": {}},
    }


def same(one, other):
    left, right = split_tensors(one), split_tensors(other)
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    return all(torch.equal(left[1][k], right[1][k]) and left[1][k].dtype == right[1][k].dtype for k in left[1])


def names(folder):
    return sorted(child.name for child in folder.iterdir())


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_state_goes_round_through_files(tmp_path):
    path = write_checkpoint(tmp_path, 3, state_of(3), keep=2)
    assert path.name == "step-00000003"
    assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert same(read_checkpoint(path), state_of(3))
    verify_checkpoint(path)


def test_odd_tensors_and_numbers_go_round(tmp_path):
    whole = torch.arange(77.0).view(7, 11)
    state = {
        "a.b": whole,
        "a": {"b": whole[2:5], "b~": whole.T},  # one path for two tensors, and three tensors in one storage
        "__metadata__": (whole * (2 + 1j)).to(torch.complex64).conj(),
        "numbers": [math.inf, -math.inf, 1e-300],
        "empty": torch.zeros(0, 3),
    }
    read = read_checkpoint(write_checkpoint(tmp_path, 1, state, keep=1))
    assert same(read, state)
    assert "Infinity" not in (tmp_path / "step-00000001" / "state.json").read_text()
    assert math.isnan(read_checkpoint(write_checkpoint(tmp_path, 2, {"x": math.nan}, keep=1))["x"])


def test_what_is_no_tensor_and_no_json_is_named():
    with pytest.raises(TypeError, match=r"a\.b\.1 is a set"):
        split_tensors({"a": {"b": [1, {2}]}})
    with pytest.raises(TypeError, match="keys of saved state must be strings of your own; a has 3"):
        split_tensors({"a": {3: 1}})
    with pytest.raises(TypeError, match="keys of saved state must be strings of your own; the root has '__tensor__'"):
        split_tensors({"__tensor__": "a"})
    with pytest.raises(TypeError, match=r"must be dense, .*; a is sparse"):
        split_tensors({"a": torch.eye(3).to_sparse()}, clone=False)
    with pytest.raises(TypeError, match=r"must be dense, .*; a is without data"):
        split_tensors({"a": torch.zeros(3, device="meta")})
    with pytest.raises(TypeError, match=r"must be dense, .*; a is torch.complex128"):
        split_tensors({"a": torch.zeros(3, dtype=torch.complex128)})
    deep = []
    for _ in range(101):
        deep = [deep]
    with pytest.raises(ValueError, match="nested at most 100 deep"):
        split_tensors({"a": deep})
    assert join_tensors(*split_tensors({"a": [1, {"b": None}]})) == {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
    ("step", "changed", "error", "sentence"),
    [
        (-1, {}, ValueError, "step must be a whole number of at least 0; got -1"),
        (1.0, {}, ValueError, r"step must be a whole number of at least 0; got 1\.0"),
        (1, {"keep": 0}, ValueError, "keep must be a whole number of at least 1; got 0"),
        (1, {"protect": ["best"]}, ValueError, "protect must be a whole number of at least 0; got 'best'"),
        (1, {"state": [1]}, TypeError, "the state must be a dict of tensors and JSON values; got a list"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, step, changed, error, sentence):
    folder = tmp_path / "run"
    options = {"state": {}, "keep": 1} | changed
    with pytest.raises(error, match=sentence):
        write_checkpoint(folder, step, options.pop("state"), **options)
    assert not folder.exists()


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 13):
        write_checkpoint(tmp_path, step, state_of(step), keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000013"]


def test_protected_steps_stay_and_are_not_counted(tmp_path):
    for step in (1, 2, 9, 13, 17):
        write_checkpoint(tmp_path, step, state_of(step), keep=2, protect=[2])
    assert names(tmp_path) == ["step-00000002", "step-00000013", "step-00000017"]
    assert same(read_checkpoint(tmp_path / "step-00000002"), state_of(2))
    write_checkpoint(tmp_path, 19, state_of(19), keep=1, protect={13, 19})
    assert names(tmp_path) == ["step-00000013", "step-00000019"]


def test_what_lies_ahead_of_a_run_that_went_back_is_removed_and_not_the_new_one(tmp_path):
    for step in (4, 6):
        write_checkpoint(tmp_path, step, state_of(step), keep=1 if step == 4 else 2)
    (tmp_path / "step-00000006" / "state.json").write_bytes(b"")
    assert newest_valid(tmp_path)[0].name == "step-00000004"
    path = write_checkpoint(tmp_path, 5, state_of(5), keep=1)
    assert names(tmp_path) == [path.name] == ["step-00000005"]


def test_writing_a_step_again_replaces_it(tmp_path):
    write_checkpoint(tmp_path, 4, state_of(4), keep=2)
    write_checkpoint(tmp_path, 4, state_of(5), keep=2)
    assert names(tmp_path) == ["step-00000004"]
    assert newest_valid(tmp_path)[1]["step"] == 5


def test_a_run_adds_files_of_its_own(tmp_path):
    def files(folder):
        (folder / "adapter" / "deep").mkdir(parents=True)
        (folder / "adapter" / "deep" / "weights.safetensors").write_bytes(b"xyz")
        (folder / "tokenizer.json").write_text("{}")

    flushed = []
    flush = checkpoint_write.flush
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint_write, "flush", lambda path: (flushed.append(path), flush(path)))
        path = write_checkpoint(tmp_path, 1, state_of(1), keep=1, files=files)
    manifest = json.loads((path / "manifest.json").read_text())
    own = {"adapter/deep/weights.safetensors", "tokenizer.json"}
    assert set(manifest["files"]) == own | {"state.json", "tensors.safetensors"}
    assert manifest["files"]["adapter/deep/weights.safetensors"]["size"] == 3
    every = {child.relative_to(path).as_posix() for child in path.rglob("*")}
    inside = {child.relative_to(flushed[-2]).as_posix() for child in flushed[:-1]}
    assert inside == every | {"."}  # each file and folder, then the temporary one itself
    assert flushed[-1] == tmp_path
    assert same(read_checkpoint(path), state_of(1))


def test_files_that_no_checkpoint_holds_are_refused(tmp_path):
    def link(folder):
        (folder / "link").symlink_to(tmp_path)

    def taken(folder):
        (folder / "state.json").write_text("{}")

    def failing(folder):
        (folder / "half").write_text("")
        raise KeyError("mine")

    for files, error, sentence in (
        (link, CheckpointError, "link is a link or no plain file"),
        (taken, ValueError, r"files= wrote state\.json, which is a file of the checkpoint itself"),
        (failing, KeyError, "mine"),
        (full, CheckpointError, "step-00000001 could not be written: .*No space left on device"),
    ):
        with pytest.raises(error, match=sentence):
            write_checkpoint(tmp_path, 1, state_of(1), keep=1, files=files)
        assert names(tmp_path) == []


def test_tensors_on_the_cpu_are_written_from_where_they_are():
    whole, odd = torch.randn(7, 11), torch.randn(11, 7).T
    made = checkpoint_write._side_by_side({"a": whole, "b": odd, "c": whole[3]})
    assert made["a"].data_ptr() == whole.data_ptr()
    assert made["b"].is_contiguous()
    assert made["c"].data_ptr() != whole[3].data_ptr()  # safetensors refuses two tensors of one storage
    assert torch.equal(made["c"], whole[3])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps to look for mapped files")
def test_what_was_read_does_not_lie_in_the_file(tmp_path):
    path = write_checkpoint(tmp_path, 1, {"a": torch.ones(701, 997)}, keep=1)
    state = read_checkpoint(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    os.truncate(path / "tensors.safetensors", 0)  # with the file mapped, looking would kill the process
    assert float(state["a"].sum()) == 701 * 997


def test_too_little_space_is_said_before_anything_is_touched(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, state_of(1), keep=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 19 << 20))
    monkeypatch.setattr(checkpoint_write, "open_temporary", full)
    big = {"a": torch.zeros(1 << 20, dtype=torch.float32)}  # 4 MiB, and 16 more to be sure
    with pytest.raises(CheckpointError, match=r"step-00000002 needs 20 MiB and 19 MiB are free: make room"):
        write_checkpoint(tmp_path, 2, big, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))  # a file system that does not tell
    write_checkpoint(tmp_path, 2, big, keep=1)


@pytest.mark.parametrize("broken_call", ["save_file", "write_bytes", "write_text", "flush", "rename", "mkdir"])
def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch, broken_call):
    write_checkpoint(tmp_path, 1, state_of(1), keep=1)
    targets = {
        "save_file": ("safetensors.torch.save_file", full),
        "flush": ("llmtune.training.checkpoint_write.flush", full),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*targets.get(broken_call, (f"pathlib.Path.{broken_call}", full)))
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: .*No space left on device"):
            write_checkpoint(tmp_path, 2, state_of(2), keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert same(newest_valid(tmp_path)[1], state_of(1))


def test_a_checkpoint_that_cannot_be_removed_is_warned_of_and_goes_with_the_next(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, state_of(1), keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        with pytest.warns(LlmtuneWarning, match=r"step-00000002 is written, but .*step-00000001 could not be removed"):
            write_checkpoint(tmp_path, 2, state_of(2), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    write_checkpoint(tmp_path, 3, state_of(3), keep=1)
    assert names(tmp_path) == ["step-00000003"]


@forks
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path, moment):
    write_checkpoint(tmp_path, 1, state_of(1), keep=2)
    child = os.fork()
    if child == 0:  # a process that dies without unwinding, as one that is killed does
        renamed = {"before": 0, "between": 1, "after": 2}[moment]
        rename, calls = Path.rename, []

        def dying(self, target):
            if len(calls) == renamed:
                os._exit(9)
            calls.append(target)
            return rename(self, target)

        Path.rename = dying
        shutil.rmtree = lambda *args, **kwargs: os._exit(9)
        write_checkpoint(tmp_path, 1, state_of(2), keep=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    path, state, skipped = newest_valid(tmp_path)
    assert skipped == []
    assert state["step"] == (2 if moment == "after" else 1)
    assert names(tmp_path) == [path.name]


def leftovers(folder, process, machine=None):
    """Lay out what a writer leaves that is killed while it writes step 5, replaces step 3 and removes step 1."""
    machine = checkpoint_folder._machine() if machine is None else machine
    write_checkpoint(folder, 3, state_of(3), keep=1)
    (folder / "step-00000003").rename(folder / f".old-step-00000003-{process}-{machine}")
    for kind, step in (("tmp", 5), ("gone", 1)):
        made = folder / f".{kind}-step-{step:08d}-{process}-{machine}"
        made.mkdir()
        (made / "tensors.safetensors").write_bytes(b"half")


def test_a_dead_writers_leftovers_go_and_a_living_ones_stay(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        leftovers(tmp_path, living.pid)
        before = names(tmp_path)
        assert newest_valid(tmp_path) is None
        assert names(tmp_path) == before
        write_checkpoint(tmp_path, 2, state_of(2), keep=1)
        assert names(tmp_path) == sorted([*before, "step-00000002"])
        shutil.rmtree(tmp_path / "step-00000002")
    finally:
        living.kill()
        living.wait()
    path, state, skipped = newest_valid(tmp_path)
    assert (path.name, skipped) == ("step-00000003", [])
    assert same(state, state_of(3))
    assert names(tmp_path) == ["step-00000003"]


def test_leftovers_under_our_own_process_number_are_a_killed_ones(tmp_path):
    leftovers(tmp_path, os.getpid())
    assert newest_valid(tmp_path)[0].name == "step-00000003"
    assert names(tmp_path) == ["step-00000003"]


def test_another_machines_writer_is_left_for_an_hour(tmp_path):
    leftovers(tmp_path, 999_999_999, machine="elsewhere")
    assert newest_valid(tmp_path)[0].name == "step-00000003"  # a checkpoint moved aside is put back at once
    hidden = [".gone-step-00000001-999999999-elsewhere", ".tmp-step-00000005-999999999-elsewhere"]
    assert names(tmp_path) == [*hidden, "step-00000003"]
    for name in hidden:
        os.utime(tmp_path / name, times=(time.time() - 3700,) * 2)
    newest_valid(tmp_path)
    assert names(tmp_path) == ["step-00000003"]


def test_looking_leaves_what_this_process_is_writing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, state_of(1), keep=1)
    seen = []
    monkeypatch.setattr(
        checkpoint_write, "describe", lambda path, old=checkpoint_write.describe: (look(), old(path))[1]
    )
    look = lambda: seen.append((newest_valid(tmp_path)[0].name, len(names(tmp_path))))
    write_checkpoint(tmp_path, 2, state_of(2), keep=1)
    assert seen == [("step-00000001", 2)] * 2
    assert names(tmp_path) == ["step-00000002"]


def test_strict_raises_where_an_older_one_would_be_taken(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, state_of(step), keep=2)
    assert newest_valid(tmp_path, strict=True)[0].name == "step-00000002"
    (tmp_path / "step-00000002" / "state.json").unlink()
    assert newest_valid(tmp_path)[0].name == "step-00000001"
    with pytest.raises(CheckpointError, match=r"step-00000002/state\.json is missing"):
        newest_valid(tmp_path, strict=True)


def test_all_damaged_raises_and_none_is_none(tmp_path):
    assert newest_valid(tmp_path / "nowhere") is None
    assert newest_valid(tmp_path) is None
    os.truncate(write_checkpoint(tmp_path, 1, state_of(1), keep=3) / "state.json", 7)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is whole: .*state\.json is damaged: it has 7 bytes"
    ):
        newest_valid(tmp_path)


def test_fingerprints_tell_models_apart():
    tensor = torch.randn(37, 41)
    other = tensor.clone()
    other[-1, -1] += 1e-6
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) != fingerprint(other)
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
    assert fingerprint(torch.ones(3, dtype=torch.bfloat16)) == fingerprint(torch.ones(3, dtype=torch.bfloat16))


def test_the_page_on_resuming_names_tests_that_there_are():
    here = Path(__file__).parent
    page = (here.parents[1] / "docs" / "how-to" / "resume.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {name for file in here.glob("test_*.py") for name in re.findall(r"(?m)^def (test_\w+)", file.read_text())}
    assert len(named) >= 13
    assert named - there == set()
