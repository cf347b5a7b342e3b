"""The divergences of one row of logits from another, in every direction, with their gradients in closed form.

A gradient written down is exactly 0 where both rows agree, which one put together by autograd is only to rounding; and
the backward pass needs to keep nothing but the two rows.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

Direction = Literal["forward", "reverse", "symmetric", "jensen-shannon"]
OTHER_WAY: dict[Direction, Direction] = {"forward": "reverse", "reverse": "forward"}  # as the teacher sees it


def check_direction(direction: str) -> None:
    """Raise ValueError where the direction is unknown."""
    if direction not in get_args(Direction):
        names = ", ".join(f'"{name}"' for name in get_args(Direction))
        raise ValueError(f"direction must be one of {names}; got {direction!r}")


def row_divergence(student: Tensor, teacher: Tensor, temperature: float, direction: Direction) -> Tensor:
    """Return temperature^2 times the divergences [N] of rows of logits; differentiable any number of times.

    Args:
        student: [N, V] logits, in at least float32.
        teacher: [N, V] logits of the same type.
        temperature: larger than 0.
        direction: as in `kl_divergence`.
    """
    losses: Tensor = _RowDivergence.apply(student, teacher, temperature, direction)
    return losses


def divergence_value(log_s: Tensor, log_t: Tensor, direction: Direction) -> Tensor:
    """Return the divergences [N], 0 or more.

    Args:
        log_s: [N, V] log-probabilities, the student's.
        log_t: [N, V], the teacher's.
        direction: as in `kl_divergence`.
    """
    if direction == "jensen-shannon":
        log_m = _log_mean(log_s, log_t)
        value = (_kl(log_t, log_m) + _kl(log_s, log_m)) / 2
    elif direction == "symmetric":
        value = (_kl(log_t, log_s) + _kl(log_s, log_t)) / 2
    else:
        value = _kl(log_t, log_s) if direction == "forward" else _kl(log_s, log_t)
    return value.clamp(min=0.0)  # less is rounding


def divergence_gradient(log_a: Tensor, log_b: Tensor, direction: Direction) -> Tensor:
    """Return the gradient [N, V] of the divergences by the logits behind a; exactly 0 where the two rows agree.

    Args:
        log_a: [N, V] log-probabilities of the side whose gradient is asked for.
        log_b: [N, V], the other side's.
        direction: as seen from a: "forward" is KL(b || a).
    """
    if direction == "forward":
        return log_a.exp() - log_b.exp()
    if direction == "reverse":
        return _kl_gradient(log_a, log_b)
    if direction == "symmetric":
        return (log_a.exp() - log_b.exp() + _kl_gradient(log_a, log_b)) / 2
    return _kl_gradient(log_a, _log_mean(log_a, log_b)) / 2


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b) [N]."""
    a = log_a.exp()
    return (a * _log_ratio(a, log_a, log_b)).sum(-1)


def _kl_gradient(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return the gradient [N, V] of KL(a || b) by the logits of a, which is a (log(a / b) - KL(a || b)).

    With the mean of a and c for b it is also that of KL(a || mean) + KL(c || mean): what comes through the mean is 0.
    A row where KL(a || b) is infinite has no slope to follow, and gets 0.
    """
    a = log_a.exp()
    ratio = _log_ratio(a, log_a, log_b)
    kl = (a * ratio).sum(-1, keepdim=True)
    ratio = torch.where(kl == torch.inf, 0.0, ratio)
    return a * (ratio - torch.where(kl == torch.inf, 0.0, kl))


def _log_ratio(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(a / b), and 0 where a is 0: such a place adds nothing, whatever b is there."""
    return (log_a - log_b).masked_fill_(a == 0, 0.0)


def _log_mean(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log((a + b) / 2), exactly log a where a is b."""
    apart = torch.where(log_a == log_b, 0.0, log_a - log_b)  # -inf and -inf are not apart
    return torch.maximum(log_a, log_b) + torch.log1p(torch.expm1(-apart.abs()) / 2)


class _RowDivergence(torch.autograd.Function):
    """`row_divergence`; its backward pass keeps the logits alone, and is made of differentiable operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, temperature: float, direction: Direction) -> Tensor:
        log_s, log_t = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
        return temperature**2 * divergence_value(log_s, log_t, direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        student, teacher, ctx.temperature, ctx.direction = inputs
        ctx.save_for_backward(student, teacher)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_s, log_t = ((logits / ctx.temperature).log_softmax(-1) for logits in ctx.saved_tensors)
        factor, d_student, d_teacher = ctx.temperature * grad[..., None], None, None
        if ctx.needs_input_grad[0]:
            d_student = factor * divergence_gradient(log_s, log_t, ctx.direction)
        if ctx.needs_input_grad[1]:
            d_teacher = factor * divergence_gradient(log_t, log_s, OTHER_WAY.get(ctx.direction, ctx.direction))
        return d_student, d_teacher, None, None
