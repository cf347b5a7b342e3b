"""Writing one checkpoint in two parts: what must see the run at that moment, and the rest, which another thread may do.

Everything goes into a temporary folder, is flushed to the disk, and shows under its name after one rename.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtune.errors import CheckpointError, LlmtuneWarning
from llmtune.training.checkpoint_files import (
    MANIFEST,
    MOST_STATE,
    STATE,
    TENSORS,
    describe,
    files_under,
    flush,
    one_line,
    write_manifest,
)
from llmtune.training.checkpoint_folder import (
    close_temporary,
    hidden,
    list_checkpoints,
    open_temporary,
    remove_checkpoint,
    step_name,
    step_of,
    sweep,
)
from llmtune.training.checkpoint_state import split_tensors

SLACK = 16 << 20  # bytes that must be free beyond what is known to be written

AddFiles = Callable[[Path], object]
"""Writes more files of a checkpoint into the folder it is given."""


@dataclass(frozen=True)
class Unpublished:
    """A checkpoint that is begun: a temporary folder, with the run's own files in it, and what is still to be written.

    Attributes:
        temporary: the folder.
        final: where it goes.
        text: the JSON of all that is no tensor.
        tensors: by name, of any shapes.
    """

    temporary: Path
    final: Path
    text: bytes
    tensors: Mapping[str, Tensor]

    def publish(self, *, keep: int, protect: Collection[int]) -> Path:
        """Write the rest, rename it into place, and remove older ones. See `write_checkpoint`."""
        aside = hidden("old", self.final)
        try:
            with written(self.final):
                _write(self.temporary, self.text, self.tensors)
                if self.final.exists():  # the older one stays whole under another name until the new one is in place
                    self.final.rename(aside)
                self.temporary.rename(self.final)
                flush(self.final.parent)
        except BaseException:
            if not self.final.exists():
                with suppress(OSError):  # the next save or resume puts it back otherwise
                    aside.rename(self.final)
            raise
        finally:
            close_temporary(self.temporary)
        shutil.rmtree(aside, ignore_errors=True)
        _rotate(self.final, keep=keep, protect=protect)
        return self.final


def begin_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], *, files: AddFiles | None, copy: bool
) -> Unpublished:
    """Do of a checkpoint's writing what must see the run at this very moment: take the state, and call `files`.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        state: nested dicts and lists of tensors and JSON values.
        files: writes more files.
        copy: take copies of the tensors on the CPU, so that the run may go on before they are written.

    Raises:
        TypeError: the state holds something that is neither a tensor nor JSON.
        ValueError: the state is nested too deeply.
        CheckpointError: too little space is free, or something cannot be written.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"the state must be a dict of tensors and JSON values; got a {type(state).__name__}")
    values, tensors = split_tensors(state, clone=copy)
    text = json.dumps(values, allow_nan=False).encode()
    if len(text) > MOST_STATE:
        raise CheckpointError(f"what is no tensor in the state is {len(text)} bytes of JSON; {MOST_STATE} can be read")
    final = folder / step_name(step)
    with written(final):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    _check_space(final, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + len(text))
    try:
        with written(final):
            temporary = open_temporary(final)
            if files is not None:
                files(temporary)
                _check_own_names(temporary)
    except BaseException:
        close_temporary(hidden("tmp", final))
        raise
    return Unpublished(temporary, final, text, tensors)


def check_arguments(step: int, keep: int, protect: Collection[int]) -> None:
    """Raise ValueError where a step is none or `keep` keeps nothing."""
    for what, number, least in (("step", step, 0), ("keep", keep, 1), *(("protect", one, 0) for one in protect)):
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number < 10**18:
            raise ValueError(f"{what} must be a whole number of at least {least}; got {number!r}")


@contextmanager
def written(final: Path) -> Iterator[None]:
    """Say in one sentence what could not be written, whatever was called to write it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final} could not be written: {one_line(error)}; the checkpoints that were there are whole"
        ) from error


def _check_space(final: Path, known: int) -> None:
    free, needed = shutil.disk_usage(final.parent), known + SLACK
    if free.total and free.free < needed:  # a total of 0 is a file system that does not tell
        raise CheckpointError(
            f"{final} needs {needed / 2**20:,.0f} MiB and {free.free / 2**20:,.0f} MiB are free: make room, or keep "
            "fewer checkpoints; nothing has been changed"
        )


def _check_own_names(temporary: Path) -> None:
    taken = sorted({TENSORS, STATE, MANIFEST} & set(files_under(temporary)))
    if taken:
        raise ValueError(f"files= wrote {taken[0]}, which is a file of the checkpoint itself: give it another name")


def _write(temporary: Path, text: bytes, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(_side_by_side(tensors), temporary / TENSORS, metadata={"format": "pt"})
    (temporary / STATE).write_bytes(text)
    names = list(files_under(temporary))
    write_manifest(temporary, {name: describe(temporary / name) for name in names})
    folders = [path for path in sorted(temporary.rglob("*")) if path.is_dir()]
    for path in (*(temporary / name for name in (*names, MANIFEST)), *reversed(folders), temporary):
        flush(path)


def _side_by_side(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them: on the CPU, contiguous, and no two in one storage."""
    taken: set[int] = set()
    made = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        made[name] = plain.clone() if place in taken else plain
        taken.add(place)
    return made


def _rotate(final: Path, *, keep: int, protect: Collection[int]) -> None:
    """Remove older ones, and later ones of a history that was left when the run went back.

    What cannot be removed is warned of and no error: the new checkpoint is written, and nothing is lost.
    """
    counted = [path for path in list_checkpoints(final.parent) if step_of(path) not in protect or path == final]
    here = counted.index(final)
    for path in (*counted[: max(here + 1 - keep, 0)], *counted[here + 1 :]):
        try:
            remove_checkpoint(path)
        except OSError as error:
            warnings.warn(f"{final} is written, but {path} could not be removed: {error}", LlmtuneWarning, stacklevel=3)
