"""The gates and the feed-forward layer against their formulas in float64."""

import math

import pytest
import torch

from llmtune.layers import FeedForward, geglu, swiglu


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return x * 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


PLAIN = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": lambda x: x * (x > 0), "silu": silu}
GATED = {"swiglu": silu, "geglu": gelu, "geglu_tanh": gelu_tanh}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
def test_it_is_the_formula_with_its_gradients(activation, bias):
    layer, hidden = FeedForward(5, 7, activation=activation, bias=bias).double(), draw(2, 3, 5).requires_grad_()

    def linear(part, x):
        out = torch.einsum("...e,fe->...f", x, part.weight)
        return out + part.bias if bias else out

    if activation in GATED:
        inner = GATED[activation](linear(layer.gate, hidden)) * linear(layer.up, hidden)
    else:
        assert layer.gate is None
        inner = PLAIN[activation](linear(layer.up, hidden))
    wanted, got = linear(layer.down, inner), layer(hidden)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    leaves, weights = [hidden, *layer.parameters()], draw(*got.shape, seed=1)
    assert len(leaves) == 1 + (2 + (activation in GATED)) * (1 + bias)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, weights), torch.autograd.grad(wanted, leaves, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_the_gates_are_their_formulas():
    gate, up = draw(3, 5), draw(3, 5, seed=1)
    torch.testing.assert_close(swiglu(gate, up), silu(gate) * up, rtol=0, atol=1e-14)
    torch.testing.assert_close(geglu(gate, up), gelu(gate) * up, rtol=0, atol=1e-14)
    torch.testing.assert_close(geglu(gate, up, approximate="tanh"), gelu_tanh(gate) * up, rtol=0, atol=1e-14)
    assert (gelu(gate) - gelu_tanh(gate)).abs().max() > 1e-5
    for function in (swiglu, geglu):
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        assert torch.autograd.gradcheck(function, leaves)


def test_dropout_acts_before_the_last_layer_in_training_only():
    layer, hidden = FeedForward(5, 7, dropout=1.0), torch.randn(2, 3, 5)
    assert torch.equal(layer(hidden), layer.down.bias.expand(2, 3, 5))
    assert not torch.allclose(layer.eval()(hidden), layer.down.bias.expand(2, 3, 5))


def test_what_does_not_fit_is_refused():
    for knobs, sentence in (
        ({"activation": "swigul"}, r'no activation "swigul", only "gelu".* Did you mean "swiglu"'),
        ({"activation": ""}, r'no activation "", only .*"geglu_tanh"\.$'),
        ({"inner": 0}, "inner must be positive, got 0"),
        ({"width": -3}, "width must be positive, got -3"),
        ({"dropout": -0.1}, "dropout must be between 0 and 1, got -0.1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            FeedForward(**({"width": 5, "inner": 7} | knobs))
    with pytest.raises(ValueError, match=r"hidden must be \[\.\.\., 5\], got shape \(2, 3\)"):
        FeedForward(5, 7)(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"gate and up must have one shape, got \(2, 3\) and \(3,\)"):
        swiglu(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"gate and up must have one shape, got \(2, 3\) and \(2, 1\)"):
        geglu(torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match='approximate must be "none" or "tanh", got "erf"'):
        geglu(torch.ones(2), torch.ones(2), approximate="erf")
