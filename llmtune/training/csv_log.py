"""A run's history as a CSV file that grows while the run goes."""

from __future__ import annotations

import csv
import io
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneWarning
from llmtune.training.history import History


class CsvLog:
    """Keep a CSV file in step with a `History`, at the cost of one line a row.

    Rows are written in whole lines, about once a second, so that a run killed at any moment leaves a file one can read.
    A column that appears later (`eval_loss` at the first evaluation) makes the file be written anew with the wider
    header, in one move. Where the disk is full or gone, a warning says so once and the rows wait for a later try.

    Args:
        path: of the file; its folder is made.
        flush_seconds: how long rows may wait to be written together.

    Example:
        >>> history, log = History(), CsvLog("history.csv")
        >>> log.start(history)
        >>> for row in ({"step": 1, "loss": 3.5}, {"step": 2, "loss": 2.5, "eval_loss": 3.0}):
        ...     history.append(row)
        ...     log.append(row)
        >>> log.close()
        >>> print(open("history.csv").read())
        step,loss,eval_loss
        1,3.5,
        2,2.5,3.0
        <BLANKLINE>
    """

    def __init__(self, path: str | Path, *, flush_seconds: float = 1.0) -> None:
        self.path, self.flush_seconds = Path(path), flush_seconds
        self._history = History()
        self._columns: dict[str, None] = {}
        self._whole = True  # whether the file has to be written as a whole
        self._waiting: list[str] = []
        self._next_write = 0.0
        self._warned = False

    def start(self, history: History) -> None:
        """Make the file hold exactly the rows of `history`: what a killed run wrote beyond its checkpoint goes.

        Args:
            history: the rows so far. The log keeps the list itself, from which it writes the file anew.
        """
        self._history, self._waiting, self._whole, self._warned = history, [], True, False
        self._next_write = 0.0
        if history:
            self._write()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row: the one that has just become the history's last, with its evaluation where it has one."""
        if not self._whole and all(name in self._columns for name in row):
            self._waiting.append(_line(row, self._columns))
        else:
            self._whole = True
        if time.monotonic() >= self._next_write:
            self._write()

    def close(self) -> None:
        """Write what waits. The log can be started again."""
        if self._history and (self._whole or self._waiting):
            self._write()

    def _write(self) -> None:
        try:
            if self._whole or not self.path.exists():
                self._history.to_csv(self.path)
                self._columns, self._whole = dict.fromkeys(self._history.names()), False
            else:
                _append("".join(self._waiting).encode(), self.path)
            self._waiting.clear()
            self._next_write = time.monotonic() + self.flush_seconds
        except OSError as error:
            self._next_write = time.monotonic() + max(10.0, self.flush_seconds)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self.path} cannot be written, and training goes on; its rows wait for a later try: {error}",
                    LlmtuneWarning,
                    stacklevel=3,
                )


def _line(row: Mapping[str, Any], columns: Mapping[str, None]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, fieldnames=list(columns), restval="").writerow(row)
    return text.getvalue()


def _append(data: bytes, path: Path) -> None:
    """Add bytes to a file in one piece, or raise OSError and leave it as it was."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, io.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise
