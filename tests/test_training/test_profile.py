"""A profile of a few steps: which ones, what is written, and that it ends by itself."""

import json
from types import SimpleNamespace

import pytest
import torch

from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.profile import Profile
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


class Mark(Callback):
    """Marks each step in the trace, and looks whether a profiler runs in it, and whether there is one at all."""

    def __init__(self, profile=None):
        self.profile, self.profiled, self.there = profile, [], []

    def on_step_start(self, loop):
        self.profiled.append(torch.autograd.profiler._is_profiler_enabled)
        self.there.append(self.profile is not None and self.profile._profiler is not None)
        with torch.profiler.record_function(f"mark {loop.step + 1}"):
            pass


def fit(callbacks, steps):
    settings = LoopSettings(max_steps=steps, rows_per_step=2, progress=False)
    return TrainingLoop(tiny_llama(), uneven_rows(), settings=settings, callbacks=callbacks).fit()


def test_the_steps_asked_for_are_recorded(tmp_path, capsys):
    profile = Profile(tmp_path / "seen", wait=2, warmup=1, active=2)
    mark = Mark(profile)
    fit([mark, profile], 7)
    events = json.loads((tmp_path / "seen" / "trace.json").read_text())["traceEvents"]
    assert sorted({event["name"] for event in events if event["name"].startswith("mark ")}) == ["mark 4", "mark 5"]
    assert mark.profiled == [False, False, False, True, True, False, False], "waits, warms up, records, is gone"
    assert mark.there == [True, True, True, True, True, False, False], "ends by itself"
    text = (tmp_path / "seen" / "operators.txt").read_text()
    assert text.startswith("Operators by self time\n")
    assert "\nOperators by memory of their own\n" in text
    assert "aten::mm" in text
    said = capsys.readouterr().out
    assert "profiled 2 steps: " in said
    assert str(tmp_path / "seen" / "trace.json") in said


def test_a_run_that_breaks_leaves_what_was_recorded(tmp_path):
    class Break(Callback):
        def on_step_start(self, loop):
            if loop.step == 3:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit([Profile(tmp_path, wait=1, warmup=1, active=3, memory=False), Break()], 7)
    assert not torch.autograd.profiler._is_profiler_enabled
    assert (tmp_path / "trace.json").stat().st_size > 1000
    assert "memory" not in (tmp_path / "operators.txt").read_text().splitlines()[0]


def test_a_run_too_short_is_refused_before_any_step(tmp_path):
    with pytest.raises(ValueError, match=r"Profile needs 5 steps \(wait 1, warmup 1, active 3\); the run has 4: lower"):
        fit([Profile(tmp_path / "none")], 4)
    assert not (tmp_path / "none").exists()


def test_a_done_run_and_another_process_are_left_alone(tmp_path):
    for loop in (
        SimpleNamespace(step=7, total_steps=7),
        SimpleNamespace(step=0, total_steps=7, ranks=SimpleNamespace(main=False)),
    ):
        profile = Profile(tmp_path / "none")
        profile.on_fit_start(loop)
        profile.on_step_end(loop, {})
        profile.on_fit_end(loop)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("name", "value", "least"), [("wait", -1, 0), ("warmup", 0, 1), ("active", 1.5, 1)])
def test_counts_out_of_range(name, value, least, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least {least}; got {value}"):
        Profile(tmp_path, **{name: value})
