"""Stochastic depth: the mean over draws, which layers and rows are left out, and that nothing is left behind."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from traces import LOSSES, MODELS, assert_same, batch_of, equal, logits_of, traces, trained

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.regularizers.stochastic_depth import drop_residual, stochastic_depth
from llmtune.testing.models import tiny_llama


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, hidden_states, extra=None):
        out = hidden_states + torch.tanh(self.linear(hidden_states))
        return out if extra is None else (out, extra)


class Stack(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.double()

    def forward(self, x, keywords=False, extra=None):
        for layer in self.layers:
            x = layer(hidden_states=x) if keywords else layer(x, extra)
            x = x if extra is None else x[0]
        return x


def values(rows=7):
    x = torch.randn(rows, 3, 5, dtype=torch.float64)
    return x, x + torch.randn_like(x)


@pytest.mark.parametrize("p", [0.2, 0.75])
def test_a_row_is_left_out_or_scaled_and_the_mean_is_the_block(p):
    x, y = values(1009)
    found = drop_residual(x, y, p)
    out = (found == x).flatten(1).all(1)
    torch.testing.assert_close(found[~out], (x + (y - x) / (1 - p))[~out], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p * x + (1 - p) * (x + (y - x) / (1 - p)), y, rtol=1e-12, atol=1e-12)
    assert abs(float(out.double().mean()) - p) < 5 * (p * (1 - p) / 1009) ** 0.5


def test_a_batch_draws_once():
    x, y = values()
    seen = {int((drop_residual(x, y, 0.5, unit="batch") == x).flatten(1).all(1).sum()) for _ in range(53)}
    assert seen == {0, 7}


def test_no_gradient_and_no_nan_comes_from_what_is_left_out():
    x, y = values(31)
    y = y.requires_grad_()
    found = drop_residual(x, y, 0.5, generator=torch.Generator().manual_seed(3))
    out = (found == x).flatten(1).all(1)
    found.sum().backward()
    assert torch.equal(y.grad, (~out).double()[:, None, None].expand_as(y) / 0.5)
    broken = torch.where(out[:, None, None], torch.inf, y.detach())
    assert bool(drop_residual(x, broken, 0.5, generator=torch.Generator().manual_seed(3)).isfinite().all())
    assert drop_residual(x, y, 0.0) is y


@pytest.mark.parametrize(("mode", "chances"), [("linear", [0.2, 0.4, 0.6]), ("uniform", [0.6] * 3)])
def test_the_stack_is_the_formula(mode, chances):
    model, x = Stack().train(), torch.randn(17, 5, dtype=torch.float64)
    with stochastic_depth(model, 0.6, mode=mode) as shown:
        torch.manual_seed(5)
        found = model(x)
    assert list(shown) == ["layers.0", "layers.1", "layers.2"]
    assert list(shown.values()) == pytest.approx(chances)
    torch.manual_seed(5)
    expected = x
    for layer, p in zip(model.layers, chances, strict=True):
        kept = (torch.rand(17) >= p).double()[:, None]
        expected = expected + kept / (1 - p) * torch.tanh(layer.linear(expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_tuples_and_keywords_pass():
    model, x = Stack().train(), torch.randn(17, 5, dtype=torch.float64)
    with stochastic_depth(model, 0.6):
        found = []
        for knobs in ({}, {"keywords": True}, {"extra": torch.ones(2)}):
            torch.manual_seed(5)
            found.append(model(x, **knobs))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        assert model.layers[0](x, extra=3)[1] == 3


def test_each_stack_of_an_encoder_decoder_is_counted_by_itself():
    with stochastic_depth(MODELS["t5"](), 0.3) as shown:
        assert shown == {
            "encoder.block.0": pytest.approx(0.15), "encoder.block.1": pytest.approx(0.3),
            "decoder.block.0": pytest.approx(0.15), "decoder.block.1": pytest.approx(0.3),
        }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_train_mode_alone_and_no_trace_afterwards(name):
    model = MODELS[name]()
    plain, before = logits_of(name, model), traces(model.train())
    with stochastic_depth(model, 0.5):
        assert list(model.state_dict()) == list(before[1])
        assert len({float(logits_of(name, model).sum()) for _ in range(8)}) > 1
        assert torch.equal(logits_of(name, model.eval()), plain)
        LOSSES[name](model.train(), batch_of(name)).backward()
    assert_same(before, traces(model))
    assert torch.equal(logits_of(name, model), plain)
    with pytest.raises(KeyError), stochastic_depth(model, 0.5):
        raise KeyError
    assert_same(before, traces(model))


@pytest.mark.parametrize("name", MODELS)
def test_rows_in_which_all_layers_stay_out_skip_the_stack(name):
    """With p near 1 all layers are left out, and a row's hidden states go through unchanged."""
    model, seen = MODELS[name]().train(), {}
    with stochastic_depth(model, 1 - 1e-9, mode="uniform") as shown:
        for place in shown:
            layer = model.get_submodule(place)
            layer.register_forward_hook(lambda m, args, out, place=place: seen.update({place: (args[0], out)}))
        model(**batch_of(name))
    assert len(seen) == (4 if name == "t5" else 2)
    for given, out in seen.values():
        assert torch.equal(given, out[0] if isinstance(out, tuple) else out)


def test_under_adapters():
    model = tiny_llama().train()
    attach(model, LoRA(rank=2, alpha=4))
    before = traces(model)
    with stochastic_depth(model, 0.5) as shown:
        assert list(shown) == ["model.layers.0", "model.layers.1"]
        assert len({float(logits_of("llama", model).sum()) for _ in range(8)}) > 1
    assert_same(before, traces(model))


def test_recomputation_draws_the_same():
    model, x = Stack().train(), torch.randn(17, 5, dtype=torch.float64)
    found = []
    with stochastic_depth(model, 0.6):
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            model.zero_grad()
            torch.manual_seed(5)
            run(x).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_a_compiled_model_that_ran_before_drops_inside_alone():
    model, x = Stack().train(), torch.randn(17, 5, dtype=torch.float64)
    run = torch.compile(model, backend="aot_eager")
    plain = run(x)
    with stochastic_depth(model, 0.6):
        torch.manual_seed(5)
        found = run(x)
        torch.manual_seed(5)
        torch.testing.assert_close(found, model(x))
    assert not torch.equal(found, plain)
    assert torch.equal(run(x), plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_runs_of_one_seed_are_equal_and_so_is_a_resumed_one(tmp_path, checkpointing):
    context = partial(stochastic_depth, p=0.5)
    knobs = {"activation_checkpointing": checkpointing}
    whole = trained(tiny_llama(), context, **knobs)
    assert equal(whole, trained(tiny_llama(), context, **knobs))
    assert not equal(whole, trained(tiny_llama(), partial(stochastic_depth, p=0.0), **knobs))
    trained(tiny_llama(), context, folder=tmp_path / "run", stop=2, **knobs)
    assert equal(whole, trained(tiny_llama(), context, folder=tmp_path / "run", resume=True, **knobs))


def widening():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(5, 7)])
    return model.layers[0], model


def test_what_is_refused():
    for knobs, message in (
        ({"p": 1.0}, "p must be a probability from 0 to below 1; got 1.0"),
        ({"p": 0.1, "mode": "log"}, 'mode must be "linear" or "uniform"; got \'log\''),
        ({"p": 0.1, "unit": "token"}, 'unit must be "row" or "batch"; got \'token\''),
    ):
        with pytest.raises(ValueError, match=message):
            stochastic_depth(Stack(), **knobs).__enter__()
    with pytest.raises(ValueError, match=r"goes by layer numbers .* and this Linear has none"):
        stochastic_depth(nn.Linear(3, 5), 0.1).__enter__()
    layer, model = widening()
    with stochastic_depth(model, 0.1), pytest.raises(ValueError, match=r"the layer layers.0 must give hidden states"):
        layer(torch.ones(2, 5))
    with stochastic_depth(model, 0.1), pytest.raises(ValueError, match="on this model already"):
        stochastic_depth(model, 0.2).__enter__()
    with pytest.raises(ValueError, match=r"the shape it was given, \[2, 3\], to be left out; got \[3, 2\]"):
        drop_residual(torch.ones(2, 3), torch.ones(3, 2), 0.1)
    with pytest.raises(ValueError, match='unit must be "row" or "batch"'):
        drop_residual(torch.ones(2), torch.ones(2), 0.1, unit="token")
