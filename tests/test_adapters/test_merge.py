"""Merging refuses what it cannot do right, before anything is changed."""

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, adapter_parameters, attach, detach, merge, set_active, unmerge
from llmtune.testing.models import tiny_llama


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(model, message, **options):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        merge(model, **options)
    after = state(model)
    assert all(torch.equal(after[name], tensor) or name.endswith("lora_b") for name, tensor in before.items())


def test_tied_weights_are_known_by_storage():
    model = tiny_llama(tied=True)
    attach(model, LoRA(rank=2, alpha=3, targets=["embed_tokens"]))
    refused(model, r"model.embed_tokens.weight shares its storage with another parameter \(tied weights\)")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1)
    ids = torch.tensor([[5, 7, 11]])
    before = model(input_ids=ids).logits.detach()
    report = merge(model, untie=True)
    assert report.untied == ("model.embed_tokens.weight",)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_views_of_one_storage_count_as_tied():
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)  # another parameter in the same memory
    attach(model, LoRA(rank=2, alpha=3))
    refused(model, "0.weight shares its storage")


def test_a_change_that_is_not_finite_is_refused():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3))
    list(adapter_parameters(model).values())[-1].data[0, 0] = float("nan")
    refused(model, "is not finite: nothing has been merged")


def test_biases_of_two_adapters_add_up_when_merged_one_after_the_other():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    for name in ("one", "two"):
        attach(model, LoRA(rank=2, alpha=2, targets=["0"], train_bias="lora_only"), name)
        with torch.no_grad():
            for parameter in adapter_parameters(model, name).values():
                parameter.add_(torch.randn_like(parameter))
    x = torch.randn(11, 5)
    before = model(x).detach()
    for name in ("one", "two"):
        merge(model, name)
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_a_layer_compiled_by_itself_is_refused():
    model = nn.Sequential(torch.compile(nn.Linear(5, 7), backend="eager"), nn.Linear(7, 3))
    with pytest.raises(ValueError, match="a target has been compiled by itself"):
        attach(model, LoRA(rank=2, alpha=2, targets=["0"]))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_may_be_tied_again_under_an_adapter():
    model = tiny_llama(tied=True)
    attach(model, LoRA(rank=2, alpha=3, targets=["lm_head"]))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_twice_and_unmerging_nothing_are_refused():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3))
    with pytest.raises(ValueError, match='adapter "default" is not merged'):
        unmerge(model)
    merge(model)
    refused(model, 'adapter "default" is merged already')
    with pytest.raises(ValueError, match="is merged into the weights: unmerge it before detaching"):
        detach(model)
    attach(model, LoRA(rank=2, alpha=3), "second")
    with pytest.raises(ValueError, match="merge with keep_base=True, or unmerge that one first"):
        merge(model, "second", keep_base=False)


def test_a_bias_beside_a_layer_without_one_cannot_be_merged():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, lora_bias=True))
    refused(model, 'adapter "default" trains a bias where the base Linear has none')


def test_a_weight_that_is_no_float_cannot_be_merged_into():
    class Quantised(nn.Module):
        in_features, out_features = 5, 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype).T

    model = nn.Sequential(Quantised())
    attach(model, LoRA(rank=2, alpha=3, targets=["0"]))
    assert torch.equal(model(torch.ones(1, 5)), torch.full((1, 3), 5.0))
    refused(model, r"0.weight is \(3, 5\) of torch.int8: only a floating weight .* De-quantise it first")


def test_a_merged_weight_too_large_for_its_dtype_is_refused():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).half()
    attach(model, LoRA(rank=1, alpha=1))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(400.0)  # 160,000 fits float32 and not float16
    refused(model, r"the merged 0.weight is too large for torch.float16: nothing has been merged")


def test_an_adapter_that_is_off_is_not_merged():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3))
    set_active(model, ())
    refused(model, r'adapter "default" is switched off, and merging it would change what the model gives')


def test_a_norms_statistics_go_with_the_copy():
    model, x = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), torch.randn(7, 5)
    attach(model, LoRA(rank=2, alpha=3, targets=["0"], train_modules=["1"]))
    before, base = state(model), {k: v.clone() for k, v in model[1].base.state_dict().items()}
    model.train()
    for _ in range(3):
        model(3 * x + 1)
    model.eval()
    tuned = model(x)
    assert all(torch.equal(base[name], tensor) for name, tensor in model[1].base.state_dict().items())
    merge(model)
    torch.testing.assert_close(model(x), tuned)
    unmerge(model)
    assert torch.equal(model(x), tuned)
    assert all(torch.equal(base[name], tensor) for name, tensor in model[1].base.state_dict().items())
    assert before.keys() == state(model).keys()
    merge(model, keep_base=False)
    assert int(model[1].num_batches_tracked) == 3
    torch.testing.assert_close(model(x), tuned)


def test_a_weight_untied_under_two_adapters_keeps_its_flag():
    model = tiny_llama(tied=True)
    attach(model, LoRA(rank=2, alpha=3, targets=["lm_head"]), "one")
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), "two")
    merge(model, "one", keep_base=False, untie=True)
    detach(model, "two")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
