"""Numbers of the R-matrix by hand, and what may be missing from it."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from llmtune.metrics import ContinualMatrix, continual_summary

R = [[0.9, 0.1, 0.1], [0.5, 0.8, 0.2], [0.6, 0.7, 0.9]]
LOWER = [[0.9, None, math.nan], [0.5, 0.8, None], [0.6, 0.7, 0.9]]


def test_the_matrix_everybody_can_compute_by_hand():
    matrix = ContinualMatrix(R, baseline=[0.3, 0.1, 0.05], joint=[0.9, 0.85, 0.95])
    assert matrix.accuracy == pytest.approx(2.2 / 3)
    assert matrix.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert matrix.forward_transfer == pytest.approx(((0.1 - 0.1) + (0.2 - 0.05)) / 2)
    assert matrix.forgetting == pytest.approx((0.3 + 0.1) / 2)
    assert matrix.relative_forgetting == pytest.approx((0.3 / 0.9 + 0.1 / 0.8) / 2)
    assert matrix.accuracy_over_time == pytest.approx((0.9, 0.65, 2.2 / 3))
    assert matrix.anytime_accuracy == pytest.approx((0.9 + 0.65 + 2.2 / 3) / 3)
    assert matrix.plasticity == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert matrix.intransigence == pytest.approx((0.0 + 0.05 + 0.05) / 3)
    assert list(matrix.summary()) == [
        "accuracy", "anytime_accuracy", "backward_transfer", "forgetting", "relative_forgetting", "forward_transfer",
        "intransigence", "plasticity",
    ]  # fmt: skip


def test_forgetting_takes_the_maximum_of_earlier_rows_only():
    improved = ContinualMatrix([[0.5, None], [0.9, 0.8]])
    assert improved.forgetting == pytest.approx(-0.4), "over all rows it would be 0"
    peak_between = ContinualMatrix([[0.5, None, None], [0.8, 0.6, None], [0.7, 0.6, 0.6]])
    assert peak_between.forgetting == pytest.approx((0.1 + 0.0) / 2), "first minus last would be -0.1"
    assert peak_between.backward_transfer == pytest.approx((0.2 + 0.0) / 2)


def test_forgetting_looks_at_what_was_measured_before_a_task_was_learned():
    rows = [[0.9, 0.95, 0.1], [0.9, 0.6, 0.1], [0.9, 0.5, 0.9]]
    assert ContinualMatrix(rows).forgetting == pytest.approx((0.0 + 0.45) / 2)
    rows[0][1] = None
    assert ContinualMatrix(rows).forgetting == pytest.approx((0.0 + 0.1) / 2)


def test_what_lies_above_the_diagonal_may_be_missing():
    matrix, whole = ContinualMatrix(LOWER), ContinualMatrix(R)
    for name in ("accuracy", "backward_transfer", "forgetting", "anytime_accuracy", "plasticity"):
        assert getattr(matrix, name) == getattr(whole, name)
    with pytest.raises(ValueError, match=r"needs the score of task 1 after task 0 \(from 0\), before it was learned"):
        _ = ContinualMatrix(LOWER, baseline=[0, 0, 0]).forward_transfer
    assert "forward_transfer" not in ContinualMatrix(LOWER, baseline=[0, 0, 0]).summary()
    assert ContinualMatrix(LOWER, baseline=[]).baseline is None  # as a sequence that scores seen tasks has it


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_lists_arrays_and_tensors_are_the_same(kind):
    double = torch.float64 if kind is torch.tensor else None
    given = kind(R, dtype=double) if double else kind(R)
    assert ContinualMatrix(given, baseline=[0.1] * 3).summary() == ContinualMatrix(R, baseline=[0.1] * 3).summary()


def test_it_goes_through_json_and_is_a_copy():
    rows = [list(row) for row in LOWER]
    matrix = ContinualMatrix(rows, joint=[1, 1, 1])
    rows[2][0] = 0.0
    assert matrix.scores[2][0] == 0.6
    again = ContinualMatrix(**json.loads(json.dumps(dataclasses.asdict(matrix), allow_nan=False)))
    assert again == matrix


def test_one_task_has_an_accuracy_and_no_past():
    matrix = ContinualMatrix([[0.75]])
    assert matrix.summary() == {"accuracy": 0.75, "anytime_accuracy": 0.75, "plasticity": 0.75}
    for name in ("backward_transfer", "forgetting", "relative_forgetting", "forward_transfer"):
        with pytest.raises(ValueError, match=f"{name.replace('_', ' ')} is about earlier tasks: .* at least two tasks"):
            getattr(matrix, name)


def test_summaries_of_several_runs():
    runs = [ContinualMatrix([[0.8, None], [0.8 - fall, 0.9]]) for fall in (0.1, 0.2, 0.6)]
    mean, half = continual_summary(runs)["forgetting"]
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.302653 * math.sqrt(0.14 / 2) / math.sqrt(3), rel=1e-6)
    assert math.isnan(continual_summary(runs[:1])["accuracy"].half)
    others = [ContinualMatrix([[0.8, None], [0.7 - fall, 0.9]]) for fall in (0.1, 0.2, 0.6)]
    mean, half = continual_summary(others, against=runs)["forgetting"]
    assert (mean, half) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))


def test_a_number_that_one_run_lacks_is_left_out():
    runs = [ContinualMatrix(R, baseline=[0.1] * 3), ContinualMatrix(R)]
    assert "forward_transfer" not in continual_summary(runs)
    assert "accuracy" in continual_summary(runs)


@pytest.mark.parametrize(
    ("scores", "options", "error", "sentence"),
    [
        ([], {}, ValueError, "scores must have a row for each task; there is none"),
        ([[1.0, 2.0]], {}, ValueError, "scores must be square: 1 rows need 1 columns, and row 0 has 2"),
        ([[1.0, None], [None, 1.0]], {}, ValueError, r"task 0 has no score after task 1 \(from 0\)"),
        ([[1.0, None], [1.0, math.nan]], {}, ValueError, r"task 1 has no score after task 1 \(from 0\)"),
        ([[math.inf]], {}, ValueError, r"the score of task 0 after task 0 \(from 0\) must be finite; got inf"),
        ([["high"]], {}, TypeError, r"the score of task 0 after task 0 \(from 0\) must be a number; got 'high'"),
        (5, {}, TypeError, "scores must be rows of numbers, one row a task; got 5"),
        ([5], {}, TypeError, r"row 0 \(from 0\) of the scores must be a list of numbers; got 5"),
        (R, {"baseline": [0.1]}, ValueError, "baseline must have a score for each of the 3 tasks; got 1"),
        (R, {"joint": [0.1, 0.2, None]}, TypeError, r"joint\[2\] must be a number; got None"),
        (R, {"joint": 0.5}, TypeError, "joint must be a list with a score for each task; got 0.5"),
    ],
)
def test_bad_matrices(scores, options, error, sentence):
    with pytest.raises(error, match=sentence):
        ContinualMatrix(scores, **options)


def test_bad_questions():
    matrix = ContinualMatrix(R)
    with pytest.raises(ValueError, match="compares with the scores before any training: give them as baseline"):
        _ = matrix.forward_transfer
    with pytest.raises(ValueError, match="compares with joint training: give its scores as joint"):
        _ = matrix.intransigence
    with pytest.raises(ValueError, match=r"that of task 0 \(from 0\) is 0.0: look at forgetting instead"):
        _ = ContinualMatrix([[0.0, None], [0.0, 0.5]]).relative_forgetting
    with pytest.raises(TypeError, match="a list of ContinualMatrix, one a run, is expected"):
        continual_summary(matrix)
    with pytest.raises(ValueError, match="there is no matrix to summarize"):
        continual_summary([])
    with pytest.raises(ValueError, match="pairs need as many matrices against; got 1 and 2"):
        continual_summary([matrix], against=[matrix, matrix])
