"""The R-matrix of continual learning: every task's score after every task, and the numbers that are made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from llmtune.metrics.intervals import Interval, mean_and_interval, paired_difference

SUMMARY = (
    "accuracy", "anytime_accuracy", "backward_transfer", "forgetting", "relative_forgetting", "forward_transfer",
    "intransigence", "plasticity",
)  # fmt: skip


@dataclass(frozen=True)
class ContinualMatrix:
    """Scores of T tasks that were learned one after the other: R[t][i] is task i's score after learning task t.

    Higher is better: give the negative of a loss. Every number is computed from what was given, in its unit; all tasks
    count alike. What lies above the diagonal, the score on a task that is still to come, may be missing.

    Where others differ: mammoth's `forgetting` takes the maximum over all rows, the last one included, so that it can
    never be negative, and writes zeros into the caller's lists where nothing was measured; avalanche's is first minus
    last, which is -backward transfer and no maximum.

    Attributes:
        scores: T rows of T numbers, rows in the order of learning; None or NaN where nothing was measured, above the
            diagonal only. A list, an array or a tensor [T, T].
        baseline: T scores before any training, for forward transfer; None or an empty list where there are none.
        joint: T scores, task k's after training on tasks 1 ... k together, for intransigence; None or an empty
            list where there are none.

    Raises:
        ValueError: the matrix is not square or has no row; a score on or below the diagonal is missing; a score is
            infinite; or `baseline` or `joint` is not of T numbers.
        TypeError: an argument is no list of numbers.

    Example:
        >>> R = ContinualMatrix([[0.9, 0.1, 0.1], [0.5, 0.8, 0.2], [0.6, 0.7, 0.9]], baseline=[0.1, 0.1, 0.1])
        >>> round(R.accuracy, 4), round(R.backward_transfer, 4), round(R.forward_transfer, 4), round(R.forgetting, 4)
        (0.7333, -0.2, 0.05, 0.2)

    Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017), section 2, for accuracy and both transfers; Chaudhry et
    al., "Riemannian Walk for Incremental Learning" (2018), section 3, for forgetting and intransigence.
    """

    scores: Sequence[Sequence[float | None]]
    baseline: Sequence[float] | None = None
    joint: Sequence[float] | None = None

    def __post_init__(self) -> None:
        rows = _listed(self.scores, "scores must be rows of numbers, one row a task")
        if not rows:
            raise ValueError("scores must have a row for each task; there is none")
        T = len(rows)
        for t, row in enumerate(rows):
            rows[t] = _listed(row, f"row {t} (from 0) of the scores must be a list of numbers")
            if len(rows[t]) != T:
                raise ValueError(f"scores must be square: {T} rows need {T} columns, and row {t} has {len(rows[t])}")
        scores = tuple(tuple(_score(value, t, i) for i, value in enumerate(row)) for t, row in enumerate(rows))
        object.__setattr__(self, "scores", scores)
        for name in ("baseline", "joint"):
            given = getattr(self, name)
            none = given is None or (isinstance(given, list | tuple) and not given)
            object.__setattr__(self, name, None if none else _one_a_task(given, name, T))

    @property
    def tasks(self) -> int:
        """T, how many tasks there are."""
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        """The mean score at the end: 1/T sum_i R[T][i]."""
        return self.accuracy_over_time[-1]

    @property
    def accuracy_over_time(self) -> tuple[float, ...]:
        """After each task t the mean score of the tasks so far: 1/t sum_{i <= t} R[t][i]."""
        return tuple(_mean([self._at(t, i) for i in range(t + 1)]) for t in range(self.tasks))

    @property
    def anytime_accuracy(self) -> float:
        """The mean of `accuracy_over_time`: 1/T sum_t 1/t sum_{i <= t} R[t][i]."""
        return _mean(self.accuracy_over_time)

    @property
    def plasticity(self) -> float:
        """The mean score of a task right after it was learned: 1/T sum_i R[i][i]."""
        return _mean([self._at(i, i) for i in range(self.tasks)])

    @property
    def backward_transfer(self) -> float:
        """What later tasks did to earlier ones: 1/(T-1) sum_{i < T} (R[T][i] - R[i][i]).

        Raises:
            ValueError: there is only one task.
        """
        return _mean([self._at(-1, i) - self._at(i, i) for i in self._earlier("backward transfer")])

    @property
    def forgetting(self) -> float:
        """How far scores have fallen from their best: 1/(T-1) sum_{i < T} (max_{t < T} R[t][i] - R[T][i]).

        The maximum is over the rows before the last; so it is negative where the last task improved the others. It
        looks at all scores that were measured, those before a task was learned as well: compare matrices in which the
        same were.

        Raises:
            ValueError: there is only one task.
        """
        return _mean([self._best(i) - self._at(-1, i) for i in self._earlier("forgetting")])

    @property
    def relative_forgetting(self) -> float:
        """Which share of the best score was lost: 1/(T-1) sum_{i < T} (best[i] - R[T][i]) / best[i].

        best[i] is the maximum over t < T of R[t][i], as in `forgetting`. Zhao et al., "SAPT" (2024), the measure F.Ra,
        there in per cent.

        Raises:
            ValueError: there is only one task; or a task's best score is not above 0, of which there is no share.
        """
        earlier = self._earlier("relative forgetting")
        for i in earlier:
            if not self._best(i) > 0:
                raise ValueError(
                    f"relative forgetting is a share of the best score, and that of task {i} (from 0) is "
                    f"{self._best(i)}: look at forgetting instead"
                )
        return _mean([(self._best(i) - self._at(-1, i)) / self._best(i) for i in earlier])

    @property
    def forward_transfer(self) -> float:
        """What earlier tasks did for later ones: 1/(T-1) sum_{i > 1} (R[i-1][i] - baseline[i]).

        Raises:
            ValueError: there is no baseline, only one task, or a score right before a task was not measured.
        """
        earlier = self._earlier("forward transfer")
        if self.baseline is None:
            raise ValueError("forward transfer compares with the scores before any training: give them as baseline")
        for i in earlier:
            if self.scores[i][i + 1] is None:
                raise ValueError(
                    f"forward transfer needs the score of task {i + 1} after task {i} (from 0), before it was learned: "
                    "measure it, or leave the baseline out"
                )
        return _mean([self._at(i, i + 1) - self.baseline[i + 1] for i in earlier])

    @property
    def intransigence(self) -> float:
        """How much worse a task was learned than in joint training: 1/T sum_k (joint[k] - R[k][k]).

        Raises:
            ValueError: there is no joint training to compare with.
        """
        if self.joint is None:
            raise ValueError("intransigence compares with joint training: give its scores as joint")
        return _mean([best - self._at(k, k) for k, best in enumerate(self.joint)])

    def summary(self) -> dict[str, float]:
        """Return every number there is, by name; what needs a baseline, joint training or more tasks is left out."""
        found = {}
        for name in SUMMARY:
            try:
                found[name] = getattr(self, name)
            except ValueError:
                continue
        return found

    def _at(self, t: int, i: int) -> float:
        value = self.scores[t][i]
        assert value is not None
        return value

    def _best(self, i: int) -> float:
        return max(row[i] for row in self.scores[:-1] if row[i] is not None)  # type: ignore[type-var,return-value]

    def _earlier(self, name: str) -> range:
        if self.tasks < 2:
            raise ValueError(f"{name} is about earlier tasks: it needs at least two tasks; there is one")
        return range(self.tasks - 1)


def continual_summary(
    matrices: Sequence[ContinualMatrix], *, against: Sequence[ContinualMatrix] | None = None, confidence: float = 0.95
) -> dict[str, Interval]:
    """Return the mean and confidence interval of each number over several runs: other seeds, other orders of tasks.

    Args:
        matrices: one a run.
        against: another method's, of the same seeds and orders one by one: the numbers are then the paired differences,
            matrices minus against.
        confidence: above 0 and below 1.

    Returns:
        (mean, half) by the names of `ContinualMatrix.summary`, those that all matrices have; half is NaN for one run.

    Raises:
        ValueError: there is no matrix; there are not as many against; or the confidence is out of range.
        TypeError: an argument is no list of matrices.

    Example:
        >>> runs = [ContinualMatrix([[0.8, None], [0.6, 0.9]]), ContinualMatrix([[0.8, None], [0.7, 0.9]])]
        >>> mean, half = continual_summary(runs)["forgetting"]
        >>> round(mean, 3), round(half, 3)
        (0.15, 0.635)
    """
    given = [matrices] if against is None else [matrices, against]
    for several in given:
        if not isinstance(several, Sequence) or not all(isinstance(one, ContinualMatrix) for one in several):
            raise TypeError(f"a list of ContinualMatrix, one a run, is expected; got {several!r}")
    if not matrices:
        raise ValueError("there is no matrix to summarize: give one a run")
    if len({len(several) for several in given}) > 1:
        raise ValueError(f"pairs need as many matrices against; got {len(matrices)} and {len(given[-1])}")
    runs = [[one.summary() for one in several] for several in given]
    names = [name for name in SUMMARY if all(name in run for several in runs for run in several)]
    columns = {name: [[run[name] for run in several] for several in runs] for name in names}
    return {
        name: mean_and_interval(c[0], confidence) if against is None else paired_difference(c[0], c[1], confidence)
        for name, c in columns.items()
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _listed(values: Any, expected: str) -> list[Any]:
    given = values.tolist() if hasattr(values, "tolist") else values  # of a tensor or an array
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{expected}; got {values!r}")
    return list(given)


def _score(value: Any, t: int, i: int) -> float | None:
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        if i <= t:
            raise ValueError(
                f"task {i} has no score after task {t} (from 0): every task must be measured after each task from its "
                "own on"
            )
        return None
    return _number(value, f"the score of task {i} after task {t} (from 0)")


def _one_a_task(values: Any, name: str, T: int) -> tuple[float, ...]:
    given = _listed(values, f"{name} must be a list with a score for each task")
    if len(given) != T:
        raise ValueError(f"{name} must have a score for each of the {T} tasks; got {len(given)}")
    return tuple(_number(value, f"{name}[{i}]") for i, value in enumerate(given))


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite; got {value}")
    return float(value)
