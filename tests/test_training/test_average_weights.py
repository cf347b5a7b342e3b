"""The average of a run's weights: what it is of, who sees it, and that a resumed run has the same."""

import pytest
import torch
from runs import Stop, equal, settings, weights

from llmtune.adapters import LoRA, attach
from llmtune.errors import CheckpointError
from llmtune.modules import unwrap
from llmtune.optim import EMA
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training import LISA, AverageWeights, KeepBest, TrainingLoop
from llmtune.types import Callback


class Remember(Callback):
    """Keeps the weights after each step, and those that each evaluation saw."""

    def __init__(self):
        self.steps, self.seen = [], []

    def on_step_end(self, loop, metrics):
        self.steps.append(weights(loop.model))

    def on_eval_end(self, loop, metrics):
        self.after = weights(loop.model)


class Loop(TrainingLoop):
    def eval_step(self, batch):
        self.evaluated_with = weights(self.model)
        return super().eval_step(batch)


def loop(*callbacks, model=None, **changed):
    options = {"max_steps": 7, "learning_rate": 0.01} | changed
    return Loop(model or tiny_llama(), uneven_rows(), settings=settings(**options), eval_data=uneven_rows(3),
                callbacks=callbacks)  # fmt: skip


def mean(rows, decay=None):
    parts = [(1.0 if decay is None else decay) ** age for age in reversed(range(len(rows)))]
    return {n: sum(w * row[n].double() for w, row in zip(parts, rows, strict=True)) / sum(parts) for n in rows[0]}


def close(actual, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("decay", "start", "every", "which"), [
    (None, 0, 1, slice(0, 7)), (None, 2, 2, slice(3, 7, 2)), (0.6, 0, 1, slice(0, 7)), (0.6, 3, 1, slice(3, 7)),
])  # fmt: skip
def test_the_run_ends_with_the_average_of_its_steps(decay, start, every, which):
    seen, average = Remember(), AverageWeights(decay, start=start, every=every)
    made = loop(seen, average)
    made.fit()
    close(weights(made.model), mean(seen.steps[which], decay))
    plain = loop(other := Remember())
    plain.fit()
    assert equal(seen.steps[-1], other.steps[-1])  # training itself goes on as without


def test_an_evaluation_is_of_the_average_and_the_trained_weights_come_back():
    seen = Remember()
    made = loop(AverageWeights(None, start=1), seen, eval_every=3)
    made.fit()
    close(made.evaluated_with, mean(seen.steps[1:]))
    assert equal(seen.after, seen.steps[-1])
    losses = [row["eval_loss"] for row in made.history if "eval_loss" in row]
    plain = loop(AverageWeights(None, start=1, evaluate=False), eval_every=3)
    plain.fit()
    others = [row["eval_loss"] for row in plain.history if "eval_loss" in row]
    assert len(losses) == len(others) == 3
    assert all(one != other for one, other in zip(losses, others, strict=True))
    before_the_first = loop(AverageWeights(None, start=4), eval_every=3)
    assert before_the_first.fit()[2]["eval_loss"] == others[0]


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("adapter", [False, True])
def test_resumed_at_a_step_is_uninterrupted_bit_for_bit(tmp_path, stop, adapter):
    def model():
        made = tiny_llama()
        if adapter:
            torch.manual_seed(0)
            attach(made, LoRA(rank=2, alpha=3))
        return made

    def run(*more, **changed):
        return loop(*more, AverageWeights(0.8, start=1), LISA(1, every=2), model=model(), eval_every=2, **changed)

    straight = run()
    straight.fit()
    with pytest.raises(KeyboardInterrupt):
        run(Stop(stop), folder=tmp_path, save_every=1).fit()
    resumed = run(folder=tmp_path, save_every=1)
    resumed.fit(resume=True)
    assert equal(weights(straight.model), weights(resumed.model))
    one, other = straight.callbacks[0].ema, resumed.callbacks[0].ema
    assert one.updates == other.updates == 6
    assert all(torch.equal(other.averages[name], value) for name, value in one.averages.items())
    assert straight.history.column("eval_loss") == resumed.history.column("eval_loss")
    again = run(folder=tmp_path, save_every=1)  # a run that is over ends in the same way
    again.fit(resume=True)
    assert equal(weights(straight.model), weights(again.model))


def test_an_evaluation_that_fails_leaves_the_trained_weights_for_the_checkpoint(tmp_path):
    class Told(Exception):
        pass

    class Failing(Loop):
        def eval_step(self, batch):
            raise Told

    seen = Remember()
    made = Failing(tiny_llama(), uneven_rows(), settings=settings(eval_every=2), eval_data=uneven_rows(3),
                   callbacks=[AverageWeights(None), seen])  # fmt: skip
    with pytest.raises(Told):
        made.fit()
    assert equal(weights(made.model), seen.steps[-1])


def test_a_step_that_was_passed_over_is_not_averaged():
    class Poison(Callback):
        def on_task_gradients(self, loop):
            if loop.step == 2:
                loop.model.lm_head.weight.grad.fill_(float("nan"))

    seen, average = Remember(), AverageWeights(None)
    made = loop(Poison(), seen, average, on_bad_step="skip")
    made.fit()
    assert average.ema.updates == 6
    close(weights(made.model), mean([row for step, row in enumerate(seen.steps) if step != 2]))


def test_a_bfloat16_model_is_averaged_in_float32():
    seen, average = Remember(), AverageWeights(0.9)
    made = loop(seen, average, model=tiny_llama().to(torch.bfloat16))
    made.fit()
    assert {value.dtype for value in average.ema.averages.values()} == {torch.float32}
    close(average.ema.averages, mean(seen.steps, 0.9))
    assert all(torch.equal(p, average.ema.averages[n].to(p.dtype)) for n, p in made.model.named_parameters())


def test_what_is_kept_apart_from_the_end():
    seen, average = Remember(), AverageWeights(None, final=False, evaluate=False)
    made = loop(seen, average, KeepBest(restore=True))  # which may put back what it evaluated
    made.fit()
    assert equal(weights(made.model), seen.steps[-1])
    with average.ema.averaged():
        close(weights(made.model), mean(seen.steps))


def test_a_second_run_begins_its_own_average():
    average = AverageWeights(None)
    loop(average).fit()
    model = tiny_llama(seed=1)
    seen = Remember()
    loop(average, seen, model=model).fit()
    close(weights(model), mean(seen.steps))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="start must be a whole number of at least 0; got -1"):
        AverageWeights(start=-1)
    with pytest.raises(ValueError, match="every must be a whole number of at least 1; got 0"):
        AverageWeights(every=0)
    with pytest.raises(ValueError, match="decay must be above 0 and below 1, or None for equal weights; got 1"):
        AverageWeights(1)
    with pytest.raises(ValueError, match="nothing would be averaged: the first average is due after step 8 and the ru"):
        loop(AverageWeights(start=7)).fit()
    for callbacks in ([KeepBest(), AverageWeights()], [AverageWeights(final=False), KeepBest()]):
        with pytest.raises(ValueError, match="KeepBest puts back the trained weights of the best evaluation, AverageW"):
            loop(*callbacks, eval_every=1).fit()
    loop(AverageWeights(0.9), folder=tmp_path, save_every=1).fit()
    with pytest.raises(CheckpointError, match=r"decay was 0.9 in the run and is None now"):
        loop(AverageWeights(None), folder=tmp_path, save_every=1).fit(resume=True)


def test_the_average_is_one_a_user_can_make_by_hand():
    made = loop(callback := AverageWeights(0.7))
    by_hand = EMA(unwrap(made.model), decay=0.7)

    class Update(Callback):
        def on_step_end(self, loop, metrics):
            by_hand.update()

    made.callbacks.append(Update())
    made.fit()
    assert all(torch.equal(callback.ema.averages[name], value) for name, value in by_hand.averages.items())
