"""Noise on weights: its distribution, which weights get it, and that they come back bit for bit."""

import pytest
import torch
from torch import nn
from traces import MODELS, assert_same, batch_of, equal, traces

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.regularizers.weight_noise import noisy_start, noisy_weights, weight_noise
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def deviation(weight):
    values = weight.double().flatten().tolist()
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_the_noise_is_the_draw_times_the_scale(kind, relative):
    weight = 3 * torch.randn(11, 13, dtype=torch.float64) + 2
    found = weight_noise(weight, 0.2, kind=kind, relative=relative, generator=seeded())
    empty = torch.empty(11, 13, dtype=torch.float64)
    draw = torch.rand if kind == "uniform" else torch.randn
    unit = draw(11, 13, dtype=torch.float64, generator=seeded()) - (0.5 if kind == "uniform" else 0.0)
    torch.testing.assert_close(found, unit * 0.2 * (deviation(weight) if relative else 1), rtol=1e-12, atol=1e-15)
    assert found.shape == empty.shape


@pytest.mark.parametrize(("kind", "variance"), [("uniform", 0.2**2 / 12), ("gaussian", 0.2**2)])
def test_mean_and_variance(kind, variance):
    noise = weight_noise(torch.zeros(211, 223, dtype=torch.float64), 0.2, kind=kind, relative=False, generator=seeded())
    n = noise.numel()
    assert abs(noise.mean()) < 5 * (variance / n) ** 0.5
    assert abs(noise.square().mean() / variance - 1) < 5 * (2 / n) ** 0.5
    if kind == "uniform":
        assert 0.0999 < noise.abs().max() <= 0.1


def test_one_entry_and_constants_get_none():
    assert weight_noise(torch.tensor([3.0]), 0.2).tolist() == [0.0]
    assert not weight_noise(torch.ones(7), 0.2).any()
    assert weight_noise(torch.ones(7, dtype=torch.bfloat16), 0.2, relative=False).dtype == torch.bfloat16


def test_a_noisy_start_moves_trained_weights_once():
    model = tiny_gpt2()
    model.transformer.h[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    noisy_start(model, 0.15)
    torch.manual_seed(5)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        if name.startswith("transformer.h.0."):
            assert torch.equal(parameter, before[name])
        else:
            expected = before[name] + (torch.rand(parameter.shape) - 0.5) * 0.15 * deviation(before[name])
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_noisy_weights_come_back_bit_for_bit(name):
    model, batch = MODELS[name]().train(), batch_of(name)
    before, plain = traces(model), model(**batch).loss.detach()
    with noisy_weights(model, 0.1):
        loss = model(**batch).loss
        loss.backward()
        assert not torch.equal(loss, plain)
    assert_same(before, traces(model))
    with pytest.raises(KeyError), noisy_weights(model, 0.1):
        raise KeyError
    assert_same(before, traces(model))


def test_the_gradient_is_that_at_the_noisy_weights():
    model, x = nn.Linear(5, 3).double(), torch.randn(7, 5, dtype=torch.float64)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    with noisy_weights(model, 0.1, generator=seeded()):
        model(x).square().sum().backward()
    generator = seeded()
    noisy = [value + weight_noise(value, 0.1, kind="gaussian", generator=generator) for value in (weight, bias)]
    torch.testing.assert_close(model.weight.grad, 2 * (x @ noisy[0].T + noisy[1]).T @ x, rtol=1e-12, atol=1e-12)


def test_a_step_inside_the_block_is_put_back_and_raises():
    model = nn.Linear(5, 3)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), model.weight.detach().clone()
    model(torch.ones(2, 5)).sum().backward()
    sentence = "a weight was changed inside noisy_weights, and has been put back"
    with pytest.raises(ValueError, match=sentence), noisy_weights(model, 0.1):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_backward_pass_outside_of_the_block_is_refused():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    with noisy_weights(model, 0.1):
        loss = model(torch.ones(2, 5)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Noisy(TrainingLoop):
    stop = None

    def accumulate_gradients(self, batches):
        if self.step == self.stop:
            raise InterruptedError
        with noisy_weights(self.model, 0.1):
            return super().accumulate_gradients(batches)


def test_a_loop_of_noisy_steps_is_resumed_bit_for_bit(tmp_path):
    def run(stop=None, folder=None, resume=False, kind=Noisy):
        settings = LoopSettings(
            max_steps=4, rows_per_step=4, progress=False, folder=folder, save_every=1 if folder else None
        )
        loop = kind(tiny_llama(), uneven_rows(13), settings=settings)
        loop.stop = stop
        try:
            loop.fit(resume=resume)
        except InterruptedError:
            assert stop is not None
        return {name: value.clone() for name, value in loop.model.state_dict().items()}

    class Plain(TrainingLoop):
        stop = None

    whole = run()
    assert equal(whole, run())
    assert not equal(whole, run(kind=Plain))
    run(stop=2, folder=tmp_path / "run")
    assert equal(whole, run(folder=tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale must be a number above 0; got 0.0"),
        ({"kind": "normal"}, ValueError, 'kind must be "uniform" or "gaussian"; got \'normal\''),
        ({"relative": 1}, TypeError, "relative must be True or False; got 1"),
    ],
)
def test_what_is_refused(knobs, error, message):
    model, knobs = nn.Linear(5, 3), {"scale": 0.1} | knobs
    with pytest.raises(error, match=message):
        weight_noise(model.weight, **knobs)
    with pytest.raises(error, match=message):
        noisy_start(model, **knobs)
    with pytest.raises(error, match=message):
        noisy_weights(model, **knobs).__enter__()


def test_a_frozen_base_is_refused():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=4))
    before = traces(model)
    for act in (noisy_start, lambda m: noisy_weights(m, 0.1).__enter__()):
        with pytest.raises(ValueError, match="no weight of this LlamaForCausalLM itself requires a gradient"):
            act(model)
    assert_same(before, traces(model))
