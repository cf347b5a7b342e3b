"""Rows that come one after another: an iterable with a `state_dict`, instead of rows by number."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from llmtune.errors import CheckpointError
from llmtune.training.checkpoint_state import split_tensors


class StreamRows:
    """The rows of a stream, cut into steps.

    A stream is an iterable of rows with `state_dict()` and `load_state_dict(state)`, which stand for the next row to
    come: torchdata's `StatefulDataLoader` (with `batch_size=None`, so that it gives rows), Hugging Face's
    `IterableDataset`. When it ends it is started again, after `set_epoch(passes so far)` where it, or its `dataset`,
    has such a method. Resuming is as exact, and as fast, as the stream's own.

    Args:
        stream: an iterable with `state_dict` and `load_state_dict`.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._iterator: Iterator[Any] | None = None
        self._passes = 0  # ended so far
        self._begun: tuple[int, Any] = 0, None  # the last step before which its state was looked at, and that state
        self._step = -1  # the last step whose rows were taken
        self._rows: list[Any] = []

    def take(self, step: int, size: int) -> list[Any]:
        """Return the rows of `step`: the next `size` ones, or the last ones again if they were that step's.

        Raises:
            ValueError: the step is neither the last one taken nor the next: a stream cannot be read out of order; or
                the stream gives no rows, or gives batches.
        """
        if step == self._step and self._rows:
            return self._rows
        if step != self._step + 1:
            raise ValueError(f"a stream gives its rows in order: step {self._step + 1} is next, not {step}")
        self._rows = [self._next() for _ in range(size)]
        self._step = step
        return self._rows

    def state(self, step: int) -> dict[str, Any] | None:
        """Return the stream's state before `step`, for a checkpoint; None before the first row.

        Raises:
            CheckpointError: the stream is ahead of the step.
        """
        if self.is_ahead(step):
            raise CheckpointError(f"the stream has given the rows of step {self._step} already; save after that step")
        if step != self._begun[0]:
            self._begun = step, {"passes": self._passes, "state": copy.deepcopy(self.stream.state_dict())}
        return self._begun[1]

    def is_ahead(self, step: int) -> bool:
        """Return whether the rows of `step` are taken already, and the state before them is no longer to be had."""
        return step not in (self._begun[0], self._step + 1)

    def restore(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Go back to where `state` was taken, before `step`."""
        self._iterator, self._rows, self._step = None, [], step - 1
        self._begun, self._passes = (step, state), 0 if state is None else int(state["passes"])
        if state is not None:
            self._set_epoch()
            self.stream.load_state_dict(state["state"])

    def check_state(self) -> None:
        """Raise TypeError where the stream's state cannot be saved."""
        try:
            split_tensors(self.stream.state_dict(), clone=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the state_dict of the stream {type(self.stream).__name__} cannot be saved: {error}"
            ) from error

    def _next(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self.stream)
            for row in self._iterator:
                return checked_row(row)
            self._iterator = None  # it has ended: once more from the start
            self._passes += 1
            self._set_epoch()
        raise ValueError(
            f"the stream {type(self.stream).__name__} gives no rows when it is gone through from the start"
        )

    def _set_epoch(self) -> None:
        parts: list[Any] = [self.stream, getattr(self.stream, "dataset", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._passes)
                return


def is_stream(data: Any) -> bool:
    """Return whether the data is gone through, with a state to go on from, rather than asked for a row by number."""
    by_number = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)  # which has one that only raises
    return hasattr(data, "__iter__") and hasattr(data, "state_dict") and not by_number


def checked_row(row: Any) -> Any:
    """Return the row; raise ValueError where it is a batch already."""
    ids: Any = row.get("input_ids") if isinstance(row, Mapping) else None
    if isinstance(row, list | tuple) and row and isinstance(row[0], Mapping):
        came = f"a list of {len(row)} rows"
    elif getattr(ids, "ndim", 1) > 1:
        came = f"a batch, {list(ids.shape)}"
    elif isinstance(ids, list | tuple) and ids and (isinstance(ids[0], list | tuple) or getattr(ids[0], "ndim", 0) > 0):
        came = f"a batch of lists, {len(ids)} of {len(ids[0])}"
    else:
        return row
    raise ValueError(
        f"a stream must give rows, with input_ids [n]; got {came}: give its loader batch_size=None, and the loop "
        "rows_per_step and collate"
    )
