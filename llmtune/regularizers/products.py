"""||L R||_F^2 of many products of low rank at once, through matrices of the rank's size: no product is built.

||L R||_F^2 = tr[(L^T L) (R R^T)], in (rows + columns) r^2 operations instead of rows * columns * r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmtune.weights.quadratic import Factors


def product_norms(weights: Sequence[Sequence[Factors]]) -> Tensor:
    """Return the sum over weights of ||sum_k scaling_k left_k @ right_k||_F^2, a scalar in at least float32.

    The cross terms between the products of one weight are exact. Weights whose factors have the same shapes are stacked
    and done at once, so that a model of many equal layers takes a few dozen operations.

    Args:
        weights: for each weight at least one (left [..., rows, r], right [..., r, columns], scaling); all on one device
            or on several. Leading dimensions are further weights.

    Returns:
        The sum, on the first weight's device, with gradient to the factors.

    Example:
        >>> left, right = torch.ones(5, 2), torch.ones(2, 3)  # the product is 2 everywhere
        >>> product_norms([[(left, right, 0.5)], [(left, right, 1.0), (left, right, -1.0)]]).item()
        15.0
    """
    alike: dict[Any, list[Sequence[Factors]]] = {}
    for factors in weights:
        key = tuple((left.shape, right.shape, left.dtype, left.device, s) for left, right, s in factors)
        alike.setdefault(key, []).append(factors)
    device = weights[0][0][0].device
    return torch.stack([_norm_of_stack(group).to(device) for group in alike.values()]).sum()


def difference(now: Sequence[Factors], then: Sequence[Factors]) -> list[Factors]:
    """Return factors of the sum of `now` less the sum of `then`.

    Where two of them have the same shapes and scaling, L R - L0 R0 is taken as (L - L0) R + L0 (R - R0): exactly 0,
    without gradient, where nothing has changed; and near there no digits are lost, as they are in the difference of two
    large products.

    Args:
        now: (left [rows, r], right [r, columns], scaling), newest first.
        then: the same, of any number.
    """
    rest, found = list(then), []
    for left, right, s in reversed(now):  # the oldest is likeliest to have been there
        fits = (k for k in reversed(range(len(rest))) if _shape(rest[k]) == _shape((left, right, s)))
        place = next(fits, None)
        if place is None:
            found.append((left, right, s))
        else:
            left0, right0, _ = rest.pop(place)
            found += [(left - left0, right, s), (left0, right - right0, s)]
    return found + [(left, right, -s) for left, right, s in rest]


def _norm_of_stack(group: Sequence[Sequence[Factors]]) -> Tensor:
    """Return the sum of the squared norms of weights with factors of the same shapes and scalings."""
    wide = torch.promote_types(group[0][0][0].dtype, torch.float32)
    scalings = [s for _, _, s in group[0]]
    lefts = [torch.stack([factors[k][0] for factors in group]).to(wide) for k in range(len(scalings))]
    rights = [torch.stack([factors[k][1] for factors in group]).to(wide) for k in range(len(scalings))]
    if len(scalings) == 1:
        alone: Tensor = _GramProduct.apply(lefts[0], rights[0])[0]
        return scalings[0] ** 2 * alone
    scaled = [right * s for right, s in zip(rights, scalings, strict=True)]
    value: Tensor = _GramProduct.apply(torch.cat(lefts, dim=-1), torch.cat(scaled, dim=-2))[0]
    return value


class _GramProduct(torch.autograd.Function):
    """(sum of tr[(L^T L) (R R^T)], L^T L, R R^T): the gradients are 2 L (R R^T) and 2 (L^T L) R, of the same two."""

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gram_left, gram_right = left.mT @ left, right @ right.mT
        return (gram_left * gram_right).sum(), gram_left, gram_right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        left, right, gram_left, gram_right = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            gram_left, gram_right = left.mT @ left, right @ right.mT
        return left @ (2 * grad * gram_right), (2 * grad * gram_left) @ right


def _shape(factors: Factors) -> tuple[Any, ...]:
    return factors[0].shape, factors[1].shape, factors[2]
