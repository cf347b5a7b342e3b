"""MultiHeadAttention against a plain formula in float64, decoding with a cache, and what it refuses."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.attention import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    Padding,
    RelativePositionBias,
    SlidingWindow,
)
from llmtune.attention.cache import GrowingCache, StaticCache
from llmtune.attention.positions import RotaryEmbedding
from llmtune.layers import MultiHeadAttention, merge_heads, split_heads

B, T, S, E = 2, 5, 7, 11


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(*args, **knobs):
    """In float64, with every parameter drawn, so that no bias, norm or sink is at its start."""
    attention = MultiHeadAttention(*args, **knobs).double()
    for seed, parameter in enumerate(attention.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=seed + 10))
    return attention


def turned(x, positions, dim, base):
    """The rotation, one pair of numbers after the other. x: [b, heads, t, d]."""
    parts = list(x.unbind(-1))
    for i in range(dim // 2):
        angle = positions.double() * base ** (-2 * i / dim)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., i], x[..., i + dim // 2]
        parts[i], parts[i + dim // 2] = a * cos - b * sin, b * cos + a * sin
    return torch.stack(parts, dim=-1)


def formula(layer, hidden, *, context=None, allowed=None, bias=None, positions=None):
    """The layer in einsums, with K key heads that H / K query heads share."""
    H, K, D = layer.heads, layer.key_heads, layer.head_size
    context = hidden if context is None else context

    def projected(linear, x, heads, norm=None):
        out = torch.einsum("bte,fe->btf", x, linear.weight)
        out = out if linear.bias is None else out + linear.bias
        if norm is not None and layer.qk_norm_over == "projection":
            out = out / (out.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        out = torch.einsum("bthd->bhtd", out.reshape(*out.shape[:2], heads, D))
        if norm is not None and layer.qk_norm_over == "head":
            out = out / (out.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        return out

    query = projected(layer.query, hidden, H, layer.query_norm)
    key = projected(layer.key, context, K, layer.key_norm)
    value = projected(layer.value, context, K)
    if positions is not None:
        query, key = (turned(x, positions, layer.rotary.dim, layer.rotary.base) for x in (query, key))
    query = query.reshape(query.shape[0], K, H // K, *query.shape[2:])
    scores = torch.einsum("bkgtd,bksd->bkgts", query, key).flatten(1, 2)
    scores = scores * (1 / math.sqrt(D) if layer.scale is None else layer.scale)
    if layer.softcap is not None:
        scores = layer.softcap * (scores / layer.softcap).tanh()
    scores = scores if bias is None else scores + bias
    scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].unflatten(1, (K, H // K))
    out = torch.einsum("bkgts,bksd->btkgd", weights, value).flatten(2)
    out = torch.einsum("bti,ei->bte", out, layer.output.weight)
    return out if layer.output.bias is None else out + layer.output.bias


RMS = partial(nn.RMSNorm, eps=0.1)
LAYERS = {
    "plain": partial(make, 15, 3),
    "without biases": partial(make, 15, 3, bias=False),
    "a bias at the output only": partial(make, 15, 3, bias=False, output_bias=True),
    "none at the output": partial(make, 15, 3, output_bias=False),
    "grouped heads of another size": partial(make, E, 6, key_heads=2, head_size=7),
    "one key head": partial(make, E, 3, key_heads=1, head_size=7),
    "a scale": partial(make, E, 3, head_size=7, scale=1.3),
    "a softcap": partial(make, E, 3, head_size=7, softcap=0.7),
    "sinks": partial(make, E, 6, key_heads=3, head_size=7, sinks=True),
    "a norm over each head": partial(make, E, 6, key_heads=2, head_size=7, qk_norm=RMS),
    "a norm over the projection": partial(make, E, 6, key_heads=2, head_size=7, qk_norm=RMS, qk_norm_over="projection"),
}


def compare(layer, got, wanted, leaves):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    leaves = [*leaves, *layer.parameters()]
    weights = draw(*got.shape, seed=99)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, weights), torch.autograd.grad(wanted, leaves, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_self_attention_is_the_formula_with_its_gradients(name):
    layer = LAYERS[name]()
    hidden, allowed = draw(B, T, layer.width).requires_grad_(), Causal().dense(T, T)
    compare(layer, layer(hidden), formula(layer, hidden), [hidden])
    compare(layer, layer(hidden, mask=Causal()), formula(layer, hidden, allowed=allowed), [hidden])


@pytest.mark.parametrize(
    ("name", "biases"),
    [
        ("plain", {"query", "key", "value", "output"}),
        ("without biases", set()),
        ("a bias at the output only", {"output"}),
        ("none at the output", {"query", "key", "value"}),
    ],
)
def test_the_projections_have_the_biases_asked_for(name, biases):
    layer = LAYERS[name]()
    assert {part for part, linear in layer.named_children() if getattr(linear, "bias", None) is not None} == biases


def test_cross_attention_is_the_formula_with_its_gradients():
    layer = make(E, 6, key_heads=2, head_size=7, context_width=13, sinks=True)
    hidden, context = draw(B, T, E).requires_grad_(), draw(B, S, 13, seed=1).requires_grad_()
    allowed = draw(B, 1, T, S, seed=2) > 0
    got = layer(hidden, context=context, mask=Dense(allowed))
    compare(layer, got, formula(layer, hidden, context=context, allowed=allowed), [hidden, context])


@pytest.mark.parametrize("dim", [6, 2])
def test_rotary_turns_by_the_position_ids(dim):
    layer = make(E, 6, key_heads=2, head_size=7, rotary=RotaryEmbedding(dim, base=50.0), qk_norm=RMS)
    hidden, positions = draw(B, T, E), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    wanted = formula(layer, hidden, positions=positions)
    torch.testing.assert_close(layer(hidden, position_ids=positions), wanted, rtol=0, atol=2e-6)  # float32 angles
    counted = formula(layer, hidden, positions=torch.arange(T).expand(B, T))
    torch.testing.assert_close(layer(hidden), counted, rtol=0, atol=2e-6)
    assert (wanted - counted).abs().max() > 1e-2


def test_a_bias_tensor_and_biases_by_distance():
    layer, hidden = make(E, 3, head_size=7), draw(B, T, E).requires_grad_()
    table = draw(B, 3, T, T, seed=1).requires_grad_()
    compare(layer, layer(hidden, bias=table), formula(layer, hidden, bias=table), [hidden, table])
    learned = RelativePositionBias(3, buckets=6, max_distance=4).double()
    learned.weight.data.copy_(draw(6, 3, seed=2))
    wanted = formula(layer, hidden, bias=learned.dense(T, T, dtype=torch.float64))
    compare(layer, layer(hidden, bias=learned), wanted, [hidden, learned.weight])
    distance = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    slopes = torch.tensor([2**-4.0, 2**-8.0, 2**-2.0], dtype=torch.float64)  # of 3 heads: those of 2, one of 4
    wanted = formula(layer, hidden, bias=-slopes[:, None, None] * distance)
    torch.testing.assert_close(layer(hidden, bias=ALiBi(3)), wanted, rtol=0, atol=1e-6)


def test_the_gradient_is_right():
    layer = make(3, 2, key_heads=1, head_size=2, context_width=5, sinks=True, qk_norm=RMS)
    names = [name for name, _ in layer.named_parameters()]

    def call(hidden, context, *parameters):
        return torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (hidden,), {"context": context, "mask": Padding([3])}
        )

    leaves = [draw(1, 2, 3).requires_grad_(), draw(1, 3, 5, seed=1).requires_grad_(), *layer.parameters()]
    assert torch.autograd.gradcheck(call, leaves)


def test_the_backend_asked_for_is_the_one_that_works():
    hidden = torch.ones(B, T, 15)
    MultiHeadAttention(15, 3, softcap=2.0)(hidden)
    with pytest.raises(ValueError, match=r'"sdpa" cannot take softcap=2\.0'):
        MultiHeadAttention(15, 3, softcap=2.0, backend="sdpa")(hidden)


def test_dropout_acts_in_training_only():
    attention = MultiHeadAttention(15, 3, dropout=0.5)
    hidden = torch.randn(B, T, 15)
    assert not torch.equal(attention(hidden), attention(hidden))
    attention.eval()
    assert torch.equal(attention(hidden), attention(hidden))


CACHED = {
    "plain": ({}, {"mask": Causal()}),
    "rotary": ({"rotary": RotaryEmbedding(6)}, {"mask": Causal()}),
    "grouped heads and norms": (
        {"key_heads": 2, "rotary": RotaryEmbedding(4), "qk_norm": RMS, "sinks": True},
        {"mask": Causal()},
    ),
    "a relative bias": ({}, {"mask": Causal(), "bias": RelativePositionBias(6, 5, 7, bidirectional=False)}),
    "ALiBi": ({}, {"mask": Causal(), "bias": ALiBi(6)}),
    "a window": ({"rotary": RotaryEmbedding(6)}, {"mask": Causal() & SlidingWindow(3)}),
}


@pytest.mark.parametrize(
    ("name", "cache"),
    [*((name, cache) for name in CACHED for cache in ("growing", "static")), ("a window", "windowed")],
)
def test_decoding_with_a_cache_gives_what_the_whole_gives(name, cache):
    knobs, arguments = CACHED[name]
    layer, hidden = make(E, 6, head_size=7, **knobs), draw(B, 13, E)
    if isinstance(arguments.get("bias"), nn.Module):
        arguments["bias"].weight.data.copy_(draw(5, 6, seed=1))
    whole = layer(hidden, **arguments).detach()
    kept = {
        "growing": GrowingCache,
        "static": partial(StaticCache, B, layer.key_heads, 13, 7, dtype=torch.float64),
        "windowed": partial(GrowingCache, window=3),
    }[cache]()
    with torch.no_grad():
        pieces = [layer(piece, cache=kept, **arguments) for piece in hidden.split([4, 1, 1, 2, 1, 1, 1, 1, 1], dim=1)]
    assert kept.length == 13
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


def test_a_cross_attention_projects_its_context_once():
    layer = make(E, 6, key_heads=2, head_size=7, context_width=13, qk_norm=RMS)
    hidden, context, mask = draw(B, T, E), draw(B, S, 13, seed=1), Padding([7, 3])
    whole, calls = layer(hidden, context=context, mask=mask).detach(), []
    layer.key.register_forward_hook(lambda *_: calls.append(1))
    cache = GrowingCache()
    with torch.no_grad():
        pieces = [layer(hidden[:, :2], context=context, mask=mask, cache=cache)]
        pieces.append(layer(hidden[:, 2:4], context=context, mask=mask, cache=cache))
        pieces.append(layer(hidden[:, 4:], mask=mask, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)
    assert calls == [1]
    with pytest.raises(ValueError, match=r"the cache holds a context of 7 positions, but this one has 6; start with a"):
        layer(hidden, context=context[:, :6], cache=cache)


@pytest.mark.parametrize("over", ["head", "projection"])
def test_norms_that_answer_in_float32_go_with_a_cache_under_autocast(over):
    class Wide(RMS.func):
        def forward(self, x):
            return super().forward(x.float())

    layer = make(E, 6, key_heads=2, head_size=7, qk_norm=partial(Wide, eps=0.1), qk_norm_over=over).float()
    hidden, cache = draw(B, T, E).float(), GrowingCache()
    with torch.no_grad():
        wanted = layer(hidden, mask=Causal())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = torch.cat([layer(piece, mask=Causal(), cache=cache) for piece in hidden.split(2, dim=1)], dim=1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))


def test_packed_documents_and_padded_rows_give_what_each_gives_alone():
    layer = make(E, 6, key_heads=2, head_size=7, rotary=RotaryEmbedding(6))
    rows = [draw(1, n, E, seed=n) for n in (5, 1, 3)]
    alone = [layer(row, mask=Causal()) for row in rows]
    packed = layer(torch.cat(rows, dim=1), mask=Causal() & Documents.from_lengths([5, 1, 3]))
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)  # other float32 angles
    starting_again = torch.cat([torch.arange(n) for n in (5, 1, 3)])[None]
    exact = layer(
        torch.cat(rows, dim=1), mask=Documents.from_lengths([5, 1, 3]) & Causal(), position_ids=starting_again
    )
    torch.testing.assert_close(exact, torch.cat(alone, dim=1), rtol=0, atol=1e-12)
    padded = torch.cat([torch.cat([row, draw(1, 5 - row.shape[1], E, seed=50)], dim=1) for row in rows])
    out = layer(padded, mask=Causal() & Padding([5, 1, 3]))
    for i, row in enumerate(alone):
        torch.testing.assert_close(out[i : i + 1, : row.shape[1]], row, rtol=0, atol=1e-12)


def test_heads_are_cut_and_joined():
    projected = torch.arange(2 * 3 * 35.0).view(2, 3, 35)
    separate = split_heads(projected, 5)
    assert separate.shape == (2, 5, 3, 7)
    assert torch.equal(separate[1, 3, 2], projected[1, 2, 21:28])
    assert torch.equal(merge_heads(separate), projected)


def test_heads_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match=r"multiple of the 5 heads, got shape \(2, 3, 7\)"):
        split_heads(torch.ones(2, 3, 7), 5)
    with pytest.raises(ValueError, match=r"heads to be merged must be \[B, H, T, D\], got shape \(2, 3, 7\)"):
        merge_heads(torch.ones(2, 3, 7))


@pytest.mark.parametrize(
    ("sizes", "knobs", "sentence"),
    [
        ((11, 3), {}, "a width of 11 cannot be split into 3 equal heads; give head_size"),
        ((12, 6), {"key_heads": 4}, "heads must be a multiple of key_heads, got 6 and 4"),
        ((12, 3), {"key_heads": 6}, "heads must be a multiple of key_heads, got 3 and 6"),
        ((12, 0), {}, "heads must be positive, got 0"),
        ((12, 3), {"key_heads": 0}, "key_heads must be positive, got 0"),
        ((12, 3), {"context_width": -1}, "context_width must be positive, got -1"),
        ((12, 3), {"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
        ((12, 3), {"softcap": 0.0}, "softcap must be positive and finite, got 0.0; leave it out for none"),
        ((12, 3), {"scale": math.nan}, "scale must be finite, got nan"),
        ((12, 3), {"backend": "sdqa"}, r'no attention backend "sdqa", only "auto".* Did you mean "sdpa"'),
        ((12, 3), {"qk_norm_over": "projection"}, 'qk_norm_over="projection" has no effect without qk_norm'),
        ((12, 3), {"qk_norm": RMS, "qk_norm_over": "heads"}, 'must be "head" or "projection", got "heads"'),
        ((12, 3), {"qk_norm": nn.RMSNorm(4)}, "qk_norm makes a norm of a given size.* got a RMSNorm already made"),
        ((12, 3), {"rotary": RotaryEmbedding(6)}, "rotary turns 6 numbers of each head, but head_size is only 4"),
        ((12, 3), {"rotary": RotaryEmbedding(4), "context_width": 5}, "a cross-attention takes no rotary"),
    ],
)
def test_sizes_and_knobs_that_do_not_fit_are_refused(sizes, knobs, sentence):
    with pytest.raises(ValueError, match=sentence):
        MultiHeadAttention(*sizes, **knobs)


def test_inputs_that_do_not_fit_are_refused_before_the_cache_is_touched():
    self_attention, cross = MultiHeadAttention(15, 3), MultiHeadAttention(15, 3, context_width=13)
    turning = MultiHeadAttention(12, 3, rotary=RotaryEmbedding(4))
    hidden, cache = torch.ones(B, T, 15), GrowingCache()
    positions = torch.arange(T)[None]
    for call, sentence in (
        (
            lambda: self_attention(torch.ones(B, T, 13), cache=cache),
            r"hidden must be \[B, T, 15\], got shape \(2, 5, 13\)",
        ),
        (lambda: self_attention(torch.ones(T, 15), cache=cache), r"hidden must be \[B, T, 15\], got shape \(5, 15\)"),
        (lambda: self_attention(hidden, context=hidden), "a self-attention takes no context; give context_width"),
        (lambda: cross(hidden, cache=cache), r"a cross-attention needs context, \[B, S, 13\], got none"),
        (lambda: cross(hidden, context=hidden), r"context must be \[2, S, 13\], got shape \(2, 5, 15\)"),
        (lambda: cross(hidden, context=torch.ones(3, S, 13)), r"context must be \[2, S, 13\], got shape \(3, 7, 13\)"),
        (lambda: self_attention(hidden, position_ids=positions), "position_ids have no effect without rotary"),
        (
            lambda: turning(torch.ones(B, T, 12), position_ids=positions[:, :3], cache=cache),
            r"position_ids must be \[2, 5\] or \[1, 5\], got shape \(1, 3\)",
        ),
        (
            lambda: turning(torch.ones(B, T, 12), position_ids=positions.expand(3, T), cache=cache),
            r"position_ids must be \[2, 5\] or \[1, 5\], got shape \(3, 5\)",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    assert cache.length == 0


@pytest.mark.parametrize(
    "refused",
    [{"mask": Causal() & Padding([9])}, {"bias": torch.zeros(3, 3)}, {"mask": Padding([1, 1, 1])}],
)
def test_what_is_refused_leaves_the_cache_as_it_was(refused):
    attention, cache = MultiHeadAttention(12, 4).eval(), GrowingCache()
    hidden = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = attention(hidden, mask=Causal())
        attention(hidden[:, :2], mask=Causal(), cache=cache)
        with pytest.raises(ValueError, match=r"key_lengths|bias must be|made for"):
            attention(hidden[:, 2:], cache=cache, **refused)
        assert cache.length == 2
        torch.testing.assert_close(attention(hidden[:, 2:], mask=Causal(), cache=cache), truth[:, 2:])


def test_a_cross_attention_takes_no_cache_with_a_window():
    attention = MultiHeadAttention(12, 4, context_width=12)
    with pytest.raises(ValueError, match="needs its whole context, but this cache has a window of 3"):
        attention(torch.zeros(1, 2, 12), context=torch.zeros(1, 7, 12), cache=GrowingCache(window=3))
