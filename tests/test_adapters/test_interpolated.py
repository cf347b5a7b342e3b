"""Between the base and the adapted model: the same line as that of the merged states, and all back afterwards."""

import copy
import math

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    IA3,
    AdaLoRA,
    BitFit,
    Bottleneck,
    DoRA,
    LayerNormTuning,
    LoRA,
    NewTokens,
    PromptTuning,
    VeRA,
    adapter_parameters,
    attach,
    combine,
    disabled,
    interpolated,
    merge,
    set_active,
    unmerge,
)
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_qwen3_moe, tiny_t5
from llmtune.weights import interpolate

IDS = {"input_ids": torch.tensor([[5, 7, 11, 13, 17], [3, 19, 23, 29, 31]])}


def adapted(make, config, name="default"):
    model = make()
    attach(model, config, name)
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def output(model, **inputs):
    with torch.no_grad():
        return model(**IDS, **inputs).logits


CASES = {
    "lora": (tiny_llama, LoRA(rank=3, alpha=5)),
    "rslora, gpt2": (tiny_gpt2, LoRA(rank=3, alpha=5, rslora=True, targets=["c_attn"])),
    "lora with biases": (
        lambda: tiny_bert(labels=3),
        LoRA(rank=2, alpha=3, train_bias="all", lora_bias=True, targets=["query"]),
    ),
    "lora and a head": (lambda: tiny_bert(labels=3), LoRA(rank=2, alpha=3, train_modules=["classifier"])),
    "pissa": (tiny_llama, LoRA(rank=2, alpha=3, initialise="pissa")),
    "lora on experts": (tiny_qwen3_moe, LoRA(rank=2, alpha=3, targets=(), target_parameters=["down_proj"])),
    "adalora": (tiny_llama, AdaLoRA(alpha=5, total_steps=9, initial_rank=3, target_rank=2)),
    "vera": (tiny_llama, VeRA(rank=5)),
    "ia3": (tiny_llama, IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"])),
    "bitfit": (lambda: tiny_bert(labels=3), BitFit()),
    "norms": (tiny_llama, LayerNormTuning()),
    "new tokens": (tiny_gpt2, NewTokens(tokens=[3, 5, 7])),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, -0.5])
def test_it_is_the_line_between_the_merged_states(case, alpha):
    make, config = CASES[case]
    model = adapted(make, config)
    base, tuned = make(), copy.deepcopy(model)
    merge(tuned, keep_base=False)
    middle = make()
    middle.load_state_dict(interpolate(base.state_dict(), tuned.state_dict(), alpha))
    with interpolated(model, alpha):
        found = output(model)
    torch.testing.assert_close(found, output(middle), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_ends_are_the_base_and_the_adapted_model_and_afterwards_all_is_back(case):
    make, config = CASES[case]
    model = adapted(make, config)
    before, state = output(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with disabled(model):
        base = output(model)
    with interpolated(model, 0):
        assert torch.equal(output(model), base)
    with interpolated(model, 1):
        assert torch.equal(output(model), before)
    with pytest.raises(RuntimeError, match="inside"), interpolated(model, 0.5):
        raise RuntimeError("inside")
    assert torch.equal(output(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_scaling_a_and_b_is_another_model():
    layer = nn.Sequential(nn.Linear(7, 5, bias=False))
    attach(layer, LoRA(rank=2, alpha=4))
    nn.init.normal_(layer[0].lora_b)
    x, base = torch.randn(3, 7), layer[0].base
    change = (layer(x) - base(x)).detach()
    with interpolated(layer, 0.5):
        torch.testing.assert_close(layer(x) - base(x), 0.5 * change)
    with torch.no_grad():
        layer[0].lora_a *= 0.5
        layer[0].lora_b *= 0.5
    torch.testing.assert_close(layer(x) - base(x), 0.25 * change)


def test_it_can_be_kept_by_combine_or_by_merge():
    model = adapted(tiny_llama, LoRA(rank=2, alpha=3))
    with interpolated(model, 0.3):
        wanted = output(model)
        merge(model)
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=1e-5)
    unmerge(model)
    combine(model, ["default"], [0.3], new_name="wise")
    set_active(model, "wise")
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=1e-5)


def test_the_other_adapters_stay_as_they_are():
    model = adapted(tiny_llama, LoRA(rank=2, alpha=3), "first")
    before = output(model)
    attach(model, LoRA(rank=3, alpha=5), "second")
    nn.init.normal_(next(p for n, p in adapter_parameters(model, "second").items() if "lora_b" in n))
    with interpolated(model, 0.0, "second"):
        assert torch.equal(output(model), before)


def test_gradients_flow_through_the_scaled_adapter():
    layer = nn.Sequential(nn.Linear(7, 5, bias=False))
    attach(layer, LoRA(rank=2, alpha=4))
    x = torch.randn(3, 7)
    layer(x).sum().backward()
    whole, layer[0].lora_b.grad = layer[0].lora_b.grad.clone(), None
    with interpolated(layer, 0.25):
        layer(x).sum().backward()
    torch.testing.assert_close(layer[0].lora_b.grad, 0.25 * whole)


def test_bad_input():
    model = adapted(tiny_llama, LoRA(rank=2, alpha=3))
    for alpha, error, sentence in (
        (math.inf, ValueError, "alpha must be a finite number; got inf"),
        ("half", TypeError, "alpha must be a number; got 'half'"),
    ):
        with pytest.raises(error, match=sentence), interpolated(model, alpha):
            pass
    with pytest.raises(ValueError, match='no adapter "other"'), interpolated(model, 0.5, "other"):
        pass
    set_active(model, ())
    with pytest.raises(ValueError, match='"default" is switched off, so that no alpha'), interpolated(model, 0.5):
        pass
    set_active(model, "default")
    merge(model)
    with pytest.raises(ValueError, match='"default" is merged into the weights: unmerge it'), interpolated(model, 0.5):
        pass
    for config in (DoRA(rank=2, alpha=3), Bottleneck(size=3), PromptTuning(tokens=3)):
        model = tiny_llama()
        attach(model, config)
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="is no change of weights that can be scaled"), interpolated(model, 0.5):
            pass
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_encoder_decoders():
    model = adapted(tiny_t5, LoRA(rank=2, alpha=3, targets=["q", "wo"]))
    inputs = {"decoder_input_ids": torch.tensor([[0, 5, 7], [0, 3, 2]])}
    with disabled(model):
        base = output(model, **inputs)
    with interpolated(model, 0.0):
        assert torch.equal(output(model, **inputs), base)
