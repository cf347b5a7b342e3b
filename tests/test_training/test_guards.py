"""What stops or passes over a bad step: numbers that are not finite, losses far above the recent ones."""

import math

import pytest
import torch

from llmtune.errors import LossSpikeError, NonFiniteError
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.training.guards import check_finite, check_spike, pass_over
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


def settings(**changed):
    base = {"max_steps": 5, "rows_per_step": 4, "rows_per_micro_batch": 2, "progress": False, "learning_rate": 1e-2}
    return LoopSettings(**(base | changed))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Spoiled(TrainingLoop):
    """Spoils loss, gradient or penalty of the steps in `bad`, by `value`."""

    where, value, bad = "loss", float("nan"), ()

    def compute_loss(self, model, batch):
        loss = super().compute_loss(model, batch)
        if self.step not in self.bad:
            return loss
        if self.where == "gradient":  # the loss itself stays as it is
            zero = model.lm_head.weight[0, 0] * 0
            zero.register_hook(lambda gradient: gradient * self.value)
            return loss + zero
        return loss * self.value if self.where == "loss" else loss

    def penalty(self):
        weight = self.model.lm_head.weight
        bad = self.where == "penalty" and self.step in self.bad
        return weight.sum() * (self.value if bad else 0.0)


def spoiled(where, bad, *, value=float("nan"), model=None, **changed):
    callbacks = changed.pop("callbacks", ())
    run = settings(**changed)
    loop = Spoiled(model or tiny_llama(), uneven_rows(11), settings=run, callbacks=callbacks)
    loop.where, loop.value, loop.bad = where, value, bad
    return loop


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("where", "precision"),
    [
        *[("loss", precision) for precision in ("float32", "bf16", "fp16")],
        *[("gradient", precision) for precision in ("float32", "bf16")],  # under fp16 an overflow: see below
        *[("penalty", precision) for precision in ("float32", "bf16", "fp16")],
    ],
)
def test_a_number_that_is_not_finite_is_named_and_no_weight_changed(where, value, precision):
    before = weights(tiny_llama())
    loop = spoiled(where, (0,), value=value, precision=precision)
    said = {"loss": rf"the loss is {value}", "penalty": rf"the penalty is {value}",
            "gradient": "the gradient is not finite, first in lm_head.weight"}[where]  # fmt: skip
    with pytest.raises(NonFiniteError, match=f"step 1: {said}; no weight has been changed"):
        loop.fit()
    assert equal(before, weights(loop.model))
    assert loop.step == 0


@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize("where", ["loss", "penalty"])
def test_a_skipped_step_changes_neither_weights_nor_optimizer_and_is_counted(where, precision):
    """Judged from outside: whatever the optimizer and the schedule hold is compared before and after."""
    seen = []

    def note(loop):
        state = loop.optimizer.state_dict()["state"]
        copies = {key: {name: value.clone() for name, value in entry.items()} for key, entry in state.items()}
        seen.append((weights(loop.model), copies, loop.scheduler.state_dict()["last_epoch"]))

    class Watch(Callback):
        def on_before_optimizer_step(self, loop):
            note(loop)

        def on_step_end(self, loop, metrics):
            note(loop)

    loop = spoiled(where, (2,), precision=precision, on_bad_step="skip", callbacks=[Watch()], weight_decay=0.1)
    if precision == "fp16":
        loop.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    history = loop.fit()
    assert [row.get("skipped", 0) for row in history] == [0, 0, 1, 0, 0]
    before, after = seen[4], seen[5]
    assert equal(before[0], after[0])
    assert before[2] == after[2] == 2
    assert before[1].keys() == after[1].keys() != set()
    for key, state in before[1].items():
        assert all(torch.equal(value, after[1][key][name]) for name, value in state.items())
    assert not equal(seen[2][0], seen[3][0])
    assert math.isnan(history[2]["loss" if where == "loss" else "penalty"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_ten_skipped_in_a_row_are_enough(where):
    loop = spoiled(where, range(3, 99), max_steps=30, on_bad_step="skip")
    with pytest.raises(NonFiniteError, match="step 14: the "):
        loop.fit()
    assert [row.get("skipped", 0) for row in loop.history] == [0] * 3 + [1] * 10
    nearly = spoiled(where, [step for step in range(23) if step % 11 != 10], max_steps=23, on_bad_step="skip")
    assert sum(row.get("skipped", 0) for row in nearly.fit()) == 21


@pytest.mark.parametrize("stop", [3, 4, 9])
def test_skipped_steps_are_resumed_exactly(tmp_path, stop):
    """Ten in a row with a stop among them: the resumed run knows how many there have been."""

    class Stop(Callback):
        def on_step_end(self, loop, metrics):
            if loop.step == stop + 1:
                raise KeyboardInterrupt

    def loop(folder, callbacks=()):
        changed = {"max_steps": 30, "on_bad_step": "skip", "save_every": 1, "folder": folder, "callbacks": callbacks}
        return spoiled("loss", range(3, 99), model=tiny_gpt2(dropout=0.2), **changed)

    ends = []
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "cut", [Stop()]).fit()
    for folder in ("whole", "cut"):
        resumed = loop(tmp_path / folder)
        with pytest.raises(NonFiniteError, match="step 14: the loss is nan"):
            resumed.fit(resume=True)
        ends.append((weights(resumed.model), resumed.history))
    assert equal(ends[0][0], ends[1][0])
    assert [row["step"] for row in ends[1][1]] == list(range(1, 14))
    assert all(math.isnan(row["loss"]) == (row["step"] > 3) for row in ends[1][1])


def test_under_fp16_an_overflow_lowers_the_scale_and_is_no_skipped_step():
    loop = spoiled("gradient", (1, 2), value=float("inf"), precision="fp16", on_bad_step="skip")
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    history = loop.fit()
    assert [row["overflow"] for row in history] == [0, 1, 1, 0, 0]
    assert "skipped" not in history.names()
    assert loop.scaler.get_scale() == 16.0


def test_under_fp16_the_penalty_is_judged_by_itself():
    """An overflow of the scaled loss may pass; a penalty's gradient is not scaled, and what it spoils is an error."""

    class Hooked(Spoiled):
        def penalty(self):
            zero = self.model.lm_head.weight[1, 1] * 0
            zero.register_hook(lambda gradient: gradient * float("inf"))
            return zero

    loop = Hooked(tiny_llama(), uneven_rows(), settings=settings(precision="fp16"))
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient is not finite, first in lm_head\.weight"):
        loop.fit()


def test_where_only_the_norm_overflows_it_says_so():
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0)
    metrics = {"loss": 1.0, "grad_norm": float("inf")}
    with pytest.raises(NonFiniteError, match="step 5: the gradient is not finite, in its norm alone"):
        check_finite(model, metrics, step=5, scale=1.0)
    check_finite(model, {"loss": 1.0, "grad_norm": 3.0}, step=5, scale=1.0)
    check_finite(model, metrics | {"overflow": 1.0}, step=5, scale=2.0)
    with pytest.raises(NonFiniteError):
        check_finite(model, metrics | {"overflow": 1.0}, step=5, scale=1.0)


def rows(*losses):
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]


def test_a_spike_is_measured_against_the_median():
    eight = rows(1.0, 5.0, 2.0, 7.0, 3.0, 4.0, 90.0, 6.0)  # the median of 1 ... 7 and 90 is 4.5
    check_spike(eight, 13.5, 3.0, step=9)
    with pytest.raises(
        LossSpikeError, match=r"step 9: the loss 13.51 is more than 3 times 4.5, the median of the 8 st"
    ):
        check_spike(eight, 13.51, 3.0, step=9)
    check_spike(eight, 1e9, None, step=9)
    check_spike(eight[:7], 1e9, 3.0, step=8)  # too few


def test_the_last_32_steps_are_looked_at():
    long = rows(*[100.0] * 50, *[1.0] * 17, *[3.0] * 15)  # of the last 32 the median is 1
    check_spike(long, 2.0, 2.0, step=83)
    with pytest.raises(LossSpikeError, match="2 times 1, the median of the 32 steps"):
        check_spike(long, 2.01, 2.0, step=83)


def test_skipped_rows_and_rows_without_a_loss_do_not_count():
    seven = rows(*[1.0] * 7)
    skipped = [{"step": step, "loss": float("nan"), "skipped": 1} for step in range(8, 20)]
    check_spike([*seven, *skipped, {"step": 20, "value": 1.0}], 1e9, 2.0, step=21)
    with pytest.raises(LossSpikeError, match="the median of the 8 steps"):
        check_spike([*seven, *skipped, *rows(1.0)], 2.5, 2.0, step=21)


def test_a_median_that_is_not_above_zero_is_not_judged():
    """More than twice as high says nothing of losses below 0: -1.5 would be a spike above -1."""
    check_spike(rows(*[-1.0] * 8), -1.5, 2.0, step=9)
    check_spike(rows(*[0.0] * 8), 1.0, 2.0, step=9)


class Jumping(TrainingLoop):
    """Has a loss of the given heights, whatever the model."""

    heights = ()

    def compute_loss(self, model, batch):
        loss = super().compute_loss(model, batch)
        return loss * (self.heights[self.step] / loss.detach())


def jumping(heights, **changed):
    loop = Jumping(tiny_llama(), uneven_rows(), settings=settings(max_steps=len(heights), **changed))
    loop.heights = heights
    return loop


def test_a_spike_stops_or_is_skipped():
    heights = [2.0] * 8 + [6.1, 5.9, 6.1, 2.0]
    loop = jumping(heights, spike_factor=3.0)
    with pytest.raises(
        LossSpikeError, match=r"step 9: the loss 6\.1 is more than 3 times 2, the median of the 8 steps"
    ):
        loop.fit()
    assert loop.step == 8
    history = jumping(heights, spike_factor=3.0, on_bad_step="skip").fit()
    assert [row["step"] for row in history if row.get("skipped")] == [9, 11]
    assert "skipped" not in jumping(heights).fit().names()


def test_a_resumed_run_judges_spikes_the_same(tmp_path):
    heights = [2.0] * 9 + [9.0, 2.0, 9.0, 2.0]

    def run(folder, resume=False):
        run = {"spike_factor": 3.0, "on_bad_step": "skip", "folder": folder, "save_every": 1}
        loop = jumping(heights, **run)
        if not resume:
            loop.compute_loss, first = None, loop.compute_loss

            def stop(model, batch):
                if loop.step == 9:
                    raise KeyboardInterrupt
                return first(model, batch)

            loop.compute_loss = stop
        return loop

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut").fit()
    resumed, whole = run(tmp_path / "cut", True), run(tmp_path / "whole", True)
    for loop in (resumed, whole):
        history = loop.fit(resume=True)
        assert [row["step"] for row in history if row.get("skipped")] == [10, 12]
    assert equal(weights(resumed.model), weights(whole.model))


def test_passing_over():
    error = NonFiniteError("it")
    bad, good = {"skipped": 1}, {}
    pass_over([], "skip", error)
    pass_over([bad] * 9, "skip", error)
    pass_over([bad] * 9 + [good], "skip", error)
    for history, what in (([], "raise"), ([good] + [bad] * 10, "skip")):
        with pytest.raises(NonFiniteError, match="it"):
            pass_over(history, what, error)
