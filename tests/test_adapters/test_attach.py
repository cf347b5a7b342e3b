"""Attaching: targets, names, what is refused, and that a refusal changes nothing."""

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    LoRA,
    LoRAConv1D,
    LoRAEmbedding,
    LoRALinear,
    active,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    disabled,
    set_active,
    trainable_summary,
)
from llmtune.adapters.layer import bare_named_parameters
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear | LoRAEmbedding)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"rank": -2}, "got -2"),
        ({"rank": 2.5}, "got 2.5"),
        ({"alpha": 0}, "alpha must be a number above 0; got 0"),
        ({"alpha": float("inf")}, "got inf"),
        ({"dropout": 1.0}, "dropout must be a probability from 0 to below 1; got 1.0"),
        ({"initialise": "pisa"}, r"initialise must be one of .*; got 'pisa'"),
        ({"train_bias": "lora"}, "train_bias must be .*; got 'lora'"),
        ({"targets": ()}, "targets names no module"),
        ({"targets": "(q_proj"}, "targets must be suffixes or one regular expression"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a whole number"),
        ({"alpha_pattern": {"(": 1.0}}, "is no regular expression"),
    ],
)
def test_a_record_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**({"rank": 2, "alpha": 3} | options))


def test_records_refuse_wrong_types():
    with pytest.raises(TypeError, match="train_modules must be a list of suffixes"):
        LoRA(rank=2, alpha=3, train_modules="classifier")
    with pytest.raises(TypeError, match="dtype must be a floating torch dtype"):
        LoRA(rank=2, alpha=3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_prj"]}, 'targets: "q_prj" matches no module.* Did you mean .*"q_proj"'),
        ({"targets": ["q_proj", "fake"]}, 'targets: "fake" matches no module'),
        ({"targets": r"model\.layers\.[789]\..*"}, "matches no module's whole name"),
        ({"targets": ["q_proj"], "exclude": ["v_prj"]}, 'exclude: "v_prj" matches no module.*"v_proj"'),
        ({"targets": ["q_proj"], "exclude": ["self_attn.q_proj"]}, "nothing would be adapted"),
        ({"targets": ["q_proj"], "rank_pattern": {"k_proj": 2}}, 'rank_pattern: "k_proj" fits none of the adapted'),
        ({"targets": ["q_proj"], "alpha_pattern": {"k_proj": 2.0}}, 'alpha_pattern: "k_proj" fits none'),
        ({"targets": ["q_proj"], "train_modules": ["lmhead"]}, 'train_modules: "lmhead" matches no module.*"lm_head"'),
        ({"targets": ["q_proj"], "rank": 29}, "the rank 29 is larger than model.layers.0.self_attn.q_proj allows.* 28"),
        ({"targets": ["q_proj"], "train_modules": ["self_attn"]}, "named both in targets and in train_modules"),
    ],
)  # fmt: skip
def test_a_pattern_that_means_nothing_is_refused_and_nothing_is_half_done(options, message):
    model = tiny_llama()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        attach(model, LoRA(**({"rank": 2, "alpha": 3} | options)))
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert adapter_names(model) == []


def test_a_target_that_is_no_layer_is_refused():
    with pytest.raises(TypeError, match=r"model.layers.0.self_attn is a LlamaAttention: LoRA goes to linear layers"):
        attach(tiny_llama(), LoRA(rank=2, alpha=3, targets=["self_attn"]))


def test_an_expression_may_match_containers_beside_layers():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=r".*layers\.1\.mlp.*"))
    assert len(adapted(model)) == 3
    with pytest.raises(TypeError, match=r"is a LlamaMLP"):
        attach(tiny_llama(), LoRA(rank=2, alpha=3, targets=r".*\.mlp"))


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", "../x", ".hidden", "-x", "a b", "q_proj", "model.x", "0", 3])
def test_names_that_would_do_harm_are_refused(name):
    with pytest.raises(ValueError, match=r"the adapter name must be made of|is also the name of a module"):
        attach(tiny_llama(), LoRA(rank=2, alpha=3), name)


def test_a_name_is_taken_once():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3))
    with pytest.raises(ValueError, match='the model already has an adapter "default": detach it first'):
        attach(model, LoRA(rank=2, alpha=3))
    for verb in (detach, set_active, adapter_parameters):
        with pytest.raises(ValueError, match=r'the model has no adapter "defalt"; there are: "default". Did you mean'):
            verb(model, "defalt")


def test_the_root_cannot_be_its_own_target():
    with pytest.raises(ValueError, match=r"the model itself, a Linear, would be the target"):
        attach(nn.Linear(5, 3), LoRA(rank=2, alpha=3))


def test_all_linear_means_all_but_the_head():
    llama, bert, plain = tiny_llama(), tiny_bert(labels=3), nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    attach(llama, LoRA(rank=2, alpha=3))
    assert len(adapted(llama)) == 2 * 7
    assert "lm_head" not in adapted(llama)
    report = attach(bert, LoRA(rank=2, alpha=3))
    assert "classifier" not in adapted(bert)
    assert report.heads == ("classifier",)
    assert "frozen: classifier; a head that starts at random must be named in train_modules" in str(report)
    attach(plain, LoRA(rank=2, alpha=3))
    assert adapted(plain) == ["0", "2"]
    gpt2 = tiny_gpt2()
    attach(gpt2, LoRA(rank=2, alpha=3))
    assert isinstance(gpt2.transformer.h[0].attn.c_attn, LoRAConv1D)
    assert gpt2.transformer.h[0].attn.c_attn.lora_b.shape == (78, 2)
    with pytest.raises(ValueError, match='"all-linear" finds no linear layer in this ReLU'):
        attach(nn.ReLU(), LoRA(rank=2, alpha=3))


def test_patterns_set_rank_and_alpha_per_layer():
    model = tiny_llama()
    config = LoRA(rank=4, alpha=8, rank_pattern={r"layers\.1\..*": 2}, alpha_pattern={"q_proj": 3.0}, rslora=True)
    attach(model, config)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert (first.q_proj.rank, second.q_proj.rank, second.v_proj.rank) == (4, 2, 2)
    assert first.q_proj.scaling == pytest.approx(3.0 / 2.0)
    assert second.v_proj.scaling == pytest.approx(8.0 / 2**0.5)


def test_everything_else_is_frozen_and_flags_come_back():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    report = attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == list(adapter_parameters(model))
    assert len(trained) == 4
    assert report.summary == trainable_summary(model)
    assert str(report).startswith('adapter "default": 2 modules (q_proj 2)\ntrainable params: 336 || all params: ')
    assert "<pre>adapter &quot;default&quot;" in report._repr_html_()
    detach(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_activity_is_apart_from_trainability():
    model = tiny_llama()
    for name in ("one", "two"):
        attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), name)
    outer = model.model.layers[0].self_attn.q_proj
    states = lambda: (outer.adapter_name, outer.active, outer.base.active)
    assert states() == ("two", True, True)
    with active(model, "one"):
        assert states() == ("two", False, True)
        with disabled(model):
            assert states() == ("two", False, False)
        assert states() == ("two", False, True)
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        raise RuntimeError("inside")
    assert states() == ("two", True, True)
    set_active(model, ["two"])
    assert states() == ("two", True, False)
    assert not any(p.requires_grad for p in adapter_parameters(model, "one").values())
    with pytest.raises(ValueError, match=r"the model has no adapters to switch off"), disabled(tiny_llama()):
        pass


def test_a_module_used_in_two_places_is_adapted_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.second = self.first
            self.tower = nn.ModuleList([self.first, nn.Linear(5, 3)])

    model = Twice()
    attach(model, LoRA(rank=2, alpha=3))
    assert model.first is model.second is model.tower[0]
    assert isinstance(model.first, LoRALinear)
    detach(model)
    assert model.first is model.second is model.tower[0]
    assert type(model.first) is nn.Linear


def test_an_embedding_known_by_several_names_must_be_named_by_all():
    with pytest.raises(ValueError, match=r"shared shares its weight with encoder.embed_tokens, decoder.embed_tokens"):
        attach(tiny_t5(), LoRA(rank=2, alpha=3, targets=["shared"]))


def test_bare_names_are_those_of_the_model_that_came():
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    attach(model, LoRA(rank=2, alpha=3, train_modules=["lm_head"]))
    attach(model, LoRA(rank=2, alpha=3), "second")
    assert [name for name, _ in bare_named_parameters(model)] == names
    compiled = torch.compile(model, backend="eager")
    assert [name for name, _ in bare_named_parameters(compiled)] == names
    detach(compiled, "second")
    assert adapter_names(model) == ["default"]


def test_a_copied_module_cannot_be_adapted_twice():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"], train_modules=["lm_head"]), "one")
    with pytest.raises(ValueError, match='lm_head already belongs to adapter "one"'):
        attach(model, LoRA(rank=2, alpha=3, targets=["lm_head"]), "two")
    assert adapter_names(model) == ["one"]


def test_layers_by_themselves_refuse_what_they_cannot_do():
    with pytest.raises(TypeError, match=r"LoRALinear needs a module with in_features and out_features; got ReLU"):
        LoRALinear(nn.ReLU(), rank=2, alpha=3)
    with pytest.raises(ValueError, match="the rank must be a whole number of at least 1; got 0"):
        LoRALinear(nn.Linear(5, 3), rank=0, alpha=3)
    with pytest.raises(TypeError, match=r"LoRAEmbedding needs an nn.Embedding .*; got Linear"):
        LoRAEmbedding(nn.Linear(5, 3), rank=2, alpha=3)
    with pytest.raises(ValueError, match="lora_bias has no meaning for an embedding"):
        LoRAEmbedding(nn.Embedding(5, 3), rank=2, alpha=3, lora_bias=True)


def test_a_layer_speaks_like_the_one_under_it():
    base = nn.Linear(5, 3)
    layer = LoRALinear(base, rank=2, alpha=4)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (5, 3)
    embedding = LoRAEmbedding(nn.Embedding(7, 3, padding_idx=1), rank=2, alpha=4)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (7, 3, 1)
    assert "adapter=default, rank=2, scaling=2, active=True" in repr(layer)


def test_the_formula_by_hand():
    """x = (1, 2), A = (3, 5), B = (7, 11): x A^T = 13, times B and the scaling 8/1."""
    base = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(base.weight)
    layer = LoRALinear(base, rank=1, alpha=8)
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor([[3.0, 5.0]]))
        layer.lora_b.copy_(torch.tensor([[7.0], [11.0]]))
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [8 * 7 * 13, 8 * 11 * 13]
    assert layer.deltas()["weight"].tolist() == [[168.0, 280.0], [264.0, 440.0]]


def test_an_exclude_that_leaves_out_nothing_is_refused():
    with pytest.raises(ValueError, match=r'exclude: "layers.0" leaves out nothing: it matches model.layers.0, which'):
        attach(tiny_llama(), LoRA(rank=2, alpha=3, targets=["q_proj"], exclude=["layers.0"]))
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"], exclude=r".*layers\.0\..*"))
    assert adapted(model) == ["model.layers.1.self_attn.q_proj"]


def test_a_suffix_given_as_a_string_is_told():
    with pytest.raises(
        ValueError, match=r'"q_proj" is a regular expression for whole names .* give the list \["q_proj"\]'
    ):
        attach(tiny_llama(), LoRA(rank=2, alpha=3, targets="q_proj"))


def test_detaching_the_newest_lets_the_earlier_train_again():
    model = tiny_llama()
    trained = lambda: {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), "one")
    model.lm_head.weight.requires_grad_(True)  # the user's own doing
    before = trained()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj", "v_proj"]), "two")
    attach(model, LoRA(rank=2, alpha=3, targets=["v_proj"]), "three")
    assert trained() == set(adapter_parameters(model, "three"))
    detach(model, "two")  # an earlier one: the newest is still the one that is trained
    assert trained() == set(adapter_parameters(model, "three"))
    detach(model, "three")
    assert trained() == before


def test_flags_come_back_whichever_goes_last():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), "one")
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), "two")
    detach(model, "one")
    detach(model, "two")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_a_module_trained_whole_belongs_to_one_adapter_with_all_that_is_in_it():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"], train_modules=["mlp"]), "one")
    with pytest.raises(ValueError, match=r'up_proj already belongs to adapter "one" \(model.layers.0.mlp\)'):
        attach(model, LoRA(rank=2, alpha=3, targets=["up_proj"]), "two")
    with pytest.raises(ValueError, match=r'mlp.down_proj already belongs to adapter "one"'):
        attach(model, LoRA(rank=2, alpha=3, targets=["k_proj"], train_modules=["down_proj"]), "two")
    with pytest.raises(
        ValueError, match=r'self_attn already belongs to adapter "one" \(model.layers.0.self_attn.q_proj'
    ):
        attach(model, LoRA(rank=2, alpha=3, targets=["lm_head"], train_modules=["self_attn"]), "two")
    with pytest.raises(
        ValueError, match=r"train_modules names model.layers.0.mlp and model.layers.0.mlp.up_proj inside"
    ):
        attach(tiny_llama(), LoRA(rank=2, alpha=3, targets=["q_proj"], train_modules=["mlp", "up_proj"]))
    assert adapter_names(model) == ["one"]
    both = tiny_llama()
    attach(both, LoRA(rank=2, alpha=3, train_modules=["mlp"]))  # "all-linear" is what is left
    assert [name.rsplit(".", 1)[-1] for name in adapted(both)] == ["q_proj", "k_proj", "v_proj", "o_proj"] * 2


def encoder_layer():
    return nn.Sequential(nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True)).eval()


def test_torchs_fast_path_does_not_go_round_an_adapter():
    model, x = encoder_layer(), torch.randn(2, 5, 6)
    attach(model, LoRA(rank=2, alpha=3, targets=["linear1", "linear2"]))
    with torch.no_grad():
        base = model(x)
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.5)
        fast = model(x)
    slow = model(x.clone().requires_grad_(True))
    assert not torch.allclose(fast, base, atol=1e-3)
    torch.testing.assert_close(fast, slow)


def test_a_weight_that_is_taken_without_a_call_is_no_target():
    with pytest.raises(
        TypeError, match=r"0.self_attn.out_proj belongs to nn.MultiheadAttention, which takes its weight"
    ):
        attach(encoder_layer(), LoRA(rank=2, alpha=3))


def test_an_embedding_takes_neither_a_bias_nor_dropout():
    with pytest.raises(ValueError, match=r"lora_bias has no meaning for model.embed_tokens, an embedding"):
        attach(tiny_llama(), LoRA(rank=2, alpha=3, targets=["embed_tokens", "q_proj"], lora_bias=True))
    with pytest.raises(ValueError, match="dropout has no meaning for an embedding"):
        LoRAEmbedding(nn.Embedding(5, 3), rank=2, alpha=3, dropout=0.1)
    with pytest.raises(TypeError, match="without max_norm"):
        LoRAEmbedding(nn.Embedding(5, 3, max_norm=1.0), rank=2, alpha=3)


def test_the_padding_row_of_an_embedding_learns_nothing():
    layer = LoRAEmbedding(nn.Embedding(7, 3, padding_idx=1), rank=2, alpha=4)
    layer(torch.tensor([1, 2, 1])).sum().backward()
    assert layer.lora_a.grad[:, 1].tolist() == [0.0, 0.0]
    assert layer.lora_a.grad[:, 2].abs().min() > 0


def test_distributed_wrappers_come_after():
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)  # making a real one needs a process group
    nn.Module.__init__(wrapped)
    wrapped.module = tiny_llama()
    with pytest.raises(TypeError, match="attach first, then wrap"):
        attach(wrapped, LoRA(rank=2, alpha=3))
