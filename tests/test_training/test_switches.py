"""Switches of speed and memory: what they do, that they are off again afterwards, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.data.collate import collate_padded
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.switches import autocast, compiled, recomputing
from llmtune.types import Callback

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5}
LOSSES = {"bert": masked_lm_loss, "t5": sequence_to_sequence_loss}


def run(name="llama", *, model=None, callbacks=(), **changed):
    base = {"max_steps": 2, "rows_per_step": 4, "rows_per_micro_batch": 2, "progress": False, "learning_rate": 1e-2}
    more = {"loss": LOSSES[name]} if name in LOSSES else {}
    return TrainingLoop(
        model or MODELS[name](), uneven_rows(11), settings=LoopSettings(**(base | changed)), collate=collate_padded,
        callbacks=callbacks, **more,
    )  # fmt: skip


def gradient(loop):
    loop.accumulate_gradients(loop.micro_batches(0))
    return torch.cat([p.grad.double().flatten() for p in loop.model.parameters() if p.grad is not None])


def off(one, other):
    return float((one - other).norm() / other.norm())


def layers(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_runs_each_block_twice_and_is_off_afterwards(name):
    calls = []
    loop = run(name, activation_checkpointing=True, max_steps=1)
    first = layers(loop.model)[0]
    inside = next(
        module for module in first.modules() if isinstance(module, nn.LayerNorm) or "Norm" in str(type(module))
    )
    inside.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    plain = gradient(run(name))
    with recomputing(loop.model, True):
        loop.model.train()
        found = gradient(loop)
    assert len(calls) == 4, "two micro-batches, each forward twice"
    assert off(found, plain) < 1e-6
    assert not loop.model.is_gradient_checkpointing
    calls.clear()
    loop.fit()
    assert len(calls) == 4
    assert not loop.model.is_gradient_checkpointing
    calls.clear()
    gradient(loop)
    assert len(calls) == 2


def test_recomputing_that_was_on_before_stays_on():
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    run(model=model, activation_checkpointing=True).fit()
    assert model.is_gradient_checkpointing
    run(model=model).fit()
    assert model.is_gradient_checkpointing


def test_recomputing_is_off_after_an_error():
    loop = run(activation_checkpointing=True)
    loop.training_step = None
    with pytest.raises(TypeError):
        loop.fit()
    assert not loop.model.is_gradient_checkpointing


def test_recomputing_draws_the_same_dropout():
    losses = [
        [row["loss"] for row in run(model=tiny_gpt2(dropout=0.3), activation_checkpointing=on, max_steps=3).fit()]
        for on in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)


class Refusing(Plain):
    supports_gradient_checkpointing = False

    def gradient_checkpointing_enable(self):
        raise AssertionError("not reached")


@pytest.mark.parametrize("kind", [Plain, Refusing])
def test_a_model_without_the_switch_is_told_before_anything_is_done(tmp_path, kind):
    settings = LoopSettings(max_steps=2, activation_checkpointing=True, folder=tmp_path / "run")
    with pytest.raises(
        ValueError, match=f"{kind.__name__} has no switch for activation checkpointing, .*set activation"
    ):
        TrainingLoop(kind(), uneven_rows(), settings=settings)
    assert not (tmp_path / "run").exists()


def test_under_an_adapter_the_frozen_embedding_does_not_stop_it():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=6))
    history = run(model=model, activation_checkpointing=True).fit()
    assert all(row["grad_norm"] > 0 for row in history)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_precision_is_that_of_the_forward_pass_alone(precision):
    """Parameters, gradients and optimizer state stay float32; matrices are multiplied as the setting says."""
    seen = []
    loop = run(precision=precision)
    loop.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    loop.accumulate_gradients(loop.micro_batches(0))
    assert set(seen) == {{"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert (
        {p.grad.dtype for p in loop.model.parameters()} == {torch.float32} == {p.dtype for p in loop.model.parameters()}
    )
    loop.fit()
    assert {v.dtype for state in loop.optimizer.state.values() for v in state.values()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("precision", "allowed"), [("bf16", 3e-2), ("fp16", 4e-3)])
def test_reduced_precision_is_near_the_whole_one(precision, allowed):
    wanted = gradient(run())
    loop = run(precision=precision)
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=precision == "fp16")
    found = gradient(loop)
    assert 1e-6 < off(found, wanted) < allowed


def test_autocast_of_float32_is_none():
    with autocast(torch.device("cpu"), "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(torch.device("cpu"), "bf16"):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.slow
def test_a_compiled_run_is_compiled_and_near_the_plain_one():
    """A backend that counts what it is given: the model's graphs do pass through it."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    loop = run(max_steps=3)
    loop.called_model = torch.compile(loop.model, backend=counting)
    losses = [row["loss"] for row in loop.fit()]
    assert sum(graphs) > 50
    assert losses == pytest.approx([row["loss"] for row in run(max_steps=3).fit()], rel=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_compiles(name):
    torch._dynamo.reset()
    wanted = gradient(run(name))
    assert off(gradient(run(name, compile="aot_eager")), wanted) < 1e-6
    torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_too():
    torch._dynamo.reset()
    loop = run(compile=True, max_steps=3)
    losses = [row["loss"] for row in loop.fit()]
    assert losses == pytest.approx([row["loss"] for row in run(max_steps=3).fit()], rel=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiling_leaves_names_and_the_model_as_they_are(tmp_path):
    torch._dynamo.reset()
    loop = run(compile="aot_eager", max_steps=1, folder=tmp_path)
    names = [name for name, _ in loop.model.named_parameters()]
    loop.fit()
    assert [name for name, _ in loop.model.named_parameters()] == names
    assert type(loop.model).__name__ == "LlamaForCausalLM"
    assert len(run(max_steps=1, folder=tmp_path).fit(resume=True)) == 1
    torch._dynamo.reset()


def test_compiled_by_name():
    model = tiny_llama()
    assert compiled(model, False) is model
    assert compiled(model, "aot_eager")._orig_mod is model
    with pytest.raises(ValueError, match=r"compile must be True, False or one of .*inductor.*; got 'inducter'"):
        compiled(model, "inducter")
    with pytest.raises(ValueError, match="got 'inducter'"):
        run(compile="inducter")


@pytest.mark.parametrize("fused", [True, False, None])
def test_fused_is_asked_of_the_optimizer(fused):
    loop = run(fused=fused, max_steps=3)
    losses = [row["loss"] for row in loop.fit()]
    assert loop.optimizer.defaults["fused"] is (fused is not False)
    assert losses == pytest.approx([row["loss"] for row in run(fused=False, max_steps=3).fit()], rel=1e-5)


@pytest.mark.slow
def test_all_switches_together():
    class Look(Callback):
        def on_step_end(self, loop, metrics):
            assert loop.model.is_gradient_checkpointing

    torch._dynamo.reset()
    both = {"precision": "bf16", "activation_checkpointing": True, "compile": "aot_eager", "fused": True}
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=6, dropout=0.1))
    history = run(model=model, callbacks=[Look()], spike_factor=3.0, on_bad_step="skip", **both).fit()
    assert all(math.isfinite(row["loss"]) for row in history)
    torch._dynamo.reset()
