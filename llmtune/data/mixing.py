"""New rows and replayed rows in one data set, in a ratio that is exact over an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from llmtune.data.collate import IGNORED, collate_padded
from llmtune.data.replay import ReplayBuffer
from llmtune.data.teacher_fields import TEACHER_FIELDS, teacher_fields, without_prediction
from llmtune.types import Batch, LossFunction, Rows

Unit = Literal["targets", "tokens"] | Callable[[Mapping[str, Any]], int] | LossFunction


class MixedBatches:
    """All new rows and as many replayed rows as make up `ratio` of an epoch's targets.

    sum of targets in replayed rows  =  ratio / (1 - ratio) * sum of targets in new rows

    to within half the targets of one row, and to the target where some row fits the gap. The ratio is one of targets,
    not of rows: a loss is a mean over targets, so this is the share of the gradient that the old rows have. (One long
    document weighs as much as many short ones; where every row has one class, it is the ratio of rows.)

    It is rows by number: pass it as a loop's or a Trainer's training data. Which rows are in it is a function of the
    seed alone, and the order is the loop's, a function of (its seed, step): resuming costs and changes nothing.
    Every replayed row comes as often as every other, or once more; who comes once more is drawn by the seed, but for
    the last one, which is the one that fits best. Rows without targets are not replayed.

    Rows of both sides need the same fields, apart from a teacher's predictions (`with_teacher`): a row without any is
    given empty ones, so both kinds may stand in one batch.

    Args:
        new: rows by number; each is read once to count its targets.
        replay: a `ReplayBuffer`, of which the present rows are taken, or any rows.
        ratio: the replayed share of all targets, 0 (none) to less than 1.
        seed: of the draw.
        unit: what is counted in a row. The loss that is trained by: its `count_targets` of the row as a batch of one,
            which is exact for every loss that does not compare rows with each other. "targets": labels other than -100,
            without the first one of each document where there is one label a token, as a causal loss counts them; so
            where an encoder-decoder's row has as many labels as tokens, or the first label of a masked one is not -100,
            one target is missed. "tokens": the input ids. Or a function of a row.
        collate: makes the batch of one for a loss.

    Attributes:
        ratio: what was asked for.
        share: the replayed share in fact.
        replayed: the numbers of the replayed rows, as often as they come.

    Raises:
        ValueError: the ratio is out of range, or too small for a single row; there is nothing to replay, or nothing
            new; a side has no targets; or a row's fields are others than the first one's. Names the row.

    Example:
        >>> new = [{"input_ids": [5, 7, 11, 13, 17], "labels": [5, 7, 11, 13, 17]}] * 6
        >>> old = [{"input_ids": [3, 4, 3], "labels": [3, 4, 3]}]
        >>> mixed = MixedBatches(new, old, ratio=0.25)
        >>> len(mixed), mixed.share
        (10, 0.25)

    Where we differ: mammoth and avalanche draw a fixed number of old *rows* for each batch, whatever their lengths, and
    an epoch is as many steps as the new rows make; TRACE shuffles a share of old rows in.
    """

    def __init__(
        self, new: Rows, replay: Rows, ratio: float = 0.2, *, seed: int = 0, unit: Unit = "targets",
        collate: Callable[[list[Any]], Batch] = collate_padded,
    ) -> None:  # fmt: skip
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must be 0 or more and less than 1, the replayed share of all targets; got {ratio}")
        if isinstance(unit, type) or (not callable(unit) and unit not in COUNTS):
            raise ValueError(f'unit must be "targets", "tokens", a loss or a function of a row; got {unit!r}')
        for rows, what in ((new, "new rows"), (replay, "replayed rows")):
            if len(rows) == 0:
                raise ValueError(f"there are no {what} to mix: fill the buffer, or train on the other rows alone")
        self.new, self.ratio = new, ratio
        self.old = replay.rows() if isinstance(replay, ReplayBuffer) else replay
        counted = getattr(unit, "count_targets", None)
        count: Callable[[Mapping[str, Any]], int]
        if callable(counted):
            count = lambda row: int(counted(collate([row])))
        else:
            count = unit if callable(unit) else COUNTS[unit]  # type: ignore[assignment]
        counts_of: Any = "targets by the loss's count" if callable(counted) else unit
        counts, kept = self._look(count)
        fresh = sum(counts[: len(new)])
        if fresh == 0 or (ratio and sum(counts[len(new) :]) == 0):
            hint = " (a loss that does not shift counts otherwise: give unit=loss)" if unit == "targets" else ""
            raise ValueError(
                f"the {'replayed' if fresh else 'new'} rows have no {counts_of}, so there is no ratio to keep{hint}"
            )
        wanted = round(fresh * ratio / (1 - ratio))
        self.replayed = replayed_rows(counts[len(new) :], wanted, seed=seed)
        if ratio and not self.replayed:
            raise ValueError(
                f"ratio={ratio} of these rows is {wanted} {counts_of} to replay, less than half of any old row's: give "
                "a larger ratio, or more new rows"
            )
        old = sum(counts[len(new) + at] for at in self.replayed)
        self.share = old / (old + fresh)
        self._kept = kept  # one row's fields of a teacher, for those that have none

    def __len__(self) -> int:
        return len(self.new) + len(self.replayed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return row `index`: the new ones come first."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} rows; there is no row {index}")
        row = self.new[index] if index < len(self.new) else self.old[self.replayed[index - len(self.new)]]
        return without_prediction(row, self._kept)

    def _look(self, count: Callable[[Mapping[str, Any]], int]) -> tuple[list[int], dict[str, Any]]:
        """Return the counts of all rows, new ones first, and a row's fields of a teacher, if there are any."""
        counts: list[int] = []
        kept: dict[str, Any] = {}
        fields = set(self.new[0]) - set(TEACHER_FIELDS)
        for rows, what in ((self.new, "new"), (self.old, "replayed")):
            for index in range(len(rows)):
                row = rows[index]
                if other := sorted((set(row) - set(TEACHER_FIELDS)) ^ fields):
                    raise ValueError(
                        f'new and replayed rows need the same fields; "{other[0]}" is in only one of new row 0 and '
                        f"{what} row {index}"
                    )
                counts.append(count(row))
                if not isinstance(counts[-1], int) or counts[-1] < 0:
                    came = f"{counts[-1]!r} of {what} row {index}"
                    raise ValueError(f"unit must count a whole number, 0 or more, in each row; got {came}")
                kept = {**teacher_fields(row), **kept}
        return counts, kept


def replayed_rows(counts: Sequence[int], wanted: int, *, seed: int) -> list[int]:
    """Return the numbers of rows whose counts add up to `wanted`, as nearly as one last row allows.

    Whole passes over all rows first; then rows in a drawn order while they fit; then the one that fits the gap best,
    if that is better than none. The sum is off by at most half the largest count.

    Args:
        counts: of each row; those with 0 are left out.
        wanted: what they are to add up to.
        seed: of the order.
    """
    rows = [at for at, count in enumerate(counts) if count > 0]
    if not rows:
        return []
    passes, left = divmod(wanted, sum(counts[at] for at in rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rest = [rows[at] for at in order]
    chosen = rows * passes
    while rest and counts[rest[0]] <= left:
        left -= counts[rest[0]]
        chosen.append(rest.pop(0))
    best = min(rest, key=lambda at: abs(left - counts[at]), default=None)
    if best is not None and abs(left - counts[best]) < left:
        chosen.append(best)
    return chosen


def count_targets(row: Mapping[str, Any]) -> int:
    """Return how many labels are not -100, the first one of each document left out where there is one label a token."""
    if "labels" not in row:
        raise ValueError(f'a row needs "labels" for its targets to be counted; its fields are {sorted(row)}')
    labels = torch.as_tensor(row["labels"])
    if labels.is_floating_point():
        return 1  # to regress on, or several classes at once
    targets = labels.long() != IGNORED  # in a narrower type a class may look like -100
    if labels.ndim == 1 and "input_ids" in row and len(labels) == len(row["input_ids"]):
        starts = torch.as_tensor(row["position_ids"]) == 0 if "position_ids" in row else torch.arange(len(labels)) == 0
        targets = targets & ~starts
    return int(targets.sum())


def count_tokens(row: Mapping[str, Any]) -> int:
    """Return how many input ids the row has."""
    return len(row["input_ids"])


COUNTS: dict[str, Callable[[Mapping[str, Any]], int]] = {"targets": count_targets, "tokens": count_tokens}
