"""Reading the file of tensors in an adapter's folder. Nothing is unpickled unless asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from llmtune.adapters.record import BIN, CONFIG, UNFINISHED, WEIGHTS, check_mapping


def read_tensors(folder: Path, *, allow_bin: bool) -> dict[str, Tensor]:
    """Return the tensors of an adapter's folder by their names in the file.

    Args:
        folder: where the two files are.
        allow_bin: read the pickle where there is no safetensors file, by torch's `weights_only=True`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a save was cut off, the file of tensors is damaged, or holds what no adapter's does.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    pickled = folder / BIN
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"saving into {folder} was cut off between its two files, which may not belong together: save it again, or "
            f"delete {UNFINISHED} there if you know that they do"
        )
    for file in (CONFIG, WEIGHTS):
        if (folder / file).is_file() or (file == WEIGHTS and allow_bin and pickled.is_file()):
            continue
        hint = f" There is a {BIN}, a pickle: allow_bin=True reads its tensors." if pickled.is_file() else ""
        raise FileNotFoundError(f"{folder} holds no {file}: give the folder that an adapter was saved into.{hint}")
    path = folder / WEIGHTS if (folder / WEIGHTS).is_file() else pickled
    try:
        tensors = load_file(path) if path != pickled else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged, or no file of tensors: copy or save it once more; the reader says: {error}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{pickled} holds no dictionary of tensors: it is not an adapter's file")
    narrow = [key for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize < 2]
    if narrow:
        raise ValueError(
            f"{narrow[0]} in {path} is {tensors[narrow[0]].dtype}, in which nothing is trained: convert the file's "
            "tensors to a dtype of 16 bits or more"
        )
    return tensors


def renamed(tensors: dict[str, Tensor], rename: Mapping[str, str], *, source: Path) -> dict[str, Tensor]:
    """Return tensors by other names.

    Args:
        tensors: by name.
        rename: regular expressions and what stands for them, put through `re.sub` in order; each must match.
        source: the folder they are from, for the sentences.

    Raises:
        TypeError: `rename` is no dict of strings.
        ValueError: an expression is none, matches nothing, or gives two tensors one name.
    """
    check_mapping("rename", rename)
    for pattern, replacement in rename.items():
        if not isinstance(replacement, str):
            raise TypeError(f"rename: what stands for {pattern!r} must be a string; got {replacement!r}")
        try:
            changed = {re.sub(pattern, replacement, key): tensor for key, tensor in tensors.items()}
        except (re.error, IndexError) as error:
            raise ValueError(f"rename: {pattern!r} to {replacement!r} cannot be put through re.sub: {error}") from error
        if not any(re.search(pattern, key) for key in tensors):
            raise ValueError(
                f"rename: {pattern!r} matches no tensor in {source}, where one is {next(iter(tensors), None)}"
            )
        if len(changed) < len(tensors):
            raise ValueError(f"rename: {pattern!r} gives several tensors of {source} the same name")
        tensors = changed
    return tensors
