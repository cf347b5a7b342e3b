"""Checkpoints that are whole or not there: safetensors and JSON, hashed, renamed into place, never unpickled.

A checkpoint is a folder `step-00000040` of three files: `tensors.safetensors`, `state.json` (everything that is no
tensor) and `manifest.json` (size and SHA-256 of the other two). It is written under a temporary name, flushed to the
disk, and renamed; only then are older ones removed. A process killed at any moment leaves the older ones as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmtune.errors import CheckpointError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_MARK = "__tensor__"


def split_tensors(state: Any, path: str = "", *, clone: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """Part nested dicts and lists into JSON values, with a mark where a tensor stood, and those tensors by path.

    Args:
        state: what to part.
        path: where in the whole it stands.
        clone: copy the tensors to the CPU, contiguous and each in a storage of its own; False leaves them as they are.

    Raises:
        TypeError: a value is neither a tensor nor JSON, or a dict's key is no string; the sentence names the path.
    """
    if isinstance(state, Tensor):
        return {_MARK: path}, {path: state.detach().cpu().contiguous().clone() if clone else state}
    if isinstance(state, Mapping):
        pieces = {}
        for key, value in state.items():
            if not isinstance(key, str) or key == _MARK:
                raise TypeError(f"keys of saved state must be strings; {path or 'the root'} has {key!r}")
            pieces[key] = split_tensors(value, f"{path}.{key}" if path else key, clone=clone)
        return {key: piece[0] for key, piece in pieces.items()}, _merged(piece[1] for piece in pieces.values())
    if isinstance(state, list | tuple):
        parts = [split_tensors(value, f"{path}.{index}", clone=clone) for index, value in enumerate(state)]
        return [part[0] for part in parts], _merged(part[1] for part in parts)
    if state is None or isinstance(state, bool | int | float | str):
        return state, {}
    raise TypeError(f"saved state must be tensors and JSON values; {path or 'the root'} is a {type(state).__name__}")


def join_tensors(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors back where `split_tensors` left a mark."""
    if isinstance(values, dict):
        if set(values) == {_MARK}:
            return tensors[values[_MARK]]
        return {key: join_tensors(value, tensors) for key, value in values.items()}
    if isinstance(values, list):
        return [join_tensors(value, tensors) for value in values]
    return values


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint of `step`, publish it in one rename, then remove all but `keep`.

    Args:
        folder: the run's folder; made where it is missing.
        step: optimizer steps done.
        state: nested dicts and lists of tensors and JSON values.
        keep: checkpoints to leave, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        TypeError: the state holds something that is neither a tensor nor JSON.
    """
    from safetensors.torch import save_file

    values, tensors = split_tensors(state)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    final, temporary = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}-{os.getpid()}"
    temporary.mkdir()
    try:
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        (temporary / STATE).write_text(json.dumps(values), encoding="utf-8")
        manifest = {name: _describe(temporary / name) for name in (TENSORS, STATE)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*(temporary / name for name in (TENSORS, STATE, MANIFEST)), temporary):
            _flush(path)
        aside = folder / f".old-{final.name}-{os.getpid()}"
        if final.exists():  # the older one stays whole under another name until the new one is in place
            final.rename(aside)
        temporary.rename(final)
        _flush(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    published = list_checkpoints(folder)
    here = published.index(final)
    for other in (*published[: max(here + 1 - keep, 0)], *published[here + 1 :]):
        shutil.rmtree(other)  # older ones, and later ones of a history that was left when the run went back
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the run's checkpoint folders, oldest first; empty where there are none or no such folder."""
    if not folder.is_dir():
        return []
    found = [
        path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint's state after checking size and hash of each of its files.

    Raises:
        CheckpointError: a file is missing, is a link, has another size or hash, or cannot be read; says which.
    """
    from safetensors.torch import load

    try:
        manifest = json.loads(_regular(path / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or set(manifest) != {TENSORS, STATE}:
            raise CheckpointError(f"{path / MANIFEST} must describe exactly {TENSORS} and {STATE}")
        contents = {}
        for name, described in manifest.items():
            content = _regular(path / name).read_bytes()
            found = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            if found != described:
                raise CheckpointError(f"{path / name} is damaged: its manifest says {described}, the file has {found}")
            contents[name] = content
        state = join_tensors(json.loads(contents[STATE]), load(contents[TENSORS]))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise, the caller gets one kind of error
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE} must hold an object; it holds a {type(state).__name__}")
    return state


def newest_valid(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Return (path, state, reasons for skipping newer ones) of the newest checkpoint that is whole.

    None where the folder holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    if folder.is_dir():
        _sweep(folder)
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, read_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(f"no checkpoint in {folder} is whole: " + "; ".join(skipped))
    return None


def fingerprint(tensor: Tensor) -> str:
    """Return a short hash of up to 1024 entries spread over a tensor of any shape: enough to tell two models apart."""
    flat = tensor.detach().flatten()
    if flat.numel() > 1024:
        flat = flat[torch.linspace(0, flat.numel() - 1, 1024, dtype=torch.float64).long().to(flat.device)]
    return hashlib.sha256(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _merged(dicts: Any) -> dict[str, Tensor]:
    return {name: tensor for part in dicts for name, tensor in part.items()}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _regular(path: Path) -> Path:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing, or is no regular file")
    return path


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what a killed writer left, putting back a checkpoint that it had only just moved aside."""
    for path in folder.iterdir():
        if path.name.startswith(".old-step-"):
            name = path.name.removeprefix(".old-").rsplit("-", 1)[0]
            if not (folder / name).exists():
                path.rename(folder / name)
                continue
        elif not path.name.startswith(".tmp-step-"):
            continue
        shutil.rmtree(path, ignore_errors=True)
