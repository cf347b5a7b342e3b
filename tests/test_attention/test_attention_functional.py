"""The door: what it refuses, which backend it takes, and why."""

import pytest
import torch

from llmtune.attention import (
    BackendChoice,
    Causal,
    Dense,
    Documents,
    Padding,
    RelativePositionBias,
    SlidingWindow,
    available_backends,
    choose_backend,
    scaled_dot_product_attention,
)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


QUERY, KEY = zeros(2, 4, 3, 5), zeros(2, 2, 7, 5)


@pytest.mark.parametrize(
    ("query", "key", "value", "sentence"),
    [
        (zeros(2, 4, 3, 5), zeros(2, 3, 7, 5), zeros(2, 3, 7, 5), "must be a multiple of the key heads, got 4 and 3"),
        (zeros(2, 4, 3, 5), zeros(2, 0, 7, 5), zeros(2, 0, 7, 5), "must be a multiple of the key heads, got 4 and 0"),
        (zeros(2, 3, 5), KEY, KEY, r"query must have 4 dimensions, .* got \(2, 3, 5\)"),
        (QUERY, zeros(2, 2, 7, 6), KEY, "query and key must have one head size, got 5 and 6"),
        (QUERY, KEY, zeros(2, 2, 8, 5), r"same heads and length, got \(2, 7\) and \(2, 8\)"),
        (QUERY, KEY, zeros(2, 1, 7, 5), r"same heads and length, got \(2, 7\) and \(1, 7\)"),
        (zeros(3, 4, 3, 5), KEY, KEY, "one batch size, got 3, 2 and 2"),
        (QUERY, KEY.double(), KEY, "one floating dtype, got torch.float32, torch.float64 and torch.float32"),
        (QUERY.long(), KEY.long(), KEY.long(), "one floating dtype, got torch.int64"),
        (QUERY, zeros(2, 2, 7, 5, device="meta"), KEY, "on one device, got cpu, meta and cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_numbers(query, key, value, sentence):
    for backend in ("auto", *available_backends()):
        with pytest.raises(ValueError, match=sentence):
            scaled_dot_product_attention(query, key, value, backend=backend)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"mask": Padding([7, 8])}, r"key_lengths are \[7, 8\], but there are only 7 keys"),
        ({"mask": Padding([7])}, r"Padding is made for 1 rows in the batch"),
        ({"bias": zeros(3, 6)}, r"each size as \(2, 4, 3, 7\) or 1, got shape \(3, 6\)"),
        ({"bias": zeros(2, 3, 7)}, r"bias must be \[T, S\] or \[B, H, T, S\]"),
        ({"bias": zeros(2, 2, 3, 7)}, r"got shape \(2, 2, 3, 7\)"),
        ({"bias": zeros(3, 7, dtype=torch.bool)}, r"a boolean table is a mask: Dense\(tensor\)"),
        ({"bias": zeros(3, 7, dtype=torch.float64)}, "bias must be torch.float32, as the query, got"),
        ({"bias": zeros(3, 7, device="meta")}, "bias is on meta, the query on cpu"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
        ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0; leave it out for none"),
        ({"sinks": zeros(2)}, r"one logit for each of the 4 query heads, \[H\], got \(2,\)"),
        ({"sinks": zeros(4, device="meta")}, "sinks are on meta, the query on cpu"),
        ({"backend": "sdp"}, r'no attention backend "sdp", only "auto", "windowed", .* Did you mean "sdpa"'),
    ],
)
def test_knobs_that_do_not_fit_are_refused_with_the_numbers(knobs, sentence):
    with pytest.raises(ValueError, match=sentence):
        scaled_dot_product_attention(QUERY, KEY, KEY, **knobs)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"mask": torch.ones(3, 7).bool()}, "mask must be a Mask .* got Tensor: wrap a boolean tensor in Dense"),
        ({"bias": 0.5}, "bias must be a tensor .* got float"),
        ({"generator": 3}, "generator must be a torch.Generator, got int"),
        ({"backend": None}, 'backend must be "auto" or a name from available_backends\\(\\), got None'),
        ({"bias": Causal()}, "got Causal; a mask goes in as mask"),
        ({"scale": torch.tensor(0.5)}, "scale must be a number, got Tensor; multiply the query by a learned scale"),
    ],
)
def test_knobs_of_a_wrong_kind_are_a_type_error(knobs, sentence):
    with pytest.raises(TypeError, match=sentence):
        scaled_dot_product_attention(QUERY, KEY, KEY, **knobs)
    with pytest.raises(TypeError, match="query must be a tensor, got list"):
        scaled_dot_product_attention([1.0], KEY, KEY)


def test_the_backends_have_names():
    assert available_backends() == ("windowed", "packed", "sdpa", "chunked", "reference")


def test_few_scores_go_to_one_call():
    assert choose_backend(QUERY, KEY, KEY, mask=Causal() & Documents([0, 3], [0, 7])).name == "sdpa"
    assert choose_backend(QUERY, KEY, KEY, softcap=30.0) == BackendChoice(
        "reference", "there are few scores, and sdpa cannot take softcap=30.0"
    )
    with pytest.raises(ValueError, match="got 4 and 3"):
        choose_backend(QUERY, zeros(2, 3, 7, 5), zeros(2, 3, 7, 5))


LONG = zeros(1, 2, 1031, 5)


@pytest.mark.parametrize(
    ("knobs", "name", "reason"),
    [
        ({}, "sdpa", "takes every argument"),
        ({"mask": Causal()}, "sdpa", "takes every argument"),
        ({"mask": Causal() & SlidingWindow(13)}, "windowed", "only the keys in the window"),
        ({"mask": Causal() & Documents([0, 31, 1031])}, "packed", "no table is made"),
        ({"mask": Causal() & Padding([7])}, "packed", "no table is made"),
        ({"mask": Causal(-3)}, "packed", "no table is made"),
        ({"mask": Dense(torch.eye(1031).bool())}, "sdpa", "takes every argument"),
        ({"mask": Dense(torch.eye(1031).bool()), "softcap": 2.0}, "chunked", "sdpa cannot take softcap=2.0"),
        ({"softcap": 2.0}, "chunked", "memory stays linear"),
        ({"dropout_p": 0.5}, "chunked", "all scores at once because of dropout"),
        ({"bias": torch.zeros(1031, 1031)}, "sdpa", "takes every argument"),
        ({"bias": torch.zeros(1, 1031, requires_grad=True)}, "chunked", "because of a learned bias"),
        ({"bias": RelativePositionBias(2)}, "chunked", "because of a learned bias"),
        ({"sinks": zeros(2), "mask": Causal()}, "sdpa", "takes every argument"),
    ],
)
def test_the_choice_is_told_with_its_reason(knobs, name, reason):
    choice = choose_backend(LONG, LONG, LONG, **knobs)
    assert (choice.name, reason in choice.reason) == (name, True), choice
    chosen = scaled_dot_product_attention(LONG + 0.1, LONG, LONG + 0.3, backend="auto", **knobs)
    assert chosen.shape == (1, 2, 1031, 5)


def test_what_can_be_traced_is_chosen_under_torch_func():
    def loss(query, backend):
        return scaled_dot_product_attention(query, LONG, LONG, mask=Causal(), softcap=2.0, backend=backend).sum()

    query = torch.randn(1, 2, 1031, 5)
    torch.testing.assert_close(torch.func.grad(loss)(query, "auto"), torch.func.grad(loss)(query, "reference"))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"softcap": 2.0},
        {"sinks": zeros(4)},
        {"dropout_p": 0.5, "generator": torch.Generator()},
        {"bias": zeros(3, 7)},
    ],
)
@pytest.mark.parametrize("lse", [False, True])
def test_auto_takes_every_case(knobs, lse):
    result = scaled_dot_product_attention(QUERY, KEY, KEY, mask=Causal(), return_lse=lse, **knobs)
    out = result[0] if lse else result
    assert out.shape == (2, 4, 3, 5)
    assert not lse or result[1].shape == (2, 4, 3)


@pytest.mark.parametrize("backend", available_backends())
def test_autocast_brings_mixed_inputs_to_its_dtype(backend):
    query, key = torch.randn(1, 4, 3, 5), torch.randn(1, 2, 7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scaled_dot_product_attention(query, key.bfloat16(), key.bfloat16(), mask=Causal(), backend=backend)
    low = [tensor.bfloat16() for tensor in (query, key, key)]
    assert torch.equal(out, scaled_dot_product_attention(*low, mask=Causal(), backend=backend))


def test_any_subset_of_the_inputs_may_want_a_gradient():
    for backend in available_backends():
        for wanted in range(1, 8):
            inputs = [torch.randn(1, 2, 5, 3, requires_grad=bool(wanted >> i & 1)) for i in range(3)]
            scaled_dot_product_attention(*inputs, mask=Causal() & Padding([3]), backend=backend).sum().backward()
            assert [tensor.grad is not None for tensor in inputs] == [tensor.requires_grad for tensor in inputs]


def test_it_compiles_into_one_graph():
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 2, 5, 4)
    for mask in (None, Causal(), Causal() & Padding([3, 0])):
        torch.testing.assert_close(compiled(x, x, x, mask=mask), scaled_dot_product_attention(x, x, x, mask=mask))


def test_heads_of_no_size_are_refused():
    with pytest.raises(ValueError, match="query and key must have a head size of at least 1"):
        scaled_dot_product_attention(zeros(2, 4, 3, 0), zeros(2, 4, 7, 0), zeros(2, 4, 7, 5))
