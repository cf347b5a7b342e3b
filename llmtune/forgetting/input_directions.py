"""Directions of a layer's inputs: the largest that earlier tasks leave free, and those that are to be protected."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.adapters.layer import wide
from llmtune.forgetting.input_rows import exact_dtype

ORTHONORMAL = 1e-4  # how far products of a basis's columns may be from 0 and 1


def free_share(dtype: torch.dtype) -> float:
    """Return the share of the largest singular value of X X^T below which a direction holds rounding alone."""
    return 1e-10 if dtype == torch.float64 else 1e-6


def designed_rows(covariance: Tensor, rank: int, *, protected: Tensor | None = None) -> Tensor:
    """Return the directions of the inputs that are largest once the protected ones are taken out.

    The first r left singular vectors of (I - P) X X^T, as rows, with P = Q Q^T for the protected basis Q.

    Args:
        covariance: X X^T, [in, in], of the inputs X [in, n], up to any factor; finite.
        rank: r, at least 1.
        protected: Q, [in, k], with orthonormal columns.

    Returns:
        [r, in], float64 (float32 on Apple's GPUs), rows orthonormal and orthogonal to Q; rows of zeros where fewer than
        r directions are left.

    Raises:
        ValueError: a size or the rank is out of range, or Q's columns are not orthonormal.

    Example:
        >>> designed_rows(torch.diag(torch.tensor([5.0, 3.0, 1.0])), 1, protected=torch.eye(3)[:, :1]).abs()
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"the covariance of inputs is square, [in, in]; got {[*covariance.shape]}")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= len(covariance):
        raise ValueError(f"the rank must be a whole number from 1 to {len(covariance)}, the inputs' size; got {rank!r}")
    exact = exact_dtype(covariance.device)
    matrix = covariance.to(exact)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(matrix))  # largest first
    largest = values[0]  # not of what is left, which may be rounding alone
    if protected is not None:
        basis = checked_basis(protected, len(matrix), "the layer").to(matrix)
        vectors, values, _ = torch.linalg.svd(matrix - basis @ (basis.T @ matrix))
        vectors = vectors - basis @ (basis.T @ vectors)  # what rounding left of the protected directions
        vectors = vectors / vectors.norm(dim=0).clamp(min=torch.finfo(exact).tiny)
    return vectors[:, :rank].T * (values[:rank] > free_share(exact) * largest)[:, None]


def extended_basis(covariance: Tensor, energy: float, *, protected: Tensor | None = None) -> Tensor:
    """Return the protected directions and as few more as it takes to hold a share of the inputs' energy.

    ||Q^T X||^2 >= energy * ||X||^2; the new ones are the first eigenvectors of (I - P) X X^T (I - P).

    Args:
        covariance: X X^T, [in, in].
        energy: above 0, at most 1. Where it is 1, all directions beyond rounding are taken.
        protected: Q so far, [in, k], with orthonormal columns.

    Returns:
        [in, k'], float32, orthonormal columns, the protected ones first.

    Raises:
        ValueError: `energy` or a size is out of range.

    Example:
        >>> extended_basis(torch.diag(torch.tensor([6.0, 3.0, 1.0])), 0.85).shape
        torch.Size([3, 2])

    Saha et al. 2021, "Gradient Projection Memory for Continual Learning", section 4, equations 5, 8 and 9. InfLoRA's
    code applies these to the singular values of X X^T, the squares of X's, so that its share is one of fourth powers,
    and takes one direction fewer than the first task's share asks for.
    """
    if isinstance(energy, bool) or not 0 < energy <= 1:
        raise ValueError(f"energy must be a share above 0 and at most 1; got {energy!r}")
    exact = exact_dtype(covariance.device)
    matrix = covariance.to(exact)
    basis = matrix.new_zeros(len(matrix), 0)
    if protected is not None:
        basis = checked_basis(protected, len(matrix), "the layer").to(matrix)
    total = float(matrix.diagonal().sum())
    rest = matrix - basis @ (basis.T @ matrix)
    rest = rest - (rest @ basis) @ basis.T
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    held = total - float(values.sum())
    sums = held + values.cumsum(0)
    needed = 0 if held >= energy * total else int((sums < energy * total).sum()) + 1
    found = vectors[:, : min(needed, int((values > free_share(exact) * total).sum()))]
    found = found - basis @ (basis.T @ found)
    return torch.cat([basis, torch.linalg.qr(found).Q], dim=1).float()


def checked_basis(basis: Tensor, size: int, place: str) -> Tensor:
    """Return the basis, having made sure that it is [size, k] with orthonormal columns.

    Raises:
        ValueError: it is not; names the place.
    """
    if not isinstance(basis, Tensor) or basis.ndim != 2 or len(basis) != size:
        shape = [*basis.shape] if isinstance(basis, Tensor) else type(basis).__name__
        raise ValueError(f"the protected basis of {place} must be [{size}, k], for its inputs' size; got {shape}")
    products = wide(basis).T @ wide(basis)
    off = (products - torch.eye(len(products), device=basis.device)).abs()
    if off.numel() and not float(off.max()) <= ORTHONORMAL:
        raise ValueError(f"the protected basis of {place} must have orthonormal columns: take the Q of its QR")
    return basis
