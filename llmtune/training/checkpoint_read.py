"""Reading one checkpoint: every file of its manifest is checked before a tensor is made, and nothing is unpickled."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtune.errors import CheckpointError
from llmtune.training.checkpoint_files import (
    MANIFEST,
    MOST_STATE,
    STATE,
    TENSORS,
    FileEntry,
    one_line,
    open_plain,
    parse_json,
    plain_path,
    read_manifest,
    sha256,
)
from llmtune.training.checkpoint_state import join_tensors


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's state after checking size and hash of every file that its manifest names.

    Hashes are taken in blocks and tensors loaded one by one, so that reading takes little more memory than the state.
    Files that the manifest does not name are not opened.

    Args:
        path: the checkpoint's folder.

    Raises:
        CheckpointError: a file is missing, is no plain file in the folder, has another size or hash, or holds something
            else than a state; one line says which and what.
    """
    path = Path(path)
    files = _checked(path, but=STATE)
    with _one_kind_of_error(path / TENSORS):
        tensors = _tensors(path)
    with _one_kind_of_error(path / STATE):
        state = join_tensors(parse_json(_checked_state(path, files[STATE]), most=MOST_STATE), tensors)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path / STATE} must hold an object; it holds a {type(state).__name__}")
    return state


def verify_checkpoint(path: str | Path) -> None:
    """Check size and hash of every file that a checkpoint's manifest names; nothing is loaded.

    Args:
        path: the checkpoint's folder.

    Raises:
        CheckpointError: a file is missing, is no plain file in the folder, or has another size or hash; says which.
    """
    _checked(Path(path), but=None)


def _checked(path: Path, *, but: str | None) -> dict[str, FileEntry]:
    """Return the manifest's entries, every file found to be as its entry says; of `but` the size alone is looked at.

    All sizes come first, which costs nothing, then the hashes.
    """
    with _one_kind_of_error(path / MANIFEST):
        files = read_manifest(path)
    for name, wanted in files.items():
        with _one_kind_of_error(path / MANIFEST):
            size = plain_path(path, name).lstat().st_size
        if size != wanted.size:
            raise CheckpointError(f"{path / name} is damaged: it has {size} bytes and must have {wanted.size}")
    for name, wanted in files.items():
        if name != but:
            with _one_kind_of_error(path / name), open_plain(path, name) as file:
                _check_hash(path / name, sha256(file), wanted)
    return files


def _check_hash(path: Path, found: str, wanted: FileEntry) -> None:
    if found != wanted.sha256:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is {found[:12]}... and must be {wanted.sha256[:12]}...")


def _checked_state(path: Path, wanted: FileEntry) -> bytes:
    if wanted.size > MOST_STATE:
        raise CheckpointError(f"{wanted.size} bytes are more than the {MOST_STATE} that are read")
    with open_plain(path, STATE) as file:
        content = file.read(wanted.size + 1)
    _check_hash(path / STATE, hashlib.sha256(content).hexdigest(), wanted)
    return content


def _tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors, each copied out of the file: what safetensors gives lies in it, and would change with it."""
    from safetensors import safe_open

    with safe_open(os.fspath(path / TENSORS), framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


@contextmanager
def _one_kind_of_error(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes the readers raise, the caller gets a CheckpointError that names the file."""
    try:
        yield
    except MemoryError:  # says nothing of the file
        raise
    except CheckpointError as error:
        if str(path.parent) in str(error):
            raise
        raise CheckpointError(one_line(f"{path} is damaged: {error}")) from error
    except Exception as error:
        raise CheckpointError(one_line(f"{path} cannot be read: {type(error).__name__}: {error}")) from error
