"""The nearest matrix of a low rank, by the singular value decomposition.

Eckart and Young, "The Approximation of One Matrix by Another of Lower Rank" (1936): no matrix of rank r is nearer, in
the Frobenius norm, than the sum of the r largest singular triples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXACT = torch.finfo(torch.float32).eps  # of the largest; a singular value below is rounding


class LowRank(NamedTuple):
    """A matrix as a product of two, and how far that is from what was asked for.

    Attributes:
        left: [rows, r].
        right: [r, columns], its rows as long as the columns of `left`.
        error: ||left @ right - matrix|| / ||matrix|| in the Frobenius norm, what rounding adds left out; 0 for zeros.
    """

    left: Tensor
    right: Tensor
    error: float


@torch.no_grad()
def low_rank_matrix(matrix: Tensor, rank: int) -> LowRank:
    """Return the nearest matrix of rank at most `rank`, as two factors.

    Args:
        matrix: [rows, columns], finite. It costs a full decomposition; a product of factors is far cheaper with
            `low_rank_product`.
        rank: r, at least 1; one beyond the smaller side counts as that side.

    Returns:
        The factors, in at least float32, and the error.

    Raises:
        ValueError: the rank is no whole number of at least 1.

    Example:
        >>> low_rank_matrix(torch.diag(torch.tensor([4.0, 3.0])), 1).error
        0.6
    """
    check_rank(rank)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    left, values, right = torch.linalg.svd(matrix.to(wide), full_matrices=False)
    return _cut(left, values, right, rank)


@torch.no_grad()
def low_rank_product(left: Tensor, right: Tensor, rank: int | None = None) -> LowRank:
    """Return the nearest matrix of rank at most `rank` to left @ right, which is never written out.

    left = Q_l R_l and right^T = Q_r R_r, and what is decomposed is R_l R_r^T, of the factors' inner size.

    Args:
        left: [rows, R], finite.
        right: [R, columns], finite.
        rank: r, at least 1; None for as many as the product needs to be exact to float32's rounding.

    Returns:
        The factors, in at least float32 (computed in float64, but on Apple's GPUs), and the error.

    Raises:
        ValueError: the rank is no whole number of at least 1.

    Example:
        >>> left, right = torch.ones(7, 3), torch.ones(3, 5)
        >>> found = low_rank_product(left, right)
        >>> found.left.shape, bool((found.left @ found.right - 3).abs().max() < 1e-5)
        (torch.Size([7, 1]), True)
    """
    if rank is not None:
        check_rank(rank)
    narrow = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    work = narrow if left.device.type == "mps" else torch.float64
    outer_left, inner_left = torch.linalg.qr(left.to(work))
    outer_right, inner_right = torch.linalg.qr(right.to(work).T)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    needed = max(1, int((values > EXACT * values[0]).sum())) if rank is None else rank
    found = _cut(outer_left @ u, values, v @ outer_right.T, needed)
    return LowRank(found.left.to(narrow), found.right.to(narrow), found.error)


@torch.no_grad()
def effective_rank(matrix: Tensor) -> float:
    """Return over how many directions a matrix is spread: exp of the entropy of its singular values' shares.

    exp(- sum_i p_i log p_i),  p_i = s_i / sum_j s_j

    From 1 for one direction to the rank for equal singular values; 0 for a matrix of zeros. Of a change of weights it
    says whether the training used the rank that it was given.

    Args:
        matrix: [rows, columns], finite.

    Raises:
        ValueError: it has other than two dimensions, or an entry that is not finite.

    Example:
        >>> round(effective_rank(torch.diag(torch.tensor([3.0, 3.0, 0.0]))), 4)
        2.0

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007), section 2.
    """
    if matrix.ndim != 2 or not bool(matrix.isfinite().all()):
        raise ValueError(f"a finite matrix is expected; got {[*matrix.shape]} of {matrix.dtype}")
    values = torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    if not bool(values.any()):
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def check_rank(rank: int) -> None:
    """Raise ValueError where `rank` is no whole number of at least 1."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1; got {rank!r}")


def _cut(left: Tensor, values: Tensor, right: Tensor, rank: int) -> LowRank:
    squares = values.double() if values.device.type != "mps" else values
    squares = squares.square()
    whole, lost = float(squares.sum()), float(squares[rank:].sum())
    roots = values[:rank].sqrt()
    return LowRank(left[:, :rank] * roots, roots[:, None] * right[:rank], (lost / whole) ** 0.5 if whole else 0.0)
