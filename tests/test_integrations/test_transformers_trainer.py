"""with_loss in the real Trainer: the mean over the targets of a step, however they are spread."""

import math

import pytest
import torch
from torch import nn
from trainers import (
    EXPORTED,
    LOSSES,
    MODELS,
    ROWS,
    arguments,
    drops,
    in_double,
    of_decoder,
    off,
    pairs,
    reference,
    texts,
    trained,
    with_lora,
)
from transformers import Trainer

import llmtune
from llmtune import forgetting, losses, regularizers
from llmtune.adapters import disabled
from llmtune.data import collate_preferences
from llmtune.data.collate import collate_padded
from llmtune.integrations import trainer_loss, with_loss
from llmtune.losses import CausalLMLoss, SequenceToSequenceLoss, causal_lm_loss
from llmtune.testing.models import tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training import LoopSettings, TrainingLoop
from llmtune.types import Callback, LossFunction


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "llama"), "llama"])
def test_steps_are_those_of_the_mean_over_all_targets(name, tmp_path):
    make, rows, collate = MODELS[name]
    loss, how = LOSSES[name]
    start, rows = in_double(make()), rows()
    wanted = reference(start, rows, **how)
    for accumulation in (1, 2, 4):
        model = in_double(make())
        trained(with_loss(Trainer, loss), model, rows, tmp_path, accumulation, collate=collate)
        assert off(model, wanted) < 1e-9, accumulation
    assert off(start, wanted) > 1e-4


def test_the_trainer_by_itself_is_off_where_the_class_name_says_nothing(tmp_path):
    """GPT2LMHeadModel's loss shifts, and transformers 5.24 counts its first labels all the same; LlamaForCausalLM's no
    more. The learning rate is then too small by the share of targets among the labels."""
    for make, good in ((tiny_gpt2, False), (tiny_llama, True)):
        wanted = reference(in_double(make()), texts(), shift=True, steps=1)
        model = in_double(make())
        trained(Trainer, model, texts(), tmp_path, 2, max_steps=1)
        assert (off(model, wanted) < 1e-9) == good


def test_smoothing_is_after_the_shift_whatever_the_model_is_called(tmp_path):
    """transformers 5.24 shifts the labels for its label_smoothing_factor if it knows the name of the model's class."""
    model = tiny_llama()
    batch = collate_padded(texts()[:4])
    loss = CausalLMLoss(label_smoothing=0.1)
    wanted = loss(model, batch).item()
    for kind, shifts in ((type(model), True), (type("MyLlama", (type(model),), {}), False)):
        model.__class__ = kind
        theirs = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
        assert (theirs.compute_loss(model, dict(batch)).item() == pytest.approx(wanted, rel=1e-5)) == shifts
        ours = with_loss(Trainer, loss)(model, arguments(tmp_path))
        assert ours.compute_loss(model, dict(batch)).item() == pytest.approx(wanted, rel=1e-6)
    nothing = Trainer(
        model, arguments(tmp_path, label_smoothing_factor=0.1), compute_loss_func=trainer_loss(causal_lm_loss, model)
    )
    assert nothing.compute_loss(model, dict(batch)).item() == causal_lm_loss(model, batch).item()  # not smoothed


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_run_is_that_of_the_training_loop(accumulation, tmp_path):
    options = {"learning_rate": 1e-3, "schedule": "constant", "clip_norm": None, "progress": False}
    settings = LoopSettings(max_steps=3, rows_per_step=4, rows_per_micro_batch=4 // accumulation, **options)

    class InOrder(TrainingLoop):
        def row_indices(self, step):
            return list(range(4 * step, 4 * step + 4))

    ours, theirs = in_double(tiny_llama()), in_double(tiny_llama())
    history = InOrder(ours, texts(), settings=settings, collate=collate_padded).fit()
    trainer = trained(
        with_loss(Trainer, causal_lm_loss), theirs, texts(), tmp_path, accumulation, optim="adamw_torch",
        learning_rate=1e-3,
    )  # fmt: skip
    assert off(theirs, ours) < 1e-9
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx([row["loss"] for row in history], rel=1e-5)


def exported_losses():
    return {
        name
        for room in (losses, regularizers, forgetting)
        for name in room.__all__
        if isinstance(getattr(room, name), type) and issubclass(getattr(room, name), LossFunction)
    }


def test_no_loss_is_forgotten():
    assert set(EXPORTED) == exported_losses()


@pytest.mark.parametrize("name", EXPORTED)
def test_every_loss_trains_in_the_trainer(name, tmp_path):
    loss, make, rows, collate = EXPORTED[name]
    model, before = make(), make()
    rows = rows()[:8]
    if name == "MixupLoss":  # two rows of each micro-batch need a label
        rows = [row for row in MODELS["classifier"][1]() if row["labels"] != -100][:8]
    accumulation = 2
    if name == "PrototypicalLoss":  # two classes in each micro-batch, one with two rows
        rows, accumulation = [{**row, "labels": index % 2} for index, row in enumerate(rows)], 1
    trainer = with_loss(Trainer, loss)(
        model,
        arguments(tmp_path, accumulation, max_steps=2),
        train_dataset=rows,
        eval_dataset=rows[:5],
        data_collator=collate,
    )
    trainer.train()
    assert 0 < off(model, before) < math.inf
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    batch = collate(rows[:4])
    result = loss(model.train(), batch)
    if isinstance(result, tuple):
        assert set(result[1]) <= set(logged[-1])
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_parts_are_means_over_the_targets_since_the_last_log(tmp_path):
    loss = regularizers.RDropLoss(alpha=2.0)
    trainer = trained(with_loss(Trainer, loss), drops(), texts(), tmp_path, 4, logging_steps=3)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["loss"] == pytest.approx(row["task_loss"] + 2.0 * row["r_drop"], rel=1e-5)
    assert row["r_drop"] > 0


def test_penalties_come_once_a_step(tmp_path):
    """L + strength/2 ||p - anchor||^2, by hand: its gradient is added once however many micro-batches there are."""
    ends = []
    for accumulation in (1, 4):
        model = in_double(tiny_llama())
        anchor = {name: parameter.detach() + 0.3 for name, parameter in model.named_parameters()}
        kind = with_loss(Trainer, causal_lm_loss, penalties=[regularizers.L2SP(anchor, 0.7)])
        trainer = trained(kind, model, texts(), tmp_path, accumulation, max_steps=1)
        ends.append(model)
    wanted = reference(in_double(tiny_llama()), texts(), shift=True, steps=1)
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter += 0.05 * 0.7 * 0.3
    assert off(ends[0], wanted) < 1e-7
    assert off(ends[1], ends[0]) < 1e-9
    row = trainer.state.log_history[0]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert row["penalty"] == pytest.approx(0.35 * 0.09 * count, rel=1e-4)
    assert row["loss"] > row["penalty"]


@pytest.mark.parametrize("make", [forgetting.OnlineEWC, forgetting.MemoryAwareSynapses])
def test_penalties_that_finish_tasks(make, tmp_path):
    """Against the same steps written out: SGD on loss + penalty."""
    model = in_double(tiny_llama())
    penalty = make(0.5)
    penalty.finish_task(model, [collate_padded(texts())])
    wanted = in_double(tiny_llama())
    trainer = trained(with_loss(Trainer, causal_lm_loss, penalties=[penalty]), model, texts(), tmp_path, 2, max_steps=3)
    for step in range(3):
        wanted.zero_grad()
        rows = texts()[4 * step : 4 * step + 4]
        (causal_lm_loss(wanted, collate_padded(rows)) + penalty(wanted)).backward()
        with torch.no_grad():
            for parameter in wanted.parameters():
                parameter -= 0.05 * parameter.grad
    assert off(model, wanted) < 1e-7
    assert trainer.state.log_history[2]["penalty"] > 0


def test_evaluation_is_the_mean_over_targets_with_and_without_metrics(tmp_path):
    rows = texts()
    rows[7] = {**rows[7], "labels": [-100] * len(rows[7]["labels"])}
    model = tiny_gpt2()
    seen = []
    for metrics in (None, lambda prediction: seen.append(prediction.predictions.shape) or {}):
        trainer = with_loss(Trainer, CausalLMLoss(label_smoothing=0.1))(
            model, arguments(tmp_path), eval_dataset=rows, data_collator=collate_padded, compute_metrics=metrics
        )
        whole = CausalLMLoss(label_smoothing=0.1)(model, collate_padded(rows)).item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-5)
    assert seen[0][0] == ROWS
    plain = Trainer(model, arguments(tmp_path), eval_dataset=texts(), data_collator=collate_padded)
    mean = causal_lm_loss(model, collate_padded(texts())).item()
    assert plain.evaluate()["eval_loss"] != pytest.approx(mean, rel=1e-3)


def test_generating_trainers_keep_their_tokens_and_get_our_loss(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    given = arguments(tmp_path).to_dict()
    chosen = {name: given[name] for name in ("output_dir", "report_to", "use_cpu", "disable_tqdm", "save_strategy")}
    options = Seq2SeqTrainingArguments(**chosen, predict_with_generate=True, generation_max_length=5)
    model, rows, shapes = tiny_t5(), MODELS["t5"][1](), []
    loss = SequenceToSequenceLoss(label_smoothing=0.2)
    trainer = with_loss(Seq2SeqTrainer, loss)(
        model, options, eval_dataset=rows, data_collator=of_decoder,
        compute_metrics=lambda prediction: shapes.append(prediction.predictions.ndim) or {},
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss(model, of_decoder(rows)).item(), rel=1e-5)
    assert shapes == [2]


def test_micro_batches_without_a_target_add_nothing(tmp_path):
    rows = texts()
    for index in (1, 3):  # the last micro-batch of the step among them
        rows[index] = {**rows[index], "labels": [-100] * len(rows[index]["labels"])}
    model = in_double(tiny_llama())
    trained(with_loss(Trainer, causal_lm_loss), model, rows, tmp_path, 4)
    assert off(model, reference(in_double(tiny_llama()), rows, shift=True)) < 1e-9


def test_bfloat16_covers_what_a_loss_does_outside_the_model_too(tmp_path):
    seen, ends = [], [tiny_llama(), tiny_llama()]

    def loss(model, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return causal_lm_loss(model, batch)

    loss.count_targets = causal_lm_loss.count_targets
    for model, bf16 in zip(ends, (False, True), strict=True):
        trained(with_loss(Trainer, loss), model, texts(), tmp_path, bf16=bf16, max_steps=1)
    assert seen == [False, True]
    assert 0 < off(ends[1], ends[0]) < 0.01


def test_functions_are_losses_too(tmp_path):
    def loss(model, batch):
        return causal_lm_loss(model, batch)

    loss.count_targets = causal_lm_loss.count_targets
    model, other = tiny_llama(), tiny_llama()
    trained(with_loss(Trainer, loss), model, texts(), tmp_path)
    trained(with_loss(Trainer, causal_lm_loss), other, texts(), tmp_path)
    assert off(model, other) == 0.0
    assert with_loss(Trainer, loss).__name__ == "TrainerWithLoss"


class Moves(Callback):
    def __call__(self, model):
        return next(model.parameters()).sum()

    def on_step_end(self, loop, metrics):
        pass


def test_bad_input(tmp_path):
    kind = with_loss(Trainer, causal_lm_loss)
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor=0\.1 smooths the Trainer's own loss, which with_loss"
    ):
        kind(tiny_llama(), arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="with_loss brings the loss, and compute_loss_func is another one"):
        kind(tiny_llama(), arguments(tmp_path), compute_loss_func=lambda *_, **__: None)
    two = arguments(tmp_path)
    two._n_gpu = 2
    with pytest.raises(ValueError, match="2 devices in one process mean torch's DataParallel"):
        kind(tiny_llama(), two)
    with pytest.raises(
        TypeError, match=r"a loss is expected.*such as llmtune\.losses\.causal_lm_loss; got .*CausalLMLoss"
    ):
        with_loss(Trainer, CausalLMLoss)
    with pytest.raises(TypeError, match="a loss is expected"):
        with_loss(Trainer, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"a class is expected, transformers\.Trainer or one made of it; got 3"):
        with_loss(3, causal_lm_loss)
    with pytest.raises(TypeError, match="TrainerWithLoss has a loss already"):
        with_loss(kind, causal_lm_loss)
    with pytest.raises(ValueError, match="the penalty Moves acts in on_step_end, which the Trainer does not call"):
        with_loss(Trainer, causal_lm_loss, penalties=[Moves()])
    ignored = [{**row, "labels": [-100] * len(row["labels"])} for row in texts()]
    with pytest.raises(ValueError, match="step 1 has no target to learn from: in the 2 micro-batches of process 0"):
        trained(kind, tiny_llama(), ignored, tmp_path, 2)
    trainer = kind(tiny_llama(), arguments(tmp_path), eval_dataset=ignored, data_collator=collate_padded)
    with pytest.raises(ValueError, match="no row of the evaluation's data has a target"):
        trainer.evaluate()
    unlabelled = [{"input_ids": row["input_ids"]} for row in texts()]
    with pytest.raises(ValueError, match='the loss needs integer "labels"'):
        trained(kind, tiny_llama(), unlabelled, tmp_path)


def test_penalties_and_losses_of_adapters(tmp_path):
    """A reference by switching adapters off, and weights of the base that stay to the bit."""
    model = with_lora(tiny_llama)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs()]
    kind = with_loss(Trainer, losses.DPOLoss(reference=disabled), penalties=[regularizers.DeltaNorm(0.1)])
    trained(kind, model, rows, tmp_path, 2, collate=collate_preferences)
    llmtune.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))
