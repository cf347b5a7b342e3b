"""Adapters as a run meets them: compiled, checkpointed, on the meta device, and where no gradient arrives."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from llmtune.adapters import (
    AdaLoRA,
    DoRA,
    LoRA,
    adapter_parameters,
    attach,
    check_gradients,
    detach,
    load,
    merge,
    save,
    set_active,
    unmerge,
)
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training import LoopSettings, TrainingLoop

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def inputs(model):
    return {"input_ids": IDS} | ({"labels": IDS} if model.config.model_type == "t5" else {})


def moved(model, name="default"):
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoRA(rank=3, alpha=5),
        DoRA(rank=3, alpha=5),
        LoRA(rank=2, alpha=3, lora_bias=True),
        AdaLoRA(alpha=5, total_steps=9, initial_rank=3, target_rank=2),
        LoRA(rank=3, alpha=5, targets=(), target_parameters=["0.weight", "2.weight"]),
    ],
)
def test_another_scaling_or_other_tensors_compile_nothing_anew(config, tmp_path):
    model = nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 7))
    attach(model, config)
    save(moved(model), tmp_path)
    saved = copy.deepcopy(model)
    torch._dynamo.reset()  # what another case has made dynamic would hide a recompilation here
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(5, 11)
    compiled(x)
    first = counter.frame_count
    moved(model)
    model[0].scaling, model[2].scaling = 0.7, 1.9
    torch.testing.assert_close(compiled(x), model(x))
    model[0].scaling, model[2].scaling = saved[0].scaling, saved[2].scaling
    load(model, tmp_path)
    torch.testing.assert_close(compiled(x), saved(x))
    assert counter.frame_count == first


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5])
def test_checkpointing_needs_nothing_put_in_place_and_changes_no_gradient(make):
    model = make()
    attach(model, LoRA(rank=3, alpha=5))
    moved(model).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(**inputs(model)).logits.square().mean().backward()
        check_gradients(model)
        found.append([p.grad.clone() for p in adapter_parameters(model).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("config", [LoRA(rank=3, alpha=5, targets=["q_proj", "embed_tokens"]), DoRA(rank=3, alpha=5)])
def test_a_model_without_memory_takes_adapters_and_gets_it_later(config, tmp_path):
    model = tiny_llama()
    attach(model, config)
    save(moved(model), tmp_path)
    with torch.device("meta"):
        empty = tiny_llama()
    report = attach(empty, config)
    assert str(report.modules) == str(attach(tiny_llama(), config).modules)
    assert all(p.is_meta for p in empty.parameters())
    assert empty(IDS.to("meta")).logits.shape == (2, 11, 97)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), strict=True)
    for module, other in zip(empty.modules(), model.modules(), strict=True):
        for name, buffer in other.named_buffers(recurse=False):  # those that no state dict holds
            getattr(module, name).copy_(buffer)
    assert torch.equal(empty(IDS).logits, model(IDS).logits)
    detach(empty)
    assert not any("lora" in name for name in empty.state_dict())


class TakesWeight(nn.Module):
    """As Mamba does: the weight of `dt` is taken, and `dt` never called."""

    def __init__(self):
        super().__init__()
        self.inner, self.dt = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.inner(x) @ self.dt.weight.T


def test_a_parameter_that_no_gradient_reaches_is_named():
    model = TakesWeight()
    attach(model, LoRA(rank=2, alpha=3, targets=["inner", "dt"]))
    moved(model)
    model(torch.randn(2, 5)).sum().backward()
    with pytest.raises(
        ValueError, match=r'adapter "default": no gradient has reached dt\.lora_a, dt\.lora_b of 4 .*takes'
    ):
        check_gradients(model)
    detach(model)
    attach(model, LoRA(rank=2, alpha=3, targets=["inner"]))
    with pytest.raises(ValueError, match=r"none of its parameters has one"):
        check_gradients(model)
    model(torch.randn(2, 5)).sum().backward()
    check_gradients(model)
    attach(model, LoRA(rank=2, alpha=3, targets=["inner"]), "second")
    set_active(model, "default")
    model(torch.randn(2, 5)).sum()
    with pytest.raises(ValueError, match=r'adapter "second": .*inner\.lora_a.* it is switched off: switch it on'):
        check_gradients(model)


def test_the_loop_finds_out_in_its_first_step():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3), "first")
    attach(model, LoRA(rank=2, alpha=3), "second")
    set_active(model, "first")
    rows = [{"input_ids": list(range(3, 17)), "labels": list(range(3, 17))}]
    for parameter in adapter_parameters(model, "first").values():
        parameter.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loop = TrainingLoop(model, rows, settings=LoopSettings(max_steps=2, rows_per_step=1))
    with pytest.raises(ValueError, match=r'adapter "second": .* it is switched off'):
        loop.fit()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_copy_lives_by_itself():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    other = copy.deepcopy(moved(model))
    tuned = model(IDS).logits
    merge(model)
    moved(other)
    assert not torch.equal(other(IDS).logits, tuned)
    unmerge(model)
    assert torch.equal(model(IDS).logits, tuned)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, tuned)
