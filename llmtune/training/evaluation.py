"""Means over the evaluation rows, of which only sums and counts are kept, shared among the processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from llmtune.errors import NonFiniteError
from llmtune.modules import eval_mode
from llmtune.training.randomness import fetch_rows, fixed_randomness, seed_everything
from llmtune.types import Batch, Rows

if TYPE_CHECKING:
    from llmtune.training.loop import TrainingLoop

Totals = dict[str, list[float]]
"""Sum and count by name."""


def evaluation_means(loop: TrainingLoop) -> dict[str, float]:
    """Return the mean of everything that `loop.eval_step` sums, over all of `loop.eval_data`.

    Looking changes nothing: the model's modes and the random state are those of before. What is drawn at random is the
    same in every evaluation, so that one can be compared with the next. A signal that asks the run to stop is heard
    between two batches. What callbacks return from `around_evaluation` is entered for the length of it, and what they
    return from `during_evaluation` is added.

    Raises:
        ValueError: no row has a target, or a callback measures what is measured already.
        NonFiniteError: a mean is NaN or infinite.
    """
    assert loop.eval_data is not None
    totals: Totals = {}
    with ExitStack() as around, eval_mode(loop.model), fixed_randomness():
        for callback in loop.callbacks:
            around.enter_context(callback.around_evaluation(loop))
        for batch, counts in share_of(loop, loop.eval_data):
            sums, targets = loop.eval_step(batch)
            if counts:
                add_sums(totals, sums, targets)
        means = mean_by_name(loop.ranks.shares(totals))
        if not means:
            raise ValueError(
                "no row of eval_data has a target: every label is ignored (-100), or none has what the loss asks for"
            )
        _check_finite(loop, means)
        for callback in loop.callbacks:
            more = callback.during_evaluation(loop, dict(means))
            if twice := sorted(means.keys() & more.keys()):
                raise ValueError(
                    f'{type(callback).__name__} measures "{twice[0]}", which the evaluation reports already: rename '
                    "that part of the loss, or leave one of the two out"
                )
            means |= more
        _check_finite(loop, means)
    loop.ranks.settle(loop.model)
    return means


def share_of(loop: TrainingLoop, rows: Rows) -> Iterator[tuple[Batch, bool]]:
    """Yield this process's share of the rows as (batch, whether it counts), each from a random state of its own.

    A batch that does not count is there because the model is sharded: it must be run for the others' sake.
    """
    size, seed = loop.rows_per_micro_batch, loop.settings.seed
    for place, counts in loop.ranks.places(-(-len(rows) // size)):
        loop.leave_if_told()
        if counts or loop.ranks.sharded:
            seed_everything(seed, "evaluation", place)
            indices = range(place * size, min((place + 1) * size, len(rows)))
            yield loop.collate(fetch_rows(rows, indices, seed=seed, first=place * size)), counts


def mean_by_name(shares: Iterable[Totals]) -> dict[str, float]:
    """Return the sum of all shares' sums divided by that of their counts; a name whose counts are all 0 is left out."""
    together: Totals = {}
    for totals in shares:
        add_sums(together, {n: pair[0] for n, pair in totals.items()}, {n: pair[1] for n, pair in totals.items()})
    return {name: total / count for name, (total, count) in together.items() if count}


def add_sums(totals: Totals, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
    """Add sums and counts, by name, to the totals."""
    for name, value in sums.items():
        total = totals.setdefault(name, [0.0, 0.0])
        total[0] += float(value)
        total[1] += float(counts[name])


def _check_finite(loop: TrainingLoop, means: Mapping[str, float]) -> None:
    if not all(map(math.isfinite, means.values())):
        raise NonFiniteError(f"step {loop.step}: the evaluation gives {dict(means)}")
