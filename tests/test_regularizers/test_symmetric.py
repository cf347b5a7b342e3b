import re

import pytest
import torch

from llmtune.regularizers.symmetric import symmetric_kl


def test_bernoulli_closed_form():
    """Of two coins: (p - q) (log-odds of p - log-odds of q)."""
    a, b = torch.tensor([0.3, -1.7, 2.0], dtype=torch.float64), torch.tensor([-0.9, 0.4, 2.5], dtype=torch.float64)
    zero = torch.zeros_like(a)
    found = symmetric_kl(torch.stack([zero, a], -1), torch.stack([zero, b], -1))
    torch.testing.assert_close(found, (a.sigmoid() - b.sigmoid()) * (a - b), rtol=1e-12, atol=0)


def test_is_both_directions_of_torchs_own():
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    kl = torch.nn.functional.kl_div
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    both = kl(p, q, reduction="none", log_target=True) + kl(q, p, reduction="none", log_target=True)
    torch.testing.assert_close(symmetric_kl(a, b), both.sum(-1))


def test_exactly_0_with_gradient_0_where_both_agree():
    a = (9 * torch.randn(5, 7)).requires_grad_()
    b = a.detach().clone().requires_grad_()
    value = symmetric_kl(a, b)
    value.sum().backward()
    assert value.tolist() == [0.0] * 5
    assert not a.grad.any()
    assert not b.grad.any()


def test_gradients_reach_both_sides_and_are_the_numeric_ones():
    a, b = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(symmetric_kl, (a.requires_grad_(), b.requires_grad_()))


def test_impossible_classes_count_nothing():
    a, b = torch.randn(2, 3, 5)
    cut = [torch.cat([z, torch.full((3, 1), -torch.inf)], -1).requires_grad_() for z in (a, b)]
    value = symmetric_kl(*cut)
    torch.testing.assert_close(value, symmetric_kl(a, b))
    value.sum().backward()
    assert all(bool(z.grad.isfinite().all()) for z in cut)


def test_half_precision_is_computed_in_float32():
    a, b = torch.randn(2, 3, 5).to(torch.bfloat16)
    assert symmetric_kl(a, b).dtype == torch.float32
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(a.float(), b.float()), rtol=0, atol=0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=re.escape("both logits need one shape [..., V]; got [3, 5] and [3, 7]")):
        symmetric_kl(torch.zeros(3, 5), torch.zeros(3, 7))
