"""Student's t against printed tables, closed forms and its density; intervals by hand."""

import math

import pytest
import torch

from llmtune.metrics.intervals import (
    mean_and_interval,
    paired_difference,
    student_t_probability,
    student_t_quantile,
)

# Percentage points of Student's t as printed in tables: two-sided confidence, degrees of freedom, t.
TABLE = [
    (0.90, 1, 6.314), (0.90, 2, 2.920), (0.90, 5, 2.015), (0.90, 10, 1.812), (0.90, 30, 1.697),
    (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 5, 2.571), (0.95, 6, 2.447),
    (0.95, 7, 2.365), (0.95, 8, 2.306), (0.95, 9, 2.262), (0.95, 10, 2.228), (0.95, 30, 2.042), (0.95, 120, 1.980),
    (0.99, 1, 63.657), (0.99, 2, 9.925), (0.99, 5, 4.032), (0.99, 10, 3.169), (0.99, 30, 2.750), (0.99, 120, 2.617),
]  # fmt: skip


@pytest.mark.parametrize(("confidence", "degrees", "t"), TABLE)
def test_quantiles_are_those_of_the_tables(confidence, degrees, t):
    assert student_t_quantile(confidence, degrees) == pytest.approx(t, abs=5.1e-4)


@pytest.mark.parametrize("confidence", [1e-6, 0.3, 0.95, 0.999999])
def test_quantiles_of_one_and_two_degrees_are_the_closed_forms(confidence):
    assert student_t_quantile(confidence, 1) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-9)
    two = confidence * math.sqrt(2 / (1 - confidence**2))
    assert student_t_quantile(confidence, 2) == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 12, 101])
def test_the_probability_is_the_integral_of_the_density(degrees):
    t, steps = 1.7, 2000
    x = torch.linspace(-t, t, steps + 1, dtype=torch.float64)
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    density = (scale - (degrees + 1) / 2 * torch.log1p(x * x / degrees)).exp()
    simpson = density * torch.tensor([1.0, *[4.0, 2.0] * (steps // 2 - 1), 4.0, 1.0], dtype=torch.float64)
    assert student_t_probability(t, degrees) == pytest.approx(float(simpson.sum() * 2 * t / steps / 3), rel=1e-9)


def test_many_degrees_are_the_normal_distribution():
    assert student_t_quantile(0.95, 100_001) == pytest.approx(1.95996, abs=1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 6, 11])
def test_the_quantile_inverts_the_probability(degrees):
    assert student_t_probability(student_t_quantile(0.83, degrees), degrees) == pytest.approx(0.83, abs=1e-13)


def test_an_interval_by_hand():
    mean, half = mean_and_interval([2.0, 4.0, 9.0])  # deviation sqrt(26 / 2)
    assert mean == 5.0
    assert half == pytest.approx(4.302653 * math.sqrt(13 / 3), rel=1e-6)
    assert mean_and_interval([2.0, 4.0, 9.0], 0.9).half == pytest.approx(2.919986 * math.sqrt(13 / 3), rel=1e-6)


def test_one_value_has_no_interval_and_equal_values_have_one_of_zero():
    mean, half = mean_and_interval([7])
    assert mean == 7.0
    assert math.isnan(half)
    assert mean_and_interval(torch.full((5,), 0.25)) == (0.25, 0.0)


def test_pairs_cancel_what_seeds_do_to_both():
    seeds = [0.0, 30.0, -20.0, 50.0]
    better = [seed + gain for seed, gain in zip(seeds, (1.0, 2.0, 1.0, 2.0), strict=True)]
    mean, half = paired_difference(better, seeds)
    assert mean == 1.5
    assert half == pytest.approx(3.182446 * math.sqrt(1 / 3) / 2, rel=1e-6)
    assert half < mean_and_interval(better).half / 50


def test_bad_input():
    with pytest.raises(ValueError, match="values must hold at least one number; there is none"):
        mean_and_interval([])
    with pytest.raises(ValueError, match="values must be finite; got"):
        mean_and_interval([1.0, math.nan])
    with pytest.raises(TypeError, match="values must be a list of numbers, one a run; got 3"):
        mean_and_interval(3)
    with pytest.raises(TypeError, match="others must be a list of numbers"):
        paired_difference([1.0], ["1"])
    with pytest.raises(ValueError, match="as many values as others, of the same seeds and orders; got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
    for confidence in (0, 1, 95, True):
        with pytest.raises(ValueError, match="confidence must be above 0 and below 1, such as"):
            mean_and_interval([1.0, 2.0], confidence)
    with pytest.raises(ValueError, match="degrees of freedom must be a whole number of at least 1; got 0"):
        student_t_quantile(0.95, 0)
    with pytest.raises(ValueError, match="t must be 0 or more; got -1"):
        student_t_probability(-1.0, 3)
