"""Positions: against transformers' own modules, and against the formulas in float64."""

import math

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig, PhiConfig
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from llmtune.attention.positions import (
    LearnedPositions,
    RotaryEmbedding,
    SinusoidalPositions,
    apply_rotary,
    sinusoidal_positions,
)
from llmtune.attention.rotary_config import scaling_from_config
from llmtune.attention.rotary_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    RotaryScaling,
    YaRNScaling,
    rotary_frequencies,
)

ORIGINAL = 67

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
PARAMETERS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, its own attention factor": {**YARN, "attention_factor": 1.37},
    "yarn, mscale": {**YARN, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, other betas": {**YARN, "beta_fast": 11, "beta_slow": 2},
    "yarn, no blend": {**YARN, "beta_fast": 7, "beta_slow": 7, "truncate": False},
    "yarn, factor 1": {**YARN, "factor": 1.0},
    "llama3": LLAMA3,
    "llama3, close together": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 2.5},
}


def llama_config(parameters, *, head_dim=22, base=10000.0):
    """`max_position_embeddings` is the original length for "dynamic", and what a scaling extends to for the others."""
    length = ORIGINAL if parameters["rope_type"] == "dynamic" else 4 * ORIGINAL
    return LlamaConfig(
        hidden_size=3 * head_dim, num_attention_heads=3, head_dim=head_dim, max_position_embeddings=length,
        rope_parameters={"rope_theta": base, **parameters},
    )  # fmt: skip


def ours(config, dim):
    scaling = scaling_from_config(config.rope_parameters, max_position_embeddings=config.max_position_embeddings)
    return RotaryEmbedding(dim, config.rope_parameters["rope_theta"], scaling)


def same(got, wanted, atol=1e-6):
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=atol)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- rotary: against transformers ---


@pytest.mark.parametrize(("head_dim", "base"), [(22, 10000.0), (64, 500000.0), (4, 1000.0), (10, 5.0), (10, 2.0)])
@pytest.mark.parametrize("name", PARAMETERS)
def test_rotary_is_transformers_own(name, head_dim, base):
    config = llama_config(PARAMETERS[name], head_dim=head_dim, base=base)
    for length in (1, 13, ORIGINAL, ORIGINAL + 1, 5 * ORIGINAL, 4999):
        position_ids = torch.stack([torch.arange(length), torch.arange(length).flip(0)])
        wanted = LlamaRotaryEmbedding(config)(torch.zeros(1), position_ids)
        same(ours(config, head_dim)(position_ids), wanted)


@pytest.mark.parametrize("name", ["dynamic", "llama3", "yarn"])
def test_the_scalings_do_something_beyond_the_original_length(name):
    """Else the test above would pass by comparing plain rotary with plain rotary."""
    positions = torch.arange(3 * ORIGINAL)[None]
    cos, _ = ours(llama_config(PARAMETERS[name]), 22)(positions)
    assert (cos - RotaryEmbedding(22)(positions)[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["default", "linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize(
    ("config_class", "module", "share"),
    [
        (GPTNeoXConfig, GPTNeoXRotaryEmbedding, {"rotary_pct": 0.25}),
        (PhiConfig, PhiRotaryEmbedding, {"partial_rotary_factor": 0.5}),
    ],
)
def test_partial_rotary_is_transformers_own(config_class, module, share, name):
    parameters = dict(PARAMETERS[name])
    length = ORIGINAL if name == "dynamic" else 4 * ORIGINAL
    config = config_class(
        hidden_size=3 * 40, num_attention_heads=3, max_position_embeddings=length, rope_parameters=parameters, **share
    )
    dim = int(40 * config.rope_parameters["partial_rotary_factor"])
    assert dim in (10, 20)
    query, key = draw(2, 3, 5 * ORIGINAL, 40), draw(2, 3, 5 * ORIGINAL, 40, seed=1)
    position_ids = torch.arange(5 * ORIGINAL)[None]
    cos, sin = module(config)(query, position_ids)
    turned = apply_rotary_pos_emb(query[..., :dim], key[..., :dim], cos, sin)
    wanted = [torch.cat([t, x[..., dim:]], dim=-1) for t, x in zip(turned, (query, key), strict=True)]
    same(apply_rotary(query, key, *ours(config, dim)(position_ids)), wanted)


@pytest.mark.parametrize("rows", [1, 2])
def test_apply_rotary_is_transformers_own_with_grouped_heads(rows):
    leaves = [draw(2, 6, 11, 14).requires_grad_(), draw(2, 3, 11, 14, seed=1).requires_grad_()]
    cos, sin = RotaryEmbedding(14)(torch.stack([torch.arange(11), 7 + 3 * torch.arange(11)])[:rows])
    got, wanted = apply_rotary(*leaves, cos, sin), apply_rotary_pos_emb(*leaves, cos, sin)
    same(got, wanted)
    weights = draw(2, 6, 11, 14, seed=2), draw(2, 3, 11, 14, seed=3)
    same(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(wanted, leaves, weights))


def test_a_shorter_call_after_a_longer_one_is_what_it_would_have_been_alone():
    config = llama_config(PARAMETERS["dynamic"])
    short, long = torch.arange(ORIGINAL + 5)[None], torch.arange(4 * ORIGINAL)[None]
    theirs, rotary = LlamaRotaryEmbedding(config), ours(config, 22)
    alone = rotary(short)
    theirs(torch.zeros(1), long), rotary(long)
    same(rotary(short), alone, atol=0)
    assert (theirs(torch.zeros(1), short)[0] - alone[0]).abs().max() > 0.1  # as the docstring says of transformers


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.3, 7.7])
def test_up_to_the_original_length_dynamic_ntk_changes_no_bit(factor):
    positions = torch.arange(67)[None]
    for original in (67, 101):
        scaled = RotaryEmbedding(22, scaling=DynamicNTKScaling(factor, original))
        same(scaled(positions), RotaryEmbedding(22)(positions), atol=0)


def test_the_longest_row_of_a_call_decides():
    rotary = RotaryEmbedding(6, scaling=DynamicNTKScaling(2.0, 7))
    both, _ = rotary(torch.tensor([[0, 1, 2], [0, 5, 40]]))
    other, _ = rotary(torch.tensor([[0, 1, 2], [40, 5, 0]]))
    assert torch.equal(both[0], other[0])
    assert not torch.equal(both[0], rotary(torch.tensor([[0, 1, 2]]))[0][0])
    assert rotary(torch.empty(2, 0, dtype=torch.long))[0].shape == (2, 0, 6)


# --- rotary: against the formula ---


def test_rotary_is_a_rotation_by_position_times_frequency():
    D, R = 10, 6
    query, key = draw(2, 4, 3, D, dtype=torch.float64), draw(2, 2, 3, D, seed=1, dtype=torch.float64)
    position_ids = torch.tensor([[0, 1, 2], [5, 3, 11]])
    got = apply_rotary(query, key, *RotaryEmbedding(R, base=97.0)(position_ids))
    for x, turned in zip((query, key), got, strict=True):
        assert torch.equal(turned[..., R:], x[..., R:])
        for b in range(2):
            for t in range(3):
                for i in range(R // 2):
                    number = torch.complex(x[b, :, t, i], x[b, :, t, i + R // 2])
                    angle = int(position_ids[b, t]) * 97.0 ** (-2 * i / R)
                    number = number * complex(math.cos(angle), math.sin(angle))
                    pair = torch.complex(turned[b, :, t, i], turned[b, :, t, i + R // 2])
                    torch.testing.assert_close(pair, number, rtol=0, atol=1e-5)


def test_scores_depend_on_the_distance_alone():
    query, key = draw(1, 1, 1, 14).expand(1, 1, 5, 14), draw(1, 1, 1, 14, seed=1).expand(1, 1, 5, 14)
    rotary = RotaryEmbedding(14)
    near = apply_rotary(query, key, *rotary(torch.arange(5)[None]))
    far = apply_rotary(query, key, *rotary(1000 + torch.arange(5)[None]))
    tables = [q @ k.transpose(-2, -1) for q, k in (near, far)]
    torch.testing.assert_close(*tables, rtol=0, atol=5e-3)
    torch.testing.assert_close(tables[0][0, 0].diagonal(1), tables[0][0, 0, 0, 1].expand(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_rounded_once(dtype):
    query, key = draw(1, 2, 101, 22, dtype=dtype), draw(1, 1, 101, 22, seed=1, dtype=dtype)
    cos, sin = RotaryEmbedding(22)(torch.arange(101)[None])
    got = apply_rotary(query, key, cos, sin)
    exact = apply_rotary_pos_emb(query.double(), key.double(), cos.double(), sin.double())
    for x, wanted in zip(got, exact, strict=True):
        assert x.dtype == dtype
        assert ((x.double() - wanted).abs() <= wanted.abs() * torch.finfo(dtype).eps + 1e-6).all()


def test_float64_stays_float64():
    query, _ = apply_rotary(*[draw(1, 2, 3, 4, dtype=torch.float64)] * 2, *RotaryEmbedding(4)(torch.arange(3)[None]))
    assert query.dtype == torch.float64


# --- rotary: the module ---


@pytest.mark.parametrize("scaling", [None, LinearScaling(2.0), DynamicNTKScaling(2.0, 7), YaRNScaling(2.0, 7)])
def test_casting_or_moving_changes_nothing_and_nothing_is_saved(scaling):
    positions = torch.arange(1000, 1011)[None]
    wanted = RotaryEmbedding(10, scaling=scaling)(positions)
    for change in (nn.Module.bfloat16, nn.Module.half, nn.Module.double):
        got = change(nn.Sequential(RotaryEmbedding(10, scaling=scaling)))[0](positions)
        assert got[0].dtype == torch.float32
        same(got, wanted, atol=0)
    with torch.device("meta"):
        rotary = RotaryEmbedding(10, scaling=scaling)
    assert rotary.frequencies.is_meta
    assert rotary(positions.to("meta"))[0].shape == (1, 11, 10)
    same(rotary.to_empty(device="cpu")(positions), wanted, atol=0)
    assert rotary.state_dict() == {}
    assert list(rotary.parameters()) == []
    assert repr(scaling) in repr(rotary) or scaling is None


def test_a_scaling_of_ones_own():
    class Half(RotaryScaling):
        def frequencies(self, dim, base, *, length=None):
            return rotary_frequencies(dim, base) / 2

    same(RotaryEmbedding(6, scaling=Half())(torch.tensor([[14]])), RotaryEmbedding(6)(torch.tensor([[7]])))


def test_rotary_compiles_without_a_graph_break():
    rotary = RotaryEmbedding(6, scaling=DynamicNTKScaling(2.0, 7))

    def turn(x, position_ids):
        return apply_rotary(x, x, *rotary(position_ids))

    x, positions = draw(2, 3, 11, 8), torch.arange(11)[None]
    same(torch.compile(turn, backend="eager", fullgraph=True)(x, positions), turn(x, positions))


# --- sinusoidal and learned ---


@pytest.mark.parametrize(("length", "width"), [(13, 6), (1031, 34)])
def test_sinusoidal_positions_are_the_papers(length, width):
    table = sinusoidal_positions(length, width)
    assert table.dtype == torch.float32
    wanted = create_sinusoidal_embeddings(length, width, torch.empty(length, width))
    torch.testing.assert_close(table, wanted, rtol=0, atol=1e-7)
    marian = MarianSinusoidalPositionalEmbedding(length, width).create_weight()
    torch.testing.assert_close(torch.cat([table[:, 0::2], table[:, 1::2]], dim=-1), marian, rtol=0, atol=1e-7)
    last = (length - 1) / 10000 ** ((width - 2) / width)
    assert table[-1, -2:].tolist() == pytest.approx([math.sin(last), math.cos(last)], abs=1e-6)


def test_sinusoidal_positions_as_a_module():
    position_ids = torch.tensor([[3, 0, 12], [7, 7, 1]])
    module = SinusoidalPositions(10)
    assert torch.equal(module(position_ids), sinusoidal_positions(13, 10)[position_ids])
    assert torch.equal(module.bfloat16()(position_ids), sinusoidal_positions(13, 10)[position_ids])
    assert list(module.parameters()) == []


def test_learned_positions_are_rows_of_the_weight():
    positions = LearnedPositions(7, 5)
    position_ids = torch.tensor([[6, 0, 0], [1, 2, 6]])
    out = positions(position_ids)
    assert torch.equal(out, positions.weight[position_ids])
    (gradient,) = torch.autograd.grad(out.sum(), positions.weight)
    assert gradient[:, 0].tolist() == [2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 2.0]
    assert list(positions.state_dict()) == ["weight"]
    assert 0.015 < LearnedPositions(101, 103).weight.std().item() < 0.025
    assert positions(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 5)


# --- what is refused ---


@pytest.mark.parametrize("bad", [7, -1])
def test_a_position_that_has_not_been_learned_is_refused(bad):
    with pytest.raises(ValueError, match=rf"between 0 and 6, for there are 7 learned positions, got {bad}"):
        LearnedPositions(7, 5)(torch.tensor([[0, bad, 3]]))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RotaryEmbedding(7), "dim must be even and positive, .* got 7"),
        (lambda: RotaryEmbedding(0), "dim must be even and positive, .* got 0"),
        (lambda: RotaryEmbedding(4, base=1.0), "base must be above 1 and finite, got 1.0"),
        (
            lambda: RotaryEmbedding(4)(torch.arange(3)),
            r"integers \[B, T\] or \[1, T\], got torch.int64 of shape \(3,\)",
        ),
        (lambda: RotaryEmbedding(4)(torch.zeros(1, 3)), r"integers \[B, T\] or \[1, T\], got torch.float32"),
        (lambda: LearnedPositions(4, 2)([[0, 1]]), r"integers \[B, T\] or \[1, T\], got list"),
        (lambda: SinusoidalPositions(4)(torch.zeros(3)), r"integers \[B, T\] or \[1, T\]"),
        (
            lambda: RotaryEmbedding(2, scaling=DynamicNTKScaling(2.0, 7)),
            r"at least 4 .*dimensions \(dim\), got 2",
        ),
        (lambda: LinearScaling(0.5), "LinearScaling needs a factor of at least 1, got 0.5"),
        (lambda: LinearScaling(math.nan), "LinearScaling needs a factor of at least 1, got nan"),
        (lambda: DynamicNTKScaling(2.0, 0), "DynamicNTKScaling needs original_length as a positive integer, got 0"),
        (lambda: YaRNScaling(2.0, 8.5), "YaRNScaling needs original_length as a positive integer, got 8.5"),
        (lambda: YaRNScaling(2.0, 8, beta_fast=1, beta_slow=2), "beta_fast must be at least beta_slow, got 1 and 2"),
        (lambda: YaRNScaling(2.0, 8, attention_factor=-1.0), "attention_factor must be positive, got -1.0"),
        (lambda: YaRNScaling(2.0, 8, mscale=1.0), "must both be positive or both be left out, got 1.0 and None"),
        (
            lambda: YaRNScaling(2.0, 8, mscale=1.0, mscale_all_dim=1.0, attention_factor=1.0),
            "attention_factor leaves mscale and mscale_all_dim without effect",
        ),
        (lambda: Llama3Scaling(8.0, 4.0, 4.0, 8192), "must be larger than low_frequency_factor, got 4.0 and 4.0"),
        (lambda: sinusoidal_positions(3, 5), "width must be even and positive, .* got 5"),
        (lambda: sinusoidal_positions(-1, 4), "length must not be negative, got -1"),
        (lambda: LearnedPositions(0, 5), "length and width must be positive, got 0 and 5"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_dict_for_a_scaling_is_refused():
    with pytest.raises(TypeError, match=r"scaling must be a record such as .*, got dict; scaling_from_config reads"):
        RotaryEmbedding(4, scaling={"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("query", "key", "cos", "sentence"),
    [
        ((2, 3, 5, 4), (2, 3, 5, 4), (1, 5, 6), r"the query must be .* got \(2, 3, 5, 4\) and cos \(1, 5, 6\)"),
        ((2, 3, 5, 8), (2, 3, 7, 8), (1, 5, 6), r"the key must be .* got \(2, 3, 7, 8\)"),
        ((2, 3, 5, 8), (2, 3, 5, 8), (3, 5, 6), r"the query must be .* cos \(3, 5, 6\)"),
        ((2, 3, 5, 8), (2, 3, 5), (1, 5, 6), r"the key must be .* got \(2, 3, 5\)"),
        ((2, 3, 5, 8), (2, 3, 5, 8), (1, 5, 3), r"with R even, got \(1, 5, 3\)"),
        ((2, 3, 5, 8), (2, 3, 5, 8), (5, 6), r"must both be \[B, T, R\]"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(query, key, cos, sentence):
    with pytest.raises(ValueError, match=sentence):
        apply_rotary(torch.zeros(query), torch.zeros(key), torch.zeros(cos), torch.zeros(cos))


def test_cos_and_sin_of_different_shapes_are_refused():
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"got \(1, 3, 4\) and \(1, 3, 2\)"):
        apply_rotary(x, x, torch.zeros(1, 3, 4), torch.zeros(1, 3, 2))


# --- reading a config ---


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}, None),
        ({"type": "linear", "factor": 2.0}, LinearScaling(2.0)),
        ({"rope_type": "dynamic", "factor": 2.0}, DynamicNTKScaling(2.0, 67)),
        ({**YARN, "beta_fast": None, "truncate": False}, YaRNScaling(4.0, 67, truncate=False)),
        (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 67)),
    ],
)
def test_a_config_is_read(parameters, scaling):
    assert scaling_from_config(parameters, max_position_embeddings=67) == scaling


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"rope_type": "longrope"}, "rope_type must be one of default, linear, dynamic, yarn, llama3, got 'longrope'"),
        ({"rope_type": "lama3"}, "got 'lama3'. Did you mean \"llama3\""),
        ({"factor": 2.0}, "rope_type must be one of .* got None"),
        ({"rope_type": "linear", "facto": 2.0}, 'rope_type "linear" has no entry "facto". Did you mean "factor"'),
        ({"rope_type": "default", "factor": 2.0}, 'rope_type "default" has no entry "factor"'),
        ({"rope_type": "linear"}, 'rope_type "linear" needs factor in rope_parameters'),
        ({"rope_type": "yarn", "factor": None}, "needs factor and original_max_position_embeddings in rope_parameters"),
        ({"rope_type": "dynamic", "factor": 2.0}, 'rope_type "dynamic" needs max_position_embeddings'),
        ({"full_attention": {"rope_type": "default"}}, r"for each kind of layer \(full_attention\): hand over one"),
    ],
)
def test_a_config_that_says_something_else_is_refused(parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        scaling_from_config(parameters)
