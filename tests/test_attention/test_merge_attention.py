"""Joining attention over two sets of keys."""

import math

import pytest
import torch

from llmtune.attention import Padding, merge_attention, scaled_dot_product_attention


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(query, key, value, at, **knobs):
    left = scaled_dot_product_attention(query, key[:, :, :at], value[:, :, :at], return_lse=True, **knobs)
    right = scaled_dot_product_attention(query, key[:, :, at:], value[:, :, at:], return_lse=True)
    return merge_attention(*left, *right)


@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_two_parts_together_are_the_whole_with_its_gradients(at):
    leaves = [draw(2, 3, 7, 5).requires_grad_(), draw(2, 3, 11, 5, seed=1).requires_grad_()]
    leaves.append(draw(2, 3, 11, 2, seed=2).requires_grad_())
    whole = scaled_dot_product_attention(*leaves, return_lse=True)
    joined = split(*leaves, at)
    weights = draw(2, 3, 7, 2, seed=3), draw(2, 3, 7, seed=4)
    for got, wanted in zip(joined, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(joined, leaves, weights), torch.autograd.grad(whole, leaves, weights), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_sinks_in_one_part_are_sinks_of_the_whole():
    query, key, value = draw(1, 3, 7, 5), draw(1, 3, 11, 5, seed=1), draw(1, 3, 11, 2, seed=2)
    sinks = draw(3, seed=3)
    whole = scaled_dot_product_attention(query, key, value, sinks=sinks, return_lse=True)
    for got, wanted in zip(split(query, key, value, 4, sinks=sinks), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_two_empty_parts_give_0_and_no_gradient():
    query = draw(1, 2, 3, 5).requires_grad_()
    empty = scaled_dot_product_attention(query, query, query, mask=Padding([0]), return_lse=True)
    out, lse = merge_attention(*empty, *empty)
    assert not bool(out.any())
    assert bool((lse == -math.inf).all())
    (gradient,) = torch.autograd.grad(out.sum() + lse.sum(), query)
    assert not bool(gradient.any())


def test_the_gradient_is_right_and_so_is_its_gradient():
    leaves = [draw(1, 2, 3, 2).requires_grad_(), draw(1, 2, 3, seed=1).requires_grad_()]
    leaves += [draw(1, 2, 3, 2, seed=2).requires_grad_(), draw(1, 2, 3, seed=3).requires_grad_()]
    assert torch.autograd.gradcheck(merge_attention, leaves)
    assert torch.autograd.gradgradcheck(merge_attention, leaves)


def test_far_apart_parts_do_not_overflow():
    out_a, out_b = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    out, lse = merge_attention(out_a, torch.full((1, 1, 1), -1e4), out_b, torch.full((1, 1, 1), 1e4))
    assert torch.equal(out, out_b)
    assert lse.item() == 1e4


def test_parts_of_different_queries_are_refused():
    with pytest.raises(ValueError, match=r"of the same queries, got \(1, 2, 3, 5\) and \(1, 2, 3\), \(1, 2, 4, 5\)"):
        merge_attention(draw(1, 2, 3, 5), draw(1, 2, 3), draw(1, 2, 4, 5), draw(1, 2, 4))


def test_four_tensors_are_needed():
    with pytest.raises(TypeError, match=r"takes four tensors .* got int"):
        merge_attention(1, 2, 3, 4)
