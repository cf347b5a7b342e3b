"""The sharpness-aware loop: exact however the step is cut, under clipping, fp16, LoRA and a resume."""

import math

import pytest
import torch
from runs import Stop, equal, settings, weights
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError, NonFiniteError
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.training import SharpnessAware, TrainingLoop
from llmtune.types import Callback

RHO = 0.2


class Aware(SharpnessAware):
    rho = RHO


def made(model=None, kind=Aware, callbacks=(), penalties=(), **changed):
    return kind(
        model or tiny_gpt2(), uneven_rows(11), settings=settings(**{"rows_per_step": 8} | changed),
        collate=collate_padded, callbacks=callbacks, penalties=penalties,
    )  # fmt: skip


def gradient(loop):
    metrics = loop.accumulate_gradients(loop.micro_batches(0))
    return {name: p.grad.clone() for name, p in loop.model.named_parameters() if p.grad is not None}, metrics


def adapted():
    model = tiny_llama()
    torch.manual_seed(0)
    attach(model, LoRA(rank=3, alpha=6, dropout=0.1))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape) * p.requires_grad)
    return model


def pull(model):
    return 0.5 * model.transformer.wte.weight.square().sum()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("size", [8, 3, 1])
def test_the_gradient_is_that_of_the_whole_step_uphill(size, adaptive):
    model = tiny_gpt2().double()
    plain = made(model, TrainingLoop, penalties=[pull])
    g, here = gradient(plain)
    named, before = dict(model.named_parameters()), weights(model)
    stretch = {name: named[name].detach().abs() + 0.01 if adaptive else torch.ones_like(g[name]) for name in g}
    norm = math.sqrt(sum(float((stretch[name] * g[name]).square().sum()) for name in g))
    with torch.no_grad():
        for name in g:
            named[name].add_(RHO * stretch[name] ** 2 * g[name] / norm)
    wanted, there = gradient(plain)
    model.load_state_dict(before, strict=False)
    loop = made(model, rows_per_micro_batch=size, penalties=[pull])
    loop.adaptive = adaptive
    found, metrics = gradient(loop)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)
    assert equal(weights(model), before)
    assert metrics["loss"] == pytest.approx(float(here["loss"]), rel=1e-6)
    assert metrics["penalty"] == pytest.approx(float(here["penalty"]), rel=1e-6)
    assert float(metrics["sharpness"]) == pytest.approx(float(there["loss"] - here["loss"]), abs=1e-5)
    assert float(metrics["sharpness"]) > 0
    assert metrics["targets"] == here["targets"]


def test_a_run_is_the_run_of_the_closed_form_with_clipping():
    model, wanted = tiny_gpt2().double(), tiny_gpt2().double()
    loop = made(model, max_steps=1, clip_norm=0.05, schedule="constant", fused=False)
    row = loop.fit()[0]
    other = made(wanted, clip_norm=0.05)
    g, _ = gradient(other)
    norm = float(nn.utils.get_total_norm(list(g.values())))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-9)
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=1e-3, weight_decay=0.0)
    for p in wanted.parameters():
        p.grad *= 0.05 / (norm + 1e-6)
    optimizer.step()
    for (name, p), (_, q) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


def test_under_fp16_the_direction_is_that_of_the_unscaled_gradient():
    found = {}
    for precision in ("float32", "fp16"):
        loop = made(tiny_gpt2(), precision=precision)
        if precision == "fp16":
            loop.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        g, metrics = gradient(loop)
        found[precision] = torch.cat([value.flatten() for value in g.values()])
        assert metrics.get("overflow", 0) == 0
        assert float(metrics["sharpness"]) > 0
    off = (found["fp16"] - found["float32"]).norm() / found["float32"].norm()
    assert float(off) < 1e-2


@pytest.mark.parametrize("uphill_alone", [False, True])
def test_under_fp16_an_overflow_is_passed_over(uphill_alone):
    class Overflowing(Aware):
        calls = 0

        def compute_loss(self, model, batch):
            loss, self.calls = super().compute_loss(model, batch), self.calls + 1
            if self.step == 1 and (self.calls == 4 or not uphill_alone):  # two passes a step
                model.lm_head.weight.register_hook(lambda g: g * math.inf if self.step == 1 else g)
            return loss

    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, loop, metrics):
            self.seen.append(weights(loop.model))

    watch = Watch()
    loop = made(kind=Overflowing, precision="fp16", callbacks=[watch])
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    history = loop.fit()
    assert [row["overflow"] for row in history] == [0.0, 1.0, 0.0]
    assert equal(watch.seen[0], watch.seen[1])
    assert not equal(watch.seen[1], watch.seen[2])
    assert (history[1]["sharpness"] == 0.0) == (not uphill_alone), "where the first pass overflows nothing moves"
    assert loop.scaler.get_scale() == 256.0


def test_a_gradient_that_is_not_finite_stops_the_run_as_without():
    class Spoiled(Aware):
        def compute_loss(self, model, batch):
            loss = super().compute_loss(model, batch)
            model.transformer.wte.weight.register_hook(lambda g: g * math.nan)
            return loss

    loop = made(kind=Spoiled)
    before = weights(loop.model)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient is not finite, first in transformer\.wte"):
        loop.fit()
    assert equal(weights(loop.model), before)


@pytest.mark.parametrize("passes", [1, 2])
def test_weights_are_put_back_where_a_pass_fails_and_memory_may_run_out_in_either(passes):
    class Short(Aware):
        calls = 0

        def compute_loss(self, model, batch):
            self.calls += 1
            if self.calls == passes:
                raise torch.OutOfMemoryError("seeded")
            return super().compute_loss(model, batch)

    short, plain = made(kind=Short, max_steps=1), made(max_steps=1, rows_per_micro_batch=4)
    short.fit()
    plain.fit()
    assert short.rows_per_micro_batch == 4
    assert equal(weights(short.model), weights(plain.model))


def test_under_lora_a_resumed_run_ends_with_the_same_bits(tmp_path):
    ends, base = [], weights(adapted())
    for folder, stops in (("whole", (None,)), ("cut", (1, None))):
        for stop in stops:
            watch = [] if stop is None else [Stop(stop)]
            loop = made(adapted(), max_steps=4, folder=tmp_path / folder, save_every=1, callbacks=watch)
            if stop is None:
                loop.fit(resume=True)
            else:
                with pytest.raises(KeyboardInterrupt):
                    loop.fit(resume=True)
        ends.append((weights(loop.model), [row["loss"] for row in loop.history]))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    changed = {name for name, value in ends[0][0].items() if not torch.equal(value, base[name])}
    assert changed == {name for name, p in loop.model.named_parameters() if p.requires_grad}


def test_a_checkpoint_holds_no_second_copy_and_another_rho_is_refused(tmp_path):
    loop = made(folder=tmp_path, max_steps=1)
    loop.fit()
    state = loop.state_dict()
    assert state["sharpness"] == {"rho": RHO, "adaptive": False}
    assert state["optimizer"].keys() == made(kind=TrainingLoop).state_dict()["optimizer"].keys()
    assert {name for entry in state["optimizer"]["state"].values() for name in entry} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    other = made(folder=tmp_path, max_steps=1)
    other.rho = 0.3
    with pytest.raises(CheckpointError, match=r"sharpness-aware with \{'rho': 0.2.* and is so with \{'rho': 0.3"):
        other.fit(resume=True)


def test_callbacks_hear_of_the_gradient_that_is_applied_and_of_no_other():
    heard = []

    class Hear(Callback):
        def on_task_gradients(self, loop):
            heard.append(loop.model.transformer.wte.weight.grad.clone())

    loop = made(callbacks=[Hear()], max_steps=2)
    g, _ = gradient(loop)
    assert len(heard) == 1
    assert torch.equal(heard[0], g["transformer.wte.weight"])
    loop.fit()
    assert len(heard) == 3


def test_it_goes_before_another_method():
    class Doubled(TrainingLoop):
        def compute_loss(self, model, batch):
            return 2 * super().compute_loss(model, batch)

    class Both(SharpnessAware, Doubled):
        rho = RHO

    one, _ = gradient(made(tiny_gpt2().double()))
    two, _ = gradient(made(tiny_gpt2().double(), kind=Both))
    for name, value in one.items():
        torch.testing.assert_close(two[name], 2 * value, rtol=1e-8, atol=1e-12)


def test_dropout_draws_the_same_masks_and_the_next_step_the_same_as_without():
    masks, after = [], []
    model = tiny_gpt2(dropout=0.3).train()
    model.transformer.drop.register_forward_hook(lambda module, given, made: masks.append(made == 0))
    for kind in (Aware, TrainingLoop):
        torch.manual_seed(3)
        gradient(made(model, kind, rows_per_micro_batch=4))
        after.append(torch.get_rng_state())
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert torch.equal(*after)


def test_refuses_a_rho_that_moves_nothing():
    loop = made()
    loop.rho = 0.0
    with pytest.raises(ValueError, match=r"rho must be a number above 0; got 0.0"):
        loop.fit()
