"""What a machine can do, and what of it a run reports."""

import pytest
import torch
from torch import nn

from llmtune.data.collate import collate_padded
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.training.flops import count_flops
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.utilisation import Utilisation, matmul_ceiling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ceiling_is_measured_and_draws_nothing(dtype):
    state = torch.get_rng_state()
    assert matmul_ceiling("cpu", dtype, seconds=0.05) > 1e6
    assert torch.equal(torch.get_rng_state(), state)


def test_the_ceiling_is_the_best_size_of_those_there_is_time_for(monkeypatch):
    speeds, tried = {256: 3e9, 512: 7e9, 1024: 5e9, 2048: 11e9}, set()

    def timed(one, other, repeats):
        tried.add(one.shape[0])
        assert one.shape == other.shape
        assert one.dtype == torch.bfloat16
        return repeats * 2 * one.shape[0] ** 3 / speeds[one.shape[0]]

    monkeypatch.setattr("llmtune.training.utilisation._timed", timed)
    monkeypatch.setattr("llmtune.training.utilisation.time.perf_counter", lambda: 0.0)
    assert matmul_ceiling("cpu", torch.bfloat16, seconds=60.0) == pytest.approx(11e9)
    assert tried == set(speeds)
    tried.clear()
    assert matmul_ceiling("cpu", torch.bfloat16, seconds=1.0) == pytest.approx(7e9)
    assert tried == {256, 512, 1024}, "three products of 2048 would take 7 s at the best speed so far"


def run(callbacks, **changed):
    settings = LoopSettings(
        **({"max_steps": 4, "rows_per_step": 4, "rows_per_micro_batch": 2, "progress": False} | changed)
    )
    model = tiny_gpt2(dropout=0.3)
    return TrainingLoop(model, uneven_rows(), settings=settings, callbacks=callbacks, collate=collate_padded)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_reports_and_is_the_same(precision, monkeypatch):
    plain, watched = run([], precision=precision), run([Utilisation()], precision=precision)
    asked = []
    monkeypatch.setattr(
        "llmtune.training.utilisation.matmul_ceiling", lambda device, dtype: asked.append(dtype) or 1e12
    )
    plain.fit()
    history = watched.fit()
    assert asked == [torch.bfloat16 if precision == "bf16" else torch.float32]
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
    callback = watched.callbacks[0]
    batch = watched.micro_batches(0)[0]
    watched.model.train()
    with torch.autocast("cpu", enabled=precision == "bf16"):
        flops = count_flops(lambda: watched.compute_loss(watched.model, batch), watched.model.parameters())
    assert callback.flops_per_token == flops / int(batch["attention_mask"].sum())
    for row in history:
        assert row["tokens_per_second"] == row["tokens"] / row["seconds"]
        speed = callback.flops_per_token * row["tokens"] / row["seconds"]
        assert row["flops_utilisation"] == pytest.approx(speed / 1e12)
        assert row["peak_memory"] > 2**20


def test_buffers_that_a_forward_pass_changes_are_the_same(monkeypatch):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()
            self.config = self.inner.config
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, **batch):
            self.calls += self.training
            return self.inner(**batch)

    monkeypatch.setattr("llmtune.training.utilisation.matmul_ceiling", lambda device, dtype: 1e12)

    class Plain(TrainingLoop):
        def compute_loss(self, model, batch):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return nn.functional.cross_entropy(
                model(**inputs).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            )

    settings = LoopSettings(max_steps=3, rows_per_step=4, progress=False)
    counts = []
    for callbacks in ([], [Utilisation()]):
        loop = Plain(Counted(), uneven_rows(), settings=settings, callbacks=callbacks, collate=collate_padded)
        loop.fit()
        counts.append(int(loop.model.calls))
    assert counts[0] == counts[1]


def test_batches_without_tokens_are_refused():
    class Vectors(TrainingLoop):
        def micro_batches(self, step):
            return [{"pixels": torch.ones(2, 3), "kind": torch.ones(2)}]

    loop = Vectors(tiny_llama(), uneven_rows(), settings=LoopSettings(max_steps=2, progress=False))
    loop.model.train()
    with pytest.raises(ValueError, match='the batches have no "input_ids": they have pixels, kind'):
        Utilisation().on_fit_start(loop)
