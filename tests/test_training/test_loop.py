"""The training loop: its errors, its switches, and that a subclass may override any part."""

import csv
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from runs import equal, settings, weights
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError, NonFiniteError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.packed import document_leak
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.types import Callback


def test_a_run_records_every_step_and_learns(tmp_path):
    model = tiny_llama()
    run = settings(max_steps=20, learning_rate=1e-2, folder=tmp_path, clip_norm=None)
    loop = TrainingLoop(model, uneven_rows(), settings=run, eval_data=uneven_rows())
    before = loop.evaluate()["eval_loss"]
    history = loop.fit()
    assert [row["step"] for row in history] == list(range(1, 21))
    assert history[-1]["eval_loss"] < before - 1
    assert {"loss", "targets", "grad_norm", "learning_rate", "tokens", "seconds"} <= history[0].keys()
    assert history[0]["learning_rate"] == pytest.approx(1e-2)
    assert history[10]["learning_rate"] == pytest.approx(1e-2 * 10 / 20)
    with (tmp_path / "history.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20


def test_epochs_see_every_row_exactly_that_often():
    rows, seen = uneven_rows(7), []

    class Watching(TrainingLoop):
        def row_indices(self, step):
            seen.append(super().row_indices(step))
            return seen[-1]

    loop = Watching(tiny_llama(), rows, settings=settings(max_steps=None, epochs=3, rows_per_step=4))
    assert loop.total_steps == 6
    for step in range(6):
        loop.micro_batches(step)
    flat = [index for step in seen for index in step]
    assert sorted(flat) == sorted(list(range(7)) * 3)
    assert len(seen[-1]) == 1


def test_evaluation_is_the_mean_over_targets_and_keeps_modes():
    model = tiny_llama()
    model.train()
    rows = uneven_rows(5)
    loop = TrainingLoop(model, rows, settings=settings(rows_per_micro_batch=2), eval_data=rows)
    nll, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits.double()
        kept = labels[0, 1:] != -100
        nll -= logits[0, :-1].log_softmax(-1).gather(1, labels[0, 1:, None].clamp(min=0))[kept].sum().item()
        count += int(kept.sum())
    assert loop.evaluate()["eval_loss"] == pytest.approx(nll / count, rel=1e-6)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("where", ["loss", "gradient", "penalty"])
def test_a_number_that_is_not_finite_stops_before_the_step(where):
    class Bad(TrainingLoop):
        def compute_loss(self, model, batch):
            loss = super().compute_loss(model, batch)
            return loss * float("nan") if where == "loss" and self.step == 1 else loss

    class Spoil(Callback):
        def on_before_optimizer_step(self, loop):
            if where == "gradient" and loop.step == 1:
                loop.model.lm_head.weight.grad[3, 5] = float("inf")

    model = tiny_llama()
    penalty = lambda m: m.lm_head.weight.sum() * (float("nan") if where == "penalty" and loop.step == 1 else 0.0)
    loop = Bad(model, uneven_rows(), settings=settings(), penalties=[penalty], callbacks=[Spoil()])
    kept = []
    loop.callbacks.append(
        type("Keep", (Callback,), {"on_step_end": lambda self, loop, m: kept.append(weights(model))})()
    )
    message = {"loss": "step 2: the loss is nan", "gradient": "step 2: the gradient is not finite, first in lm_head.w",
               "penalty": "step 2: the penalty is nan"}[where]  # fmt: skip
    with pytest.raises(NonFiniteError, match=message):
        loop.fit()
    assert len(kept) == 1
    assert equal(kept[0], weights(model))
    assert len(loop.history) == 1


def test_the_penalty_is_added_once_a_step_however_many_micro_batches():
    calls = []

    def penalty(model):
        calls.append(1)
        return 0.5 * (model.lm_head.weight**2).sum()

    gradients = []
    for size in (8, 1):
        for penalties in ([], [penalty]):
            loop = TrainingLoop(
                tiny_llama(),
                uneven_rows(),
                settings=settings(rows_per_step=8, rows_per_micro_batch=size),
                penalties=penalties,
            )
            loop.accumulate_gradients(loop.micro_batches(0))
            gradients.append(loop.model.lm_head.weight.grad)
    assert len(calls) == 2
    for with_penalty, without in ((gradients[1], gradients[0]), (gradients[3], gradients[2])):
        torch.testing.assert_close(with_penalty - without, loop.model.lm_head.weight.data, rtol=1e-5, atol=1e-6)


def test_task_gradients_are_seen_before_the_penalty():
    seen = {}

    class Watch(Callback):
        def on_task_gradients(self, loop):
            seen["task"] = loop.model.lm_head.weight.grad.clone()

        def on_before_optimizer_step(self, loop):
            seen["all"] = loop.model.lm_head.weight.grad.clone()

    loop = TrainingLoop(
        tiny_llama(), uneven_rows(), settings=settings(max_steps=1), penalties=[lambda m: 7 * m.lm_head.weight.sum()],
        callbacks=[Watch()],
    )  # fmt: skip
    loop.fit()
    torch.testing.assert_close(seen["all"] - seen["task"], torch.full_like(seen["all"], 7.0))


def test_clipping_reports_the_norm_from_before():
    loop = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(clip_norm=0.25))
    loop.accumulate_gradients(loop.micro_batches(0))
    square = sum(float(p.grad.double().pow(2).sum()) for p in loop.model.parameters())
    assert float(loop.clip_gradients()) == pytest.approx(math.sqrt(square), rel=1e-5)
    clipped = sum(float(p.grad.double().pow(2).sum()) for p in loop.model.parameters())
    assert math.sqrt(clipped) == pytest.approx(0.25, rel=1e-4)


def test_bf16_keeps_parameters_and_autocasts_the_forward():
    dtypes = []
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    TrainingLoop(model, uneven_rows(), settings=settings(max_steps=1, precision="bf16")).fit()
    assert set(dtypes) == {torch.bfloat16} or torch.bfloat16 in dtypes
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_fp16_scales_the_loss_and_unscales_before_the_callbacks():
    seen = {}

    class Watch(Callback):
        def on_task_gradients(self, loop):
            seen[loop.settings.precision] = loop.model.lm_head.weight.grad.clone()

    for precision in ("float32", "fp16"):
        loop = TrainingLoop(
            tiny_llama(), uneven_rows(), settings=settings(max_steps=1, precision=precision), callbacks=[Watch()]
        )
        if precision == "fp16":
            loop.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        loop.fit()
    scale = float(seen["float32"].abs().max())
    assert float((seen["fp16"] - seen["float32"]).abs().max()) < 0.05 * scale


def test_fp16_passes_over_an_overflow_but_not_over_what_is_never_finite():
    class Overflowing(TrainingLoop):
        def compute_loss(self, model, batch):
            loss = super().compute_loss(model, batch)
            spoiled = self.step in self.spoil
            model.lm_head.weight.register_hook(lambda g: g * float("inf")) if spoiled else None
            return loss

    run = settings(max_steps=3, precision="fp16")
    loop = Overflowing(tiny_llama(), uneven_rows(), settings=run)
    loop.spoil = ()
    loop.accumulate_gradients(loop.micro_batches(0))
    loop.accumulate_gradients(loop.micro_batches(0))  # gradients may be taken twice a step
    history = loop.fit()
    assert [row["overflow"] for row in history] == [0.0, 0.0, 0.0] or history[0]["overflow"] == 1.0
    assert all(p.isfinite().all() for p in loop.model.parameters())

    loop = Overflowing(tiny_llama(), uneven_rows(), settings=settings(max_steps=99, precision="fp16"))
    loop.spoil = range(99)
    with pytest.raises(NonFiniteError, match="the gradient is not finite"):
        loop.fit()
    assert all(p.isfinite().all() for p in loop.model.parameters())


def test_fp16_does_not_pass_over_a_penalty_without_a_finite_gradient():
    model = tiny_llama()
    before = weights(model)
    penalty = lambda m: ((m.lm_head.weight - m.lm_head.weight.detach()) ** 2).sum().sqrt()
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient is not finite, first in lm_head.weight"):
        TrainingLoop(model, uneven_rows(), settings=settings(precision="fp16"), penalties=[penalty]).fit()
    assert equal(before, weights(model))


def test_what_cannot_be_saved_is_found_before_the_first_step(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints into .*file"):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=file)).fit()

    class Odd(Callback):
        def state_dict(self):
            return {"seen": {1, 2}}

    loop = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path / "run"), callbacks=[Odd()])
    with pytest.raises(TypeError, match="seen is a set"):
        loop.fit()
    assert loop.step == 0


def test_a_callback_whose_state_is_empty_at_first_is_resumed(tmp_path):
    class Filling(Callback):
        def __init__(self):
            self.kept = {}

        def on_step_end(self, loop, metrics):
            self.kept = {"loss": metrics["loss"]}

        def state_dict(self):
            return self.kept

        def load_state_dict(self, state):
            self.kept = dict(state)

    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path), callbacks=[Filling()]).fit()
    callback = Filling()
    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path), callbacks=[callback]).fit(resume=True)
    assert callback.kept


def test_another_optimizer_is_refused_and_nothing_changed(tmp_path):
    class Plain(TrainingLoop):
        def configure_optimizer(self):
            optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path)).fit()
    other = Plain(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path))
    before = weights(other.model)
    with pytest.raises(CheckpointError, match=r"optimizer and schedule were .*AdamW.* and are .*SGD"):
        other.fit(resume=True)
    assert equal(before, weights(other.model))


def test_parts_and_penalties_are_checked():
    class Named(TrainingLoop):
        def compute_loss(self, model, batch):
            return super().compute_loss(model, batch), {"loss": 0.0}

    with pytest.raises(ValueError, match='a part of the loss cannot be called "loss"'):
        Named(tiny_llama(), uneven_rows(), settings=settings()).fit()

    def nothing(model):
        return torch.zeros(())

    loop = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(), penalties=[nothing])
    with pytest.raises(ValueError, match="the penalty nothing must return a scalar tensor that reaches"):
        loop.fit()


@pytest.mark.parametrize("value", [0.0, torch.ones(()), torch.ones(3, requires_grad=True)])
def test_a_penalty_of_ones_own_is_checked(value):
    class Own(TrainingLoop):
        def penalty(self):
            return value

    with pytest.raises(
        ValueError, match=r"the penalty penalty\(\) must return a scalar tensor that reaches a trainable"
    ):
        Own(tiny_llama(), uneven_rows(), settings=settings()).fit()


def test_a_step_without_batches_is_refused():
    class Empty(TrainingLoop):
        def micro_batches(self, step):
            return []

    with pytest.raises(ValueError, match=r"micro_batches\(0\) must return one batch or more; it returned none"):
        Empty(tiny_llama(), uneven_rows(), settings=settings()).fit()


def test_looking_changes_nothing():
    def draws(rows):
        torch.rand(3)
        return collate_padded(rows)

    found = []
    for every in (None, 1):
        run = settings(eval_every=every, rows_per_micro_batch=2)
        loop = TrainingLoop(
            tiny_gpt2(dropout=0.2), uneven_rows(), settings=run, eval_data=uneven_rows(3), collate=draws
        )
        loop.fit()
        found.append(weights(loop.model))
    assert equal(*found)


def test_a_penalty_among_the_callbacks_is_called_once_an_event():
    class Counting(Callback):
        calls = 0

        def __call__(self, model):
            return 0 * model.lm_head.weight.sum()

        def on_step_end(self, loop, metrics):
            self.calls += 1

    both = Counting()
    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(), penalties=[both], callbacks=[both]).fit()
    assert both.calls == 3


def test_a_step_of_ones_own_may_report_what_it_likes():
    class Own(TrainingLoop):
        def training_step(self, batches):
            return {"value": 1.0}

    assert len(Own(tiny_llama(), uneven_rows(), settings=settings(progress=True)).fit()) == 3


def test_rows_of_the_history_hold_plain_numbers(tmp_path):
    class Own(TrainingLoop):
        def training_step(self, batches):
            return {"value": self.model.lm_head.weight.sum() * 0 + 7.0}

        def evaluate(self):
            return {"eval_f1": np.float32(0.5)}

    class Adds(Callback):
        def on_step_end(self, loop, metrics):
            metrics["added"] = torch.tensor(3)

        def on_eval_end(self, loop, metrics):
            metrics["eval_more"] = np.float64(0.25)

    run = settings(folder=tmp_path, eval_every=1)
    history = Own(tiny_llama(), uneven_rows(), settings=run, eval_data=uneven_rows(2), callbacks=[Adds()]).fit()
    for row in history:
        found = {name: row[name] for name in ("value", "added", "eval_f1", "eval_more")}
        assert found == {"value": 7.0, "added": 3, "eval_f1": 0.5, "eval_more": 0.25}
        assert {type(value) for value in row.values()} == {int, float}
    with (tmp_path / "history.csv").open() as file:
        assert {row["value"] for row in csv.DictReader(file)} == {"7.0"}


def test_an_optimizers_float32_state_of_bfloat16_weights_resumes_exactly(tmp_path):
    class Master(torch.optim.Optimizer):
        """SGD on a float32 copy, which a bfloat16 weight is the rounding of."""

        @torch.no_grad()
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                copy = self.state[parameter].setdefault("copy", parameter.float())
                parameter.copy_(copy.sub_(parameter.grad.float(), alpha=1e-3))

    class Own(TrainingLoop):
        def configure_optimizer(self):
            optimizer = Master(self.model.parameters(), {"lr": 1e-3})
            return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    class Ends(Callback):
        def on_step_end(self, loop, metrics):
            if loop.step == 3:
                raise KeyboardInterrupt

    def loop(folder, *callbacks):
        run = settings(max_steps=5, folder=tmp_path / folder, save_every=1)
        return Own(tiny_llama().bfloat16(), uneven_rows(), settings=run, callbacks=callbacks)

    whole, cut, resumed = loop("whole"), loop("cut", Ends()), loop("cut")
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    resumed.fit(resume=True)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        copy = resumed.optimizer.state[mine]["copy"]
        assert copy.dtype == torch.float32
        assert torch.equal(copy, whole.optimizer.state[theirs]["copy"])
        assert torch.equal(mine, theirs)


def test_labels_all_ignored_are_refused_before_any_work():
    rows = [{"input_ids": [5, 7, 11], "labels": [-100, -100, -100]}] * 4
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(ValueError, match=r"step 1 has no target to learn from: .* every label is ignored \(-100\)"):
        TrainingLoop(model, rows, settings=settings()).fit()
    assert equal(before, weights(model))
    with pytest.raises(ValueError, match="no row of eval_data has a target"):
        TrainingLoop(model, uneven_rows(), settings=settings(), eval_data=rows).evaluate()


def test_a_micro_batch_without_targets_is_passed_over():
    rows = uneven_rows(3)
    blank = {"input_ids": [5, 7, 11], "labels": [-100] * 3}
    gradients = []
    for data in ([*rows, blank], rows):
        loop = TrainingLoop(tiny_llama(), data, settings=settings(rows_per_step=len(data), rows_per_micro_batch=1))
        loop.accumulate_gradients(loop.micro_batches(0))
        gradients.append(loop.model.lm_head.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "train_data is empty"),
        (iter([1]), TypeError, "train_data must be rows with a length and an index .* got list_iterator"),
    ],
)
def test_data_that_cannot_be_trained_on(data, error, message):
    with pytest.raises(error, match=message):
        TrainingLoop(tiny_llama(), data, settings=settings())


def test_a_frozen_model_and_a_loss_without_gradient_are_refused():
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        TrainingLoop(model, uneven_rows(), settings=settings())

    class Detached(TrainingLoop):
        def compute_loss(self, model, batch):
            return super().compute_loss(model, batch).detach()

    with pytest.raises(ValueError, match="the loss carries no gradient"):
        Detached(tiny_llama(), uneven_rows(), settings=settings()).fit()

    class Rows(TrainingLoop):
        def compute_loss(self, model, batch):
            return model.lm_head.weight.sum(1)

    with pytest.raises(ValueError, match=r"must return a scalar tensor, or \(scalar, parts\); got shape \(97,\)"):
        Rows(tiny_llama(), uneven_rows(), settings=settings()).fit()


def test_a_loss_without_a_count_is_refused():
    with pytest.raises(TypeError, match=r"give it a count_targets\(batch\) method"):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(), loss=lambda m, b: m.lm_head.weight.sum()).fit()


def test_a_folder_in_use_is_refused_and_named(tmp_path):
    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path)).fit()
    loop = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path))
    with pytest.raises(
        CheckpointError, match=r"up to step-00000003: go on with it by fit\(resume=True\), or give another"
    ):
        loop.fit()


def test_resume_on_an_empty_folder_starts_afresh(tmp_path):
    runs = [
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=folder))
        for folder in (None, tmp_path / "new")
    ]
    runs[0].fit()
    runs[1].fit(resume=True)
    assert equal(weights(runs[0].model), weights(runs[1].model))
    with pytest.raises(ValueError, match="needs a folder to resume from"):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings()).fit(resume=True)


def test_a_done_run_is_not_run_again(tmp_path):
    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path)).fit()
    again = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path))
    again.training_step = None  # calling it would raise
    assert len(again.fit(resume=True)) == 3


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_resume_is_exact_with_dropout_and_random_data(tmp_path, precision):
    class Augmented(TrainingLoop):
        def micro_batches(self, step):
            batches = super().micro_batches(step)
            for batch in batches:  # draws from the global random state, as careless augmentation does
                swap = torch.rand(batch["input_ids"].shape) < 0.1
                batch["input_ids"] = batch["input_ids"].masked_fill(swap, 5)
            return batches

    class Interrupt(Callback):
        def on_step_end(self, loop, metrics):
            if loop.step == 3:
                raise KeyboardInterrupt

    def loop(folder, callbacks=()):
        run = settings(max_steps=6, folder=folder, save_every=2, rows_per_micro_batch=2, precision=precision)
        return Augmented(
            tiny_gpt2(dropout=0.3), uneven_rows(13), settings=run, callbacks=callbacks, collate=collate_padded
        )

    whole = loop(tmp_path / "whole")
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "cut", [Interrupt()]).fit()
    resumed = loop(tmp_path / "cut")
    history = resumed.fit(resume=True)
    assert equal(weights(whole.model), weights(resumed.model))
    assert [row["loss"] for row in history] == [row["loss"] for row in whole.history]


def saved_run(folder, **changed):
    return TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=folder, **changed))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda f: TrainingLoop(tiny_llama(tied=True), uneven_rows(), settings=settings(folder=f)),
            "had a parameter lm_head.weight",
        ),
        (
            lambda f: TrainingLoop(tiny_gpt2(), uneven_rows(), settings=settings(folder=f)),
            "the model has a parameter transformer.wte.weight",
        ),
        (
            lambda f: TrainingLoop(tiny_llama(), uneven_rows(9), settings=settings(folder=f)),
            "the run had 8 rows of data; now there are 9",
        ),
        (lambda f: saved_run(f, seed=1), "seed was 0 in the run and is 1 now"),
        (lambda f: saved_run(f, learning_rate=0.5), "learning_rate was 0.001 in the run and is 0.5 now"),
        (lambda f: saved_run(f, max_steps=7), "max_steps was 3 in the run and is 7 now"),
    ],
)
def test_another_run_is_refused_and_nothing_changed(tmp_path, other, message):
    saved_run(tmp_path).fit()
    loop = other(tmp_path)
    before = weights(loop.model)
    with pytest.raises(CheckpointError, match=message):
        loop.fit(resume=True)
    assert equal(before, weights(loop.model))
    assert loop.step == 0


def test_another_shape_and_other_frozen_weights_are_named(tmp_path):
    def frozen(seed=0):
        model = tiny_llama(seed)
        model.model.embed_tokens.weight.requires_grad_(False)
        return model

    TrainingLoop(frozen(), uneven_rows(), settings=settings(folder=tmp_path)).fit()
    for model, message in (
        (frozen(1), "the frozen parameter model.embed_tokens.weight has other values"),
        (tiny_llama(), "model.embed_tokens.weight is trained now and was frozen"),
    ):
        with pytest.raises(CheckpointError, match=message):
            TrainingLoop(model, uneven_rows(), settings=settings(folder=tmp_path)).fit(resume=True)
    wider = frozen()
    wider.lm_head = nn.Linear(28, 101, bias=False)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is \[\[101, 28\], 'float32'\] in the model and \[\[97, 28\]"
    ):
        TrainingLoop(wider, uneven_rows(), settings=settings(folder=tmp_path)).fit(resume=True)


def test_a_penalty_with_state_is_saved_and_must_be_there(tmp_path):
    class Counting(Callback):
        def __init__(self):
            self.calls = 0

        def __call__(self, model):
            return model.lm_head.weight.sum() * 0

        def on_step_end(self, loop, metrics):
            self.calls += 1

        def state_dict(self):
            return {"calls": torch.tensor(self.calls)}

        def load_state_dict(self, state):
            self.calls = int(state["calls"])

    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path), penalties=[Counting()]).fit()
    penalty = Counting()
    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path), penalties=[penalty]).fit(resume=True)
    assert penalty.calls == 3
    with pytest.raises(
        CheckpointError, match=r"penalties and callbacks with state were \['Counting'\]; now they are none"
    ):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path)).fit(resume=True)


def test_another_scaling_of_the_same_shapes_is_refused(tmp_path):
    def loop(alpha):
        model = tiny_llama()
        attach(model, LoRA(rank=2, alpha=alpha))
        return TrainingLoop(model, uneven_rows(), settings=settings(folder=tmp_path))

    loop(4).fit()
    assert len(loop(4).fit(resume=True)) == 3
    with pytest.raises(CheckpointError, match='adapter "default" has alpha=64 now and had alpha=4 in the run'):
        loop(64).fit(resume=True)
    plain = tiny_llama()
    with pytest.raises(CheckpointError, match="that the checkpoint's model had not"):
        TrainingLoop(plain, uneven_rows(), settings=settings(folder=tmp_path)).fit(resume=True)


def test_weights_trained_in_float16_are_refused():
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is trained in float16, .* give precision="):
        TrainingLoop(tiny_llama().half(), uneven_rows(), settings=settings())


def test_a_model_that_sees_what_follows_is_no_causal_one():
    with pytest.raises(ValueError, match="BertForMaskedLM sees the tokens after a place as well"):
        TrainingLoop(tiny_bert(), uneven_rows(), settings=settings(), collate=collate_padded).fit()


def test_packed_documents_that_see_each_other_are_refused():
    model = tiny_bert()
    rows = uneven_rows()
    with pytest.raises(ValueError, match="packed documents see each other in BertForMaskedLM under attention 'sdpa'"):
        TrainingLoop(model, rows, settings=settings(), loss=masked_lm_loss).fit()
    one_document_first = [{"input_ids": [5, 7, 11], "labels": [5, 7, 11]}] * 4
    with pytest.raises(ValueError, match="packed documents see each other"):
        TrainingLoop(model, one_document_first, settings=settings(rows_per_step=1), loss=masked_lm_loss).fit()
    assert document_leak(model, torch.arange(7)) > 1e-2
    assert document_leak(tiny_llama(), torch.arange(7)) == 0.0
    assert document_leak(tiny_gpt2(), torch.arange(7)) == 0.0


def test_events_come_in_order(tmp_path):
    events = []

    class Record(Callback):
        pass

    for name in ("on_fit_start", "on_step_start", "on_task_gradients", "on_before_optimizer_step", "on_step_end",
                 "on_eval_end", "on_save", "on_fit_end", "on_exception"):  # fmt: skip
        setattr(Record, name, lambda self, *args, name=name: events.append(name.removeprefix("on_")))
    loop = TrainingLoop(
        tiny_llama(), uneven_rows(), settings=settings(max_steps=2, folder=tmp_path, save_every=1, eval_every=2),
        eval_data=uneven_rows(3), callbacks=[Record()],
    )  # fmt: skip
    loop.fit()
    step = ["step_start", "task_gradients", "before_optimizer_step", "step_end"]
    assert events == ["fit_start", *step, "save", *step, "eval_end", "save", "fit_end"]


def test_the_banner_and_the_end_line_say_what_ran(capsys):
    run = settings(progress=True)
    TrainingLoop(tiny_llama(), uneven_rows(), settings=run).fit()
    shown = capsys.readouterr().out
    assert "Training LlamaForCausalLM: 3 steps of 4 rows, 8 rows in all" in shown
    assert "trainable params: 21,196 || all params: 21,196 || trainable%: 100.0000" in shown
    assert "3 steps done: loss " in shown
    assert "real tokens/s, peak memory" in shown


def test_a_subclass_changes_only_what_it_means_to():
    """Sharpness-aware minimisation in a few lines: the gradient taken at the worst point near the weights."""

    class SharpnessAware(TrainingLoop):
        def accumulate_gradients(self, batches):
            super().accumulate_gradients(batches)
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
            steps = [(p, 0.05 * p.grad / norm) for p in self.model.parameters()]
            for p, step in steps:
                p.data.add_(step)
            metrics = super().accumulate_gradients(batches)
            for p, step in steps:
                p.data.sub_(step)
            return metrics

    plain, aware = tiny_llama(), tiny_llama()
    for kind, model in ((TrainingLoop, plain), (SharpnessAware, aware)):
        history = kind(model, uneven_rows(), settings=settings(max_steps=5)).fit()
        assert all(math.isfinite(loss) for loss in history.column("loss"))
    assert not equal(weights(plain), weights(aware))


def test_causal_loss_is_the_default_and_nothing_is_left_in_the_modes():
    model = tiny_llama()
    with nullcontext():
        loop = TrainingLoop(model, uneven_rows(), settings=settings())
    assert loop.loss is causal_lm_loss
    model.eval()
    loop.fit()
    assert not any(module.training for module in model.modules())
