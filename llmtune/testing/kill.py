"""The law of killed runs: a run killed at any moment, and resumed, ends as the one that was left alone.

Runs are processes forked from this one and ended by SIGKILL, which nothing can catch: from outside after a random time
or a random time into a save, or by themselves at a random one of the calls by which a save touches its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import CheckpointError, LawBroken
from llmtune.training.checkpoint_folder import list_checkpoints, step_of
from llmtune.training.checkpoint_read import verify_checkpoint
from llmtune.training.checkpoint_state import split_tensors

MakeRun = Callable[[Path], Any]

_HIDDEN = (".tmp-step-", ".old-step-", ".gone-step-")  # what a save leaves that is cut off
_TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_WAYS = {"at any moment": 0.4, "a while into a save": 0.25, "at a call of a save": 0.35}


@dataclass
class KillReport:
    """What was tried.

    Attributes:
        kills: processes that were killed.
        in_saves: those of them that left a save half done, by what lay in the folder afterwards.
        before_any: those of them that came before the first checkpoint.
        runs: runs that were killed at least once, brought to their end, and found equal to the one left alone.
        ways: how many kills came in which way.
    """

    kills: int = 0
    in_saves: int = 0
    before_any: int = 0
    runs: int = 0
    ways: Counter[str] = field(default_factory=Counter)


def check_killed(make: MakeRun, *, kills: int = 40, seed: int = 0) -> KillReport:
    """Check the law of killed runs.

    - one result: weights, optimizer, all tensors of the state and all losses are equal bit for bit to those of a run
      that is left alone;
    - nothing lost: after a kill the newest checkpoint is no older than before;
    - nothing half: every checkpoint that is to be seen after a kill is whole.

    Args:
        make: `make(folder) -> loop`, a new loop with `fit(resume=True)`, `state_dict()`, `model` and `history`, which
            keeps its checkpoints in `folder` as `write_checkpoint` does; one that saves often in a run of a second or
            so tells the most.
        kills: how many; several fall into one run, each after a resume.
        seed: of the moments.

    Returns:
        How many kills there were, and how many of them struck inside a save.

    Raises:
        LawBroken: names the law and the difference; or a run stops with an error.
        RuntimeError: the system cannot fork a process.
    """
    if not hasattr(os, "fork"):
        raise RuntimeError("runs are killed in processes forked from this one: that needs a system that can fork")
    draw, report = random.Random(seed), KillReport()
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary) / "warm").state_dict()  # whatever is imported on first use is there when runs are forked
        alone = _Run(make, Path(temporary) / "alone")
        took = alone.until_killed("", 0.0)
        wanted = _outcome_of(alone, killed=0)
        while report.kills < kills:
            folder, before, newest = Path(tempfile.mkdtemp(dir=temporary)), 0, -1
            while True:
                way, when = "", 0.0
                if report.kills < kills:
                    way = draw.choices(list(_WAYS), list(_WAYS.values()))[0]
                    when = draw.random() * {"at any moment": took}.get(way, alone.save_seconds())
                calls = draw.randint(1, alone.save_calls()) if way == "at a call of a save" else 0
                run = _Run(make, folder, calls=calls, saves=draw.randint(1, 2))
                run.until_killed(way, when)
                if not run.killed:
                    break
                before, newest = before + 1, _newest(folder, no_older=max(newest, run.published()))
                _count(report, folder, way, run.process)
            _same(_outcome_of(run, killed=before), wanted, killed=before)
            report.runs += before > 0
    return report


class _Run:
    """A process that runs `fit(resume=True)` and tells through a pipe when it starts to save, and what it came to."""

    def __init__(self, make: MakeRun, folder: Path, *, calls: int = 0, saves: int = 1) -> None:
        self.saves, self.killed, self.said = saves, False, b""
        self._pipe, write = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self._pipe)
            _live(make, folder, write, calls=calls, saves=saves)  # does not return
        os.close(write)

    def until_killed(self, way: str, when: float) -> float:
        """Wait for the process's end, killing it in this way where one is named; return the seconds it lived."""
        began = time.monotonic()
        deadline = began + when if way == "at any moment" else None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([self._pipe], [], [], left)[0]:
                os.kill(self.process, signal.SIGKILL)
                break
            read = os.read(self._pipe, 1 << 16)
            self.said += read
            if not read:
                break
            if way == "a while into a save" and deadline is None and self.said.count(b"saving\n") >= self.saves:
                deadline = time.monotonic() + when
        while read := os.read(self._pipe, 1 << 16):  # what it said before it was killed
            self.said += read
        status = os.waitpid(self.process, 0)[1]
        os.close(self._pipe)
        self.killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return time.monotonic() - began

    def published(self) -> int:
        """Return the newest step that this process has published, as far as it came to tell; -1 where there is none."""
        lines = self.said.split(b"\n")[:-1]
        return max((int(line.split()[1]) for line in lines if line.startswith(b"published")), default=-1)

    def result(self) -> dict[str, Any]:
        """Return what the process said last: its outcome, or the error it stopped with."""
        said = self.said.split(b"\n")[-1]
        return json.loads(said) if said else {"error": "its process ended without a word"}

    def save_seconds(self) -> float:
        """Return how long a save took in this run."""
        return float(self.result()["seconds"]) / max(self.result()["saves"], 1)

    def save_calls(self) -> int:
        """Return how many calls a save of this run consisted of."""
        return max(int(self.result()["calls"]) // max(self.result()["saves"], 1), 1)


def _live(make: MakeRun, folder: Path, pipe: int, *, calls: int, saves: int) -> None:
    """Be the run's process: train, tell the outcome, end without any of the ways out of the parent's program."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    seen = {"saves": 0, "calls": 0, "seconds": 0.0}
    said: dict[str, Any] = {}
    try:
        _watch(seen, pipe, folder, calls=calls, saves=saves)
        loop = make(folder)
        loop.fit(resume=True)
        said = {"outcome": outcome(loop)}
    except BaseException as error:
        said = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    finally:
        with os.fdopen(pipe, "wb") as file:
            file.write(json.dumps(said | seen).encode())
        os._exit(0)


def _watch(seen: dict[str, Any], pipe: int, folder: Path, *, calls: int, saves: int) -> None:
    """Count the saves of this process and the calls that touch their hidden files; die at one of them.

    Saves into folders below the run's, of a run that consists of runs, count as well; published is what shows in its
    own.
    """
    began, counted, published = 0.0, 0, b""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal began, counted, published
        if event not in _TOUCHES:
            return
        if published:  # an event comes before what it is about: the rename has been done by now
            os.write(pipe, published)
            published = b""
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not any(mark in os.fspath(path) for mark in _HIDDEN):
            return
        if event == "os.mkdir" and os.path.basename(path).startswith(_HIDDEN[0]):
            began, counted = time.monotonic(), 0
            seen["saves"] += 1
            os.write(pipe, b"saving\n")
        own = event == "os.rename" and os.path.dirname(os.path.abspath(arguments[1])) == os.path.abspath(folder)
        if own and (name := os.path.basename(arguments[1])).startswith("step-"):
            published = f"published {int(name.removeprefix('step-'))}\n".encode()
        counted += 1
        if counted == calls and seen["saves"] >= saves:
            os.kill(os.getpid(), signal.SIGKILL)
        seen["calls"] += 1
        now = time.monotonic()
        seen["seconds"] += now - began
        began = now

    sys.addaudithook(hook)


def outcome(loop: Any) -> dict[str, str]:
    """Return what a run came to, by name: a hash of every tensor of its state and its model, and each step's losses.

    Args:
        loop: a loop after `fit`.
    """
    _, tensors = split_tensors({"state": loop.state_dict(), "model": dict(loop.model.state_dict())}, clone=False)
    found = {name: _hash(tensor) for name, tensor in tensors.items()}
    for row in loop.history:
        losses = {key: value for key, value in row.items() if key.endswith("loss") or key in ("penalty", "grad_norm")}
        found[f"the losses of step {row['step']}"] = json.dumps(losses, sort_keys=True)
    return found


def _hash(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _count(report: KillReport, folder: Path, way: str, process: int) -> None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    report.kills += 1
    report.ways[way] += 1
    own = f"-{process}-"  # what the one killed before it left may still be there
    report.in_saves += any(name.startswith(_HIDDEN) and own in name for name in names)
    report.before_any += not any(name.startswith("step-") for name in names)


def _newest(folder: Path, *, no_older: int) -> int:
    """Return the step of the newest checkpoint, -1 where there is none; all that are to be seen must be whole."""
    found = list_checkpoints(folder)
    for path in found:
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            raise LawBroken(f"nothing half: after a kill there is a checkpoint that is not whole: {error}") from error
    newest = step_of(found[-1]) if found else -1
    if newest < no_older:
        raise LawBroken(f"nothing lost: the newest checkpoint was of step {no_older}; after a kill it is of {newest}")
    return newest


def _outcome_of(run: _Run, *, killed: int) -> dict[str, str]:
    result = run.result()
    if "error" in result:
        after = f"after {killed} kills the resumed run" if killed else "the run that is left alone"
        raise LawBroken(f"one result: {after} stops with {result['error']}\n{result.get('trace', '')}")
    return dict(result["outcome"])


def _same(found: dict[str, str], wanted: dict[str, str], *, killed: int) -> None:
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise LawBroken(f"one result: after {killed} kills {name} is not what it is in the run that was left alone")
