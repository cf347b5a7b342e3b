"""A damaged checkpoint is found, named and passed over, and a full disk costs no older one."""

import errno
import io
import os
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from llmtune.errors import CheckpointError, LlmtuneWarning
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2
from llmtune.training.checkpoint import newest_valid, write_checkpoint
from llmtune.training.checkpoint_folder import list_checkpoints
from llmtune.training.checkpoint_read import read_checkpoint, verify_checkpoint
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback

OWN = ("state.json", "tensors.safetensors", "manifest.json")
EXTRA = "adapter/adapter_config.json"


class Run(TrainingLoop):
    """A run with dropout that adds a file of its own to each checkpoint."""

    def save(self):
        def files(folder):
            (folder / "adapter").mkdir()
            (folder / EXTRA).write_text(f'{{"step": {self.step}, "rank": 7}}')

        return write_checkpoint(self.settings.folder, self.step, self.state_dict(), keep=3, files=files)


class Stop(Callback):
    """Ends a run after step 3, as Ctrl-C does."""

    def on_step_start(self, loop):
        if loop.step == 3:
            raise KeyboardInterrupt


def run(folder, callbacks=()):
    settings = LoopSettings(
        max_steps=5, rows_per_step=4, learning_rate=1e-2, folder=folder, save_every=1, progress=False
    )
    loop = Run(tiny_gpt2(dropout=0.3), uneven_rows(11), settings=settings, callbacks=callbacks)
    loop.fit(resume=True)
    return loop


def result(loop):
    state = loop.state_dict()
    losses = [row["loss"] for row in loop.history]
    moments = [v["exp_avg_sq"] for v in state["optimizer"]["state"].values()]
    return [*loop.model.state_dict().values(), *moments, torch.tensor(losses, dtype=torch.float64)]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Return the folder of a run stopped after step 3, and what a run that is never stopped comes to."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "cut", [Stop()])
    return folder / "cut", result(run(folder / "whole"))


def flip(path, part):
    content = bytearray(path.read_bytes())
    content[int(part * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def of_another_step(path):
    shutil.copyfile(str(path).replace("step-00000003", "step-00000002"), path)


DAMAGES = {
    **{f"one bit at {part:.0%}": partial(flip, part=part) for part in (0, 0.01, 0.5, 0.99, 1)},
    "cut short": truncate, "emptied": empty, "deleted": Path.unlink, "longer": longer,
    "another step's": of_another_step,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*OWN, EXTRA])
def test_damage_is_found_named_and_passed_over(cut, tmp_path, name, damage, capsys):
    before, wanted = cut
    folder = shutil.copytree(before, tmp_path / "run")
    DAMAGES[damage](folder / "step-00000003" / name)
    path, state, reasons = newest_valid(folder)
    assert (path.name, state["step"]) == ("step-00000002", 2)
    assert len(reasons) == 1
    named = name if damage != "another step's" or name != "manifest.json" else "step-00000003/"  # there any file is off
    assert named in reasons[0]
    assert "\n" not in reasons[0]
    for look in (read_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointError) as refused:
            look(folder / "step-00000003")
        assert str(refused.value) == reasons[0]
    with pytest.raises(CheckpointError) as refused:
        newest_valid(folder, strict=True)
    assert str(refused.value) == reasons[0]
    if damage in ("one bit at 50%", "deleted"):
        found = result(run(folder))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert f"skipped a damaged checkpoint: {reasons[0]}" in capsys.readouterr().out


def test_every_bit_of_a_small_checkpoint_counts(tmp_path):
    """Not one bit of the files of state can change unseen; of the manifest, some stand in no value."""
    path = write_checkpoint(tmp_path, 1, {"a": torch.arange(3.0), "b": "x"}, keep=1)
    for name in ("state.json", "tensors.safetensors"):
        content = (path / name).read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            (path / name).write_bytes(bytes(changed))
            with pytest.raises(CheckpointError, match=f"{name} is damaged: its SHA-256 is"):
                read_checkpoint(path)
        (path / name).write_bytes(content)
    assert read_checkpoint(path)["b"] == "x"


class Disk:
    """Counts the calls that open, write, flush or move something, and fails the `at`-th for want of space.

    Args:
        at: which call.
        jammed: from that call on nothing can be removed either.
    """

    def __init__(self, at=0, *, jammed=False):
        self.at, self.jammed, self.calls = at, jammed, []

    def __enter__(self):
        self.patched = pytest.MonkeyPatch()
        writing = [(os, "mkdir"), (os, "rename"), (os, "fsync"), (os, "open"), (io, "open")]  # pathlib opens by io
        for owner, name in [*writing, (safetensors.torch, "save_file")]:
            self.patched.setattr(owner, name, partial(self.write, getattr(owner, name)))
        for name in ("rmdir", "unlink") if self.jammed else ():
            self.patched.setattr(os, name, partial(self.remove, getattr(os, name)))
        return self

    def __exit__(self, *args):
        self.patched.undo()

    def write(self, call, *args, **kwargs):
        self.calls.append(f"{call.__name__} {Path(args[0]).name if isinstance(args[0], Path | str) else ''}")
        if len(self.calls) == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(*args, **kwargs)

    def remove(self, call, *args, **kwargs):
        if len(self.calls) >= self.at:
            raise OSError(errno.EIO, "Input/output error")
        return call(*args, **kwargs)


def extra(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(b"xyz")


def save(folder, step):
    return write_checkpoint(folder, step, {"step": step, "a": torch.full((7,), step)}, keep=2, files=extra)


@pytest.mark.parametrize("jammed", [False, True], ids=["", "nor can anything be removed"])
@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step again"])
def test_a_disk_that_is_full_at_any_call_costs_no_older_checkpoint(tmp_path, step, jammed):
    for older in (1, 2):
        save(tmp_path / "start", older)
    shutil.copytree(tmp_path / "start", tmp_path / "counted")
    with Disk() as disk:
        save(tmp_path / "counted", step)
    kinds = Counter(call.split()[0] for call in disk.calls)
    assert kinds.keys() == {"mkdir", "rename", "fsync", "open", "save_file"}
    assert kinds["fsync"] == 7  # four files, two folders, and the run's folder
    refused, warned, passed = [], [], []
    for at in range(1, len(disk.calls) + 1):
        folder = shutil.copytree(tmp_path / "start", tmp_path / "full")
        with Disk(at, jammed=jammed) as full:
            try:
                save(folder, step)
                passed.append(full.calls[at - 1])
            except CheckpointError as error:
                refused.append(str(error))
            except LlmtuneWarning as warning:  # an error in these tests
                warned.append(str(warning))
        newest_valid(folder)  # what a run does first when it goes on
        left = {path.name: read_checkpoint(path)["step"] for path in list_checkpoints(folder)}
        assert left["step-00000002"] == 2
        assert "step-00000001" in left or "step-00000003" in left
        assert all(int(name[-1]) == found for name, found in left.items())
        shutil.rmtree(folder)
    sentence = r"[^\n]* could not be written: [^\n]*No space left on device[^\n]*"
    assert [said for said in refused if not re.fullmatch(sentence, said)] == []
    assert [said for said in warned if "is written, but" not in said] == []
    assert len(refused) >= 20
    # All that may fail unnoticed is to make the run's folder, which is there, and to look into what is to be removed.
    assert [call for call in passed if not call.startswith("open ") and call != "mkdir full"] == []
    assert len(passed) <= 3


@pytest.mark.parametrize("most", [0, 1, 100, 1000, 4000, 40_000])
def test_a_write_that_the_system_cuts_off_costs_nothing(tmp_path, most):
    """The real thing: the kernel refuses to let any file grow beyond a limit, in the middle of a write."""
    resource = pytest.importorskip("resource", reason="needs a system that can limit the size of files")
    write_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    state = {"step": 2, "a": torch.zeros(10_007), "b": "x" * 4001}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: .*File too large"):
            write_checkpoint(tmp_path, 2, state, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_valid(tmp_path)[1] == {"step": 1}
    write_checkpoint(tmp_path, 2, state, keep=1)
    assert newest_valid(tmp_path)[1]["b"] == state["b"]
