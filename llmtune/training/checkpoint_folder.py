"""The folder of a run: which checkpoints lie in it, and what a writer that was killed left behind.

Beside `step-00000040` there may be, for as long as a save takes, `.tmp-step-...` (being written), `.old-step-...`
(moved aside until the new one of that step is in place) and `.gone-step-...` (being removed), each with its writer's
process number and machine at the end of its name.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

_STEP = re.compile(r"step-([0-9]{8,18})")
_HIDDEN = re.compile(r"\.(tmp|old|gone)-(step-[0-9]{8,18})-([0-9]{1,10})(?:-(.*))?")
_OTHER_MACHINE_SECONDS = 3600.0
_OPEN: set[str] = set()  # the temporary folders that this process is writing just now


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the run's checkpoint folders, oldest first; empty where there are none or no such folder."""
    return [path for path in named_checkpoints(folder) if path.is_dir() and not path.is_symlink()]


def named_checkpoints(folder: Path) -> list[Path]:
    """Return all that is named like a checkpoint, oldest first, be it a folder, a link or a file."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for step, path in sorted(found) if path.name == step_name(step)]


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def hidden(kind: str, path: Path) -> Path:
    """Return this process's hidden name for a checkpoint: "tmp", "old" or "gone"."""
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}-{_machine()}")


def open_temporary(path: Path) -> Path:
    """Make the folder that a checkpoint is written into before it is published, and return it."""
    temporary = hidden("tmp", path)
    _OPEN.add(os.fspath(temporary))
    temporary.mkdir()
    return temporary


def close_temporary(temporary: Path) -> None:
    """Remove what is left of a temporary folder, as far as that can be done; the next save tries again."""
    shutil.rmtree(temporary, ignore_errors=True)
    _OPEN.discard(os.fspath(temporary))


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that it is whole or not there at any moment.

    Raises:
        OSError: it cannot be moved or not all of it removed.
    """
    gone = hidden("gone", path)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    if gone.exists():
        raise OSError(f"some of {gone} is still there")


def sweep(folder: Path) -> None:
    """Remove what killed writers left, putting back a checkpoint that one had only just moved aside.

    What a process writes that lives on this machine is left alone; another machine's is left for an hour. What cannot
    be removed stays.
    """
    for path in list(folder.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        kind, name, process, machine = match[1], match[2], int(match[3]), match[4] or _machine()
        here = machine == _machine()
        if here and _alive(process, path):
            continue
        with suppress(OSError):
            if kind == "old" and not (folder / name).exists():
                path.rename(folder / name)
            elif here or time.time() - path.stat().st_mtime > _OTHER_MACHINE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int, path: Path) -> bool:
    """Return whether the process that a hidden folder is named after is at work on it."""
    if process == os.getpid():  # after a restart a process may well have the number of the one that was killed
        ours = path.with_name(path.name.replace(".old-", ".tmp-").replace(".gone-", ".tmp-"))
        return os.fspath(ours) in _OPEN
    if os.name == "nt":  # there a signal cannot ask
        return time.time() - path.stat().st_mtime < _OTHER_MACHINE_SECONDS
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "", platform.node())[:64] or "unnamed"
