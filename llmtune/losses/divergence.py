"""Divergences between a teacher's and a student's predictions, also without their logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32, compute_dtype, linear_row_loss
from llmtune.losses.cross_entropy import check_after_head, check_linear_shapes, scale_and_cap_, scaled_and_capped
from llmtune.losses.directions import (
    Direction,
    check_direction,
    divergence_gradient,
    divergence_value,
    row_divergence,
)
from llmtune.losses.head_products import logits_into
from llmtune.losses.rows import Reduction, check_reduction, check_temperature, counted, reduced, rows_that_count


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return temperature^2 * a divergence between the softmax of two sets of logits, each divided by the temperature.

    forward          KL(teacher || student)
    reverse          KL(student || teacher)
    symmetric        1/2 KL(teacher || student) + 1/2 KL(student || teacher)
    jensen-shannon   1/2 KL(teacher || m) + 1/2 KL(student || m),  m = (teacher + student) / 2

    The gradient is the closed form's: exactly 0 where student and teacher are equal. A logit of -inf is a probability
    of 0: where both sides have it there is no term; where b alone has it KL(a || b) is infinite, and a gets no gradient
    from it. (The Jensen-Shannon divergence is never infinite.) The factor temperature^2 keeps the size of the gradient
    as the temperature changes (Hinton et al. 2015, section 2). Rows outside the mask change nothing, not even by NaN in
    them; torch's `kl_div(reduction="batchmean")` instead divides by the first dimension, padding and all.

    Args:
        student: logits [..., V].
        teacher: logits [..., V]; gets a gradient where it asks for one.
        temperature: larger than 0; larger is softer.
        direction: one of the four above.
        mask: [...] booleans, True for the rows that count; None for all.
        reduction: "mean" over the rows that count, "sum", or "none": [...], with 0 where the mask is False.

    Returns:
        A scalar, or [...] for "none", in at least float32; 0 or more.

    Raises:
        ValueError: shapes differ, an option is out of range, or no row counts and the mean is asked for.

    Example:
        >>> teacher = torch.randn(2, 3, 7)
        >>> kl_divergence(teacher.clone(), teacher, temperature=2.0).item()
        0.0

    Lin 1991, "Divergence measures based on the Shannon entropy", for the Jensen-Shannon; as a loss of a student, with
    another share of the teacher in m, Agarwal et al. 2024, "On-policy distillation of language models", equation 1.
    """
    if student.ndim < 1 or student.shape != teacher.shape:
        raise ValueError(f"student and teacher need one shape [..., V]; got {[*student.shape]} and {[*teacher.shape]}")
    check_reduction(reduction)
    loss = Divergence(temperature, direction)
    shape = student.shape[:-1]
    rows = rows_that_count(mask, shape, reduction)
    value = loss.of_logits(*(at_least_float32(counted(logits, rows)) for logits in (student, teacher)))
    return reduced(value, rows, shape, reduction)


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """Return `kl_divergence` of the logits of two linear heads, without ever holding either's [N, V] logits.

    z = softcap(logit_scale * (hidden @ weight.T + bias)), and the same for the teacher, whose tensors get no gradient.
    Computed `chunk_rows` rows at a time, only for rows where the mask is True.

    Args:
        hidden: [N, E], the student's.
        weight: [V, E], the student's head.
        teacher_hidden: [N, E'], the teacher's.
        teacher_weight: [V, E'], the teacher's head.
        temperature: larger than 0.
        direction: as in `kl_divergence`.
        mask: [N] booleans, True for the rows that count; None for all.
        bias: [V], the student's, or None.
        teacher_bias: [V], or None.
        softcap: bounds both models' logits; None for none.
        logit_scale: factor on both models' logits, before the soft cap.
        reduction: "mean" over the rows that count, "sum", or "none": [N], with 0 where the mask is False.
        chunk_rows: rows of logits held at once; left out, as many as fit into 64 MB on a CPU (512 MB on an
            accelerator), but at least 64.

    Returns:
        A scalar, or [N] for "none"; float32, or float64 for float64 input. A second derivative is computed through the
        plain formula.

    Raises:
        ValueError: a shape or an option is out of range, or no row counts and the mean is asked for.
    """
    check_linear_shapes(hidden, weight, bias)
    check_linear_shapes(teacher_hidden, teacher_weight, teacher_bias)
    if len(hidden) != len(teacher_hidden) or len(weight) != len(teacher_weight):
        raise ValueError(
            "student and teacher need the same rows and the same vocabulary; got hidden "
            f"{[*hidden.shape]} and {[*teacher_hidden.shape]}, weight {[*weight.shape]} and {[*teacher_weight.shape]}"
        )
    check_reduction(reduction)
    loss = Divergence(temperature, direction, softcap, logit_scale)
    shape = hidden.shape[:1]
    rows = rows_that_count(mask, shape, reduction)
    hidden, teacher_hidden = counted(hidden, rows), counted(teacher_hidden, rows)
    dtype = compute_dtype(teacher_hidden, teacher_weight)
    fixed = (
        teacher_hidden.detach().to(dtype),
        teacher_weight.detach().to(dtype),
        None if teacher_bias is None else teacher_bias.detach(),
    )
    per_row, factor = reduction == "none", 1 / len(hidden) if reduction == "mean" else 1.0
    value = linear_row_loss(hidden, weight, bias, loss, fixed, per_row=per_row, factor=factor, chunk_rows=chunk_rows)
    return reduced(value, rows, shape, "none") if per_row else value


@dataclass(frozen=True)
class Divergence:
    """The divergence of one row of logits from a teacher's; a `RowLoss` with the teacher's hidden, weight and bias."""

    temperature: float = 1.0
    direction: Direction = "forward"
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_direction(self.direction)
        check_after_head(self.softcap, self.logit_scale)

    @property
    def takes_few_rows(self) -> bool:
        return False

    @property
    def buffers(self) -> int:
        held = {"forward": 5, "reverse": 6, "symmetric": 7, "jensen-shannon": 7}[self.direction]
        return held if self.softcap is None else held + 1

    def of_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the losses [N] of finished logits [N, V]."""
        return row_divergence(student, teacher, self.temperature, self.direction)

    def in_place(self, z: Tensor, rows: slice, tensors: tuple[Tensor | None, ...], gradients: bool) -> Tensor:
        """Return the losses [n] and turn the student's logits z [n, V] into their gradient; see `RowLoss`."""
        hidden, weight, bias = tensors
        assert hidden is not None
        assert weight is not None
        h = hidden[rows]  # in the student's steps: equal to it, bit for bit, where they agree
        teacher = logits_into(h.new_empty(len(h), len(weight)), h, weight).to(z.dtype)
        if bias is not None:
            teacher += bias
        slope = self._log_probabilities(z, gradients)
        self._log_probabilities(teacher, False)
        losses = self.temperature**2 * divergence_value(z, teacher, self.direction)
        if gradients:
            torch.mul(divergence_gradient(z, teacher, self.direction), self.temperature * self.logit_scale, out=z)
            if slope is not None:
                z *= slope
        return losses

    def _log_probabilities(self, z: Tensor, gradients: bool) -> Tensor | None:
        """Turn logits z [n, V] into log-probabilities in place; return the soft cap's slope for a gradient, or None."""
        slope = scale_and_cap_(z, self.logit_scale, self.softcap, slope=gradients)
        if self.temperature != 1.0:
            z /= self.temperature
        z -= z.logsumexp(-1, keepdim=True)
        return slope

    def plain(self, z: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Return the losses [N] of the student's logits z [N, V]; see `RowLoss`."""
        hidden, weight, bias = tensors
        assert hidden is not None
        assert weight is not None
        teacher = at_least_float32(F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype)))
        return self.of_logits(
            scaled_and_capped(z, self.logit_scale, self.softcap),
            scaled_and_capped(teacher.to(z.dtype), self.logit_scale, self.softcap),
        )
