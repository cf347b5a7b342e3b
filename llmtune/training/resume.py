"""Saving a run and going on with it: which folder, which process writes, which checkpoint is taken."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.adapters.attach import adapter_names
from llmtune.adapters.files import save as save_adapter
from llmtune.errors import CheckpointError
from llmtune.modules import unwrap
from llmtune.training.background import CheckpointWriter
from llmtune.training.checkpoint import newest_valid
from llmtune.training.checkpoint_folder import list_checkpoints, step_name
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.training.checkpoint_state import split_tensors
from llmtune.training.csv_log import CsvLog
from llmtune.training.history import History
from llmtune.training.randomness import seed_everything
from llmtune.training.sharding import gathered
from llmtune.training.signals import Told

if TYPE_CHECKING:
    from llmtune.training.loop import TrainingLoop


class Keeper:
    """Keeps a run: writes its checkpoints and its history, and knows which must stay.

    Attributes:
        saved_step: the step of the last checkpoint; 0 before there is one.
        wanted: whether a callback asks for a checkpoint of this step.
        protected: steps whose checkpoints are never removed, as that of the best evaluation.
        fingerprints: of what does not change, taken once.
    """

    def __init__(self) -> None:
        self.saved_step = 0
        self.wanted = False
        self.protected: set[int] = set()
        self.fingerprints: dict[str, str | None] = {}
        self._writer: CheckpointWriter | None = None
        self._csv: CsvLog | None = None
        self._adapters: list[str] = []

    def start(self, loop: TrainingLoop, *, resume: bool, strict: bool) -> None:
        """Load the newest whole checkpoint, or make sure that a new run may begin; find out whether it can be saved."""
        if resume:
            load_newest(loop, strict=strict)
        else:
            loop.ranks.in_main(lambda: refuse_used_folder(loop.settings.folder))
            seed_everything(loop.settings.seed)
        check_can_save(loop)
        self._adapters = adapters_with_files(loop)
        if self.wanted:  # by a callback, when the last `fit` of this very loop failed
            loop.save()
        if loop.settings.folder is not None and loop.ranks.main:
            self._csv = CsvLog(Path(loop.settings.folder) / "history.csv")
            self._csv.start(loop.history)

    def record(self, row: dict[str, Any]) -> None:
        """Add a step, which is the history's last by now, to `history.csv`."""
        if self._csv is not None:
            self._csv.append(row)

    def record_anew(self, history: History) -> None:
        """Have `history.csv` hold the whole history as it is now, of which an earlier step has changed."""
        if self._csv is not None:
            self._csv.start(history)

    def save(self, loop: TrainingLoop) -> Path | None:
        """Write a checkpoint of the run as it stands and return its folder; None where the settings have no folder.

        All processes call it; the main one writes, and all hear what went wrong. `on_save` is emitted for what has been
        published: in the background that is the checkpoint before.
        """
        if loop.settings.folder is None:
            return None
        folder = Path(loop.settings.folder)
        loop.ranks.settle(loop.model)
        state = loop.state_dict()
        if loop.ranks.sharded:
            state = gathered(state, keep=loop.ranks.main)

        writer = self._writer = self._writer or CheckpointWriter(background=loop.settings.background_save)

        def write() -> list[Path]:
            keep, more = loop.settings.keep, files_of(loop, self._adapters)
            writer.write(folder, loop.step, state, keep=keep, protect=self.protected, files=more)
            return [] if writer.background else writer.wait()

        self._announce(loop, loop.ranks.in_main(write))
        self.saved_step, self.wanted = loop.step, False
        return folder / step_name(loop.step)

    def finish(self, loop: TrainingLoop, error: BaseException | None = None) -> None:
        """Wait for the checkpoint under way, and write the history; where a signal ends the run, save it first.

        Args:
            loop: the loop that ends.
            error: what it ends by, which a full disk must not hide.
        """
        if isinstance(error, Told) and self.saved_step != loop.step:
            loop.save()
        try:
            if self._writer is not None and not (error is not None and loop.ranks.processes > 1):
                self._announce(loop, loop.ranks.in_main(self._writer.wait))
            if self._csv is not None:
                self._csv.close() if error is None else self._csv.start(loop.history)
        except (OSError, CheckpointError) as problem:
            if error is None:
                raise
            print(f"while ending: {problem}")

    def _announce(self, loop: TrainingLoop, published: list[Path]) -> None:
        for path in published:
            loop._emit("on_save", path)


def files_of(loop: TrainingLoop, adapters: Sequence[str]) -> Callable[[Path], None] | None:
    """Return what writes the files that others read: the tokenizer, and adapters in PEFT's format."""
    if loop.tokenizer is None and not adapters:
        return None

    def write(folder: Path) -> None:
        if loop.tokenizer is not None:
            loop.tokenizer.save_pretrained(folder / "tokenizer")
        for name in adapters:
            save_adapter(unwrap(loop.model), folder / "adapters" / name, name)

    return write


def adapters_with_files(loop: TrainingLoop) -> list[str]:
    """Return which adapters a checkpoint holds in PEFT's format too, found out by writing each once.

    One that has no such file is told of in a line; its tensors are in the checkpoint all the same. Adapters of a
    sharded model are left to the end of the run: no process holds one whole.
    """
    if loop.settings.folder is None or loop.ranks.sharded or not loop.ranks.main:
        return []
    found = []
    for name in adapter_names(unwrap(loop.model)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                save_adapter(unwrap(loop.model), Path(folder) / name, name)
            except (TypeError, ValueError) as error:
                print(f'checkpoints hold adapter "{name}", but no file of it for others: {error}')
            else:
                found.append(name)
    return found


def refuse_used_folder(folder: str | Path | None) -> None:
    """Raise where a new run would write among another run's checkpoints.

    Raises:
        CheckpointError: the folder holds checkpoints; names both ways out.
    """
    found = [] if folder is None else list_checkpoints(Path(folder))
    if found:
        raise CheckpointError(
            f"{folder} already holds a run, up to {found[-1].name}: go on with it by fit(resume=True), "
            "or give another folder"
        )


def check_can_save(loop: TrainingLoop) -> None:
    """Find out before the first step what would keep the run from being saved after the last.

    Raises:
        CheckpointError: the folder cannot be made or written.
        TypeError: the tokenizer cannot be saved; or the state of the loop, its optimizer, schedule or callbacks holds
            what is neither tensor nor JSON.
    """
    if loop.settings.folder is None:
        return
    if loop.tokenizer is not None and not hasattr(loop.tokenizer, "save_pretrained"):
        raise TypeError(f"a tokenizer with save_pretrained is expected; got a {type(loop.tokenizer).__name__}")
    folder = Path(loop.settings.folder)
    loop.ranks.in_main(lambda: check_writable(folder))
    if loop.stream is None or not loop.stream.is_ahead(loop.step):  # it is where the last `fit` failed in a step
        split_tensors(loop.state_dict(), clone=False)


def check_writable(folder: Path) -> None:
    """Raise CheckpointError where the folder cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoints into {folder}: {error}") from error


def load_newest(loop: TrainingLoop, *, strict: bool = False) -> None:
    """Load the newest whole checkpoint of the loop's folder into the loop; start afresh where there is none.

    Args:
        loop: a loop that has not begun.
        strict: raise where a newer one is damaged, instead of skipping it with a line that says why.

    Raises:
        CheckpointError: every checkpoint is damaged, the newest whole one is of another run, or a process cannot see
            it.
        ValueError: the settings have no folder to resume from.
    """
    if loop.settings.folder is None:
        raise ValueError("fit(resume=True) needs a folder to resume from: set LoopSettings(folder=...)")
    folder = Path(loop.settings.folder)
    found: list[tuple[Path, dict[str, Any], list[str]] | None] = []

    def find() -> Path | None:
        found.append(newest_valid(folder, strict=strict))
        return found[0] and found[0][0]

    path = loop.ranks.in_main(find)
    if path is None:
        seed_everything(loop.settings.seed)
        return
    blind = [number for number, sees in enumerate(loop.ranks.exchange(path.is_dir())) if not sees]
    if blind:
        raise CheckpointError(
            f"process {blind[0]} does not find {path}, which the main process has found: the folder must be on storage "
            "that all machines share"
        )
    _, state, skipped = (found and found[0]) or (path, read_checkpoint(path), [])
    for reason in skipped:
        print(f"skipped a damaged checkpoint: {reason}")
    try:
        loop.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
