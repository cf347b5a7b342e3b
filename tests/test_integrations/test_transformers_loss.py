"""trainer_loss as the real Trainer's compute_loss_func: exact, or refused."""

import pytest
import torch
from torch.nn import functional as F
from trainers import EXPORTED, LOSSES, MODELS, arguments, in_double, of_decoder, off, reference, texts, trained
from transformers import Trainer

from llmtune.data.collate import collate_padded
from llmtune.integrations import trainer_loss, with_loss
from llmtune.integrations.transformers_loss import OF_LOGITS, trainer_leaves_first_out
from llmtune.losses import CausalLMLoss, causal_lm_loss, classification_loss
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_qwen3_moe, tiny_t5


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "llama"), "llama"])
def test_steps_are_those_of_the_mean_over_all_targets(name, tmp_path):
    make, rows, collate = MODELS[name]
    loss, how = LOSSES[name]
    rows = rows(first=False) if name == "gpt2" else rows()
    wanted = reference(in_double(make()), rows, **how)
    for accumulation in (1, 2, 4):
        model = in_double(make())
        of_logits = trainer_loss(loss, model)
        trained(Trainer, model, rows, tmp_path, accumulation, collate=collate, compute_loss_func=of_logits)
        assert off(model, wanted) < 1e-9, accumulation


@pytest.mark.parametrize("name", EXPORTED)
def test_a_loss_is_that_of_the_other_door_or_refused(name, tmp_path):
    loss, make, rows, collate = EXPORTED[name]
    model, other = make(), make()
    if not isinstance(loss, OF_LOGITS):
        with pytest.raises(TypeError, match=f"{name} needs more than the outputs and labels.*with_loss"):
            trainer_loss(loss, model)
        return
    if name == "SequenceToSequenceLoss":
        collate = of_decoder
    trained(Trainer, model, rows(), tmp_path, 2, collate=collate, compute_loss_func=trainer_loss(loss, model))
    trained(with_loss(Trainer, loss), other, rows(), tmp_path, 2, collate=collate)
    assert off(model, other) < 1e-6
    assert off(model, make()) > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_it_knows_what_the_trainer_counts(name, tmp_path):
    model = MODELS[name][0]()
    trainer = Trainer(model, arguments(tmp_path))
    assert trainer_leaves_first_out(model) == trainer._loss_shifts_labels == (name == "llama")
    labels = torch.tensor([[3, 5, -100, 7], [2, -100, -100, 4]])
    trainer.compute_loss_func = print
    counted = int(trainer._get_num_items_in_batch([{"labels": labels}], torch.device("cpu")))
    assert counted == (3 if name == "llama" else 5)


def test_under_peft_it_knows_too(tmp_path):
    import peft

    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    assert trainer_leaves_first_out(wrapped)
    assert Trainer(wrapped, arguments(tmp_path))._loss_shifts_labels


def test_where_the_counts_differ_it_raises_instead_of_being_a_little_wrong(tmp_path):
    model = tiny_gpt2()
    with pytest.raises(
        ValueError, match=r"the Trainer counts \d+ labels.*CausalLMLoss takes its mean over \d+ targets"
    ):
        trained(Trainer, model, texts(), tmp_path, compute_loss_func=trainer_loss(causal_lm_loss, model))


def test_several_floats_a_row_are_one_target(tmp_path):
    rows = [{**row, "labels": [float(i % 2), float(i % 3 == 0), 1.0]} for i, row in enumerate(texts())]
    ends = []
    for accumulation in (1, 4):
        model = in_double(tiny_bert(labels=3))
        func = trainer_loss(classification_loss, model)
        trained(Trainer, model, rows, tmp_path, accumulation, compute_loss_func=func, max_steps=1)
        ends.append(model)
    model = in_double(tiny_bert(labels=3)).train()
    batch = collate_padded(rows[:4])
    labels = batch.pop("labels")
    F.binary_cross_entropy_with_logits(model(**batch).logits, labels.double()).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.05 * parameter.grad
    assert off(ends[0], model) < 1e-7  # binary cross-entropy of float32 labels
    assert off(ends[1], ends[0]) < 1e-7


def test_ignored_micro_batches_and_evaluation(tmp_path):
    rows = texts()
    rows[2] = {**rows[2], "labels": [-100] * len(rows[2]["labels"])}
    model = in_double(tiny_llama())
    func = trainer_loss(causal_lm_loss, model)
    trained(Trainer, model, rows, tmp_path, 4, compute_loss_func=func)
    assert off(model, reference(in_double(tiny_llama()), rows, shift=True)) < 1e-9
    trainer = Trainer(
        model, arguments(tmp_path), eval_dataset=texts()[:5], data_collator=collate_padded, compute_loss_func=func
    )
    wanted = causal_lm_loss(model.eval(), collate_padded(texts()[:5])).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)


def test_a_loss_that_caps_in_the_model_is_not_capped_twice():
    """The logits are the model's own, whatever its configuration does to them."""
    model = tiny_llama()
    model.config.final_logit_softcapping = 0.5
    ids = torch.tensor([[5, 7, 11, 13]])
    logits = model(ids).logits.index_fill(1, torch.tensor([0]), 0.0)  # a place that looks the same capped or not
    loss = trainer_loss(causal_lm_loss, model)({"logits": logits}, ids)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, :-1], ids[0, 1:]))


class Own:
    """A loss of a user's."""

    def __init__(self, compute):
        self.compute = compute

    def __call__(self, model, batch):
        return self.compute(model, batch)

    def count_targets(self, batch):
        return int((batch["labels"] != -100).sum())


def test_own_losses_of_logits_are_served_and_others_refused():
    model, labels = tiny_bert(labels=3), torch.tensor([2, 0, -100])
    outputs = model(torch.tensor([[5, 7], [3, 2], [11, 13]]))

    def ask(compute):
        return trainer_loss(Own(compute), model)(outputs, labels, torch.tensor(8))

    def plain(model, batch):
        return F.cross_entropy(model(**batch).logits, batch["labels"]), {"part": 1.0}

    torch.testing.assert_close(ask(plain), F.cross_entropy(outputs.logits, labels) * 2 / 8)
    with pytest.raises(ValueError, match=r"Own runs the model more than once, and here it has run already.*with_loss"):
        ask(lambda model, batch: (model(**batch).logits - model(**batch).logits).sum())
    with pytest.raises(ValueError, match="Own reads last_hidden_state of the model's output, and only logits are here"):
        ask(lambda model, batch: getattr(model(**batch), "last_hidden_state", None))
    with pytest.raises(ValueError, match="Own asks for the model's embeddings"):
        ask(lambda model, batch: model.get_input_embeddings())
    with pytest.raises(ValueError, match="Own does not run the model that it is given"):
        ask(lambda model, batch: outputs.logits.sum())
    other = Own(plain)
    other.count_targets = lambda batch: len(batch["weights"])
    with pytest.raises(ValueError, match=r"Own cannot count its targets in the labels alone \('weights'\)"):
        trainer_loss(other, model)(outputs, labels, 8)


def test_bad_input(tmp_path):
    model, ids = tiny_llama(), torch.tensor([[5, 7, 11, 13]])
    outputs, func = model(ids), trainer_loss(causal_lm_loss, model)
    with pytest.raises(ValueError, match='the loss needs a tensor "labels" in the batch, which the Trainer hands on'):
        trained(Trainer, model, [{"input_ids": [5, 7]}] * 12, tmp_path, compute_loss_func=func)
    ignored = [{**row, "labels": [-100] * len(row["labels"])} for row in texts()]
    with pytest.raises(ValueError, match="the step has no target to learn from"):
        trained(Trainer, model, ignored, tmp_path, compute_loss_func=func)
    with pytest.raises(ValueError, match="num_items_in_batch has 2 entries, as under torch's DataParallel"):
        func(outputs, ids, torch.tensor([[3], [3]]))
    with pytest.raises(ValueError, match=r'CausalLMLoss cannot count its targets.*integer "labels" \[B, T\]'):
        func(outputs, ids[0], 3)
    with pytest.raises(TypeError, match="a loss is expected"):
        trainer_loss(CausalLMLoss, model)
    with pytest.raises(TypeError, match="a model, that is a torch module, is expected"):
        trainer_loss(causal_lm_loss, 3)
    torch.testing.assert_close(func(outputs, ids), causal_lm_loss(model, {"input_ids": ids, "labels": ids}))


def regresses():
    model = tiny_bert(labels=3)
    model.config.problem_type = "regression"
    return model


def routes():
    model = tiny_qwen3_moe()
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    ("make", "loss", "sentence"),
    [
        (tiny_bert, causal_lm_loss, "BertForMaskedLM sees the tokens after a place as well"),
        (tiny_t5, causal_lm_loss, "T5ForConditionalGeneration is an encoder-decoder: use sequence_to_sequence_loss"),
        (routes, causal_lm_loss, "output_router_logits=True, which adds a balancing loss"),
        (regresses, classification_loss, 'problem_type="regression" needs float labels'),
    ],
)
def test_a_model_that_the_loss_is_not_for(make, loss, sentence):
    labels = torch.tensor([[-100, 7, 11]])
    with pytest.raises(ValueError, match=sentence):
        trainer_loss(loss, make())({"logits": torch.randn(1, 3, 97)}, labels, 2)
