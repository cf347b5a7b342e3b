"""Adapters beside, under and after one another, and what is saved of them: where one could quietly undo another."""

import copy
import os

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    AdapterStack,
    BitFit,
    Bottleneck,
    DoRA,
    LayerNormTuning,
    LoRA,
    adapter_names,
    adapter_parameters,
    attach,
    load,
    merge,
    save,
    unmerge,
)
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def output(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def moved(model, name="default"):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("first", [BitFit(), LoRA(rank=2, alpha=3, train_bias="all")])
def test_a_copy_of_a_norm_does_not_leave_out_its_trained_bias(make, first):
    model = make()
    attach(model, first, "biases")
    before = output(moved(model, "biases"))
    with pytest.raises(ValueError, match=r'already belongs to adapter "biases", and a copy of the norm'):
        attach(model, LayerNormTuning(), "norms")
    assert adapter_names(model) == ["biases"]
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("untie", [False, True])
def test_a_tie_within_a_module_trained_whole_is_merged_under_both_names(untie):
    model = tiny_bert()
    attach(model, LoRA(rank=2, alpha=4, targets=["query"], train_modules=["cls"]))
    tuned = output(moved(model))
    if not untie:
        with pytest.raises(ValueError, match="tied weights"):  # the decoder's weight is the embeddings' as well
            merge(model)
    merge(model, untie=True)
    torch.testing.assert_close(output(model), tuned, rtol=2e-5, atol=2e-5)
    unmerge(model)
    assert torch.equal(output(model), tuned)


def test_a_trained_bias_means_the_same_in_another_model_and_after_a_merge(tmp_path):
    model = moved(attached(tiny_bert(labels=3), BitFit()))
    other = attached(tiny_bert(3, labels=3), BitFit())
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), output(model))
    stack = AdapterStack(tiny_bert(labels=3))
    stack.start(BitFit(), "a")
    moved(stack.model, "a")
    stack.merge_and_start(BitFit(), "b", keep_base=True)
    moved(stack.model, "b")
    stack.save(tmp_path)
    again = AdapterStack.load(tiny_bert(labels=3), tmp_path)
    assert torch.equal(output(again.model), output(stack.model))


def attached(model, config):
    attach(model, config)
    return model


def kinds(model):
    return sorted(adapter_parameters(model).items())


def test_dtypes_come_back_as_they_were_trained(tmp_path):
    model = moved(attached(tiny_llama().to(torch.bfloat16), DoRA(rank=2, alpha=3, dtype=torch.bfloat16)))
    save(model, tmp_path / "dora")
    again = tiny_llama().to(torch.bfloat16)
    load(again, tmp_path / "dora")
    assert [p.dtype for p in adapter_parameters(again).values()] == [
        p.dtype for p in adapter_parameters(model).values()
    ]
    assert torch.equal(output(again), output(model))
    wide = moved(attached(tiny_llama(), Bottleneck(size=3)).double())
    save(wide, tmp_path / "bottleneck")
    again = tiny_llama().double()
    load(again, tmp_path / "bottleneck")
    assert {p.dtype for p in adapter_parameters(again).values()} == {torch.float64}
    assert torch.equal(output(again), output(wide))


def test_a_save_that_is_cut_off_is_never_taken_for_a_whole_one(tmp_path, monkeypatch):
    model = moved(attached(tiny_llama(), LoRA(rank=2, alpha=4)))
    save(model, tmp_path)
    other = moved(attached(tiny_llama(), LoRA(rank=2, alpha=64)))
    calls, replace = [], os.replace

    def cut_off(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            save(other, tmp_path)
    with pytest.raises(ValueError, match=r"was cut off between its two files.*: save it again"):
        load(tiny_llama(), tmp_path)
    save(other, tmp_path)
    again = tiny_llama()
    load(again, tmp_path)
    assert torch.equal(output(again), output(other))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_forward_derivatives_and_traces_see_the_formula():
    layer = moved_layer = attached(nn.Sequential(nn.Linear(5, 3)), LoRA(rank=2, alpha=4)).double()
    with torch.no_grad():
        layer[0].lora_b.normal_()
    x, tangent = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        out = moved_layer(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(out).tangent
    weight = layer[0].weight + layer[0].deltas()["weight"]
    torch.testing.assert_close(found, tangent @ weight.T)
    traced = torch.jit.trace(copy.deepcopy(layer), x)
    torch.testing.assert_close(traced(2 * x), layer(2 * x))
