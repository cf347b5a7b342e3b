"""Means over the evaluation rows, of which only sums and counts are kept."""

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.errors import NonFiniteError
from llmtune.losses.classification import classification_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama
from llmtune.training.evaluation import mean_by_name
from llmtune.training.loop import TrainingLoop
from llmtune.training.randomness import random_state
from llmtune.training.settings import LoopSettings


def run(model=None, rows=None, *, loop=TrainingLoop, collate=collate_padded, loss=None, data=None, **changed):
    settings = LoopSettings(**({"max_steps": 2, "rows_per_step": 4, "progress": False} | changed))
    more = {} if loss is None else {"loss": loss}
    return loop(
        model or tiny_llama(), data or uneven_rows(), settings=settings, collate=collate, eval_data=rows, **more
    )  # fmt: skip


def mean_in_float64(model, rows):
    """Row by row, with the model in float64 and the formula written out."""
    exact, total, count = type(model)(model.config).double().eval(), 0.0, 0
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            likelihood = exact(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        for place, label in enumerate(labels[1:].tolist()):
            if label != -100:
                total, count = total - likelihood[place, label].item(), count + 1
    return total / count


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 64])
@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_it_is_the_mean_over_targets_whatever_the_batches(size, collate):
    """11 rows in batches that do not divide them, among them rows without a target and a batch of such alone."""
    rows = uneven_rows(11)
    for place in (0, 4, 5):
        rows[place] = rows[place] | {"labels": [-100] * len(rows[place]["labels"])}
    loop = run(rows=rows, rows_per_micro_batch=size, collate=collate)
    assert loop.evaluate() == {"eval_loss": pytest.approx(mean_in_float64(loop.model, rows), rel=1e-6)}


@pytest.mark.parametrize(("precision", "allowed"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_autocast_is_on_and_near(precision, allowed):
    rows, seen = uneven_rows(5), []
    loop = run(rows=rows, precision=precision)
    loop.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    wanted = mean_in_float64(loop.model, rows)
    assert loop.evaluate()["eval_loss"] == pytest.approx(wanted, rel=allowed)
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}


def test_classification_with_parts_of_its_own():
    """Accuracy as a part of the loss, counted by hand."""

    class WithAccuracy(TrainingLoop):
        def compute_loss(self, model, batch):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            right = (model(**inputs).logits.argmax(-1) == batch["labels"]).float().mean()
            return self.loss(model, batch), {"accuracy": right}

    rows = [{"input_ids": row["input_ids"], "label": place % 3} for place, row in enumerate(uneven_rows(7))]
    model = tiny_bert(labels=3)

    def collate(some):
        batch = collate_padded([{"input_ids": row["input_ids"]} for row in some])
        return batch | {"labels": torch.tensor([row["label"] for row in some])}

    loop = run(
        model, rows, data=rows, loop=WithAccuracy, collate=collate, loss=classification_loss, rows_per_micro_batch=2
    )
    right = 0
    for row in rows:
        with torch.no_grad():
            right += int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax() == row["label"])
    assert loop.evaluate()["eval_accuracy"] == pytest.approx(right / 7)


@pytest.mark.slow
def test_only_sums_and_counts_are_kept():
    """No output of the head of one batch is alive when the next one is made."""
    alive, most = [], []

    class Whole(TrainingLoop):
        def compute_loss(self, model, batch):
            gc.collect()
            most.append(sum(reference() is not None for reference in alive))
            return model(**batch).loss, {"first": 1.0}

    loop = run(rows=uneven_rows(9), loop=Whole, rows_per_micro_batch=1)
    loop.model.lm_head.register_forward_hook(lambda m, i, o: alive.append(weakref.ref(o)))
    loop.evaluate()
    assert len(alive) == 9
    assert most == [0] * 9


@pytest.mark.slow
def test_memory_stays_flat_over_many_batches():
    """Every tensor that is alive, at the third batch and at the last."""
    counts, calls = {}, []

    class Counting(TrainingLoop):
        def eval_step(self, batch):
            calls.append(1)
            if len(calls) in (3, 40):
                gc.collect()
                counts[len(calls)] = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
            return super().eval_step(batch)

    run(rows=uneven_rows(5) * 8, loop=Counting, rows_per_micro_batch=1).evaluate()
    assert counts[3] == counts[40] > 0


def test_an_eval_step_of_ones_own_adds_its_sums():
    class Own(TrainingLoop):
        def eval_step(self, batch):
            sums, counts = super().eval_step(batch)
            longest = batch["attention_mask"].sum(-1).max()
            return sums | {"rows": len(batch["input_ids"]), "length": longest}, counts | {"rows": 1, "length": 1}

    loop = run(rows=uneven_rows(5), loop=Own, rows_per_micro_batch=2)
    means = loop.evaluate()
    assert means["eval_rows"] == pytest.approx(5 / 3)
    assert means["eval_length"] == pytest.approx((4 + 6 + 7) / 3)
    assert means["eval_loss"] == pytest.approx(mean_in_float64(loop.model, uneven_rows(5)), rel=1e-6)


def test_nothing_is_changed_by_it():
    loop = run(tiny_gpt2(dropout=0.5), uneven_rows(5), collate=noisy)
    loop.model.train()
    loop.model.transformer.h[0].eval()
    modes = [module.training for module in loop.model.modules()]
    before, step = random_state(), loop.step
    first = loop.evaluate()
    after = random_state()
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in ("torch", "numpy"))
    assert torch.equal(before["python"], after["python"])
    assert modes == [module.training for module in loop.model.modules()]
    assert loop.step == step
    assert all(parameter.grad is None for parameter in loop.model.parameters())
    torch.rand(3), np.random.rand(2), random.random()
    assert loop.evaluate() == first, "it draws the same every time"


def noisy(rows):
    """Draws from all three, as careless augmentation does."""
    shift = int(torch.randint(0, 7, ())) + int(np.random.randint(7)) + random.randrange(7)
    return collate_padded([row | {"input_ids": [(token + shift) % 97 for token in row["input_ids"]]} for row in rows])


def test_rows_drawn_at_random_do_not_depend_on_the_batches():
    class Random:
        def __len__(self):
            return 7

        def __getitem__(self, place):
            row = uneven_rows(7)[place]
            shift = int(torch.randint(0, 7, ())) + int(np.random.randint(7)) + random.randrange(7)
            return row | {"input_ids": [(token + shift) % 97 for token in row["input_ids"]]}

    means = [run(rows=Random(), rows_per_micro_batch=size).evaluate()["eval_loss"] for size in (1, 2, 3, 64)]
    assert means == pytest.approx([means[0]] * 4, rel=1e-6)


def test_it_is_the_same_at_every_step_but_for_the_weights():
    loop = run(tiny_gpt2(dropout=0.5), uneven_rows(5), collate=noisy, learning_rate=0.0, eval_every=1, max_steps=3)
    history = loop.fit()
    assert len({row["eval_loss"] for row in history}) == 1


def test_what_cannot_be_evaluated_is_told():
    with pytest.raises(ValueError, match="nothing to evaluate on: give the loop eval_data"):
        run().evaluate()
    with pytest.raises(ValueError, match="eval_data is empty: there are no rows"):
        run(rows=[])
    none = [row | {"labels": [-100] * len(row["labels"])} for row in uneven_rows(3)]
    with pytest.raises(ValueError, match=r"no row of eval_data has a target: every label is ignored \(-100\)"):
        run(rows=none).evaluate()
    loop = run(rows=uneven_rows(3))
    with torch.no_grad():
        loop.model.lm_head.weight[3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 0: the evaluation gives \{'loss': nan\}"):
        loop.evaluate()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loss_in_another_dtype_is_summed_no_worse(dtype):
    """Values that bfloat16 holds exactly, with counts whose products it does not."""

    class Plain:
        def __call__(self, model, batch):
            return batch["x"].mean().to(dtype) + 0 * model.weight.sum().to(dtype)

        def count_targets(self, batch):
            return int(batch["n"][0])

    rows = [{"x": torch.tensor(1.5), "n": 257}, {"x": torch.tensor(0.25), "n": 3}]
    loop = TrainingLoop(
        nn.Linear(1, 1), rows, settings=LoopSettings(max_steps=1, rows_per_micro_batch=1, progress=False), loss=Plain(),
        eval_data=rows, collate=lambda some: {n: torch.stack([torch.as_tensor(row[n]) for row in some]) for n in "xn"},
    )  # fmt: skip
    assert loop.evaluate()["eval_loss"] == pytest.approx((257 * 1.5 + 3 * 0.25) / 260, rel=1e-7)


def test_sums_of_several_shares():
    shares = [{"a": [6.0, 2.0], "b": [1.0, 1.0]}, {"a": [3.0, 1.0], "c": [5.0, 0.0]}, {}]
    assert mean_by_name(shares) == {"a": 3.0, "b": 1.0}
    assert mean_by_name([{}, {}]) == {}
