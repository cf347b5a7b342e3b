"""What counts as better, and the best evaluation of a run."""

import json
import math

import pytest
import torch

from llmtune.errors import CheckpointError
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.best import Best, KeepBest
from llmtune.training.checkpoint_folder import list_checkpoints
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "better"),
    [
        ("min", 0.0, [3.0, 3.0, 2.0, 5.0, 1.0], [1, 0, 1, 0, 1]),
        ("max", 0.0, [3.0, 3.0, 2.0, 5.0, 1.0], [1, 0, 0, 1, 0]),
        ("min", 0.5, [3.0, 2.75, 2.5, 2.25, 1.75], [1, 0, 0, 1, 0]),  # a gain must be more than min_delta
        ("max", 0.5, [3.0, 3.25, 3.5, 3.75], [1, 0, 0, 1]),
        ("min", 0.0, [NAN, -INF, INF, 3.0, NAN, -INF, 2.0], [0, 0, 0, 1, 0, 0, 1]),
        ("max", 0.0, [NAN, INF, 3.0, NAN, INF, 4.0], [0, 0, 1, 0, 0, 1]),
    ],
)
def test_what_is_better(mode, min_delta, values, better):
    best = Best("eval_loss", mode=mode, min_delta=min_delta)
    assert [best.update({"eval_loss": value}, 7 * i) for i, value in enumerate(values)] == [bool(b) for b in better]
    last = max(i for i, b in enumerate(better) if b)
    assert (best.step, best.value) == (7 * last, values[last])


def test_the_same_step_asked_twice_says_the_same():
    best = Best("eval_loss")
    assert best.update({"eval_loss": 2.0}, 5)
    assert best.update({"eval_loss": 2.0}, 5)
    assert not best.update({"eval_loss": 2.0}, 10)


def test_a_missing_metric_is_named():
    with pytest.raises(
        ValueError, match=r"reports no 'eval_los'; it reports eval_loss, eval_f1. Did you mean \"eval_l"
    ):
        Best("eval_los").update({"step": 3, "loss": 1.0, "eval_loss": 2.0, "eval_f1": 0.5}, 3)
    with pytest.raises(ValueError, match="it reports nothing"):
        Best("eval_loss").update({}, 3)


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match='mode must be "min" or "max"; got \'less\''):
        KeepBest(mode="less")
    for wrong in (-0.1, NAN):
        with pytest.raises(ValueError, match="min_delta must be a number of at least 0; got"):
            Best("eval_loss", min_delta=wrong)


def test_state_goes_round_and_another_metric_is_refused():
    best = KeepBest()
    best.improved({"step": 11, "eval_loss": 2.5})
    state = json.loads(json.dumps(best.state_dict()))
    other = KeepBest()
    other.load_state_dict(state)
    assert (other.best_step, other.best_value) == (11, 2.5)
    assert not other.improved({"step": 13, "eval_loss": 2.75})
    with pytest.raises(CheckpointError, match="metric was 'eval_loss' in the run and is 'eval_f1' now"):
        KeepBest("eval_f1").load_state_dict(state)
    with pytest.raises(CheckpointError, match="mode was 'min' in the run and is 'max' now"):
        KeepBest(mode="max").load_state_dict(state)


def test_a_run_remembers_its_best_evaluation(tmp_path):
    def loop(steps):
        settings = LoopSettings(
            max_steps=7, rows_per_step=4, eval_every=1, save_every=1, learning_rate=0.3, folder=tmp_path, progress=False
        )
        made = TrainingLoop(
            tiny_llama(), uneven_rows(), settings=settings, eval_data=uneven_rows(3), callbacks=[KeepBest()]
        )
        made.total_steps = steps
        return made

    loop(4).fit()
    whole = loop(7)
    losses = whole.fit(resume=True).column("eval_loss")
    keep = whole.callbacks[0]
    assert len(losses) == 7
    assert keep.best_value == min(losses)
    assert keep.best_step == 1 + losses.index(min(losses))


class Scripted(TrainingLoop):
    """A run whose evaluations give what a list says, and which remembers its weights at each."""

    script = (3.0, 1.0, 2.0, 4.0, 1.5, 5.0)

    def evaluate(self):
        self.seen = {**getattr(self, "seen", {}), self.step: self.model.lm_head.weight.detach().clone()}
        return {"eval_loss": self.script[self.step - 1]}


def scripted(folder, *, keep=None, **changed):
    settings = LoopSettings(
        **{"max_steps": 6, "rows_per_step": 4, "eval_every": 1, "learning_rate": 0.05, "folder": folder, "keep": 1,
           "progress": False} | changed
    )  # fmt: skip
    keep = keep or KeepBest()
    return Scripted(tiny_llama(), uneven_rows(), settings=settings, eval_data=uneven_rows(3), callbacks=[keep])


@pytest.mark.parametrize(
    "changed", [{"folder": None}, {}, {"save_every": 1}, {"save_every": 2, "background_save": True}]
)
def test_the_best_weights_are_put_back(tmp_path, changed):
    loop = scripted(**{"folder": tmp_path} | changed)
    loop.fit()
    assert loop.callbacks[0].best_step == 2
    assert torch.equal(loop.model.lm_head.weight, loop.seen[2])
    assert not torch.equal(loop.seen[2], loop.seen[6])


def test_the_best_checkpoint_is_never_rotated_away(tmp_path):
    scripted(tmp_path, save_every=1).fit()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000006"]


def test_of_two_best_checkpoints_each_stays(tmp_path):
    class Two(TrainingLoop):
        def evaluate(self):
            at = self.step - 1
            return {"eval_a": (1.0, 2.0, 3.0, 4.0, 5.0)[at], "eval_b": (5.0, 4.0, 3.0, 7.0, 8.0)[at]}

    settings = LoopSettings(
        max_steps=5, rows_per_step=4, eval_every=1, save_every=1, folder=tmp_path, keep=1, progress=False
    )
    first, second = KeepBest("eval_a", restore=False), KeepBest("eval_b")
    Two(tiny_llama(), uneven_rows(), settings=settings, eval_data=uneven_rows(3), callbacks=[first, second]).fit()
    assert (first.best_step, second.best_step) == (1, 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000003", "step-00000005"]


def test_the_last_weights_stay_where_nothing_is_to_be_put_back(tmp_path):
    loop = scripted(tmp_path, keep=KeepBest(restore=False))
    loop.fit()
    assert torch.equal(loop.model.lm_head.weight, loop.seen[6])


def test_a_resumed_run_knows_its_best_checkpoint(tmp_path):
    first = scripted(tmp_path, save_every=1)
    first.callbacks.append(StopsAt(4))
    first.fit()
    resumed = scripted(tmp_path, save_every=1)
    resumed.fit(resume=True)
    assert resumed.step == 4, "a run that was ended stays ended"
    assert torch.equal(resumed.model.lm_head.weight, first.seen[2])


class StopsAt(Callback):
    def __init__(self, step):
        self.at = step

    def on_step_end(self, loop, metrics):
        if loop.step == self.at:
            loop.stop("enough")


def test_a_run_without_evaluations_is_refused():
    settings = LoopSettings(max_steps=3, progress=False)
    with pytest.raises(ValueError, match="KeepBest goes by the evaluations, and there will be none"):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings, callbacks=[KeepBest()]).fit()


def test_a_refusal_of_one_leaves_the_others_as_they_were(tmp_path):
    class Counting(Callback):
        def __init__(self):
            self.calls = 0

        def on_step_end(self, loop, metrics):
            self.calls += 1

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    first = scripted(tmp_path)
    first.callbacks.insert(0, Counting())
    first.fit()
    other = scripted(tmp_path, keep=KeepBest(mode="max"))
    other.callbacks.insert(0, Counting())
    with pytest.raises(CheckpointError, match="mode was 'min' in the run and is 'max' now"):
        other.fit(resume=True)
    assert other.callbacks[0].calls == 0
