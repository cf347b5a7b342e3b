"""Whether a model is right as often as it is sure: calibration error, and the Brier score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.cross_entropy import labelled_rows

UNIT = 2**32


@dataclass
class CalibrationBins:
    """Counts and sums of predictions in equal-width bins of confidence; of no prediction is more kept.

    Bin m of M holds confidences in ((m - 1) / M, m / M], the first 0 as well. Sums are whole numbers (a confidence
    counts in units of 2^-32), so that batches, their order and processes change nothing, not even by rounding. The
    fields are JSON values: `CalibrationBins(**json.loads(json.dumps(dataclasses.asdict(bins))))` is the same again.

    Attributes:
        bins: M, at least 1.
        counts: predictions by bin.
        correct: those that were right.
        confidence: the sums of confidences, in units of 2^-32.

    Raises:
        ValueError: `bins` is out of range, or a list is not of that length.

    Example:
        >>> bins = CalibrationBins(5)
        >>> bins.add(torch.tensor([0.75, 0.75]), torch.tensor([True, False]))
        >>> bins.add(torch.tensor([0.75, 0.75]), torch.tensor([True, True]))
        >>> bins.error(), bins.accuracy()
        (0.0, 0.75)
    """

    bins: int = 15
    counts: list[int] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    confidence: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_bins(self.bins)
        for name in ("counts", "correct", "confidence"):
            value = list(getattr(self, name)) or [0] * self.bins
            if len(value) != self.bins:
                raise ValueError(f"{name} must have {self.bins} entries, one a bin; got {len(value)}")
            setattr(self, name, value)

    def add(self, confidences: Tensor, correct: Tensor) -> None:
        """Count predictions.

        Args:
            confidences: [n] floats in 0 ... 1, the probability of what was predicted.
            correct: [n] bools.

        Raises:
            ValueError: the shapes do not fit, or a confidence is outside 0 ... 1 or NaN.
            TypeError: the confidences are no floats, or `correct` no bools.
        """
        c = _checked_types(confidences, correct)
        edges = torch.arange(1, self.bins, dtype=c.dtype, device=c.device) / self.bins
        outside = (~((c >= 0) & (c <= 1))).sum()
        values = torch.stack([torch.ones_like(correct).long(), correct.long(), (c * UNIT).round().long()])
        sums = values.new_zeros(3, self.bins).index_add_(1, torch.bucketize(c, edges), values)
        *flat, wrong = torch.cat([sums.flatten(), outside[None]]).tolist()  # one wait for the device
        if wrong:
            raise ValueError(f"confidences must be probabilities, 0 to 1; {wrong} of {len(c)} are not")
        for place, mine in enumerate((self.counts, self.correct, self.confidence)):
            mine[:] = [a + b for a, b in zip(mine, flat[place * self.bins : (place + 1) * self.bins], strict=True)]

    def merge(self, others: Iterable[CalibrationBins]) -> None:
        """Add what others have counted: other batches, other processes.

        Raises:
            ValueError: one has another number of bins.
        """
        for other in others:
            if other.bins != self.bins:
                raise ValueError(f"bins can be merged with as many bins: {self.bins}; got {other.bins}")
            for name in ("counts", "correct", "confidence"):
                setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)])

    def error(self) -> float:
        """Return the expected calibration error; see `expected_calibration_error`.

        Raises:
            ValueError: nothing has been counted.
        """
        return sum(abs(gap) for gap in self._gaps()) / (UNIT * self._total())

    def maximum_error(self) -> float:
        """Return the largest abs(accuracy - confidence) of a bin (Guo et al. 2017, equation 5).

        Raises:
            ValueError: nothing has been counted.
        """
        self._total()
        return max(abs(gap) / (UNIT * n) for gap, n in zip(self._gaps(), self.counts, strict=True) if n)

    def accuracy(self) -> float:
        """Return the share of predictions that were right.

        Raises:
            ValueError: nothing has been counted.
        """
        return sum(self.correct) / self._total()

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of a reliability diagram, one a bin that is not empty: low, high, count, confidence,
        accuracy."""
        return [
            {"low": m / self.bins, "high": (m + 1) / self.bins, "count": n, "confidence": sure / (UNIT * n),
             "accuracy": right / n}
            for m, (n, right, sure) in enumerate(zip(self.counts, self.correct, self.confidence, strict=True)) if n
        ]  # fmt: skip

    def _gaps(self) -> list[int]:
        return [right * UNIT - sure for right, sure in zip(self.correct, self.confidence, strict=True)]

    def _total(self) -> int:
        if not sum(self.counts):
            raise ValueError("no prediction has been counted: add some first (labels of -100 are none)")
        return sum(self.counts)


def expected_calibration_error(
    confidences: Tensor, correct: Tensor, *, bins: int = 15, equal_mass: bool = False
) -> float:
    """Return by how much confidence and accuracy differ, the mean over predictions of their bin's difference.

    sum over bins m of (n_m / N) abs(accuracy_m - confidence_m)

    It is biased upwards where bins hold few predictions, and another for another number of bins: compare values of one
    number of bins and about one N. A model that names the most frequent class with its frequency has 0: look at
    the accuracy or the negative log-likelihood beside it.

    Where we differ: torchmetrics puts a confidence of exactly 1 into a bin of its own, beside the last; the authors'
    program leaves one of exactly 0 out (for two classes or more there is none).

    Args:
        confidences: [N] floats in 0 ... 1, the probability of what was predicted; see `top_predictions`.
        correct: [N] bools.
        bins: M, at least 1.
        equal_mass: bins of equally many predictions, to within one, in place of equal width. Equal confidences count
            as equally often right each, so that the order of rows changes nothing where a bin ends among them.

    Returns:
        0 to 1.

    Raises:
        ValueError: there is no prediction, or fewer than bins of equal mass; or a shape or number does not fit.
        TypeError: the confidences are no floats, or `correct` no bools.

    Example:
        >>> sure, right = torch.tensor([0.75, 0.75, 0.25]), torch.tensor([True, False, False])
        >>> round(expected_calibration_error(sure, right, bins=2), 4)
        0.25

    Guo et al., "On Calibration of Modern Neural Networks" (2017), equation 3; equal mass: Nguyen and O'Connor,
    "Posterior calibration and exploratory analysis for natural language processing models" (2015), section 4.
    """
    counted = CalibrationBins(bins)
    counted.add(confidences, correct)  # which checks them
    if not equal_mass:
        return counted.error()
    N = len(confidences)
    if bins > N:
        raise ValueError(f"{bins} bins of equal mass need as many predictions; got {N}")
    values, group, sizes = confidences.detach().cpu().double().unique(return_inverse=True, return_counts=True)
    right = torch.zeros_like(values).index_add_(0, group, correct.cpu().double()) / sizes
    gaps = (right - values).repeat_interleave(sizes)
    parts = [gaps[m * N // bins : (m + 1) * N // bins].sum() for m in range(bins)]
    return float(torch.stack(parts).abs().sum() / N)


def top_predictions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (confidences, correct) of the likeliest classes, for the functions and bins of this file.

    Args:
        logits: [..., C].
        targets: [...] integers, the true class, -100 where there is none.

    Returns:
        [n] probabilities in at least float32 and [n] bools, n being the number of targets that are not -100.

    Raises:
        ValueError: the shapes do not fit, or a target is out of range.
        TypeError: the targets are no integers.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).log()
        >>> top_predictions(logits, torch.tensor([0, 0, -100]))
        (tensor([0.7500, 1.0000]), tensor([True, True]))
    """
    z, t = _labelled(logits, targets, "logits")
    highest, named = at_least_float32(z).max(-1)
    return (highest - at_least_float32(z).logsumexp(-1)).exp(), named == t


def brier_score(probabilities: Tensor, targets: Tensor) -> float:
    """Return the mean over rows of sum over classes of (p_c - [c is the target])^2.

    A proper score: unlike the calibration error it is lowest, in expectation, at the true probabilities and nowhere
    else. For two classes it is twice the score of the one probability.

    Args:
        probabilities: [..., C] floats, each row summing to 1.
        targets: [...] integers, the true class, -100 where there is none.

    Returns:
        0 to 2.

    Raises:
        ValueError: the shapes do not fit, a row is no distribution, a target is out of range, or there is none.
        TypeError: the targets are no integers.

    Example:
        >>> brier_score(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        0.3125

    Brier, "Verification of forecasts expressed in terms of probability" (1950).
    """
    p, t = _labelled(probabilities, targets, "probabilities")
    if len(t) == 0:
        raise ValueError("the mean needs at least one target; there is none, or all are -100")
    p = p.detach().cpu().double()
    if not bool(((p >= 0).all(-1) & ((p.sum(-1) - 1).abs() < 1e-2)).all()):
        raise ValueError("each row of probabilities must be 0 or more and sum to 1; of logits take softmax first")
    named = p.gather(1, t.cpu().long()[:, None]).squeeze(1)
    return float((p.square().sum(-1) - 2 * named + 1).mean())


def _labelled(rows: Tensor, targets: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return the rows [n, C] that carry a target, and those targets [n]."""
    if rows.ndim < 1 or rows.shape[:-1] != targets.shape:
        raise ValueError(f"{what} [..., C] need one target a row; got {[*rows.shape]} and {[*targets.shape]}")
    rows, targets = rows.reshape(-1, rows.shape[-1]), targets.flatten()
    labelled = labelled_rows(targets, rows.shape[-1])
    return (rows, targets) if labelled is None else (rows[labelled], targets[labelled])


def _checked_types(confidences: Tensor, correct: Tensor) -> Tensor:
    if not confidences.is_floating_point():
        raise TypeError(f"confidences must be floats, probabilities; got {confidences.dtype}")
    if correct.dtype != torch.bool:
        raise TypeError(f"correct must be bools (predicted == target); got {correct.dtype}")
    if confidences.ndim != 1 or confidences.shape != correct.shape:
        raise ValueError(f"confidences and correct must both be [n]; got {[*confidences.shape]} and {[*correct.shape]}")
    return at_least_float32(confidences.detach())


def _check_bins(bins: Any) -> None:
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1; got {bins!r}")
