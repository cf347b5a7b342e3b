"""A run that no longer gets better ends, in order and for a reason that is said."""

import json
import math
from types import SimpleNamespace

import pytest

from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.early_stopping import EarlyStopping
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings


class Loop(SimpleNamespace):
    """What of a loop early stopping sees."""

    def __init__(self, **changed):
        settings = SimpleNamespace(eval_every=5)
        super().__init__(**({"step": 0, "total_steps": 1000, "eval_data": [1], "settings": settings} | changed))
        self.reasons = []

    def stop(self, reason):
        self.reasons.append(reason)


def go(stopping, values, loop=None):
    """Return after how many evaluations the run ended, None where it did not."""
    loop = loop or Loop()
    stopping.on_fit_start(loop)
    for number, value in enumerate(values, start=1):
        loop.step += 5
        stopping.on_eval_end(loop, {"eval_loss": value, "eval_f1": value})
        if loop.reasons:
            return number, loop.reasons
    return None


@pytest.mark.parametrize(
    ("changed", "values", "after"),
    [
        ({"patience": 1}, [3.0, 3.0, 1.0], 2),
        ({"patience": 3}, [3.0, 4.0, 5.0, 2.0, 2.0, 2.0, 2.0, 1.0], 7),
        ({"patience": 2}, [3.0, 4.0, 2.0, 4.0, 1.0, 4.0], None),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.75, 2.5, 1.0], 3),
        ({"patience": 2, "mode": "max", "metric": "eval_f1"}, [0.5, 0.75, 0.5, 0.25], 4),
        ({"patience": 2}, [3.0, math.nan, math.nan, 1.0], 3),
        ({"patience": 2}, [math.nan, math.nan], 2),
    ],
)
def test_when_it_ends(changed, values, after):
    found = go(EarlyStopping(**changed), values)
    assert (found and found[0]) == after


def test_the_reason_is_said():
    assert go(EarlyStopping(patience=2), [3.0, 2.25, 4.0, 4.0])[1] == [
        "eval_loss got no better than 2.25, of step 10, in 2 evaluations"
    ]
    assert go(EarlyStopping(patience=1), [math.nan])[1] == ["eval_loss was no finite number in 1 evaluations"]


def test_the_last_step_needs_no_stop():
    assert go(EarlyStopping(patience=1), [3.0, 4.0], Loop(total_steps=10)) is None


def test_a_resumed_run_goes_on_counting():
    whole, first, second = (EarlyStopping(patience=3) for _ in range(3))
    values = [3.0, 4.0, 4.0, 4.0, 1.0]
    assert go(whole, values)[0] == 4
    assert go(first, values[:3]) is None
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert go(second, values[3:], Loop(step=15))[0] == 1
    again, patient = EarlyStopping(patience=3), EarlyStopping(patience=4)
    for stopping in (again, patient):
        stopping.load_state_dict(second.state_dict())
    loop = Loop(step=20)
    again.on_fit_start(loop)
    assert len(loop.reasons) == 1, "a run that was stopped stays so"
    patient.on_fit_start(loop)
    assert len(loop.reasons) == 1, "with more patience it goes on"


def test_a_real_run_ends_early():
    class Stopping(TrainingLoop):
        def stop(self, reason):
            self.reason, self.total_steps = reason, self.step

    settings = LoopSettings(max_steps=50, rows_per_step=4, eval_every=2, learning_rate=3.0, progress=False)
    loop = Stopping(
        tiny_llama(), uneven_rows(), settings=settings, eval_data=uneven_rows(3), callbacks=[EarlyStopping(patience=2)]
    )
    losses = loop.fit().column("eval_loss")
    assert len(losses) - 1 - losses.index(min(losses)) == 2
    assert loop.step == 2 * len(losses) < 50


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patience": 0}, "patience must be a whole number of at least 1; got 0"),
        ({"patience": 1.5}, "patience must be a whole number of at least 1; got 1.5"),
        ({"mode": "up"}, 'mode must be "min" or "max"; got \'up\''),
    ],
)
def test_numbers_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**changed)


def test_a_run_that_is_not_evaluated_on_the_way_is_refused():
    with pytest.raises(ValueError, match="EarlyStopping goes by the evaluations, and there will be none"):
        EarlyStopping().on_fit_start(Loop(eval_data=None))
    with pytest.raises(ValueError, match="not only at the end: set eval_every"):
        EarlyStopping().on_fit_start(Loop(settings=SimpleNamespace(eval_every=None)))
