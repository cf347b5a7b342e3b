"""DoRA: its norms, its start, its gradients, what it refuses."""

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    DoRA,
    DoRALinear,
    LoRA,
    LoRALinear,
    TrainedBias,
    adapter_parameters,
    attach,
    merge,
    row_norms,
)
from llmtune.testing.models import tiny_llama


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-6)]
)
def test_norms_are_those_of_the_written_out_weight(dtype, tolerance):
    weight, a, b = draw(7, 11, seed=0).to(dtype), draw(3, 11, seed=1, dtype=torch.float32), draw(7, 3, seed=2)
    a, b = (x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in (a, b))
    truth = torch.linalg.vector_norm(weight.double() + 1.7 * b.double() @ a.double(), dim=1)
    found = row_norms(weight, a, b, 1.7)
    assert found.dtype == a.dtype
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=0)


def test_a_row_of_zeros_gives_no_nan():
    base = nn.Linear(5, 3)
    with torch.no_grad():
        base.weight[1] = 0.0
    layer = DoRALinear(base, rank=2, alpha=4)
    x = draw(7, 5, seed=0, dtype=torch.float32)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in (layer.lora_b, layer.magnitude))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_are_those_of_the_formula_with_the_norm_held(bias, hooked):
    base = nn.Linear(11, 7, bias=bias, dtype=torch.float64).requires_grad_(False)
    if hooked:  # the way that calls the base
        base.register_forward_hook(lambda module, args, out: None)
    layer = DoRALinear(base, rank=3, alpha=5, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate((layer.lora_a, layer.lora_b, layer.magnitude)):
            p.add_(0.3 * draw(*p.shape, seed=i))
    x = draw(2, 5, 11, seed=9).requires_grad_()
    whole = base.weight + layer.scaling * layer.lora_b @ layer.lora_a
    ratio = layer.magnitude / torch.linalg.vector_norm(whole, dim=1).detach()
    truth = x @ (ratio[:, None] * whole).T + (base.bias if bias else 0.0)
    torch.testing.assert_close(layer(x), truth, rtol=1e-12, atol=1e-12)
    leaves = [x, layer.lora_a, layer.lora_b, layer.magnitude]
    pull = draw(2, 5, 7, seed=10)
    for got, want in zip(
        torch.autograd.grad(layer(x), leaves, pull), torch.autograd.grad(truth, leaves, pull), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_what_dora_cannot_do_is_told():
    with pytest.raises(ValueError, match="lora_bias has no place in DoRA"):
        DoRA(rank=2, alpha=3, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias has no place in DoRA"):
        DoRALinear(nn.Linear(5, 3), rank=2, alpha=3, lora_bias=True)
    with pytest.raises(TypeError, match='adapter "default" stands before it: attach DoRA first'):
        DoRALinear(LoRALinear(nn.Linear(5, 3), rank=2, alpha=3), rank=2, alpha=3)
    with pytest.raises(TypeError, match="embed_tokens is an embedding: DoRA goes to linear layers and Conv1D"):
        attach(tiny_llama(), DoRA(rank=2, alpha=3, targets=["embed_tokens"]))
    base = nn.Linear(5, 3)
    base.weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        TypeError,
        match="DoRA needs a base with a floating weight, or one that bitsandbytes has quantised; Linear has neither",
    ):
        DoRALinear(base, rank=2, alpha=3)


def test_attaching_names_the_magnitudes():
    model = tiny_llama()
    attach(model, DoRA(rank=2, alpha=3, targets=["q_proj"]))
    names = {name.rsplit(".", 1)[-1] for name in adapter_parameters(model)}
    assert names == {"lora_a", "lora_b", "magnitude"}


def test_norms_stay_exact_under_autocast():
    layer = DoRALinear(nn.Linear(131, 127), rank=3, alpha=5)
    nn.init.normal_(layer.lora_b)
    truth = layer.norms()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.norms(), truth)


def test_the_magnitudes_gradient_is_summed_in_its_own_dtype():
    base = nn.Linear(11, 7, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = DoRALinear(base, rank=3, alpha=5)
    x = draw(4001, 11, seed=1, dtype=torch.bfloat16)
    layer(x).sum().backward()
    plain = x.double() @ base.weight.double().T
    truth = plain.sum(0) / torch.linalg.vector_norm(base.weight.double(), dim=1)
    assert float((layer.magnitude.grad.double() - truth).abs().max()) < 0.01 * float(plain.abs().sum(0).max())


def moved(model, name):
    with torch.no_grad():
        for i, parameter in enumerate(adapter_parameters(model, name).values()):
            parameter.add_(0.2 * draw(*parameter.shape, seed=i).to(parameter.dtype))


IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def test_nothing_is_merged_into_the_weights_under_dora():
    model = tiny_llama().double()
    attach(model, DoRA(rank=2, alpha=3, targets=["q_proj"]), "a")
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj", "v_proj"]), "b")
    for name in ("a", "b"):
        moved(model, name)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with pytest.raises(ValueError, match=r'"a" is made for the weights as they are.*merge "a" first'):
            merge(model, "b")
        assert torch.equal(model(input_ids=IDS).logits, before)
        for name in ("a", "b"):
            merge(model, name)
            torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
        layer = model.model.layers[0].self_attn.q_proj.base
        with pytest.raises(ValueError, match='adapter "a" is merged: what DoRA changes is known again after unmerge'):
            layer.deltas()


def test_trained_biases_before_dora_add_up_and_hide_no_other_adapter():
    base = nn.Linear(11, 7, dtype=torch.float64).requires_grad_(False)
    chain = TrainedBias(TrainedBias(base, adapter_name="a"), adapter_name="b")
    layer = DoRALinear(chain, rank=3, alpha=5, dtype=torch.float64, adapter_name="b")
    x = draw(5, 11, seed=1)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        for i, p in enumerate((layer.lora_b, layer.magnitude, chain.trained_bias, chain.base.trained_bias)):
            p.add_(draw(*p.shape, seed=i))
    bias = base.bias + sum(one.deltas()["bias"] for one in (chain, chain.base))
    torch.testing.assert_close(layer(x), x @ (base.weight + layer.deltas()["weight"]).T + bias)
    inner = LoRALinear(base, rank=3, alpha=5, adapter_name="a")
    with pytest.raises(TypeError, match='adapter "a" stands before it: attach DoRA first'):
        DoRALinear(TrainedBias(inner, adapter_name="b"), rank=3, alpha=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_an_untrained_dora_changes_no_weight(dtype):
    model = tiny_llama()
    weights = [p.clone() for p in model.parameters()]
    attach(model, DoRA(rank=2, alpha=3, dtype=dtype))
    merge(model, keep_base=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
