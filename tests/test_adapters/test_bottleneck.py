"""Bottleneck adapters: where they stand in many architectures, the formulas there, and what they are refused for."""

import copy
import pickle
from functools import partial

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from llmtune.adapters import (
    Bottleneck,
    BottleneckLayer,
    DoRA,
    LoRA,
    ParallelBottleneckLayer,
    adapter_parameters,
    attach,
    bottleneck_change,
    detach,
    disabled,
    load,
    merge,
    save,
)
from llmtune.adapters.attach import record_of
from llmtune.adapters.bottleneck import FeedForwardInput
from llmtune.adapters.effective import choose_parameters, differentiable
from llmtune.layers import FeedForward, MultiHeadAttention, TransformerBlock
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
gelu = partial(Bottleneck, size=5, activation="gelu")

LLAMA = {
    "vocab_size": 97, "hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {
    "vocab_size": 97, "hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 29,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 97, "d_model": 22, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 29, "decoder_ffn_dim": 31, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0,
}  # fmt: skip
# name: (configuration, model, sizes, the first block's attention outputs, its feed-forward's first and last part)
FAMILIES = {
    "mixtral": (
        "Mixtral", "ForCausalLM",
        {**LLAMA, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 2,
         "num_key_value_heads": 2},
        "model.layers.0", ["self_attn"], ("mlp", "mlp"),
    ),
    "gpt_neox": (
        "GPTNeoX", "ForCausalLM", LLAMA, "gpt_neox.layers.0", ["attention"], ("mlp", "mlp")
    ),
    "bloom": (
        "Bloom", "ForCausalLM", {**BERT, "n_layer": 2, "n_head": 2}, "transformer.h.0",
        ["self_attention.dense"], ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "falcon": ("Falcon", "ForCausalLM", LLAMA, "transformer.h.0", ["self_attention"], ("mlp", "mlp")),
    "mpt": (
        "Mpt", "ForCausalLM",
        {"vocab_size": 97, "d_model": 22, "n_heads": 2, "n_layers": 2, "expansion_ratio": 4, "max_seq_len": 64},
        "transformer.blocks.0", ["attn"], ("ffn.up_proj", "ffn.down_proj"),
    ),
    "opt": (
        "OPT", "ForCausalLM", {**LLAMA, "ffn_dim": 37, "word_embed_proj_dim": 28}, "model.decoder.layers.0",
        ["self_attn"], ("fc1", "fc2"),
    ),
    "roberta": (
        "Roberta", "ForMaskedLM", {**BERT, "pad_token_id": 1}, "roberta.encoder.layer.0", ["attention.output.dense"],
        ("intermediate.dense", "output.dense"),
    ),
    "deberta": (
        "DebertaV2", "ForMaskedLM", BERT, "deberta.encoder.layer.0", ["attention.output.dense"],
        ("intermediate.dense", "output.dense"),
    ),
    "mpnet": (
        "MPNet", "ForMaskedLM", BERT, "mpnet.encoder.layer.0", ["attention.attn"],
        ("intermediate.dense", "output.dense"),
    ),
    "albert": (
        "Albert", "ForMaskedLM", {**BERT, "embedding_size": 13}, "albert.encoder.albert_layer_groups.0.albert_layers.0",
        ["attention.dense"], ("ffn", "ffn_output"),
    ),
    "distilbert": (
        "DistilBert", "ForMaskedLM", {"vocab_size": 97, "dim": 22, "n_layers": 2, "n_heads": 2, "hidden_dim": 29},
        "distilbert.transformer.layer.0", ["attention"], ("ffn", "ffn"),
    ),
    "bart": (
        "Bart", "ForConditionalGeneration", BART, "model.decoder.layers.0", ["self_attn", "encoder_attn"],
        ("fc1", "fc2"),
    ),
    "marian": (
        "Marian", "MTModel", BART, "model.encoder.layers.0", ["self_attn"], ("fc1", "fc2")
    ),
}  # fmt: skip


def build(name):
    family, kind, sizes, *_ = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**sizes)
    config._attn_implementation = "eager"
    model = getattr(hf, family + kind)(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def output(model, **inputs):
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def move(model, name="default"):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.mark.parametrize("name", FAMILIES)
def test_places_in_the_families(name):
    *_, block, attention, (first, last) = FAMILIES[name]
    model = build(name)
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    start = output(model, **inputs)
    report = attach(model, gelu())
    here = [place for place in report.modules if place.startswith(f"{block}.")]
    assert here == [f"{block}.{end}" for end in (*attention, last)]
    assert torch.equal(output(model, **inputs), start)
    move(model)
    model(input_ids=IDS, **inputs).logits.square().mean().backward()
    assert all(bool(p.grad.any()) for p in adapter_parameters(model).values()), "every one of them is called"
    detach(model)
    assert torch.equal(output(model, **inputs), start)

    attach(model, gelu(kind="parallel"))
    move(model)
    assert isinstance(model.get_submodule(f"{block}.{last}"), ParallelBottleneckLayer)
    assert (first != last) == isinstance(model.get_submodule(f"{block}.{first}"), FeedForwardInput)
    assert not torch.equal(output(model, **inputs), start)
    with disabled(model):
        assert torch.equal(output(model, **inputs), start)


def test_gpt2_and_t5_places():
    report = attach(tiny_gpt2(), gelu())
    assert report.modules[0] == "transformer.h.0.attn"
    assert report.counts == {"attention": 2, "feed-forward": 2}
    report = attach(tiny_t5(), gelu())
    assert report.counts == {"attention": 6, "feed-forward": 4}
    assert "decoder.block.1.layer.1.EncDecAttention" in report.modules
    assert "encoder.block.0.layer.1.DenseReluDense" in report.modules


def plain(layer, x, act=F.gelu):
    """The formula in the open, for the layer's parameters."""
    return layer.scaling * (act(x @ layer.down_weight.T + layer.down_bias) @ layer.up_weight.T + layer.up_bias)


@pytest.mark.parametrize(("name", "act"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu), ("tanh", torch.tanh)])
def test_the_change_is_the_formula(name, act):
    torch.manual_seed(0)
    x, down, a, up, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 7, 5), (3, 5), 3, (11, 3), 11))
    expected = 1.7 * (act(x @ down.T + a) @ up.T + b)
    torch.testing.assert_close(
        bottleneck_change(x, down, a, up, b, activation=name, scaling=1.7), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
def test_a_llama_block_by_hand(kind):
    model = tiny_llama(attention="eager").double()
    attach(model, gelu(kind=kind, scaling=1.7, dtype=torch.float64))
    move(model)
    block, x = model.model.layers[0], torch.randn(2, 7, 28, dtype=torch.float64)
    positions = torch.arange(7)[None]
    given = {"position_embeddings": model.model.rotary_emb(x, positions), "attention_mask": None}
    normed = block.input_layernorm(x)
    attention, mlp = block.self_attn, block.mlp
    if kind == "houlsby":
        inner = attention.base(hidden_states=normed, **given)[0]
        x1 = x + inner + plain(attention, inner)
    else:
        assert not isinstance(attention, BottleneckLayer)
        x1 = x + attention(hidden_states=normed, **given)[0]
    normed = block.post_attention_layernorm(x1)
    inner = mlp.base(normed)
    expected = x1 + inner + plain(mlp, normed if kind == "parallel" else inner)
    torch.testing.assert_close(block(x, **given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_a_bert_feed_forward_by_hand(kind, chunk):
    model = tiny_bert(attention="eager").double()
    attach(model, gelu(kind=kind, scaling=1.7, dtype=torch.float64))
    move(model)
    block, x = model.bert.encoder.layer[1], torch.randn(2, 6, 22, dtype=torch.float64)
    block.chunk_size_feed_forward = chunk
    attention = block.attention(x)[0]
    layer = block.output.dense
    inner = layer.base(block.intermediate(attention))
    added = plain(layer, attention if kind == "parallel" else inner)
    expected = block.output.LayerNorm(inner + added + attention)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_what_else_a_module_returns_and_takes_goes_through():
    model = tiny_llama(attention="eager")
    plain_attentions = model(input_ids=IDS, output_attentions=True).attentions
    attach(model, gelu())
    attentions = model(input_ids=IDS, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(attentions, plain_attentions, strict=True))
    assert model.model.layers[0].self_attn.layer_idx == 0
    assert model.model.layers[0].mlp.up_proj is model.model.layers[0].mlp.base.up_proj
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.model.layers[0].mlp.nothing_of_the_kind
    move(model)
    full = output(model)
    with torch.no_grad():
        first = model(input_ids=IDS[:, :6], use_cache=True)
        rest = model(input_ids=IDS[:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_torchs_own_layers_and_ours(kind):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 17, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    blocks = nn.Sequential(
        *(TransformerBlock(MultiHeadAttention(12, heads=2), FeedForward(12, inner=17)) for _ in range(2))
    )
    for model in (stack, blocks):
        x = torch.randn(3, 7, 12)
        with torch.no_grad():
            start = model(x)
            attach(model, gelu(kind=kind))
            torch.testing.assert_close(model(x), start, rtol=1e-5, atol=1e-5)  # no longer by torch's fused kernel
            move(model)
            assert float((model(x) - start).abs().max()) > 0.01
        model(x).square().mean().backward()
        assert all(bool(p.grad.any()) for p in adapter_parameters(model).values())


class Unknown(nn.Module):
    """A model of names that nobody knows."""

    def __init__(self):
        super().__init__()
        self.rows = nn.ModuleList(nn.ModuleDict({"look": nn.Linear(7, 7), "think": self.network()}) for _ in range(3))

    @staticmethod
    def network():
        return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 7))

    def forward(self, x):
        for row in self.rows:
            x = x + row["look"](x)
            x = x + row["think"](x)
        return x


def test_modules_by_any_name_can_be_named():
    model, x = Unknown(), torch.randn(2, 7)
    start = model(x)
    with pytest.raises(
        ValueError, match=r"this Unknown has no attention by a name that is known here: .* attention_modules=\[...\]"
    ):
        attach(model, gelu())
    with pytest.raises(ValueError, match=r"has no feed-forward by a name .* Bottleneck\(..., feed_forward_modules="):
        attach(model, gelu(kind="pfeiffer"))
    report = attach(model, gelu(attention_modules=["look"], feed_forward_modules=r"rows\.[02]\.think"))
    assert report.counts == {"attention": 3, "feed-forward": 2}
    assert torch.equal(model(x), start)
    detach(model)
    attach(model, gelu(kind="parallel", feed_forward_modules=["think"]))
    move(model)
    layer, inner = model.rows[0]["think"], x + model.rows[0]["look"](x)
    torch.testing.assert_close(layer(inner), layer.base(inner) + plain(layer, inner))
    with pytest.raises(ValueError, match=r'feed_forward_modules: "thnik" matches no module.* Did you mean .*"think"'):
        attach(model, gelu(kind="pfeiffer", feed_forward_modules=["thnik"]), "second")


def test_some_layers_alone():
    model = tiny_llama()
    report = attach(model, gelu(kind="pfeiffer", feed_forward_modules=r".*layers\.1\.mlp"))
    assert report.modules == ("model.layers.1.mlp",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": None}, ValueError, "give size or reduction, one of them; got None and None"),
        ({"reduction": 4}, ValueError, "give size or reduction, one of them; got 5 and 4"),
        ({"size": 0}, ValueError, "size must be a whole number of at least 1; got 0"),
        ({"size": None, "reduction": 0}, ValueError, "reduction must be a number above 0"),
        ({"kind": "housby"}, ValueError, "kind must be one of houlsby, .*; got 'housby'. Did you mean \"houlsby\""),
        ({"activation": "gleu"}, ValueError, 'activation must be one of relu, .* Did you mean "gelu"'),
        ({"scaling": -1.0}, ValueError, "scaling must be a number above 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be a probability"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating torch dtype"),
        ({"attention_modules": "(x"}, ValueError, "attention_modules must be suffixes or one regular expression"),
        ({"attention_modules": ()}, ValueError, "attention_modules names no module: leave it out"),
        ({"train_modules": "classifier"}, TypeError, "train_modules must be a list of suffixes"),
        (
            {"kind": "parallel", "attention_modules": ["q"]},
            ValueError,
            'attention_modules has no meaning for kind="parallel"',
        ),
    ],
)
def test_a_record_out_of_range_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        gelu(**options)


def test_what_cannot_be_done_on_a_model_is_refused_and_changes_nothing():
    model = tiny_bert()
    before = {name: id(module) for name, module in model.named_modules()}
    for options, message in (
        ({"kind": "parallel", "feed_forward_modules": ["output.dense"]}, "is a linear layer of .*the whole of it"),
        (
            {"attention_modules": ["intermediate.dense"], "feed_forward_modules": ["intermediate.dense"]},
            "named both in",
        ),
        ({"attention_modules": ["dropout"]}, "self.dropout returns is not to be told"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, gelu(**options))

    class Bare(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"the width of what 0 returns is not to be told"):
        attach(nn.Sequential(Bare()), gelu(kind="pfeiffer", feed_forward_modules=["0"]))
    assert {name: id(module) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="a Bare does not tell the width of its output: give width"):
        BottleneckLayer(Bare(), size=3)
    with pytest.raises(ValueError, match=r"was made for a width of 5, and Bare has 7 here: name other modules"):
        BottleneckLayer(Bare(), size=3, width=5)(torch.ones(2, 7))
    with pytest.raises(TypeError, match=r"needs a module that returns a tensor, .* Bare returned a str"):
        BottleneckLayer(Bare(), size=3, width=5)("text")


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_llama, gelu(scaling=2.0, dropout=0.1)),
        (partial(tiny_bert, labels=3), gelu(kind="parallel", train_modules=("classifier",), dtype=torch.bfloat16)),
        (tiny_t5, gelu(size=None, reduction=7, kind="pfeiffer", feed_forward_modules=r".*block\.1.*DenseReluDense")),
    ],
)
def test_files_of_our_own(make, config, tmp_path):
    model = make()
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    attach(model, config, "mine")
    move(model, "mine")
    folder = save(model, tmp_path, "mine")
    again = make()
    load(again, tmp_path, "mine")
    assert torch.equal(output(again, **inputs), output(model, **inputs))
    assert record_of(again, "mine").configs["mine"] == config
    for name, parameter in adapter_parameters(again, "mine").items():
        assert parameter.dtype == adapter_parameters(model, "mine")[name].dtype
    other = make()
    attach(other, LoRA(rank=2, alpha=3), "mine")
    with pytest.raises(ValueError, match=r'is Bottleneck, the attached "mine" is LoRA'):
        load(other, folder, "mine")


def test_reduction_is_of_the_modules_own_width():
    model = tiny_llama()
    attach(model, Bottleneck(reduction=3))
    assert model.model.layers[0].mlp.down_weight.shape == (9, 28)
    detach(model)
    attach(model, Bottleneck(reduction=99))
    assert model.model.layers[0].mlp.down_weight.shape == (1, 28)


def test_with_lora_inside_and_merged():
    model = tiny_llama()
    attach(model, gelu(), "small")
    move(model, "small")
    attach(model, LoRA(rank=3, alpha=5), "lora")
    move(model, "lora")
    both = output(model)
    merge(model, "lora")
    torch.testing.assert_close(output(model), both, rtol=2e-5, atol=2e-5)


def test_lora_around_a_bottleneck_is_not_merged_but_one_before_it_is():
    model = tiny_bert()
    attach(model, LoRA(rank=2, alpha=3, targets=["output.dense"]), "before")
    attach(model, gelu(), "small")
    attach(model, LoRA(rank=3, alpha=5, targets=["output.dense"]), "after")
    for name in ("before", "small", "after"):
        move(model, name)
    tuned = output(model)
    with pytest.raises(
        ValueError,
        match=r'adapter "after" adds to what "small" makes of the output of a Linear, .*: detach "small" first',
    ):
        merge(model, "after")
    assert torch.equal(output(model), tuned)
    merge(model, "before")
    torch.testing.assert_close(output(model), tuned, rtol=2e-5, atol=2e-5)


def test_lora_around_a_parallel_one_is_merged():
    model = tiny_bert()
    attach(model, gelu(kind="parallel"), "small")
    attach(model, LoRA(rank=3, alpha=5, targets=["output.dense", "intermediate.dense"]), "lora")
    for name in ("small", "lora"):
        move(model, name)
    tuned = output(model)
    merge(model, "lora")
    torch.testing.assert_close(output(model), tuned, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_gradient_checkpointing_gives_the_same_gradients_and_copies_stay_possible(make, kind):
    found = []
    for checkpointing in (False, True):
        model = make()
        torch.manual_seed(0)
        attach(model, gelu(kind=kind))
        move(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model(input_ids=IDS).logits.square().mean().backward()
        found.append({name: p.grad for name, p in adapter_parameters(model).items()})
        assert torch.equal(output(copy.deepcopy(model).eval()), output(model.eval()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_what_is_handed_on_is_no_part_of_a_copy():
    model = tiny_bert()
    attach(model, gelu(kind="parallel"))
    move(model)
    block = model.bert.encoder.layer[0]
    block.intermediate.dense(
        torch.randn(2, 22) @ torch.randn(22, 22, requires_grad=True)
    )  # as if a pass had broken off
    assert block.output.dense.handed.value is not None
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ends = copied.bert.encoder.layer[0]
        assert ends.output.dense.handed is ends.intermediate.dense.handed is not block.output.dense.handed
        assert ends.output.dense.handed.value is None
        assert torch.equal(output(copied), output(model))


def test_a_bf16_base_rounds_once():
    model = tiny_llama().to(torch.bfloat16)
    start = output(model)
    attach(model, gelu())
    assert torch.equal(output(model), start)
    move(model)
    layer, x = model.model.layers[0].mlp, torch.randn(2, 7, 28).to(torch.bfloat16)
    inner = layer.base(x)
    exact = inner.float() + plain(layer, inner.float())
    assert torch.equal(layer(x), exact.to(torch.bfloat16))
    assert layer.up_weight.dtype == torch.float32


def test_a_model_without_storage_can_be_attached_to():
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(tiny_llama().config)
    attach(model, gelu())
    assert all(p.is_meta for p in adapter_parameters(model).values())


def test_effective_gradients_are_taken_with_the_adapter_in_place():
    model = tiny_bert(labels=3)
    attach(model, gelu(kind="parallel"))
    attach(model, gelu(), "second")
    with differentiable(model, choose_parameters(model, ["bert.encoder.layer.0.output.dense.weight"])):
        kinds = {type(module) for module in model.modules()}
        assert {BottleneckLayer, ParallelBottleneckLayer} <= kinds
    model = tiny_bert(labels=3)
    attach(model, DoRA(rank=2, alpha=3, targets=["output.dense"]))
    attach(model, gelu(), "small")
    chosen, before = choose_parameters(model, None), dict(model.named_modules())
    with (
        pytest.raises(ValueError, match='carries adapter "small", which is no change of a parameter, beside one that'),
        differentiable(model, chosen),
    ):
        pass
    assert dict(model.named_modules()) == before
