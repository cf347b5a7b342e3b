"""Before a run: the first layers frozen, the last ones drawn anew."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training import freeze_first_layers, reinitialise_top_layers

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": partial(tiny_bert, labels=3), "t5": tiny_t5}
TOP = {"llama": ["model.layers.1."], "gpt2": ["transformer.h.1."], "bert": ["bert.encoder.layer.1."],
       "t5": ["encoder.block.1.", "decoder.block.1."]}  # fmt: skip
LOW = {"llama": ["model.layers.0.", "model.embed_tokens"], "gpt2": ["transformer.h.0.", "transformer.w"],
       "bert": ["bert.encoder.layer.0.", "bert.embeddings"], "t5": ["encoder.block.0.", "decoder.block.0.", "shared"],
       }  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_layers_and_the_embeddings_are_frozen(kind):
    model = MODELS[kind]()
    frozen = freeze_first_layers(model, 1)
    assert set(frozen) == {name for name, _ in model.named_parameters() if name.startswith(tuple(LOW[kind]))}
    assert set(frozen) == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert freeze_first_layers(model, 1) == []


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("loaded", [False, True])
def test_the_last_layers_are_drawn_as_the_class_draws_them(kind, loaded, tmp_path):
    model = MODELS[kind]()
    if loaded:  # transformers marks what it loads, and its initialisers pass over that
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
        before = copy.deepcopy(model.state_dict())
        model.apply(model._init_weights)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(11)
    names = reinitialise_top_layers(model, 1)
    assert set(names) == {name for name, _ in model.named_parameters() if name.startswith(tuple(TOP[kind]))}
    torch.manual_seed(23)
    fresh = [dict(type(model)(model.config).named_parameters()) for _ in range(30)]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name
        if name in names:  # of the class's own spread, and constants exactly its own
            drawn = torch.stack([other[name] for other in fresh])
            if float(drawn.detach().std(0).max()) == 0:
                assert torch.equal(parameter, drawn[0])
            elif parameter.numel() > 100:
                assert float(parameter.detach().std()) == pytest.approx(float(drawn.detach().std()), rel=0.2)
    torch.manual_seed(11)
    assert reinitialise_top_layers(model, 1) == names  # and again, and the same from the same state
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_draw_is_of_torchs_random_state():
    one, other = tiny_llama(), tiny_llama()
    for model in (one, other):
        torch.manual_seed(5)
        reinitialise_top_layers(model, 2)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_more_modules_by_name():
    model = tiny_bert(labels=3)
    names = reinitialise_top_layers(model, 1, also=["bert.pooler", "classifier"])
    assert names[-4:] == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert not model.bert.pooler.dense.bias.any()


def test_what_is_refused():
    for verb in (freeze_first_layers, reinitialise_top_layers):
        with pytest.raises(ValueError, match=r"layers=3, and model.layers has 2: give at most as many"):
            verb(tiny_llama(), 3)
        with pytest.raises(ValueError, match="layers must be a whole number of at least 1; got 0"):
            verb(tiny_llama(), 0)
        with pytest.raises(TypeError, match="a model, that is a torch module, is expected"):
            verb("llama", 1)
    with pytest.raises(TypeError, match="a Hugging Face model, which initialises its modules, is expected; got Linear"):
        reinitialise_top_layers(nn.Linear(2, 3), 1)
    with pytest.raises(ValueError, match="layers are told by numbers in parameters' names"):
        freeze_first_layers(nn.Linear(2, 3), 1)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no module 'bert.poler'. Did you mean"):
        reinitialise_top_layers(tiny_bert(labels=3), 1, also=["bert.poler"])
    with pytest.raises(ValueError, match=r"transformer.wte.weight is shared with a module that stays as it is"):
        reinitialise_top_layers(tiny_gpt2(), 1, also=["transformer.wte"])
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the model has adapters, which would stand on weights drawn at random: draw"):
        reinitialise_top_layers(model, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model = tiny_llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj.weight is frozen, and would stay at random"):
        reinitialise_top_layers(model, 1)
    model = tiny_llama().requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    with pytest.raises(ValueError, match="nothing that is trained lies above the first 1 layers: freeze fewer"):
        freeze_first_layers(model, 1)
    assert all(p.requires_grad for p in model.model.layers[0].parameters())
