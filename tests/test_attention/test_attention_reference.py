"""The reference against attention written out with numbers, and what only it can do."""

import math

import pytest
import torch

from llmtune.attention import Causal, Dense, Documents, Padding, scaled_dot_product_attention


def attend(*args, **knobs):
    return scaled_dot_product_attention(*args, backend="reference", **knobs)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(query, key, value, *, allowed, bias, scale, softcap, sinks):
    """Plain Python over every row, with math.exp; nothing shared with the code."""
    B, H, T, D = query.shape
    K, S = key.shape[1:3]
    out = torch.zeros(B, H, T, value.shape[-1], dtype=torch.float64)
    lse = torch.zeros(B, H, T, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                weights, k = [], h * K // H
                for s in range(S):
                    score = sum(float(query[b, h, t, d] * key[b, k, s, d]) for d in range(D)) * scale
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    score += float(bias[b, h, t, s])
                    weights.append(math.exp(score) if allowed[b, h, t, s] else 0.0)
                total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[h])))
                lse[b, h, t] = math.log(total) if total > 0 else -math.inf
                for s in range(S):
                    out[b, h, t] += (weights[s] / total if total > 0 else 0.0) * value[b, k, s]
    return out, lse


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_every_knob_together_is_the_formula(softcap, sinks):
    query, key, value = draw(2, 4, 3, 5), draw(2, 2, 7, 5, seed=1), draw(2, 2, 7, 11, seed=2)
    bias = draw(1, 4, 3, 7, seed=3)
    allowed = draw(2, 1, 3, 7, seed=4) > 0
    allowed[1, 0, 2] = False
    logits = draw(4, seed=5) if sinks else None
    out, lse = attend(
        query, key, value, mask=Dense(allowed), bias=bias, scale=0.3, softcap=softcap, sinks=logits, return_lse=True
    )
    expected = by_hand(
        query, key, value, allowed=allowed.expand(2, 4, 3, 7), bias=bias.expand(2, 4, 3, 7), scale=0.3,
        softcap=softcap, sinks=logits,
    )  # fmt: skip
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-12)


def test_the_default_scale_is_one_over_the_root_of_the_head_size():
    query, key = draw(1, 1, 3, 5), draw(1, 1, 7, 5, seed=1)
    torch.testing.assert_close(attend(query, key, key), attend(query, key, key, scale=5**-0.5), rtol=0, atol=0)


def test_the_log_sum_exp_is_float32_and_float64_for_float64():
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        x = draw(1, 2, 3, 5, dtype=dtype)
        out, lse = attend(x, x, x, return_lse=True)
        assert (out.dtype, lse.dtype, lse.shape) == (dtype, wanted, (1, 2, 3))


def test_bfloat16_is_computed_in_float32():
    x = [draw(1, 2, 13, 5, seed=i, dtype=torch.bfloat16) for i in range(3)]
    wide = attend(*(t.float() for t in x), mask=Causal()).to(torch.bfloat16)
    assert torch.equal(attend(*x, mask=Causal()), wide)


def test_a_row_without_keys_gives_0_no_gradient_and_minus_infinity():
    query, key, value = (draw(1, 2, 5, 3, seed=i).requires_grad_() for i in range(3))
    mask = Causal(-2)  # the first two queries see nothing
    out, lse = attend(query, key, value, mask=mask, return_lse=True)
    assert torch.equal(out[:, :, :2], torch.zeros(1, 2, 2, 3, dtype=torch.float64))
    assert bool((lse[:, :, :2] == -math.inf).all())
    gradients = torch.autograd.grad(out.sum() + lse[:, :, 2:].sum(), (query, key, value))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not bool(gradients[0][:, :, :2].any())
    # even a gradient that arrives at their LSE stops there
    (gradient,) = torch.autograd.grad(attend(query, key, value, mask=mask, return_lse=True)[1].sum(), query)
    assert not bool(gradient[:, :, :2].any())
    assert bool(gradient.isfinite().all())


def test_a_row_hidden_by_its_bias_is_a_row_without_keys():
    query = draw(1, 2, 3, 5).requires_grad_()
    bias = torch.zeros(3, 3, dtype=torch.float64)
    bias[1] = -math.inf
    out, lse = attend(query, query, query, bias=bias.requires_grad_(), return_lse=True)
    assert not bool(out[:, :, 1].any())
    assert bool((lse[:, :, 1] == -math.inf).all())
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), (query, bias)):
        assert bool(gradient.isfinite().all())


def test_a_row_without_keys_has_its_sink_alone():
    x = draw(1, 2, 3, 5)
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    out, lse = attend(x, x, x, mask=Padding([0]), sinks=sinks, return_lse=True)
    assert not bool(out.any())
    torch.testing.assert_close(lse, sinks[None, :, None].expand(1, 2, 3))


def test_no_keys_at_all():
    query, empty = draw(1, 2, 3, 5), draw(1, 2, 0, 5)
    out, lse = attend(query, empty, empty, return_lse=True)
    assert torch.equal(out, torch.zeros(1, 2, 3, 5, dtype=torch.float64))
    assert bool((lse == -math.inf).all())


def test_gradients_of_everything_are_right_and_so_are_their_gradients():
    mask = Causal() & Documents([0, 2, 5])
    tensors = [draw(1, 2, 5, 3), draw(1, 1, 5, 3, seed=1), draw(1, 1, 5, 2, seed=2), draw(1, 2, 5, 5, seed=3)]
    tensors.append(draw(2, seed=4))
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def call(query, key, value, bias, sinks):
        return attend(query, key, value, mask=mask, bias=bias, sinks=sinks, softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_huge_scores_in_bfloat16_do_not_overflow():
    query = torch.full((1, 1, 3, 4), 100.0, dtype=torch.bfloat16)
    key = torch.tensor([1.0, -1.0, 1.0]).to(torch.bfloat16)[None, None, :, None].expand(1, 1, 3, 4) * 100
    value = draw(1, 1, 3, 4, dtype=torch.bfloat16)
    out = attend(query, key, value, scale=1.0)  # scores of 40000 and -40000
    torch.testing.assert_close(out[0, 0, 0], (value[0, 0, 0] + value[0, 0, 2]).float().div(2).to(torch.bfloat16))


def test_dropout_draws_from_the_generator_and_keeps_the_mean():
    query, key = draw(1, 1, 2, 5), draw(1, 1, 3, 5)
    value = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    first, again, other = (
        attend(query, key, value, dropout_p=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    many = attend(
        query.expand(4000, 1, 2, 5), key.expand(4000, 1, 3, 5), value.expand(4000, 1, 3, 1), dropout_p=0.3,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert abs(float(many.mean()) - 1.0) < 0.03
    assert not bool(attend(query, key, value, dropout_p=1.0).any())


def test_the_log_sum_exp_is_of_before_dropout():
    x = draw(1, 1, 3, 5)
    dropped = attend(x, x, x, dropout_p=0.5, return_lse=True)[1]
    torch.testing.assert_close(dropped, attend(x, x, x, return_lse=True)[1], rtol=0, atol=0)
