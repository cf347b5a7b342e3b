"""Distillation from a teacher of whom only the k largest probabilities of each position were stored."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.rows import (
    Reduction,
    check_reduction,
    check_temperature,
    counted,
    is_integer,
    log_sum_outside,
    reduced,
    rows_that_count,
)


def top_k_log_probabilities(logits: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of log softmax(logits / temperature), largest first, and their indices.

    Made once by the teacher and stored, for `top_k_kl_divergence` with the same temperature. The temperature has to be
    applied here: it acts on all V logits before they are normalised, and k log-probabilities do not tell what the rest
    would weigh at another temperature. Store them in float32: in half precision their sum is off by more than most
    tails weigh.

    Args:
        logits: [..., V], the teacher's.
        k: how many to keep, 1 to V.
        temperature: larger than 0.

    Returns:
        (log-probabilities [..., k] in at least float32, indices [..., k] int64), without gradient.

    Raises:
        ValueError: k or the temperature is out of range.

    Example:
        >>> values, indices = top_k_log_probabilities(torch.tensor([[0.0, 2.0, 1.0]]), 2)
        >>> indices.tolist()
        [[1, 2]]
    """
    check_temperature(temperature)
    V = logits.shape[-1] if logits.ndim else 0
    if not 1 <= k <= V:
        raise ValueError(f"k must be between 1 and the vocabulary's size {V}; got {k}")
    with torch.no_grad():
        values, indices = (at_least_float32(logits) / temperature).log_softmax(-1).topk(k, dim=-1)
    return values, indices


def top_k_kl_divergence(
    student: Tensor,
    teacher_logprobs: Tensor,
    teacher_indices: Tensor,
    *,
    temperature: float = 1.0,
    tail: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return temperature^2 * KL(teacher || student) over the teacher's top k classes and one bucket for all others.

    With p the teacher's and q = softmax(student / temperature):

        sum over the top k of p log(p / q)  +  P log(P / Q),    P = 1 - sum of p,  Q = sum of q outside the top k

    Putting classes together loses information, so this is never more than the full `kl_divergence(student, teacher)`,
    to rounding; it is equal to it for k = V, and where teacher and student agree on the shares within the rest. The
    bucket is what tells the student how much to leave to the rest; within the rest it keeps the student's own shares.

    P is -expm1(logsumexp of the stored values), and Q is summed from the student's own logits, not taken as 1 - sum q:
    no cancellation, and a finite gradient however small the rest. TRL's `_add_tail_bucket` takes 1 - sum on both sides
    and keeps it above 1e-7, so that its divergence is not the full one at k = V.

    Args:
        student: logits [..., V].
        teacher_logprobs: [..., k], from `top_k_log_probabilities` at this same temperature; they get no gradient.
        teacher_indices: [..., k] integers, the classes they belong to, none twice in a row.
        temperature: larger than 0; acts on the student here, and acted on the teacher when its values were made.
        tail: False leaves out the bucket and takes both sides as distributions over the top k alone; the student then
            learns nothing of how much those should weigh.
        mask: [...] booleans, True for the rows that count; None for all. What stands in other rows changes nothing.
        reduction: "mean" over the rows that count, "sum", or "none": [...], with 0 where the mask is False.

    Returns:
        A scalar, or [...] for "none", in at least float32; 0 or more.

    Raises:
        ValueError: shapes do not fit, an option is out of range, no row counts and the mean is asked for, an index is
            out of range or comes twice in a row, or a row's probabilities sum to more than 1.
        TypeError: the indices are no integers.

    Example:
        >>> teacher, student = torch.randn(2, 5, 7)
        >>> full = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean()
        >>> bool(top_k_kl_divergence(student, *top_k_log_probabilities(teacher, 3)) <= full)
        True
        >>> torch.allclose(top_k_kl_divergence(student, *top_k_log_probabilities(teacher, 7)), full)
        True
    """
    check_temperature(temperature)
    check_reduction(reduction)
    _check_shapes(student, teacher_logprobs, teacher_indices)
    shape = student.shape[:-1]
    rows = rows_that_count(mask, shape, reduction)
    z = at_least_float32(counted(student, rows)) / temperature
    log_p = counted(teacher_logprobs.detach(), rows).to(z.dtype)
    index = counted(teacher_indices, rows).long()
    total = _checked_total(log_p, index, z.shape[-1])
    if tail:
        log_q = z.log_softmax(-1)
        value = _kl_terms(log_p, log_q.gather(-1, index)).sum(-1)
        if index.shape[-1] < z.shape[-1]:
            value = value + _kl_terms(_log_rest(total.squeeze(-1)), log_sum_outside(log_q, index))
    else:
        value = _kl_terms(log_p - total, z.gather(-1, index).log_softmax(-1)).sum(-1)
    value = temperature**2 * torch.where(value < 0, value - value.detach(), value)  # less than 0 is rounding
    return reduced(value, rows, shape, reduction)


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p log(p / q), 0 where p is 0."""
    p = log_p.exp()
    return p * torch.where(p == 0, 0.0, log_p - log_q)


def _log_rest(total: Tensor) -> Tensor:
    """Return log(1 - exp(total)), and -inf where that is no more than rounding."""
    rest = -torch.expm1(total)
    return torch.where(rest > 4 * torch.finfo(rest.dtype).eps, rest, 0.0).log()


def _checked_total(log_p: Tensor, index: Tensor, V: int) -> Tensor:
    """Return logsumexp [n, 1] of the stored values [n, k]; raise where they are no probabilities of classes."""
    total = log_p.logsumexp(-1, keepdim=True)
    ordered = index.sort(-1).values
    outside = ((index < 0) | (index >= V)).any()
    twice = (ordered[:, 1:] == ordered[:, :-1]).any()
    too_much = (total > 1e-3).any()
    outside, twice, too_much = torch.stack([outside, twice, too_much]).tolist()  # one wait for the device
    if outside:
        raise ValueError(f"teacher_indices must be in 0 ... {V - 1}; got {int(index.min())} ... {int(index.max())}")
    if twice:
        raise ValueError("teacher_indices name a class twice in one row: each may stand once")
    if too_much:
        raise ValueError(
            "teacher_logprobs must be log-probabilities, the probabilities at most 1 in sum; a row sums to "
            f"{float(total.max().exp()):.4g}. Make them with top_k_log_probabilities"
        )
    return total


def _check_shapes(student: Tensor, logprobs: Tensor, indices: Tensor) -> None:
    if student.ndim < 1 or logprobs.shape != indices.shape or logprobs.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            "expected student [..., V], teacher_logprobs and teacher_indices [..., k]; got "
            f"{[*student.shape]}, {[*logprobs.shape]} and {[*indices.shape]}"
        )
    if not is_integer(indices):
        raise TypeError(f"teacher_indices must be integers; got {indices.dtype}")
    if not 1 <= indices.shape[-1] <= student.shape[-1]:
        raise ValueError(
            f"the teacher needs between 1 and V = {student.shape[-1]} classes a row; got {indices.shape[-1]}"
        )
