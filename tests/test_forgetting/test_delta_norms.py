"""Distances of effective weights from the base's, against dense float64 ones."""

import copy
import math

import pytest
import torch
from torch import nn

from llmtune.adapters import IA3, LayerNormTuning, LoRA, VeRA, adapter_parameters, attach, disabled, merge
from llmtune.forgetting import anchor_of, delta_norms
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5


def adapted(make, config, name="default"):
    model = make()
    attach(model, config, name)
    generator = torch.Generator().manual_seed(31)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


CASES = {
    "lora": (tiny_llama, LoRA(rank=3, alpha=5)),
    "gpt2": (tiny_gpt2, LoRA(rank=3, alpha=5, targets=["c_attn", "c_proj"])),
    "biases and a head": (
        lambda: tiny_bert(labels=3),
        LoRA(rank=2, alpha=3, train_bias="all", train_modules=["classifier"], targets=["query"]),
    ),
    "t5": (tiny_t5, LoRA(rank=2, alpha=3, targets=["q", "wo"])),
    "vera": (tiny_llama, VeRA(rank=5)),
    "ia3": (tiny_llama, IA3(targets=["k_proj"], feedforward=())),
    "norms": (tiny_llama, LayerNormTuning()),
}


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_the_merged_weights(case):
    make, config = CASES[case]
    model, base = adapted(make, config), dict(make().named_parameters())
    merged = copy.deepcopy(model)
    merge(merged, keep_base=False)
    expected = {n: (p.double() - base[n].double()).norm().item() for n, p in merged.named_parameters()}
    for given in ((), make()):
        found = delta_norms(model, base=given, by="parameter")
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    plain = delta_norms(merged, base=make(), by="parameter")
    assert plain == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_layers_are_the_squares_of_their_parameters_summed():
    model = adapted(tiny_t5, LoRA(rank=2, alpha=3, targets=["q", "wo"]))
    single, layers = delta_norms(model, by="parameter"), delta_norms(model)
    assert {name for name, norm in layers.items() if norm} == {
        "encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1",
    }  # fmt: skip
    assert layers["shared"] == 0.0
    own = [norm for name, norm in single.items() if name.startswith("decoder.block.1.")]
    assert layers["decoder.block.1"] == pytest.approx(math.hypot(*own))
    assert math.hypot(*layers.values()) == pytest.approx(math.hypot(*single.values()))
    assert delta_norms(nn.Sequential(nn.Linear(2, 2)), base=nn.Sequential(nn.Linear(2, 2))).keys() == {"0"}


def test_it_does_not_depend_on_how_the_change_is_split_between_a_and_b():
    model = adapted(tiny_llama, LoRA(rank=2, alpha=3))
    before = delta_norms(model)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.mul_(4.0 if "lora_a" in name else 0.25)
    assert delta_norms(model) == pytest.approx(before, rel=1e-5)


def test_the_base_may_be_an_anchor_or_have_adapters_on():
    model = adapted(tiny_llama, LoRA(rank=2, alpha=3))
    anchor = anchor_of(model)
    alone = delta_norms(model)
    assert set(delta_norms(model, base=anchor).values()) == {0.0}
    attach(model, LoRA(rank=3, alpha=5), "second")
    nn.init.normal_(next(p for n, p in adapter_parameters(model, "second").items() if "lora_b" in n), std=0.1)
    second = delta_norms(model, base=["default"])
    assert 0 < second["model.layers.0"]
    assert second["model.layers.0"] == pytest.approx(delta_norms(model, base=anchor)["model.layers.0"], rel=1e-4)
    assert second["model.layers.0"] != pytest.approx(delta_norms(model)["model.layers.0"])
    with disabled(model):
        assert delta_norms(model, base=["default"]) == pytest.approx(alone, rel=1e-6), "either may be the further one"


def test_a_quantised_weight_has_the_norm_of_its_adapters_change():
    model = adapted(lambda: nn.Sequential(nn.Linear(7, 5)), LoRA(rank=2, alpha=3))
    expected = delta_norms(model, by="parameter")["0.weight"]
    bare = model[0].base
    bare.weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.int8), requires_grad=False)
    assert delta_norms(model, by="parameter")["0.weight"] == expected > 0


def test_bad_input():
    model, plain = adapted(tiny_llama, LoRA(rank=2, alpha=3)), tiny_llama()
    with pytest.raises(ValueError, match='by must be "layer" or "parameter"; got'):
        delta_norms(model, by="t")
    with pytest.raises(ValueError, match="the model has no adapter to switch off"):
        delta_norms(plain)
    with pytest.raises(ValueError, match="base is the model itself"):
        delta_norms(plain, base=plain)
    with pytest.raises(ValueError, match="is a parameter of the model only: they are no two states of one model"):
        delta_norms(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), base=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r'lm_heed\.weight is a parameter of the base only.*"lm_head\.weight"'):
        delta_norms(plain, base={"lm_heed.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lm_head.weight is \[97, 28\] in the model and \[1\] in the base"):
        delta_norms(plain, base={"lm_head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="base names no weight, so there is nothing to measure"):
        delta_norms(plain, base={})
    tied = adapted(tiny_gpt2, LoRA(rank=2, alpha=3, targets=["wte"]))
    with pytest.raises(ValueError, match="are one tied tensor, and an active adapter changes it in one place"):
        delta_norms(tied)
