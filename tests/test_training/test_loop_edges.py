"""Odd things given to the loop, or done to it: each works, or is told of in one sentence."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from runs import equal, settings, weights
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.errors import CheckpointError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.training.best import KeepBest
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.training.loop import TrainingLoop
from llmtune.types import Callback


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda loss: 1.5, "must return a scalar tensor, or .*; got a float"),
        (lambda loss: None, "must return a scalar tensor, or .*; got a NoneType"),
        (lambda loss: loss[None], r"must return a scalar tensor, or .*; got shape \(1,\)"),
        (lambda loss: {"loss": loss}, "must return a scalar tensor, or .*; got a dict"),
        (lambda loss: (loss, {}, 3), "must return a scalar tensor, or .*; got a tuple"),
        (lambda loss: (loss,), "must return a scalar tensor, or .*; got a tuple"),
        (lambda loss: loss.detach(), "the loss carries no gradient"),
        (lambda loss: torch.tensor(3), "the loss carries no gradient"),
        (lambda loss: (loss, [1.0]), "the parts beside a loss must be a dict of names and numbers; got a list"),
        (lambda loss: (loss, {"x": "y"}), "the part 'x' of the loss must be a number .*; got a str"),
        (lambda loss: (loss, {"x": torch.ones(3)}), r"the part 'x' of the loss must .*; got a tensor of shape \(3,\)"),
        (lambda loss: (loss, {"x": None}), "the part 'x' of the loss must be a number"),
        (lambda loss: (loss, {3: 1.0}), "the part 3 of the loss must be a number or a tensor of one, under a name"),
        (lambda loss: (loss, {"step": 1.0}), 'a part of the loss cannot be called "step"'),
    ],
)
def test_what_a_loss_returns_is_told_in_one_sentence(result, said):
    class Odd(TrainingLoop):
        def compute_loss(self, model, batch):
            return result(super().compute_loss(model, batch))

    loop = Odd(tiny_llama(), uneven_rows(), settings=settings())
    with pytest.raises(ValueError, match=said):
        loop.fit()
    assert loop.step == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_loss_may_be_of_any_float_dtype(dtype):
    class Cast(TrainingLoop):
        def compute_loss(self, model, batch):
            loss = super().compute_loss(model, batch)
            return loss.to(dtype), {
                "count": 3,
                "flag": True,
                "half": torch.tensor(0.5, dtype=dtype),
                "np": np.float32(2),
            }

    history = Cast(tiny_llama(), uneven_rows(), settings=settings(rows_per_micro_batch=2)).fit()
    plain = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(rows_per_micro_batch=2)).fit()
    assert history.column("loss") == pytest.approx(plain.column("loss"), rel=1e-2)
    assert (history[0]["count"], history[0]["flag"], history[0]["half"], history[0]["np"]) == pytest.approx(
        (3, 1, 0.5, 2)
    )


@pytest.mark.parametrize("count", [2.5, -1, float("nan"), "3", None, torch.ones(2)])
def test_a_count_of_targets_is_a_whole_number(count):
    class Counting:
        def __call__(self, model, batch):
            return causal_lm_loss(model, batch)

        def count_targets(self, batch):
            return count

    with pytest.raises(ValueError, match="must return how many targets the mean is over, a whole number; got"):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(), loss=Counting()).fit()


@pytest.mark.parametrize("count", [3, 3.0, torch.tensor(3), np.int64(3), torch.tensor([3.0])])
def test_a_whole_number_may_come_in_any_type(count):
    class Counting:
        def __call__(self, model, batch):
            return causal_lm_loss(model, batch)

        def count_targets(self, batch):
            return count

    loop = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(), loss=Counting())
    assert loop.fit()[0]["targets"] == 3
    assert type(loop.history[0]["targets"]) is int


def test_odd_models_are_told_before_anything_is_done(tmp_path):
    run = settings(folder=tmp_path / "run")
    with torch.device("meta"):
        empty = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"weight is on the meta device, without data: load the model's weights first"):
        TrainingLoop(empty, uneven_rows(), settings=run)
    buffers = nn.Module()
    buffers.register_buffer("x", torch.ones(3))
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        TrainingLoop(buffers, uneven_rows(), settings=run)
    assert not (tmp_path / "run").exists()


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    """The program changes its folder in the middle of the run."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()

    class Move(Callback):
        def on_step_end(self, loop, metrics):
            monkeypatch.chdir(tmp_path / "there")

    monkeypatch.chdir(tmp_path / "here")
    run = settings(folder="run", save_every=1)
    TrainingLoop(tiny_llama(), uneven_rows(), settings=run, callbacks=[Move()]).fit()
    assert sorted(path.name for path in (tmp_path / "here" / "run").iterdir()) == [
        "history.csv", "step-00000002", "step-00000003",
    ]  # fmt: skip
    assert list((tmp_path / "there").iterdir()) == []


def test_things_asked_for_before_the_run(tmp_path):
    loop = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path), eval_data=uneven_rows(3))
    assert loop.evaluate()["eval_loss"] > 0
    assert loop.state_dict()["step"] == 0
    assert loop.save().name == "step-00000000"
    with pytest.raises(CheckpointError, match="already holds a run, up to step-00000000: go on with it by fit"):
        loop.fit()
    assert len(loop.fit(resume=True)) == 3
    assert len(loop.fit(resume=True)) == 3, "a run that is done stays done"
    with pytest.raises(CheckpointError, match="already holds a run, up to step-00000003"):
        loop.fit()
    bare = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings())
    assert bare.save() is None
    assert len(bare.fit()) == 3
    assert len(bare.fit()) == 3


def test_two_loops_in_one_folder_do_not_write_over_each_other(tmp_path):
    one, other = (TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path)) for _ in range(2))
    one.fit()
    with pytest.raises(CheckpointError, match="already holds a run, up to step-00000003"):
        other.fit()


def test_callbacks_that_raise_leave_the_run_resumable(tmp_path):
    events = ("on_fit_start", "on_step_start", "on_task_gradients", "on_before_optimizer_step", "on_step_end",
              "on_eval_end", "on_save", "on_fit_end")  # fmt: skip

    class Raise(Callback):
        def __init__(self):
            self.heard = []

        def on_exception(self, loop, error):
            self.heard.append(error)

    def make(folder, callbacks=()):
        run = settings(folder=folder, save_every=1, eval_every=2)
        return TrainingLoop(
            tiny_gpt2(dropout=0.2), uneven_rows(), settings=run, callbacks=callbacks, eval_data=uneven_rows(3)
        )

    whole = make(tmp_path / "whole")
    whole.fit()
    for event in events:
        error = LookupError(event)

        def fail(self, loop, *arguments, error=error):
            if loop.step >= 2 or "start" in str(error):
                raise error

        callback = type("Failing", (Raise,), {event: fail})()
        loop = make(tmp_path / event, [callback])
        with pytest.raises(LookupError, match=event):
            loop.fit()
        assert callback.heard == [error]
        resumed = make(tmp_path / event)
        resumed.fit(resume=True)
        assert equal(weights(whole.model), weights(resumed.model)), event
        assert resumed.history.column("eval_loss") == whole.history.column("eval_loss")


def test_the_same_loop_goes_on_where_a_callback_failed_between_evaluation_and_save(tmp_path):
    """The checkpoint that KeepBest has asked for is written then, from which it puts the weights back at the end."""

    class Fail(Callback):
        def on_eval_end(self, loop, metrics):
            if loop.step == 2 and not failed:
                failed.append(weights(loop.model))
                raise LookupError

    failed = []
    run = settings(folder=tmp_path, eval_every=2, learning_rate=1.0, clip_norm=None)
    loop = TrainingLoop(
        tiny_gpt2(), uneven_rows(), settings=run, callbacks=[KeepBest(), Fail()], eval_data=uneven_rows(3)
    )
    with pytest.raises(LookupError):
        loop.fit()
    loop.fit(resume=True)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000002", "step-00000003"]
    best = min(loop.history.column("eval_loss"))
    assert loop.evaluate()["eval_loss"] == pytest.approx(best)


def test_on_exception_that_raises_itself_keeps_what_came_first():
    class Bad(Callback):
        def on_step_end(self, loop, metrics):
            raise LookupError("first")

        def on_exception(self, loop, error):
            raise RuntimeError("second")

    with pytest.raises(RuntimeError, match="second") as caught:
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(), callbacks=[Bad()]).fit()
    assert isinstance(caught.value.__context__, LookupError)


def test_settings_replaced_in_the_middle_change_nothing_that_is_fixed():
    class Replace(Callback):
        def on_step_end(self, loop, metrics):
            loop.settings = dataclasses.replace(loop.settings, max_steps=99, learning_rate=1.0, log_every=1)

    replaced = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(), callbacks=[Replace()])
    plain = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings())
    assert len(replaced.fit()) == len(plain.fit()) == 3
    assert equal(weights(replaced.model), weights(plain.model))


def test_a_checkpoint_of_more_steps_than_the_run_has_is_refused(tmp_path):
    TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path, max_steps=5)).fit()
    with pytest.raises(CheckpointError, match="max_steps was 5 in the run and is 2 now"):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path, max_steps=2)).fit(resume=True)


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    loop = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path / "closed"))
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints into .*closed"):
        loop.fit()
    assert loop.step == 0


def test_the_adapter_in_a_checkpoint_is_one_that_peft_loads(tmp_path):
    from peft import PeftModel

    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=6))
    TrainingLoop(model, uneven_rows(), settings=settings(folder=tmp_path, learning_rate=0.1)).fit()
    ids = torch.tensor([[5, 7, 11, 13]])
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "step-00000003" / "adapters" / "default").eval()
    plain = tiny_llama()(input_ids=ids).logits
    ours = model.eval()(input_ids=ids).logits
    assert float((ours - plain).detach().abs().max()) > 0.1
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_goes_with_the_checkpoints(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 5, "b": 7, "?": 11}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    run = settings(folder=tmp_path, save_every=1)
    TrainingLoop(tiny_llama(), uneven_rows(), settings=run, tokenizer=tokenizer).fit()
    for step in (2, 3):
        read = AutoTokenizer.from_pretrained(tmp_path / f"step-0000000{step}" / "tokenizer")
        assert read("b a x")["input_ids"] == [7, 5, 11]
    again = TrainingLoop(tiny_llama(), uneven_rows(), settings=run, tokenizer=tokenizer)
    assert len(again.fit(resume=True)) == 3
    with pytest.raises(TypeError, match="a tokenizer with save_pretrained is expected; got a dict"):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(folder=tmp_path / "o"), tokenizer={"a": 5}).fit()


def test_saving_in_the_background_gives_the_same_checkpoints_and_events(tmp_path):
    def run(background):
        saved = []

        class Saved(Callback):
            def on_save(self, loop, folder):
                assert (folder / "manifest.json").exists()
                saved.append(folder.name)

        folder = tmp_path / str(background)
        loop = TrainingLoop(
            tiny_gpt2(dropout=0.2), uneven_rows(), callbacks=[Saved()],
            settings=settings(max_steps=5, folder=folder, save_every=2, keep=9, background_save=background),
        )  # fmt: skip
        loop.fit()
        return saved, [read_checkpoint(folder / name) for name in saved]

    (names, states), (other_names, others) = run(False), run(True)
    assert names == other_names == ["step-00000002", "step-00000004", "step-00000005"]
    for one, other in zip(states, others, strict=True):
        assert equal(one["model"], other["model"])
        assert [row["loss"] for row in one["history"]] == [row["loss"] for row in other["history"]]


def test_gradients_of_ones_own_need_report_nothing():
    class Own(TrainingLoop):
        def accumulate_gradients(self, batches):
            super().accumulate_gradients(batches)
            return {}

    assert len(Own(tiny_llama(), uneven_rows(), settings=settings(spike_factor=2.0, progress=True)).fit()) == 3


def test_looking_at_a_row_needs_no_labels_until_the_loss_does():
    rows = [{"input_ids": [5, 7, 11]}] * 4
    with pytest.raises(ValueError, match="labels"):
        TrainingLoop(tiny_llama(), rows, settings=settings()).fit()
