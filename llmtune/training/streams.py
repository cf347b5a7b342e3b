"""Rows that come one after another: an iterable with a `state_dict`, instead of rows by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.errors import CheckpointError


class StreamRows:
    """The rows of a stream, cut into steps.

    A stream is an iterable of rows with `state_dict()` and `load_state_dict(state)`, which stand for the next row to
    come: torchdata's `StatefulDataLoader` (with `batch_size=None`, so that it gives rows), Hugging Face's
    `IterableDataset`. When it ends it is started again. Resuming is as exact, and as fast, as the stream's own.

    Args:
        stream: an iterable with `state_dict` and `load_state_dict`.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._iterator: Iterator[Any] | None = None
        self._step = -1  # the last step whose rows were taken
        self._rows: list[Any] = []

    def take(self, step: int, size: int) -> list[Any]:
        """Return the rows of `step`: the next `size` ones, or the last ones again if they were that step's.

        Raises:
            ValueError: the step is neither the last one taken nor the next: a stream cannot be read out of order.
        """
        if step == self._step and self._rows:
            return self._rows
        if self._step >= 0 and step != self._step + 1:
            raise ValueError(f"a stream gives its rows in order: step {self._step + 1} is next, not {step}")
        self._rows = [self._next() for _ in range(size)]
        self._step = step
        return self._rows

    def state(self, step: int) -> dict[str, Any] | None:
        """Return the stream's state before `step`, for a checkpoint; None before the first row.

        Raises:
            CheckpointError: the stream is ahead of the step.
        """
        if self._step < 0:
            return None
        if self._step != step - 1:
            raise CheckpointError(f"the stream has given the rows of step {self._step} already; save after that step")
        return dict(self.stream.state_dict())

    def restore(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Go back to where `state` was taken, before `step`."""
        self._iterator, self._rows, self._step = None, [], step - 1
        if state is not None:
            self.stream.load_state_dict(dict(state))

    def _next(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self.stream)
            for row in self._iterator:
                return checked_row(row)
            self._iterator = None  # it has ended: once more from the start
        raise ValueError(f"the stream {type(self.stream).__name__} gives no rows")


def is_stream(data: Any) -> bool:
    """Return whether the data is gone through, with a state to go on from, rather than asked for a row by number."""
    return hasattr(data, "__iter__") and hasattr(data, "state_dict") and not hasattr(data, "__getitem__")


def checked_row(row: Any) -> Any:
    """Return the row; raise ValueError where it is a batch already."""
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    if getattr(ids, "ndim", 1) > 1:
        raise ValueError(
            f"a stream must give rows, with input_ids [n]; got a batch, {list(ids.shape)}: give its loader "  # type: ignore[union-attr]
            "batch_size=None, and the loop rows_per_step and collate"
        )
    return row
