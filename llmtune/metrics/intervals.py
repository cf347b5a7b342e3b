"""Means of a few runs with their confidence intervals, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """A mean and half of the width of its confidence interval; the half is NaN for a single value.

    Attributes:
        mean: the values' mean.
        half: the interval is mean - half ... mean + half.
    """

    mean: float
    half: float


def student_t_probability(t: float, degrees: int) -> float:
    """Return the probability that a variable of Student's t distribution lies within -t ... t.

    With x = arctan(t / sqrt(n)), for n degrees of freedom the finite sums

        n odd     2 / pi * (x + sin x (cos x + 2/3 cos^3 x + ... + (2 * 4 ... (n-3)) / (3 * 5 ... (n-2)) cos^(n-2) x))
        n even    sin x (1 + 1/2 cos^2 x + (1 * 3) / (2 * 4) cos^4 x + ... up to cos^(n-2) x)

    Args:
        t: 0 or more.
        degrees: n, at least 1.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> round(student_t_probability(12.7062, 1), 5)
        0.95

    Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.3 and 26.7.4.
    """
    if isinstance(degrees, bool) or not isinstance(degrees, int) or degrees < 1:
        raise ValueError(f"degrees of freedom must be a whole number of at least 1; got {degrees!r}")
    if not t >= 0:
        raise ValueError(f"t must be 0 or more; got {t}")
    return _within(math.atan(t / math.sqrt(degrees)), degrees)


def student_t_quantile(confidence: float, degrees: int) -> float:
    """Return the t for which Student's t lies within -t ... t with a given probability: the (1 + confidence) / 2 point.

    Found by halving the angle arctan(t / sqrt(n)), of which `student_t_probability` is an increasing function.

    Args:
        confidence: above 0 and below 1.
        degrees: n, at least 1.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [round(student_t_quantile(0.95, n), 3) for n in (1, 2, 5, 30)]
        [12.706, 4.303, 2.571, 2.042]
    """
    _check_confidence(confidence)
    student_t_probability(0.0, degrees)  # checks them
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.tan(high) * math.sqrt(degrees)


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of values, and half of the confidence interval of the mean by Student's t.

    half = t sqrt(sum (x - mean)^2 / (n - 1)) / sqrt(n),  t the (1 + confidence) / 2 point for n - 1 degrees of freedom

    It supposes values drawn independently from a normal distribution. Runs that share a task order share what that
    order does: over 3 seeds in each of 2 orders the interval is about these two orders, not about all. Methods that
    were run with the same seeds and orders are compared by `paired_difference`, from which that falls out.

    Args:
        values: one a run, finite.
        confidence: above 0 and below 1.

    Returns:
        (mean, half); half is NaN for a single value, of which no interval is known.

    Raises:
        ValueError: there is no value, one is not finite, or the confidence is out of range.
        TypeError: `values` are no numbers.

    Example:
        >>> mean, half = mean_and_interval([1.0, 2.0, 3.0])
        >>> mean, round(half, 3)
        (2.0, 2.484)

    Student, "The probable error of a mean" (1908).
    """
    _check_confidence(confidence)
    x = _numbers(values, "values")
    n, mean = len(x), math.fsum(x) / len(x)
    if n == 1:
        return Interval(mean, math.nan)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in x) / (n - 1))
    return Interval(mean, student_t_quantile(confidence, n - 1) * deviation / math.sqrt(n))


def paired_difference(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of values[i] - others[i] and half of its confidence interval.

    What a seed or an order of tasks does to both falls out of each difference, so the interval is mostly far narrower
    than those of the two means.

    Args:
        values: one a run, finite.
        others: those of the same seeds and orders, in the same order.
        confidence: above 0 and below 1.

    Raises:
        ValueError: as many of one as of the other are expected; or as `mean_and_interval`.
        TypeError: an argument is no list of numbers.

    Example:
        >>> mean, half = paired_difference([10.0, 20.0, 30.0], [9.0, 18.0, 29.0])
        >>> round(mean, 3), round(half, 3)
        (1.333, 1.434)
    """
    x, y = _numbers(values, "values"), _numbers(others, "others")
    if len(x) != len(y):
        raise ValueError(
            f"pairs need as many values as others, of the same seeds and orders; got {len(x)} and {len(y)}"
        )
    return mean_and_interval([a - b for a, b in zip(x, y, strict=True)], confidence)


def _within(angle: float, degrees: int) -> float:
    """Return the probability of -t ... t with t = sqrt(degrees) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for power in range(degrees % 2, degrees - 1, 2):  # term is that of cos^power
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total


def _numbers(values: Any, name: str) -> list[float]:
    given = values.tolist() if hasattr(values, "tolist") else values  # of a tensor or an array
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(_is_number(value) for value in given):
        raise TypeError(f"{name} must be a list of numbers, one a run; got {values!r}")
    if not given:
        raise ValueError(f"{name} must hold at least one number; there is none")
    if not all(math.isfinite(value) for value in given):
        raise ValueError(f"{name} must be finite; got {list(given)}")
    return [float(value) for value in given]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_confidence(confidence: float) -> None:
    if not _is_number(confidence) or not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1, such as 0.95; got {confidence!r}")
