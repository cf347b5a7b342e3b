"""A sequence of tasks that is killed anywhere and resumed ends bit for bit as the one that is left alone."""

import os
from functools import partial

import pytest
from sequences import make_run

from llmtune.testing.kill import _Run, check_killed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork a process")

STAGES = [
    ("before", 0), ("start", 0), ("step", 0, 1), ("saved", 0, 2), ("saved", 0, 3), ("end", 0), ("after", 0),
    ("score", 1, "french"), ("before", 1), ("step", 1, 2), ("after", 1), ("score", 2, "maths"), ("start", 2),
    ("saved", 2, 3), ("after", 2), ("score", 3, "law"),
]  # fmt: skip


def lived(make, folder):
    run = _Run(make, folder)
    run.until_killed("", 0.0)
    return run


def ends_as_alone(tmp_path, kind, stages):
    make_run(None, kind=kind).fit()  # what is imported on first use is there when runs are forked
    alone = lived(partial(make_run, kind=kind), tmp_path / "alone").result()
    assert "outcome" in alone, alone
    for number, stage in enumerate(stages):
        folder = tmp_path / f"killed-{number}"
        assert lived(partial(make_run, kind=kind, death=stage), folder).killed, stage
        again = lived(partial(make_run, kind=kind), folder).result()
        assert again.get("outcome") == alone["outcome"], (stage, again.get("trace"))


def test_a_kill_inside_a_later_task_changes_nothing(tmp_path):
    ends_as_alone(tmp_path, "full", [("step", 1, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "stack", "alone", "merge", "slao", "many", "rows", "designed"])
def test_a_kill_at_any_stage_changes_nothing(tmp_path, kind):
    ends_as_alone(tmp_path, kind, STAGES)


@pytest.mark.slow
def test_a_kill_changes_nothing_where_later_tasks_are_not_trained(tmp_path):
    stages = [("step", 0, 2), ("after", 0), ("before", 1), ("after", 1), ("score", 2, "maths"), ("after", 2)]
    ends_as_alone(tmp_path, "statistics", stages)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "stack"])
def test_kills_at_random_moments_and_inside_saves_change_nothing(kind):
    report = check_killed(partial(make_run, kind=kind), kills=24, seed=11)
    print(report)
    assert report.kills == 24
    assert report.runs >= 2
