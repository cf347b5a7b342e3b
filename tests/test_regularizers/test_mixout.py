"""Mixout of one weight: its mean, its gradient, its draws; and the module."""

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune.regularizers.mixout import Mixout, mixout


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_every_entry_is_one_of_two_whose_mean_is_the_weight(p):
    weight, target = draw(11, 13), draw(11, 13, seed=1)
    mixed = mixout(weight, target, p, generator=seeded())
    taken = (mixed - target).abs() < 1e-12  # m = 0: ((1 - p) target) / (1 - p)
    kept = (weight - p * target) / (1 - p)  # m = 1
    torch.testing.assert_close(mixed, torch.where(taken, target, kept), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((1 - p) * kept + p * target, weight, rtol=1e-12, atol=1e-12)
    assert abs(taken.double().mean() - p) < 5 * (p * (1 - p) / taken.numel()) ** 0.5


def test_the_mean_over_draws_is_the_weight():
    weight, target, p, n = draw(5, 7), draw(5, 7, seed=1), 0.3, 4000
    generator = seeded()
    mean = sum(mixout(weight, target, p, generator=generator) for _ in range(n)) / n
    deviation = (weight - target).abs() * (p / (1 - p) / n) ** 0.5
    assert bool(((mean - weight).abs() < 5 * deviation).all())


def test_the_gradient_is_the_mask_over_one_minus_p():
    weight, target = draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    mixed = mixout(weight, target, 0.3, generator=seeded())
    mixed.sum().backward()
    kept = (mixed.detach() - target).abs() > 1e-12
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(weight.grad, kept / torch.tensor(0.7, dtype=torch.float64))


def test_gradcheck_of_weight_and_target():
    weight, target = draw(3, 5).requires_grad_(), draw(3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, u: mixout(w, u, 0.4, generator=seeded()), (weight, target))


def test_every_entry_has_a_draw_of_its_own():
    kept = mixout(torch.ones(31, 37), torch.zeros(31, 37), 0.5, generator=seeded()) != 0
    assert not any(torch.equal(kept[0], row) for row in kept[1:])
    assert not any(torch.equal(kept[:, 0], column) for column in kept.T[1:])


def test_at_p_0_the_weight_itself_comes_back():
    weight = draw(3, 5)
    assert mixout(weight, draw(3, 5, seed=1), 0.0) is weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_weight_stays_to_the_bit(dtype):
    weight = draw(11, 13, dtype=torch.float32).to(dtype)
    mixed = mixout(weight, weight.clone(), 0.7)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, weight)


def test_draws_come_from_the_generator_or_the_global_state():
    weight, target = draw(5, 7), draw(5, 7, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(*[mixout(weight, target, 0.5, generator=seeded()) for _ in range(2)])
    assert torch.equal(torch.get_rng_state(), state)
    first = mixout(weight, target, 0.5)
    assert not torch.equal(mixout(weight, target, 0.5), first)
    torch.set_rng_state(state)
    assert torch.equal(mixout(weight, target, 0.5), first)


def test_autograd_keeps_one_byte_an_entry():
    weight, target, kept = torch.randn(31, 37, requires_grad=True), torch.randn(31, 37), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixout(weight, target, 0.5)
    assert sum(tensor.nbytes for tensor in kept if tensor.ndim) == 31 * 37


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 5), torch.ones(5, 3), 0.5), r"of the weight's shape \[3, 5\]; got \[5, 3\]"),
        ((torch.ones(3), torch.ones(3), 1.0), "p must be a probability from 0 to below 1; got 1.0"),
        ((torch.ones(3), torch.ones(3), -0.1), "p must be a probability from 0 to below 1; got -0.1"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixout(*arguments)


# --- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_is_a_linear_layer_with_a_mixed_weight(bias):
    base = nn.Linear(5, 3, bias=bias).double()
    layer = Mixout(base, 0.5)
    with torch.no_grad():
        base.weight += 1.0
    x = draw(2, 7, 5)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    kept = torch.empty(3, 5, dtype=torch.bool).bernoulli_(0.5)
    mixed = (kept * base.weight + ~kept * layer.target - 0.5 * layer.target) / 0.5
    torch.testing.assert_close(found, x @ mixed.T + (base.bias if bias else 0), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.eval()(x), base(x))
    assert layer.weight is base.weight
    assert layer.bias is base.bias


def test_the_module_over_a_conv1d():
    base = Conv1D(3, 5)
    layer, target = Mixout(base, 0.5, target=torch.zeros(5, 3)), torch.zeros(5, 3)
    x = torch.randn(2, 5)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    torch.testing.assert_close(found, x @ mixout(base.weight, target, 0.5) + base.bias)


def test_the_target_is_in_the_state_and_moves_along():
    layer = Mixout(nn.Linear(5, 3), 0.5)
    target = layer.base.weight.detach().clone()
    with torch.no_grad():
        layer.base.weight += 1.0
    assert torch.equal(layer.target, target)
    other = Mixout(nn.Linear(5, 3), 0.5)
    other.load_state_dict(load(save({name: t.contiguous() for name, t in layer.state_dict().items()})))
    assert torch.equal(other.target, target)
    assert torch.equal(copy.deepcopy(layer).target, target)
    assert layer.to(torch.bfloat16).target.dtype == torch.bfloat16
    assert not layer.target.requires_grad
    assert Mixout(nn.Linear(5, 3).eval(), 0.5).training is False
    assert "p=0.5" in repr(layer)


def test_what_the_module_refuses():
    with pytest.raises(TypeError, match=r"over an nn.Linear or a Conv1D; got a LayerNorm"):
        Mixout(nn.LayerNorm(5), 0.5)
    with pytest.raises(TypeError, match="got a NonDynamicallyQuantizableLinear"):
        Mixout(nn.MultiheadAttention(4, 2).out_proj, 0.5)
    with pytest.raises(ValueError, match=r"shape \[3, 5\]; got \[5, 3\]"):
        Mixout(nn.Linear(5, 3), 0.5, target=torch.ones(5, 3))
    with pytest.raises(ValueError, match="p must be a probability"):
        Mixout(nn.Linear(5, 3), 1.5)
