"""What is handed to torch's kernel, and what comes of it."""

import pytest
import torch
import torch.nn.functional as F

from llmtune.attention import Causal, Dense, Documents, Padding, scaled_dot_product_attention, sdpa


def attend(*args, **knobs):
    return scaled_dot_product_attention(*args, backend="sdpa", **knobs)


def truth(*args, **knobs):
    return scaled_dot_product_attention(*args, backend="reference", **knobs)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def handed(monkeypatch):
    """The arguments of torch's function, one dict for each call."""
    calls, kernel = [], F.scaled_dot_product_attention

    def spy(query, key, value, **knobs):
        calls.append({"query": query, "key": key, "value": value, **knobs})
        return kernel(query, key, value, **knobs)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize(
    ("mask", "T", "S", "is_causal", "table"),
    [
        (None, 5, 7, False, False),
        (Causal(), 5, 5, True, False),
        (Causal(0), 5, 7, True, False),  # aligned to the first key, as torch does it
        (Causal(0), 7, 5, True, False),
        (Causal(), 1, 7, False, False),  # the last query sees every key
        (Causal(6), 5, 7, False, False),
        (Causal(5), 5, 7, False, True),  # the first query does not see the last key
        (Causal(), 5, 7, False, True),
        (Causal([0, 0]), 5, 5, False, True),
        (Causal() & Documents([0, 2, 5]), 5, 5, False, True),
    ],
)
def test_a_causal_mask_becomes_is_causal_only_where_torch_means_the_same(handed, mask, T, S, is_causal, table):
    query, key = draw(2, 4, T, 3), draw(2, 2, S, 3, seed=1)
    out = attend(query, key, key, mask=mask)
    assert handed[0]["is_causal"] is is_causal
    assert (handed[0]["attn_mask"] is not None) is table
    torch.testing.assert_close(out, truth(query, key, key, mask=mask), rtol=0, atol=1e-12)


def test_layers_with_one_mask_share_one_additive_tensor(handed):
    mask = Causal() & Padding([3, 5])
    for seed in range(3):
        x = draw(2, 2, 5, 3, seed=seed)
        attend(x, x, x, mask=mask)
    assert handed[0]["attn_mask"] is handed[1]["attn_mask"] is handed[2]["attn_mask"]
    assert handed[0]["attn_mask"].is_floating_point()


def test_grouped_heads_are_not_repeated(handed):
    query, key = draw(2, 6, 5, 3), draw(2, 2, 5, 3)
    attend(query, key, key, mask=Causal() & Padding([3, 5]))
    assert handed[0]["key"] is key
    assert handed[0]["enable_gqa"] is True


def test_it_says_what_it_cannot_take():
    x = draw(1, 2, 3, 5)
    for knob, sentence in (
        ({"softcap": 30.0}, r'"sdpa" cannot take softcap=30.0; "windowed", "packed", "chunked", "reference" can'),
        ({"sinks": torch.zeros(2), "dropout_p": 0.1}, r'sinks together with dropout; .*"reference" can'),
        ({"return_lse": True, "bias": x[:, :, :, :3].requires_grad_()}, r"return_lse .* with a learned bias"),
        ({"dropout_p": 0.5, "generator": torch.Generator()}, r"cannot take dropout from a generator"),
        ({"softcap": 2.0, "dropout_p": 0.5, "generator": torch.Generator()}, r"softcap=2.0 and dropout from a gen"),
    ):
        with pytest.raises(ValueError, match=sentence):
            attend(x, x, x, **knob)
    attend(x, x, x, generator=torch.Generator())  # nothing to draw: nothing to refuse


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (1, 4, 5, 7), (2, 1, 5, 7), (2, 4, 1, 7), (1, 4, 1, 1)])
@pytest.mark.parametrize(
    "mask", [None, Causal(), Causal(0), Padding([3, 0]), Dense(torch.tensor([[True] * 5 + [False] * 2]))]
)
def test_a_bias_of_any_shape_with_its_gradient(mask, shape):
    leaves = [draw(2, 4, 5, 3), draw(2, 2, 7, 3, seed=1), draw(*shape, seed=2)]
    leaves = [tensor.requires_grad_() for tensor in leaves]
    query, key, bias = leaves
    out, expected = (call(query, key, key, mask=mask, bias=bias) for call in (attend, truth))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for got, wanted in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_a_bias_of_minus_infinity_masks_whole_rows_too():
    query = draw(1, 2, 3, 5).requires_grad_()
    bias = torch.zeros(3, 3, dtype=torch.float64)
    bias[1] = float("-inf")
    out = attend(query, query, query, bias=bias)
    assert not bool(out[:, :, 1].any())
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert bool(gradient.isfinite().all())


def test_a_float32_bias_keeps_its_digits_beside_bfloat16():
    x = draw(1, 1, 3, 4, dtype=torch.bfloat16)
    value = torch.eye(3, 4, dtype=torch.bfloat16)[None, None]
    bias = torch.tensor([[1000.0, 1001.0, 1002.0]])  # bfloat16 would make 1000, 1000, 1000
    out = attend(x * 0, x, value, bias=bias)
    torch.testing.assert_close(out[0, 0, 0, :3].float(), bias[0].softmax(0), rtol=0, atol=4e-3)


def test_dropout_drops_and_keeps_the_mean():
    torch.manual_seed(0)
    x, ones = draw(2000, 1, 1, 3), torch.ones(2000, 1, 1, 1, dtype=torch.float64)
    out = attend(x, x, ones, dropout_p=0.2)  # one key: its weight is dropped, or 1 / 0.8
    assert sorted(out.unique().tolist()) == [0.0, 1.25]
    assert abs(float(out.mean()) - 1.0) < 0.03


def test_a_scale_of_ones_own():
    x = draw(1, 2, 5, 3)
    torch.testing.assert_close(attend(x, x, x, scale=1.7), truth(x, x, x, scale=1.7), rtol=0, atol=1e-12)
