import pytest
import torch
from torch import nn

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.effective import anchor_of, choose_parameters, effective_parameters
from llmtune.adapters.layer import bare_named_parameters
from llmtune.adapters.lora import LoRALinear
from llmtune.adapters.merge import merge, unmerge
from llmtune.adapters.trained_copy import TrainedCopy
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama
from llmtune.testing.small import SmallModel, moved


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: tiny_llama(tied=True), SmallModel])
def test_without_adapters_it_is_the_model_itself(make):
    model = make()
    entries = effective_parameters(nn.DataParallel(model))
    assert [(n, id(e.parameter)) for n, e in entries.items()] == [(n, id(p)) for n, p in bare_named_parameters(model)]
    assert all(e.layers == () and e.tied is None and e.value() is e.parameter for e in entries.values())


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"targets": ["embed_tokens", "o_proj"]}),
        (tiny_gpt2, {"targets": ["c_attn", "c_fc"], "train_bias": "all", "lora_bias": True}),
        (lambda: tiny_bert(labels=3), {"train_modules": ["classifier"], "train_bias": "lora_only"}),
        (tiny_bert, {"train_modules": ["transform"], "targets": ["query"]}),  # a copy of a module with children
    ],
)
def test_with_an_adapter_it_is_the_merged_model(make, options):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, LoRA(rank=2, alpha=3, **options))
    moved(model)
    values = anchor_of(model)
    everything = anchor_of(model, lambda name: True)
    assert set(values) == {n for n, v in everything.items() if not torch.equal(v, before[n])}
    merge(model)  # the adapter's change stands in the weights now, and counts once
    for name, value in anchor_of(model, lambda name: True).items():
        assert_close(value, everything[name], rtol=1e-6, what=name)
    unmerge(model)
    merge(model, keep_base=False)
    after = dict(model.named_parameters())
    assert set(everything) <= set(after)
    for name, value in everything.items():
        assert_close(value, after[name].detach(), rtol=1e-6, what=name)


def test_copies_of_two_adapters_at_one_place_the_outer_one_runs():
    model, x = SmallModel(), torch.randn(3, 5).double()
    first = TrainedCopy(LoRALinear(model.head, rank=2, alpha=3, dtype=torch.float64), adapter_name="first")
    second = TrainedCopy(first, adapter_name="second")
    model.head = LoRALinear(second, rank=1, alpha=3, dtype=torch.float64, adapter_name="third")
    moved(model).eval()
    layers = {"first": first, "second": second, "third": model.head, "innermost": first.base}
    for names in (list(layers), ["first", "innermost"], ["second", "third"], ["innermost", "third"], []):
        for name, layer in layers.items():
            layer.active = name in names
        values = {name: entry.value().detach() for name, entry in effective_parameters(model).items()}
        plain = SmallModel()
        plain.load_state_dict({**values, "second.weight": values["first.weight"]})
        assert_close(model(x).detach(), plain.eval()(x).detach(), rtol=1e-12, what=str(names))


def test_copies_of_tied_weights_are_two():
    model = tiny_llama(tied=True)
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"], train_modules=["lm_head"]))
    names = set(choose_parameters(model, None))
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names
    assert effective_parameters(model)["model.embed_tokens.weight"].tied is None


def test_anchor_of_copies_and_chooses():
    model = SmallModel()
    anchor = anchor_of(model)
    assert "scale" not in anchor
    assert list(anchor_of(model, ["scale"])) == ["scale"]
    assert set(anchor_of(model, lambda name: name.startswith("head"))) == {"head.weight", "head.bias"}
    moved(model)
    assert not torch.equal(anchor["head.weight"], model.head.weight)
    assert not any(value.requires_grad for value in anchor.values())
    with pytest.raises(ValueError, match=r'has no parameter "heads.weight". Did you mean "head.weight"'):
        anchor_of(model, ["heads.weight"])
    with pytest.raises(TypeError, match="must be a list of names"):
        anchor_of(model, "head.weight")
