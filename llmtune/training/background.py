"""Checkpoints written while the run goes on."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmtune.training.checkpoint import write_checkpoint
from llmtune.training.checkpoint_write import AddFiles, Unpublished, begin_checkpoint, check_arguments


class CheckpointWriter:
    """Write checkpoints, on request in a thread beside the run.

    In the background, `write` takes a copy of the state on the CPU, has the run's own files written, and leaves the
    rest to one thread; a checkpoint is then seen a little later, and whole as ever. At a normal exit of the program the
    write that is under way is finished. A thread's error is raised by the next `write` or `wait`, or, where there is
    none, printed at exit.

    Args:
        background: whether to write in a thread.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = CheckpointWriter(background=True)
        ...     writer.write(folder, 40, {"weight": torch.ones(2, 3)}, keep=2)
        ...     print([path.name for path in writer.wait()])
        ['step-00000040']
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._published: list[Path] = []

    def write(
        self,
        folder: str | Path,
        step: int,
        state: Mapping[str, Any],
        *,
        keep: int,
        protect: Collection[int] = (),
        files: AddFiles | None = None,
    ) -> None:
        """Write a checkpoint as `write_checkpoint` does; in the background after the one before is done.

        Args:
            folder: the run's folder.
            step: optimizer steps done.
            state: nested dicts and lists of tensors and JSON values.
            keep: checkpoints to leave, this one included.
            protect: steps whose checkpoints are never removed.
            files: writes more files; it is called before this returns.

        Raises:
            TypeError: the state holds something that is neither a tensor nor JSON.
            ValueError: a step, `keep` or the nesting of the state is out of range.
            CheckpointError: this checkpoint, or in the background the one before, could not be written.
        """
        self._join()
        if not self.background:
            self._published.append(write_checkpoint(folder, step, state, keep=keep, protect=protect, files=files))
            return
        check_arguments(step, keep, protect)
        begun = begin_checkpoint(Path(folder), step, state, files=files, copy=True)
        self._thread = threading.Thread(
            target=self._publish, args=(begun, keep, tuple(protect)), name=f"checkpoint {step}", daemon=False
        )
        atexit.register(self._join)  # runs after the threads have ended: an error nobody asked for is printed
        self._thread.start()

    def wait(self) -> list[Path]:
        """Return the checkpoints published since the last call, oldest first, after the one under way is done.

        Raises:
            CheckpointError: it could not be written.
        """
        self._join()
        published, self._published = self._published, []
        return published

    def _publish(self, begun: Unpublished, keep: int, protect: Collection[int]) -> None:
        try:
            self._published.append(begun.publish(keep=keep, protect=protect))
        except BaseException as error:
            self._error = error

    def _join(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        atexit.unregister(self._join)
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
