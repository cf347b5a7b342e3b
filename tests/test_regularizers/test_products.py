import pytest
import torch

from llmtune.regularizers.products import difference, product_norms
from llmtune.testing.close import assert_close


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def factors(rows, r, columns, s, *, seed=0, dtype=torch.float64):
    return draw(rows, r, seed=seed, dtype=dtype), draw(r, columns, seed=seed + 1, dtype=dtype), s


def dense(weights):
    return sum(sum(s * left @ right for left, right, s in w).square().sum() for w in weights)


def leaves(weights):
    return [tensor for w in weights for left, right, _ in w for tensor in (left, right)]


WEIGHTS = {
    "one": [[factors(13, 3, 7, 0.5)]],
    "many alike, and others": [
        *([factors(13, 3, 7, 0.5, seed=k)] for k in range(5)),
        [factors(13, 2, 7, 0.5)],
        [factors(13, 3, 7, 2.0)],
        [factors(5, 3, 11, 2.0)],
    ],
    "several products a weight": [
        *([factors(13, 3, 7, 0.5, seed=k), factors(13, 2, 7, -3.0, seed=k + 9)] for k in range(2)),
        [factors(13, 3, 7, 0.5, seed=20), factors(13, 3, 7, 1.5, seed=21), factors(13, 1, 7, 1.0, seed=22)],
    ],
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_equals_the_dense_norms_with_gradients(case):
    weights = WEIGHTS[case]
    value, expected = product_norms(weights), dense(weights)
    assert_close(value, expected, rtol=1e-12)
    got, want = (torch.autograd.grad(v, leaves(weights)) for v in (value, expected))
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, rtol=1e-12)


def test_leading_dimensions_are_further_weights():
    left, right = draw(5, 13, 2), draw(5, 2, 7)
    assert_close(product_norms([[(left, right, 3.0)]]), 9 * (left @ right).square().sum(), rtol=1e-12)


def test_second_derivatives():
    left, right, s = factors(5, 2, 3, 0.5)
    other = factors(5, 1, 3, 2.0, seed=4)
    assert torch.autograd.gradgradcheck(lambda a, b: product_norms([[(a, b, s), other]]), (left, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_summed_in_float32(dtype):
    weights = [[factors(13, 3, 7, 0.5, seed=k, dtype=dtype)] for k in range(3)]
    value = product_norms(weights)
    assert value.dtype == torch.float32
    wide = [[(left.detach().double(), right.detach().double(), s)] for [(left, right, s)] in weights]
    assert_close(value.double(), dense(wide), rtol=1e-5)
    assert {g.dtype for g in torch.autograd.grad(value, leaves(weights))} == {dtype}


@pytest.mark.parametrize(
    ("now", "then"),
    [
        ([(3, 0.5)], [(3, 0.5)]),
        ([(2, 1.0), (3, 0.5)], [(3, 0.5)]),
        ([(3, 0.5), (3, 0.5)], [(3, 0.5)]),
        ([(3, 0.5)], [(2, 1.0), (3, 0.5)]),
        ([(3, 0.5)], [(3, 0.25)]),
        ([], [(3, 0.5)]),
        ([(3, 0.5)], []),
    ],
)
def test_difference_is_the_difference(now, then):
    now = [factors(13, r, 7, s, seed=10 * k) for k, (r, s) in enumerate(now)]
    then = [factors(13, r, 7, s, seed=10 * k + 5) for k, (r, s) in enumerate(then)]

    def total(several):
        return sum((s * left @ right for left, right, s in several), torch.zeros(13, 7))

    assert_close(total(difference(now, then)), total(now) - total(then), rtol=1e-12)


def test_nothing_has_changed_gives_exactly_nothing_and_a_small_change_keeps_its_digits():
    left, right, s = factors(101, 7, 103, 2.0, dtype=torch.float32)
    then = [(left.detach().clone(), right.detach().clone(), s)]
    value = product_norms([difference([(left, right, s)], then)])
    assert value.item() == 0.0
    assert not any(g.any() for g in torch.autograd.grad(value, (left, right)))
    with torch.no_grad():
        left += 1e-5 * torch.randn_like(left)
    exact = (s * (left.double() @ right.double() - then[0][0].double() @ then[0][1].double())).square().sum()
    value = product_norms([difference([(left, right, s)], then)])
    assert_close(value.double(), exact, rtol=1e-4)
    naive = product_norms([[(left, right, s), (*then[0][:2], -s)]])
    assert not abs(naive.item() / exact.item() - 1) < 1e-2
