"""Calibration by hand: bins, edges, sums that merge to the bit."""

import dataclasses
import json
from fractions import Fraction

import pytest
import torch

from llmtune.metrics.calibration import CalibrationBins, brier_score, expected_calibration_error, top_predictions


def drawn(N=1009, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(N, generator=generator, dtype=torch.float64).to(dtype)
    return confidences, torch.rand(N, generator=generator) < 0.6


def in_fractions(confidences, correct, bins):
    """The formula in exact numbers, row by row, by the edges (m - 1) / M < c <= m / M."""
    sums = {}
    for c, right in zip(confidences.tolist(), correct.tolist(), strict=True):
        m = max(1, -((-Fraction(c) * bins) // 1))
        gap, n = sums.get(m, (Fraction(0), 0))
        sums[m] = gap + int(right) - Fraction(c), n + 1
    N = sum(n for _, n in sums.values())
    return float(sum(abs(gap) for gap, _ in sums.values()) / N), float(max(abs(gap) / n for gap, n in sums.values()))


@pytest.mark.parametrize("bins", [1, 2, 7, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_formula(bins, dtype):
    confidences, correct = drawn(dtype=dtype)
    counted = CalibrationBins(bins)
    counted.add(confidences, correct)
    wanted, largest = in_fractions(confidences, correct, bins)
    assert expected_calibration_error(confidences, correct, bins=bins) == pytest.approx(wanted, abs=2**-32)
    assert counted.error() == expected_calibration_error(confidences, correct, bins=bins)
    assert counted.maximum_error() == pytest.approx(largest, abs=2**-32)
    assert counted.accuracy() == correct.sum().item() / 1009


def test_right_as_often_as_sure_is_zero_and_always_wrong_is_the_confidence():
    sure = torch.tensor([0.75] * 4 + [0.25] * 8)
    right = torch.tensor([True, True, True, False] + [True] * 2 + [False] * 6)
    assert expected_calibration_error(sure, right) == 0
    assert expected_calibration_error(sure, right, equal_mass=True, bins=3) == 0
    assert expected_calibration_error(torch.ones(5), torch.zeros(5, dtype=torch.bool)) == 1
    assert expected_calibration_error(torch.full((5,), 0.5), torch.ones(5, dtype=torch.bool)) == 0.5


def test_an_edge_belongs_to_the_bin_below_and_0_and_1_to_the_outer_ones():
    for bins in range(1, 31):
        for dtype in (torch.float32, torch.float64):
            edges = torch.arange(bins + 1, dtype=dtype) / bins
            counted = CalibrationBins(bins)
            counted.add(edges, torch.ones(bins + 1, dtype=torch.bool))
            assert counted.counts == [2] + [1] * (bins - 1), (bins, dtype)


def test_a_confidence_of_1_is_in_the_last_bin():
    """0.95 right and 1.0 wrong share a bin: abs(1/2 - 0.975). In bins of their own it would be (0.05 + 1) / 2."""
    value = expected_calibration_error(torch.tensor([0.95, 1.0]), torch.tensor([True, False]), bins=10)
    assert value == pytest.approx(0.475)


def test_half_precision_counts_as_what_it_is():
    confidences, correct = drawn(dtype=torch.bfloat16)
    assert expected_calibration_error(confidences, correct) == expected_calibration_error(confidences.float(), correct)


def test_batches_processes_and_order_change_nothing_at_all():
    confidences, correct = drawn(dtype=torch.float64)
    whole = CalibrationBins(11)
    whole.add(confidences, correct)
    order = torch.randperm(1009, generator=torch.Generator().manual_seed(1))
    shares = []
    for part in order.split(97):
        share = CalibrationBins(11)
        for few in part.split(5):
            share.add(confidences[few], correct[few])
        shares.append(share)
    merged = CalibrationBins(11)
    merged.add(confidences[:0], correct[:0])
    merged.merge(shares)
    assert merged == whole
    assert merged.error() == whole.error()
    assert CalibrationBins(**json.loads(json.dumps(dataclasses.asdict(whole)))) == whole


def test_the_table_is_a_reliability_diagram():
    counted = CalibrationBins(4)
    counted.add(torch.tensor([0.625, 0.75, 1.0]), torch.tensor([True, False, True]))
    assert counted.table() == [
        {"low": 0.5, "high": 0.75, "count": 2, "confidence": 0.6875, "accuracy": 0.5},
        {"low": 0.75, "high": 1.0, "count": 1, "confidence": 1.0, "accuracy": 1.0},
    ]


def test_equal_mass_by_hand_and_in_any_order():
    """Five predictions in two bins: the first two, the last three."""
    sure = torch.tensor([0.9, 0.5, 0.75, 0.625, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, False, True, True])
    wanted = (abs(0 - 0.5 + 1 - 0.625) + abs(0 - 0.75 + 1 - 0.9 + 1 - 1.0)) / 5
    assert expected_calibration_error(sure, right, bins=2, equal_mass=True) == pytest.approx(wanted, rel=1e-12)
    tied, half = torch.full((6,), 0.75), torch.tensor([True, True, True, False, False, False])
    for order in ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0]):
        value = expected_calibration_error(tied, half[order], bins=3, equal_mass=True)
        assert value == pytest.approx(0.25, rel=1e-12), "equal confidences are equally often right"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_predictions_are_softmax_and_argmax_of_labelled_rows(dtype):
    z = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    t = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    t[0, 1] = t[2] = -100
    z[2] = float("nan")
    sure, right = top_predictions(z, t)
    kept = t != -100
    p = z[kept].double().softmax(-1)
    assert torch.allclose(sure.double(), p.max(-1).values, rtol=1e-6)
    assert torch.equal(right, p.argmax(-1) == t[kept])
    assert sure.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((top_predictions(1e4 * z[:2], t[:2])[0] <= 1).all())


def test_brier_score_by_hand_and_lowest_at_the_truth():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [9.0, 9.0, 9.0]])
    assert brier_score(p, torch.tensor([0, 2, -100])) == ((0.25 + 0.0625 + 0.0625) + 2) / 2
    truth = torch.tensor([0.6, 0.4], dtype=torch.float64)
    rows = torch.tensor([0, 0, 0, 1, 1])
    scores = {q: brier_score(torch.tensor([[q, 1 - q]] * 5, dtype=torch.float64), rows) for q in (0.5, 0.6, 0.7)}
    assert min(scores, key=scores.get) == truth[0].item()
    assert scores[0.6] == pytest.approx(2 * 0.6 * 0.4, rel=1e-12)


def test_what_does_not_fit_is_told():
    sure, right = torch.tensor([0.5, 1.5]), torch.tensor([True, False])
    with pytest.raises(ValueError, match="probabilities, 0 to 1; 1 of 2 are not"):
        expected_calibration_error(sure, right)
    with pytest.raises(ValueError, match="1 of 2 are not"):
        expected_calibration_error(torch.tensor([0.5, float("nan")]), right)
    with pytest.raises(ValueError, match=r"must both be \[n\]; got \[2\] and \[1\]"):
        expected_calibration_error(sure, right[:1])
    with pytest.raises(TypeError, match=r"must be bools .* got torch\.int64"):
        expected_calibration_error(sure, right.long())
    with pytest.raises(TypeError, match=r"confidences must be floats, probabilities; got torch\.int64"):
        expected_calibration_error(sure.long(), right)
    with pytest.raises(ValueError, match="no prediction has been counted"):
        expected_calibration_error(sure[:0], right[:0])
    with pytest.raises(ValueError, match="3 bins of equal mass need as many predictions; got 2"):
        expected_calibration_error(sure / 2, right, bins=3, equal_mass=True)
    for bins in (0, True, 2.0):
        with pytest.raises(ValueError, match="bins must be a whole number of at least 1"):
            CalibrationBins(bins)
    with pytest.raises(ValueError, match="counts must have 3 entries, one a bin; got 2"):
        CalibrationBins(3, counts=[1, 2])
    with pytest.raises(ValueError, match="with as many bins: 3; got 5"):
        CalibrationBins(3).merge([CalibrationBins(5)])
    with pytest.raises(ValueError, match=r"need one target a row; got \[2, 3\] and \[3\]"):
        top_predictions(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets must be in 0 ... 2 or ignore_index=-100; target 0 is 3"):
        top_predictions(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match="of logits take softmax first"):
        brier_score(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="at least one target"):
        brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([-100]))
