"""Checkpoints that are whole or not there: safetensors and JSON, hashed, renamed into place, never unpickled.

A checkpoint is a folder `step-00000040`: `tensors.safetensors`, `state.json` (everything that is no tensor), whatever
files the run adds, and `manifest.json` (size and SHA-256 of all others). It is written under a temporary name, flushed
to the disk, and renamed; only then are older ones removed. A process killed at any moment, or a disk that is full,
leaves the older ones as they were.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtune.errors import CheckpointError
from llmtune.training.checkpoint_folder import named_checkpoints, sweep
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.training.checkpoint_write import AddFiles, begin_checkpoint, check_arguments


def write_checkpoint(
    folder: str | Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int,
    protect: Collection[int] = (),
    files: AddFiles | None = None,
) -> Path:
    """Write `state` as the checkpoint of `step`, publish it in one rename, then remove all but the newest `keep`.

    Tensors on the CPU are written from where they are, without a copy.

    Args:
        folder: the run's folder; made where it is missing.
        step: optimizer steps done.
        state: nested dicts and lists of tensors and JSON values.
        keep: checkpoints to leave, this one included.
        protect: steps whose checkpoints are never removed, and not counted (the best one's).
        files: called with the temporary folder; what it writes there (a tokenizer, an adapter) becomes part of the
            checkpoint, is hashed and flushed like the rest.

    Returns:
        The checkpoint's folder.

    Raises:
        TypeError: the state holds something that is neither a tensor nor JSON.
        ValueError: a step, `keep` or the nesting of the state is out of range.
        CheckpointError: too little space is free, or something cannot be written; the older checkpoints are whole.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_checkpoint(folder, 40, {"weight": torch.ones(2, 3), "best": 0.5}, keep=2)
        ...     print(path.name, read_checkpoint(path)["best"])
        step-00000040 0.5
    """
    check_arguments(step, keep, protect)
    return begin_checkpoint(Path(folder), step, state, files=files, copy=False).publish(keep=keep, protect=protect)


def newest_valid(folder: str | Path, *, strict: bool = False) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Return (path, state, reasons for skipping newer ones) of the newest checkpoint that is whole.

    None where the folder holds no checkpoint at all. Each reason is one line, and names the file at fault.

    Args:
        folder: the run's folder.
        strict: raise at the first damaged checkpoint instead of going to an older one.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged; or (strict) the newest is.
    """
    folder = Path(folder)
    if folder.is_dir():
        sweep(folder)
    skipped: list[str] = []
    for path in reversed(named_checkpoints(folder)):
        try:
            return path, read_checkpoint(path), skipped
        except CheckpointError as error:
            if strict:
                raise
            if not os.path.lexists(path):  # another process has removed it meanwhile
                continue
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
