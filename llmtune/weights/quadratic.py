"""1/2 sum F (theta - anchor)^2, with F = 1 or not, without keeping a tensor of theta's size for the backward pass.

F and the anchor may be of less precision than theta and on another device: they are widened, and come over, in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**18  # entries of a weight worked on at once: they stay in the processor's cache

Factors = tuple[Tensor, Tensor, float]
"""(left [rows, r], right [r, columns], scaling): scaling * left @ right."""


def quadratic(theta: Tensor, fisher: Tensor | None, anchor: Tensor) -> Tensor:
    """Return 1/2 sum fisher * (theta - anchor)^2, a scalar in at least float32.

    Args:
        theta: any shape; gets the gradient fisher * (theta - anchor).
        fisher: the same shape, on any device; None for 1 everywhere.
        anchor: the same shape as theta, on any device.
    """
    value: Tensor = _Quadratic.apply(theta, fisher, anchor)
    return value


def low_rank_quadratic(
    factors: Sequence[Factors], fisher: Tensor | None, *, weight: Tensor | None = None, anchor: Tensor | None = None
) -> Tensor:
    """Return 1/2 sum fisher * (weight - anchor + sum of scaling * left @ right)^2, a scalar in at least float32.

    The gradients of the factors are made in the forward pass, a few rows at a time, and only scaled in the backward
    pass: no [rows, columns] tensor is built or kept (but weight's own gradient, where it asks for one). Costs about 6 r
    + 4 operations an entry of the weight, and one reading of `fisher` (and of weight and anchor).

    Args:
        factors: at least one (left [rows, r], right [r, columns], scaling).
        fisher: [rows, columns]; None for 1 everywhere.
        weight: [rows, columns]; left out together with `anchor` where the two are equal and stay so.
        anchor: [rows, columns].
    """
    flat = [tensor for left, right, _ in factors for tensor in (left, right)]
    scalings = tuple(scaling for _, _, scaling in factors)
    wanted = tuple(
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in (weight, *flat)
    )
    value: Tensor = _LowRankQuadratic.apply(fisher, anchor, scalings, wanted, weight, *flat)[0]
    return value


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(theta: Tensor, fisher: Tensor | None, anchor: Tensor) -> Tensor:
        dtype = _wide(theta, anchor)
        thetas, anchors = (x.reshape(-1).split(CHUNK) for x in (theta, anchor))
        fishers = [None] * len(thetas) if fisher is None else fisher.reshape(-1).split(CHUNK)
        parts = []
        for t, f, a in zip(thetas, fishers, anchors, strict=True):
            e = t.to(dtype) - a.to(t.device, dtype)
            parts.append(torch.dot(e, e) if f is None else torch.dot(f.to(t.device, dtype), e.square()))
        return 0.5 * torch.stack(parts).sum() if parts else theta.new_zeros((), dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        theta, fisher, anchor = ctx.saved_tensors
        dtype = _wide(theta, anchor)
        scale = grad if fisher is None else grad * fisher.to(theta.device, dtype)
        return (scale * (theta.to(dtype) - anchor.to(theta.device, dtype))).to(theta.dtype), None, None


class _LowRankQuadratic(torch.autograd.Function):
    """(value, gradients of weight and factors): the gradients are made in the forward pass."""

    @staticmethod
    def forward(
        fisher: Tensor | None,
        anchor: Tensor | None,
        scalings: tuple[float, ...],
        wanted: tuple[bool, ...],
        weight: Tensor | None,
        *flat: Tensor,
    ) -> tuple[Tensor | None, ...]:
        dtype = _wide(weight, *flat)
        wide = [tensor.detach().to(dtype) for tensor in flat]
        lefts, rights = wide[::2], wide[1::2]
        pairs = zip((weight, *flat), wanted, strict=True)
        grads = [torch.zeros_like(t, dtype=dtype) if want and t is not None else None for t, want in pairs]
        rows, columns = lefts[0].shape[0], rights[0].shape[1]
        step = max(1, CHUNK // max(1, columns))
        values = []
        for start in range(0, rows, step):
            here = slice(start, start + step)
            products = ((left[here] @ right).mul_(s) for left, right, s in zip(lefts, rights, scalings, strict=True))
            e = next(products) if weight is None else weight.detach()[here].to(dtype) + next(products)
            for product in products:
                e += product  # one by one, so that what the anchor was made of cancels exactly
            if anchor is not None:
                e -= anchor[here].to(e.device, dtype)
            fe = e if fisher is None else fisher[here].to(e.device, dtype) * e
            values.append(torch.dot(fe.flatten(), e.flatten()))
            if (d_weight := grads[0]) is not None:
                d_weight[here] = fe
            for index, (left, right, s) in enumerate(zip(lefts, rights, scalings, strict=True)):
                d_left, d_right = grads[1 + 2 * index], grads[2 + 2 * index]
                if d_left is not None:
                    torch.mm(fe, right.T, out=d_left[here]).mul_(s)
                if d_right is not None:
                    d_right.addmm_(left[here].T, fe, alpha=s)
        return (0.5 * torch.stack(values).sum(), *grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        fisher, anchor, ctx.scalings, _, *tensors = inputs
        ctx.mark_non_differentiable(*(grad for grad in output[1:] if grad is not None))
        ctx.set_materialize_grads(False)
        ctx.count = len(tensors)
        ctx.save_for_backward(fisher, anchor, *tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        fisher, anchor, *rest = ctx.saved_tensors
        tensors, made = rest[: ctx.count], rest[ctx.count :]
        needs = ctx.needs_input_grad[4:]
        if grad is None:
            return (None,) * (4 + ctx.count)
        if torch.is_grad_enabled():  # a second derivative is asked for: only the plain formula has one
            made = _plain_gradients(fisher, anchor, ctx.scalings, tensors, needs)
        scaled = [
            None if g is None or not need else (g * grad).to(t.dtype)
            for g, t, need in zip(made, tensors, needs, strict=True)
        ]
        return (None, None, None, None, *scaled)


def _plain_gradients(
    fisher: Tensor | None,
    anchor: Tensor | None,
    scalings: tuple[float, ...],
    tensors: list[Any],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradients of weight and factors as functions of them, so that they can be differentiated again.

    They are taken by aliases: one factor may stand twice, or be made from another, and each gets its own share.
    """
    tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    weight, *flat = tensors
    dtype = _wide(weight, *flat)
    e = sum(
        s * left.to(dtype) @ right.to(dtype) for left, right, s in zip(flat[::2], flat[1::2], scalings, strict=True)
    )
    if weight is not None:
        e = e + weight.to(dtype)
    if anchor is not None:
        e = e - anchor.to(flat[0].device, dtype)
    value = 0.5 * (e * e if fisher is None else fisher.to(flat[0].device, dtype) * e * e).sum()
    inputs = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(value, inputs, create_graph=True))
    return [next(found) if need else None for need in needs]
