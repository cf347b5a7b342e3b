"""Training rows and held-out rows are measured in one and the same way, and nothing of the run changes."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from ranks_cases import make as make_case
from ranks_worker import run as in_processes
from runs import Stop, StreamOf, equal, settings, weights
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import ClassificationLoss, classification_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training import AverageWeights, EarlyStopping, GeneralizationGap, KeepBest, LogTo, TrainingLoop

NAMES = {
    "eval_loss", "eval_train_loss", "eval_loss_gap", "eval_nll", "eval_train_nll", "eval_nll_gap", "eval_accuracy",
    "eval_train_accuracy", "eval_accuracy_gap", "eval_calibration_error", "eval_train_calibration_error",
}  # fmt: skip


class Table(nn.Module):
    """A classifier that looks its answer up by the first token; in train mode noise drowns it."""

    def __init__(self, logits):
        super().__init__()
        self.answers = nn.Embedding.from_pretrained(logits, freeze=False)
        self.noise = nn.Dropout(0.9)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.noise(self.answers(input_ids[:, 0])))


def first_token_rows(tokens, classes):
    return [{"input_ids": [t], "labels": c} for t, c in zip(tokens, classes, strict=True)]


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def test_a_model_that_memorised_its_rows_shows_the_gap():
    """Trained tokens: the right one of 5 classes with p = 3/4. Others: p = 2/5 for class 0, which is right every fifth
    time, and never what it says for class 3."""
    table = torch.full((29, 5), math.log(0.15))
    table[:, 0] = math.log(0.4)
    for token in range(7):
        table[token] = math.log(0.0625)
        table[token, token % 5] = math.log(0.75)
    train = first_token_rows(range(7), [t % 5 for t in range(7)])
    held_out = first_token_rows(range(7, 17), [t % 5 for t in range(7, 17)])
    loop = TrainingLoop(
        Table(table), train, settings=settings(rows_per_micro_batch=3), collate=collate, loss=classification_loss,
        eval_data=held_out, callbacks=[GeneralizationGap()],
    )  # fmt: skip
    found = loop.evaluate()
    train_loss, loss = -math.log(0.75), -(math.log(0.4) + 4 * math.log(0.15)) / 5
    wanted = {
        "train_loss": train_loss, "loss": loss, "loss_gap": loss - train_loss, "train_nll": train_loss, "nll": loss,
        "nll_gap": loss - train_loss, "train_accuracy": 1.0, "accuracy": 0.2, "accuracy_gap": 0.8,
        "train_calibration_error": 0.25, "calibration_error": 0.2,
    }  # fmt: skip
    assert found == {f"eval_{name}": pytest.approx(value, rel=1e-6) for name, value in wanted.items()}
    assert found.keys() == NAMES


def masked(rows):
    batch = collate_padded(rows)
    return batch | {"input_ids": batch["input_ids"].where(batch["labels"] % 3 != 1, torch.tensor(3))}


def tokens(seed=0):
    config = BertConfig(vocab_size=97, hidden_size=22, num_hidden_layers=2, num_attention_heads=2, num_labels=97)
    torch.manual_seed(seed)
    model = BertForTokenClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return model


KINDS = {  # model, loss, collate, shift
    "causal, padded": (tiny_llama, causal_lm_loss, collate_padded, 1),
    "causal, packed": (tiny_llama, causal_lm_loss, collate_packed, 1),
    "masked": (tiny_bert, masked_lm_loss, masked, 0),
    "encoder-decoder": (tiny_t5, sequence_to_sequence_loss, collate_padded, 0),
    "token classes": (tokens, classification_loss, collate_padded, 0),
}


def by_hand(model, rows, collate, shift):
    """Row by row in float64: the mean of -log p, the accuracy, and the calibration error in 15 bins."""
    exact = type(model)(model.config).double().eval()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    nll, sure, right = [], [], []
    for row in rows:
        batch = collate([row])
        labels = batch["labels"]
        given = {k: v for k, v in batch.items() if k != "labels" or model.config.is_encoder_decoder}
        with torch.no_grad():
            p = exact(**given).logits.softmax(-1)
        for place in range(shift, labels.shape[1]):
            label = int(labels[0, place])
            if label != -100:
                here = p[0, place - shift]
                nll.append(-here[label].log().item())
                sure.append(here.max().item())
                right.append(float(here.argmax() == label))
    error = 0.0
    for m in range(15):
        inside = [i for i, c in enumerate(sure) if m / 15 < c <= (m + 1) / 15]
        error += abs(sum(right[i] - sure[i] for i in inside))
    n = len(nll)
    return {"nll": sum(nll) / n, "accuracy": sum(right) / n, "calibration_error": error / n}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 64])
def test_both_sides_are_the_formula_whatever_the_batches(kind, size):
    """11 rows in batches that do not divide them, one of them without a target."""
    model, loss, collate, shift = KINDS[kind]
    rows, train = uneven_rows(11), uneven_rows(5, seed=1)
    rows[4] = rows[4] | {"labels": [-100] * 7}
    model = model()
    loop = TrainingLoop(
        model, train, settings=settings(rows_per_micro_batch=size), collate=collate, loss=loss, eval_data=rows,
        callbacks=[GeneralizationGap()],
    )  # fmt: skip
    found = loop.evaluate()
    assert found.keys() == NAMES
    held_out, trained = by_hand(model, rows, collate, shift), by_hand(model, train, collate, shift)
    for name, value in held_out.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert found[f"eval_train_{name}"] == pytest.approx(trained[name], rel=1e-5, abs=1e-6), name
    assert found["eval_loss"] == pytest.approx(held_out["nll"], rel=1e-5)
    assert found["eval_train_loss"] == pytest.approx(trained["nll"], rel=1e-5)
    assert found["eval_loss_gap"] == found["eval_loss"] - found["eval_train_loss"]
    assert found["eval_accuracy_gap"] == found["eval_train_accuracy"] - found["eval_accuracy"]


def test_a_head_makes_logits_of_labelled_rows_alone():
    made = []
    rows = [row | {"labels": [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]} for row in uneven_rows(7)]
    loop = TrainingLoop(tiny_llama(), rows, settings=settings(), eval_data=rows, callbacks=[GeneralizationGap()])
    loop.model.lm_head.register_forward_hook(lambda m, i, o: made.append(o.shape[:-1].numel()))
    loop.evaluate()
    assert max(made) <= 4


def test_label_smoothing_is_on_both_sides_of_the_loss_and_on_neither_of_nll():
    rows, train = uneven_rows(5), uneven_rows(5, seed=1)
    plain, smooth = (
        TrainingLoop(
            tiny_llama(), train, settings=settings(), eval_data=rows, loss=CausalLMLoss(label_smoothing=e),
            callbacks=[GeneralizationGap()],
        ).evaluate()
        for e in (0.0, 0.3)
    )  # fmt: skip
    assert {n: v for n, v in plain.items() if "loss" not in n} == {n: v for n, v in smooth.items() if "loss" not in n}
    turned = TrainingLoop(
        tiny_llama(), rows, settings=settings(), eval_data=train, loss=CausalLMLoss(label_smoothing=0.3)
    ).evaluate()  # fmt: skip
    assert smooth["eval_train_loss"] == pytest.approx(turned["eval_loss"], rel=1e-6)
    assert smooth["eval_train_loss"] > plain["eval_train_loss"]


def test_the_sample_is_drawn_from_the_seed_and_stays():
    """Of tokens 0 ... 28, one a row: which were looked at?"""

    def looked_at(seed, rows=None):
        seen = []
        loop = TrainingLoop(
            Table(torch.zeros(34, 3)), first_token_rows(range(29), [0] * 29), settings=settings(seed=seed),
            collate=collate, loss=classification_loss, eval_data=first_token_rows(range(29, 34), [1] * 5),
            callbacks=[GeneralizationGap(rows=rows, predictions=None)],
        )  # fmt: skip
        loop.model.answers.register_forward_pre_hook(lambda m, i: seen.extend(i[0].tolist()))
        before = torch.get_rng_state()
        loop.evaluate()
        assert torch.equal(torch.get_rng_state(), before)
        first, seen[:] = [token for token in seen if token < 29], []
        loop.evaluate()
        assert [token for token in seen if token < 29] == first
        return first

    first = looked_at(0)
    assert len(set(first)) == len(first) == 5, "as many as eval_data has"
    assert looked_at(1) != first
    assert looked_at(0, rows=29) == list(range(29))
    assert len(set(looked_at(0, rows=13))) == 13


def gpt2_loop(folder=None, callbacks=(), **changed):
    run = settings(folder=folder, save_every=folder and 1, max_steps=6, eval_every=2, learning_rate=1e-2, **changed)
    return TrainingLoop(
        tiny_gpt2(dropout=0.3), uneven_rows(13), settings=run, callbacks=callbacks, eval_data=uneven_rows(5, seed=1),
    )  # fmt: skip


def test_the_run_is_the_run_without_it_and_a_resumed_one_the_whole(tmp_path):
    bare, whole = gpt2_loop(), gpt2_loop(tmp_path / "whole", [GeneralizationGap()])
    bare.fit(), whole.fit()
    assert equal(weights(bare.model), weights(whole.model))
    assert bare.history.column("eval_loss") == whole.history.column("eval_loss")
    for stop in (1, 2):
        folder = tmp_path / f"cut-{stop}"
        with pytest.raises(KeyboardInterrupt):
            gpt2_loop(folder, [GeneralizationGap(), Stop(stop)]).fit()
        resumed = gpt2_loop(folder, [GeneralizationGap()])
        resumed.fit(resume=True)
        assert equal(weights(resumed.model), weights(whole.model))
        for name in NAMES:
            assert resumed.history.column(name) == whole.history.column(name)


@pytest.mark.parametrize("first", [True, False])
def test_whatever_listens_has_its_numbers_in_any_order(first, tmp_path):
    logged = []
    listen = [
        EarlyStopping("eval_calibration_error", patience=1, min_delta=1.0), KeepBest("eval_accuracy", mode="max"),
        LogTo(lambda values, step: logged.append(values)),
    ]  # fmt: skip
    loop = gpt2_loop(tmp_path / "run", [GeneralizationGap(), *listen] if first else [*listen, GeneralizationGap()])
    loop.fit()
    assert loop.step == 4, "the second evaluation is not better by 1"
    assert loop.stopped.startswith("eval_calibration_error got no better than")
    assert listen[1].best_value == max(loop.history.column("eval_accuracy"))
    assert [NAMES <= values.keys() for values in logged if "eval_loss" in values] == [True, True]
    with (tmp_path / "run" / "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["eval_loss"]]
    assert [float(row["eval_loss_gap"]) for row in rows] == loop.history.column("eval_loss_gap")


def test_training_rows_are_measured_with_the_averaged_weights_too():
    loop = gpt2_loop(callbacks=[AverageWeights(None, final=False), GeneralizationGap()])
    loop.fit()
    trained = weights(loop.model)
    loop.callbacks[0].ema.apply()
    average = TrainingLoop(
        loop.model, uneven_rows(13), settings=settings(), eval_data=uneven_rows(5, seed=1),
        callbacks=[GeneralizationGap()],
    )  # fmt: skip
    found = average.evaluate()
    assert not equal(weights(loop.model), trained)
    assert {name: loop.history[-1][name] for name in NAMES} == pytest.approx(found, rel=1e-5)


def test_predictions_of_ones_own_and_none():
    """Even against odd tokens, from the sums of their probabilities."""

    def parity(model, batch):
        p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].softmax(-1)
        labels = batch["labels"][:, 1:]
        return torch.stack([p[..., 0::2].sum(-1), p[..., 1::2].sum(-1)], -1).log(), labels.where(
            labels == -100, labels % 2
        )

    rows = uneven_rows(5)
    own, none = (
        TrainingLoop(
            tiny_llama(), uneven_rows(7, seed=1), settings=settings(), collate=collate_padded, eval_data=rows,
            callbacks=[GeneralizationGap(predictions=p, rows=uneven_rows(3))],
        ).evaluate()
        for p in (parity, None)
    )  # fmt: skip
    assert own.keys() == NAMES
    assert none.keys() == {"eval_loss", "eval_train_loss", "eval_loss_gap"}
    assert none == {name: own[name] for name in none}
    right, n = 0, 0
    for row in rows:
        logits, targets = parity(tiny_llama(), collate_padded([row]))
        right += int((logits.argmax(-1) == targets)[targets != -100].sum())
        n += int((targets != -100).sum())
    assert own["eval_accuracy"] == right / n


def test_a_stream_needs_rows():
    def loop(watch):
        return TrainingLoop(
            tiny_llama(), StreamOf(), settings=settings(eval_every=1), eval_data=uneven_rows(3), callbacks=[watch]
        )

    for rows in (None, 3):
        with pytest.raises(ValueError, match=r"train_data is a stream, .* give it rows=, a list of training rows"):
            loop(GeneralizationGap(rows=rows)).fit()
    history = loop(GeneralizationGap(rows=uneven_rows(3))).fit()
    assert history.column("eval_loss_gap") == [0.0] * 3, "the very rows of eval_data"


def test_what_does_not_fit_is_told():
    for rows in (0, True, -1):
        with pytest.raises(ValueError, match="rows must be a whole number of at least 1"):
            GeneralizationGap(rows=rows)
    with pytest.raises(ValueError, match="rows is empty"):
        GeneralizationGap(rows=[])
    with pytest.raises(TypeError, match="rows must be rows with a length and an index"):
        GeneralizationGap(rows={"input_ids": [1]})
    with pytest.raises(TypeError, match='predictions must be "labels", None, or a function'):
        GeneralizationGap(predictions="logits")
    with pytest.raises(ValueError, match="bins must be a whole number"):
        GeneralizationGap(bins=0)

    def loop(watch=None, kind=TrainingLoop, eval_data=None, **more):
        return kind(
            tiny_llama(), uneven_rows(5), settings=settings(), callbacks=[watch or GeneralizationGap()],
            eval_data=uneven_rows(3) if eval_data is None else eval_data, **more,
        )  # fmt: skip

    with pytest.raises(ValueError, match="GeneralizationGap goes by the evaluations, and there will be none"):
        TrainingLoop(tiny_llama(), uneven_rows(5), settings=settings(), callbacks=[GeneralizationGap()]).fit()
    with pytest.raises(ValueError, match="is to look at 7 training rows, and train_data has 5"):
        loop(GeneralizationGap(rows=7)).fit()
    none = [row | {"labels": [-100] * len(row["labels"])} for row in uneven_rows(3)]
    with pytest.raises(ValueError, match="no row of the training rows that GeneralizationGap looks at has a target"):
        loop(GeneralizationGap(rows=none)).evaluate()

    class Part(TrainingLoop):
        name = "accuracy"

        def compute_loss(self, model, batch):
            return self.loss(model, batch), {self.name: 0.5}

    class Miscounts(TrainingLoop):
        def count_targets(self, batch):
            return len(batch["labels"])

    class Floats(TrainingLoop):
        def prepare_batch(self, batch):
            return batch | {"labels": batch["labels"].float()}

        def compute_loss(self, model, batch):
            return model.lm_head.weight.sum()

    with pytest.raises(ValueError, match='measures "accuracy", which the loss reports as a part of its own'):
        loop(kind=Part).evaluate()
    found = loop(GeneralizationGap(predictions=None), kind=Part).evaluate()
    assert found["eval_train_accuracy"] == found["eval_accuracy"] == 0.5
    Part.name = "loss_gap"
    with pytest.raises(ValueError, match='GeneralizationGap measures "loss_gap", which the evaluation reports already'):
        loop(kind=Part).evaluate()
    with pytest.raises(ValueError, match=r"finds predictions at \d+ labels of a batch, and the loss counts 1 targets"):
        loop(kind=Miscounts).evaluate()
    with pytest.raises(ValueError, match=r"at integer labels, .* got torch.float32 \[1, \d+\]: give it predictions="):
        loop(kind=Floats).evaluate()


def test_a_class_of_minus_100_is_no_prediction():
    """-100 among classes [B] is no prediction."""
    loop = TrainingLoop(
        Table(torch.eye(5)), first_token_rows(range(5), range(5)), settings=settings(), collate=collate,
        loss=ClassificationLoss(label_smoothing=0.1), callbacks=[GeneralizationGap()],
        eval_data=first_token_rows([0, 1, 2], [0, -100, 3]),
    )  # fmt: skip
    found = loop.evaluate()
    assert found["eval_accuracy"] == 0.5
    assert found["eval_nll"] == pytest.approx(math.log(math.e + 4) - 0.5)


def watched(rank, sharded):
    loop = make_case("full", sharded=sharded, max_steps=4, eval_every=2)
    loop.callbacks += [GeneralizationGap(rows=7)]
    history = loop.fit()
    return [{name: row[name] for name in NAMES} for row in history if "eval_loss" in row]


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_measure_what_one_does(sharded, tmp_path):
    alone, found = watched(0, False), in_processes(2, watched, sharded, folder=tmp_path)
    assert found[0] == found[1]
    for mine, theirs in zip(alone, found[0], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-6)
