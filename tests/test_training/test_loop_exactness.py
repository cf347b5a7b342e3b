"""The gradient of a step is one, whatever the loss, the split and the switches."""

import pytest
import torch

from llmtune.adapters import LoRA, attach
from llmtune.data.collate import collate_padded
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.switches import recomputing


def settings(**changed):
    return LoopSettings(**({"max_steps": 3, "rows_per_step": 4, "progress": False, "learning_rate": 1e-3} | changed))


class RandomLoss:
    """An ordinary mean over targets of something irregular: a weight a token, a power, a part to log."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.rand(97, generator=generator)
        self.power, self.shift = 1 + 2 * float(torch.rand((), generator=generator)), seed % 2

    def __call__(self, model, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, labels = model(**inputs, use_cache=False).logits.float(), batch["labels"]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != -100
        loss = -logits.log_softmax(-1)[kept].gather(1, labels[kept][:, None])[:, 0]
        values = self.weights[labels[kept]].to(loss) * (loss + 0.1) ** self.power
        return values.mean(), {"largest": logits[kept].max(-1).values.mean()}

    def count_targets(self, batch):
        return int((batch["labels"][:, 1:] if self.shift else batch["labels"]).ne(-100).sum())


def with_adapter(model):
    torch.manual_seed(0)
    attach(model, LoRA(rank=3, alpha=6))
    return model


def gradient_of(loss, size, *, model, collate=collate_padded, rows=None, **changed):
    run = settings(rows_per_step=11, rows_per_micro_batch=size, **changed)
    loop = TrainingLoop(model, uneven_rows(11) if rows is None else rows, settings=run, loss=loss, collate=collate)
    if changed.get("precision") == "fp16":
        loop.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with recomputing(loop.model, run.activation_checkpointing):
        metrics = loop.accumulate_gradients(loop.micro_batches(0))
    flat = torch.cat([p.grad.double().flatten() for p in loop.model.parameters() if p.grad is not None])
    return flat, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_gradient_is_one_for_any_loss_that_is_a_mean(seed, make):
    """11 rows by 1, 2, 3, 5, 7 and 11, against each row by itself in float64, weighted by its targets."""
    loss, rows = RandomLoss(seed), uneven_rows(11, seed=seed)
    exact, total = make().double(), 0
    for row in rows:
        batch = collate_padded([row])
        count = loss.count_targets(batch)
        if count:
            (loss(exact, batch)[0] * count).backward()
            total += count
    wanted = torch.cat([p.grad.flatten() / total for p in exact.parameters()])
    found = [gradient_of(loss, size, model=make(), rows=rows) for size in (1, 2, 3, 5, 7, 11)]
    for gradient, metrics in found:
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-6
        assert metrics == pytest.approx(found[0][1], rel=1e-5)
        assert metrics["targets"] == total


@pytest.mark.parametrize(
    ("changed", "allowed"),
    [
        ({"precision": "bf16"}, 2e-2), ({"precision": "fp16"}, 3e-3), ({"activation_checkpointing": True}, 1e-6),
        ({"activation_checkpointing": True, "precision": "bf16"}, 2e-2),
        pytest.param({"compile": "aot_eager"}, 1e-6, marks=pytest.mark.slow),
        pytest.param({"compile": "aot_eager", "precision": "bf16"}, 2e-2, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("adapter", [False, True])
def test_the_gradient_is_one_under_every_switch(changed, allowed, adapter):
    """Under bf16 and fp16 to the rounding of the products, each micro-batch's being rounded by itself."""
    torch._dynamo.reset()
    make = (lambda: with_adapter(tiny_llama())) if adapter else tiny_llama
    wanted, _ = gradient_of(causal_lm_loss, 11, model=make())
    for size in (1, 3, 11):
        found, _ = gradient_of(causal_lm_loss, size, model=make(), **changed)
        assert float((found - wanted).norm() / wanted.norm()) < allowed
    if "compile" in changed:
        torch._dynamo.reset()


def test_micro_batches_without_targets_count_for_nothing():
    """Not even where their loss is NaN: they are not run."""
    rows = uneven_rows(11)
    for place in (0, 3, 4):
        rows[place] = rows[place] | {"labels": [-100] * len(rows[place]["labels"])}
    one, metrics = gradient_of(causal_lm_loss, 1, model=tiny_llama(), rows=rows)
    all_together, wanted = gradient_of(causal_lm_loss, 11, model=tiny_llama(), rows=rows)
    assert float((one - all_together).norm() / all_together.norm()) < 1e-6
    assert metrics == pytest.approx(wanted, rel=1e-5)
