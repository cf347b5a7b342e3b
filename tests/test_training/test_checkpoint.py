"""Checkpoints are whole or not there."""

import json
import os
from pathlib import Path

import pytest
import torch

from llmtune.errors import CheckpointError
from llmtune.training import checkpoint
from llmtune.training.checkpoint import (
    fingerprint,
    join_tensors,
    list_checkpoints,
    newest_valid,
    read_checkpoint,
    split_tensors,
    write_checkpoint,
)


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


def test_state_goes_round_through_files(tmp_path):
    path = write_checkpoint(tmp_path, 3, state_of(3), keep=2)
    assert path.name == "step-00000003"
    assert sorted(child.name for child in path.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert same(read_checkpoint(path), state_of(3))


def test_what_is_no_tensor_and_no_json_is_named():
    with pytest.raises(TypeError, match=r"a\.b\.1 is a set"):
        split_tensors({"a": {"b": [1, {2}]}})
    with pytest.raises(TypeError, match="keys of saved state must be strings; a has 3"):
        split_tensors({"a": {3: 1}})
    assert join_tensors(*split_tensors({"a": [1, {"b": None}]})) == {"a": [1, {"b": None}]}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 13):
        write_checkpoint(tmp_path, step, state_of(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000013"]


def test_what_lies_ahead_of_a_run_that_went_back_is_removed_and_not_the_new_one(tmp_path):
    for step in (4, 6):
        write_checkpoint(tmp_path, step, state_of(step), keep=1 if step == 4 else 2)
    truncate(tmp_path / "step-00000006" / "state.json")
    assert newest_valid(tmp_path)[0].name == "step-00000004"
    path = write_checkpoint(tmp_path, 5, state_of(5), keep=1)
    assert [child.name for child in tmp_path.iterdir()] == [path.name] == ["step-00000005"]


def test_writing_a_step_again_replaces_it(tmp_path):
    write_checkpoint(tmp_path, 4, state_of(4), keep=2)
    write_checkpoint(tmp_path, 4, state_of(5), keep=2)
    assert [child.name for child in tmp_path.iterdir()] == ["step-00000004"]
    assert newest_valid(tmp_path)[1]["step"] == 5


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def link_out(path):
    content = path.read_bytes()
    path.unlink()
    outside = path.parent.parent / "outside"
    outside.write_bytes(content)
    path.symlink_to(outside)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, link_out])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_damage_is_found_and_the_older_checkpoint_used(tmp_path, damage, name):
    write_checkpoint(tmp_path, 1, state_of(1), keep=3)
    damage(write_checkpoint(tmp_path, 2, state_of(2), keep=3) / name)
    path, state, skipped = newest_valid(tmp_path)
    assert path.name == "step-00000001"
    assert same(state, state_of(1))
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 1, state_of(1), keep=3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["../../secret"] = manifest.pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"must describe exactly tensors.safetensors and state.json"):
        read_checkpoint(path)


def test_deep_json_is_refused_with_one_kind_of_error(tmp_path):
    path = write_checkpoint(tmp_path, 1, state_of(1), keep=3)
    (path / "manifest.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read: RecursionError"):
        read_checkpoint(path)


def test_all_damaged_raises_and_none_is_none(tmp_path):
    assert newest_valid(tmp_path / "nowhere") is None
    assert newest_valid(tmp_path) is None
    truncate(write_checkpoint(tmp_path, 1, state_of(1), keep=3) / "state.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*state.json is damaged"):
        newest_valid(tmp_path)


@pytest.mark.parametrize("broken_call", ["save_file", "write_text", "flush", "rename"])
def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_rubbish(tmp_path, monkeypatch, broken_call):
    write_checkpoint(tmp_path, 1, state_of(1), keep=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    targets = {
        "save_file": ("safetensors.torch.save_file", full),
        "write_text": ("pathlib.Path.write_text", full),
        "flush": ("llmtune.training.checkpoint._flush", full),
        "rename": ("pathlib.Path.rename", full),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*targets[broken_call])
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(tmp_path, 2, state_of(2), keep=1)
    assert [child.name for child in tmp_path.iterdir()] == ["step-00000001"]
    assert same(newest_valid(tmp_path)[1], state_of(1))


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path, monkeypatch, moment):
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
        checkpoint.shutil.rmtree = lambda *args, **kwargs: os._exit(9)
        write_checkpoint(tmp_path, 1, state_of(2), keep=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    path, state, skipped = newest_valid(tmp_path)
    assert skipped == []
    assert state["step"] == (2 if moment == "after" else 1)
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_fingerprints_tell_models_apart():
    tensor = torch.randn(37, 41)
    other = tensor.clone()
    other[-1, -1] += 1e-6
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) != fingerprint(other)
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
    assert fingerprint(torch.ones(3, dtype=torch.bfloat16)) == fingerprint(torch.ones(3, dtype=torch.bfloat16))
