"""The nearest matrix of a low rank, against the full decomposition in float64."""

import pytest
import torch

from llmtune.weights import effective_rank, low_rank_matrix, low_rank_product


def factors(rows=13, inner=5, columns=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(rows, inner, generator=generator, dtype=dtype),
        torch.randn(inner, columns, generator=generator, dtype=dtype),
    )


def nearest(matrix, rank):
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank], float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize(("rows", "inner", "columns"), [(13, 5, 11), (3, 5, 11), (13, 5, 2), (3, 7, 2)])
@pytest.mark.parametrize("rank", [1, 2, 3, 17])
def test_the_product_and_the_matrix_agree_with_the_decomposition(rows, inner, columns, rank):
    left, right = factors(rows, inner, columns)
    expected, error = nearest(left @ right, rank)
    for found in (low_rank_product(left, right, rank), low_rank_matrix(left @ right, rank)):
        assert found.left.shape[1] == found.right.shape[0] <= min(rank, rows, columns)
        torch.testing.assert_close(found.left @ found.right, expected, rtol=1e-9, atol=1e-9)
        assert found.error == pytest.approx(error, abs=1e-7)
        measured = (found.left @ found.right - left @ right).norm() / (left @ right).norm()
        assert found.error == pytest.approx(float(measured), abs=1e-7)


def test_no_rank_keeps_what_the_product_needs():
    left, right = factors()
    doubled = low_rank_product(torch.cat([left, left], 1), torch.cat([right, -0.25 * right]))
    assert doubled.left.shape == (13, 5)
    torch.testing.assert_close(doubled.left @ doubled.right, 0.75 * left @ right, rtol=1e-9, atol=1e-9)
    gone = low_rank_product(torch.cat([left, left], 1), torch.cat([right, -right]))
    assert gone.left.shape[1] >= 1
    assert (gone.left @ gone.right).abs().max() < 1e-12


def test_zeros_have_rank_one_and_no_error():
    found = low_rank_product(torch.zeros(7, 3), torch.zeros(3, 5))
    assert found.left.shape == (7, 1)
    assert found.error == 0.0
    assert low_rank_matrix(torch.zeros(7, 5), 2).error == 0.0


def test_the_two_factors_share_the_size():
    left, right = factors()
    found = low_rank_product(1e3 * left, 1e-3 * right, 3)
    torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1), rtol=1e-9, atol=0)


def test_bf16_factors_come_back_in_float32():
    left, right = factors(dtype=torch.float64)
    found = low_rank_product(left.bfloat16(), right.bfloat16(), 2)
    expected, _ = nearest(left.bfloat16().double() @ right.bfloat16().double(), 2)
    assert found.left.dtype == found.right.dtype == torch.float32
    torch.testing.assert_close((found.left @ found.right).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_the_rank_is_a_whole_number(rank):
    for make in (lambda: low_rank_matrix(torch.ones(3, 2), rank), lambda: low_rank_product(*factors(), rank)):
        with pytest.raises(ValueError, match="rank must be a whole number of at least 1; got"):
            make()


def test_the_effective_rank_counts_directions():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (11, 7))
    p = values / 8
    expected = float((-(p * p.log()).sum()).exp())
    assert effective_rank(left @ torch.diag(values) @ right.T) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(left @ right.T * 0.01) == pytest.approx(4.0)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.zeros(5, 3)) == 0.0
    for wrong in (torch.ones(3), torch.full((2, 2), float("nan"))):
        with pytest.raises(ValueError, match="a finite matrix is expected; got"):
            effective_rank(wrong)
