"""A memory of old rows: a uniform sample of all rows seen, of a fixed size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtune.errors import check_state
from llmtune.types import Rows

Row = dict[str, Any]
WHOLE = ""  # the one reservoir of a buffer that does not part its rows by task


class ReplayBuffer:
    """At most `capacity` of the rows given so far, each row of n seen being kept with probability capacity / n.

    Row n takes the next free slot while there is one; afterwards, with probability capacity / n, a slot drawn at
    random. So at any time the buffer is a uniform sample without replacement, whatever the order and however often
    `add` is called. With `per_task` each task has a reservoir of its own, of capacity / tasks rows (the first tasks one
    more where that leaves a rest); when a task comes, the others give up rows drawn at random, which leaves each a
    uniform sample of its task.

    It is a sequence of rows: `MixedBatches` takes it, and so does whatever takes rows. Rows are copied when they come
    in; of one row, all fields stay together, of whatever length (`with_teacher` adds a model's predictions).

    Args:
        capacity: how many rows are kept, 1 or more.
        seed: of the draws; which rows are kept is a function of the seed and of the rows' numbers.
        per_task: part the capacity equally among the tasks.

    Attributes:
        seen: how many rows have been given so far.

    Raises:
        ValueError: the capacity is 0 or less.

    Example:
        >>> buffer = ReplayBuffer(capacity=2)
        >>> buffer.add([{"input_ids": [n], "labels": [n]} for n in range(10)])
        >>> len(buffer), buffer.seen
        (2, 10)

    Where we differ: mammoth's buffer draws from NumPy's global random state and has no state to save, so that a resumed
    run keeps other rows; with a share for each class its `fill_buffer` keeps the first rows, not a sample of them.

    Vitter 1985, "Random sampling with a reservoir", algorithm R; Chaudhry et al. 2019, "On tiny episodic memories in
    continual learning", section 3.
    """

    def __init__(self, capacity: int, seed: int = 0, *, per_task: bool = False) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(
                f"capacity must be a whole number, 1 or more: a buffer of {capacity!r} rows replays nothing"
            )
        self.capacity, self.per_task = capacity, per_task
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: dict[str, list[Row]] = {}  # by task
        self._counts: dict[str, int] = {}

    seen = property(lambda self: sum(self._counts.values()), doc="How many rows have been given so far.")
    tasks = property(lambda self: list(self._kept), doc="The names of the tasks, in the order they came.")

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._kept.values())

    def __getitem__(self, index: int) -> Row:
        """Return row `index` of those kept, tasks one after another."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"the buffer holds {len(self)} rows; there is no row {index}")
        return self.rows()[index]

    def rows(self, task: str | None = None) -> list[Row]:
        """Return the rows kept, of all tasks or of one; a list of its own.

        Raises:
            ValueError: there is no such task.
        """
        if task is not None and task not in self._kept:
            raise ValueError(f"the buffer knows no task {task!r}, only {', '.join(map(repr, self._kept)) or 'none'}")
        return [row for name, rows in self._kept.items() if task in (None, name) for row in rows]

    def add(
        self,
        rows: Rows | Iterable[Mapping[str, Any]],
        *,
        task: str | None = None,
        prepare: Callable[[list[Row]], list[Row]] | None = None,
    ) -> None:
        """Show rows to the buffer, which keeps some.

        Args:
            rows: dicts of numbers, texts, lists of such, arrays or tensors.
            task: whose they are; needed with `per_task`, and only there.
            prepare: called once with those of the rows that are kept in the end, to return them with more fields, in
                that order: `lambda kept: with_teacher(kept, model, k=16)`.

        Raises:
            ValueError: a task is missing, or given where none is used; there are more tasks than the capacity; or
                `prepare` gives another number of rows.
            TypeError: one row is given instead of rows, or a row holds what cannot be kept. Names the field.
        """
        if (task is not None) != self.per_task or (self.per_task and not task):
            wanted = "needs the name of the rows' task" if self.per_task else "has one reservoir for all: per_task=True"
            raise ValueError(f"a buffer made with per_task={self.per_task} {wanted}; got task={task!r}")
        if isinstance(rows, Mapping):
            raise TypeError("rows are expected, a list of dicts; got one dict: give [row]")
        given = [_copied(row, number) for number, row in enumerate(_each(rows))]
        before = (dict(self._kept), dict(self._counts), self._generator.get_state())
        try:
            self._take(given, task or WHOLE, prepare)
        except Exception:
            self._kept, self._counts = before[:2]
            self._generator.set_state(before[2])
            raise

    def _take(self, given: list[Row], name: str, prepare: Callable[[list[Row]], list[Row]] | None) -> None:
        if name not in self._kept:
            self._make_room(name)
        kept, size = list(self._kept[name]), self._quotas()[name]
        fresh: dict[int, Row] = {}  # by slot, in no matter which order
        for row in given:
            self._counts[name] += 1
            slot = self._counts[name] - 1
            if slot >= size:
                slot = int(torch.randint(self._counts[name], (1,), generator=self._generator))
            if slot < size:
                kept[slot : slot + 1] = [row]
                fresh[slot] = row
        if prepare is not None and fresh:
            made = prepare(list(fresh.values()))
            if len(made) != len(fresh):
                raise ValueError(
                    f"prepare was given {len(fresh)} rows and must return as many; it returned {len(made)}"
                )
            for number, (slot, row) in enumerate(zip(fresh, made, strict=True)):
                kept[slot] = _copied(row, number)
        self._kept[name] = kept

    def state_dict(self) -> dict[str, Any]:
        """Return everything: the rows, how many were seen, and the random state (a tensor [bytes])."""
        return {
            "capacity": self.capacity,
            "per_task": self.per_task,
            "random": self._generator.get_state(),
            "tasks": list(self._kept),
            "seen": [self._counts[name] for name in self._kept],
            "rows": [copy.deepcopy(rows) for rows in self._kept.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; what comes next is then bit for bit what would have come.

        Raises:
            ValueError: it is the state of a buffer of another capacity or kind; nothing is changed.
        """
        check_state(state, ("capacity", "per_task", "random", "tasks", "seen", "rows"), "ReplayBuffer")
        for name in ("capacity", "per_task"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} is {state[name]} in the saved buffer and {getattr(self, name)} in this one")
        self._generator.set_state(state["random"].cpu())
        self._counts = dict(zip(state["tasks"], map(int, state["seen"]), strict=True))
        rows = [[_copied(row, at) for at, row in enumerate(kept)] for kept in state["rows"]]
        self._kept = dict(zip(state["tasks"], rows, strict=True))

    def __repr__(self) -> str:
        tasks = f" of {len(self._kept)} tasks" if self.per_task else ""
        return f"ReplayBuffer({len(self)} rows{tasks} kept of {self.seen} seen, capacity {self.capacity})"

    def _quotas(self) -> dict[str, int]:
        each, rest = divmod(self.capacity, len(self._kept))
        return {name: each + (place < rest) for place, name in enumerate(self._kept)}

    def _make_room(self, name: str) -> None:
        """Begin the reservoir of a task; the others give up what is beyond their new share."""
        if len(self._kept) == self.capacity:
            raise ValueError(
                f"a buffer of {self.capacity} rows cannot hold a task more than the {len(self._kept)} it has: make it "
                "larger"
            )
        self._kept[name], self._counts[name] = [], 0
        for other, size in self._quotas().items():
            if len(self._kept[other]) > size:
                order = torch.randperm(len(self._kept[other]), generator=self._generator)
                self._kept[other] = [self._kept[other][at] for at in order[:size].tolist()]


def _each(rows: Any) -> Iterable[Mapping[str, Any]]:
    by_number = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    return (rows[index] for index in range(len(rows))) if by_number else rows


def _copied(row: Mapping[str, Any], number: int) -> Row:
    """Return a copy of a row that state can hold: arrays become tensors, tensors stand on the CPU."""
    if not isinstance(row, Mapping):
        raise TypeError(f"row {number} must be a dict of fields; got a {type(row).__name__}")
    return {name: _copy(value, f'row {number}: field "{name}"') for name, value in row.items()}


def _copy(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return [_copy(entry, where) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{where} cannot be kept: expected numbers, texts, lists, arrays or tensors; got {type(value).__name__}"
    )
