"""A function that logs: when it is called, with what, and that it cannot cost the run."""

from types import SimpleNamespace

import pytest
import torch

from llmtune.errors import LlmtuneWarning
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.log_to import LogTo
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


def run(callbacks, **changed):
    settings = LoopSettings(**({"max_steps": 7, "rows_per_step": 3, "progress": False, "log_every": 3} | changed))
    return TrainingLoop(
        tiny_llama(), uneven_rows(), settings=settings, callbacks=callbacks,
        eval_data=uneven_rows(5) if settings.eval_every else None,
    )  # fmt: skip


def test_when_and_with_what():
    calls = []
    loop = run([LogTo(lambda values, step: calls.append((step, values)))], eval_every=2)
    history = loop.fit()
    trained = [(step, values) for step, values in calls if "loss" in values]
    evaluated = [(step, values) for step, values in calls if "eval_loss" in values]
    assert [step for step, _ in calls] == [2, 3, 4, 6, 6, 7, 7]
    assert [step for step, _ in trained] == [3, 6, 7]
    assert evaluated == [(row["step"], {"eval_loss": row["eval_loss"]}) for row in history if "eval_loss" in row]
    for (_, values), rows in zip(trained, (history[:3], history[3:6], history[6:]), strict=True):
        targets = sum(row["targets"] for row in rows)
        assert values["loss"] == pytest.approx(sum(row["loss"] * row["targets"] for row in rows) / targets)
        assert values["grad_norm"] == pytest.approx(sum(row["grad_norm"] for row in rows) / len(rows))
        assert values["learning_rate"] == rows[-1]["learning_rate"]
        speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
        assert values["tokens_per_second"] == pytest.approx(speed)
        assert all(type(value) is float for value in values.values())


def test_every_of_its_own():
    steps = []
    run([LogTo(lambda values, step: steps.append(step), every=5)]).fit()
    assert steps == [5, 7]


def test_a_logger_that_is_down_does_not_cost_the_run():
    def down(values, step):
        raise ConnectionError("no route")

    log, plain = LogTo(down, every=2), run([])
    plain.fit()
    loop = run([log])
    with pytest.warns(LlmtuneWarning) as seen:
        loop.fit()
    assert len(seen) == 1
    assert "logging at step 2 failed and training goes on" in str(seen[0].message)
    assert "ConnectionError: no route" in str(seen[0].message)
    assert log.failures == 4
    for one, other in zip(plain.model.parameters(), loop.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_interrupt_is_no_failure_of_the_logger():
    def interrupted(values, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LogTo(interrupted, every=1).on_step_end(
            SimpleNamespace(step=1, total_steps=9, ranks=SimpleNamespace(main=True)), {"loss": 1.0}
        )


def test_what_is_left_is_handed_on_when_the_run_ends_otherwise():
    class Break(Callback):
        def on_step_end(self, loop, metrics):
            if loop.step == 5:
                raise RuntimeError("broken")

    calls = []
    with pytest.raises(RuntimeError, match="broken"):
        run([LogTo(lambda values, step: calls.append((step, values["loss"]))), Break()]).fit()
    assert [step for step, _ in calls] == [3, 5]

    class Early(Callback):
        def on_step_end(self, loop, metrics):
            loop.total_steps = 4 if loop.step == 4 else loop.total_steps

    calls.clear()
    run([LogTo(lambda values, step: calls.append((step, values["loss"]))), Early()]).fit()
    assert [step for step, _ in calls] == [3, 4]


def test_only_the_main_process_calls():
    calls, log = [], LogTo(lambda values, step: calls.append(step), every=1)
    for main in (False, True):
        loop = SimpleNamespace(step=1 + main, total_steps=9, ranks=SimpleNamespace(main=main))
        log.on_step_end(loop, {"loss": 1.0})
    assert calls == [2]


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"LogTo takes a function of \(values, step\); got 'tensorboard'"):
        LogTo("tensorboard")
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="every must be a whole number of at least 1, or None; got"):
            LogTo(print, every=wrong)
