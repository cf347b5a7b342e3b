"""Losses of a linear head's logits, row by row, without the [N, V] logits: the engine of cross-entropy and divergence.

The logits of a language model's head are often the largest tensor of a training step. Here they are made a chunk of
rows at a time; each chunk is turned into its own gradient in place, multiplied back onto the hidden states and the
head, and is gone before the next one comes. So the gradients are ready after the forward pass, and the backward pass
scales them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.head_products import add_head_gradient, gradient_into, logits_into

CHUNK_BYTES = {"cpu": 64 * 2**20}
CHUNK_BYTES_ELSEWHERE = 512 * 2**20  # an accelerator needs larger chunks to be busy
FEWEST_ROWS = 64  # every chunk reads the whole head: it must be worth its while
FLOAT16_FACTOR = 2.0**-5  # neither makes large gradients infinite nor small ones 0, as 1 / N would
CACHE_BYTES = 2**20  # a CPU works through a chunk this much at a time, so that a row is read from memory once


class RowLoss(Protocol):
    """A loss that is a sum over rows of logits.

    Attributes:
        buffers: how many [rows, V] tensors, the logits among them, `in_place` holds at once.
        takes_few_rows: whether a few rows cost no more than their share of many: nothing is multiplied by a head.
    """

    @property
    def buffers(self) -> int: ...

    @property
    def takes_few_rows(self) -> bool: ...

    def in_place(self, z: Tensor, rows: slice, tensors: tuple[Tensor | None, ...], gradients: bool) -> Tensor:
        """Return the losses [n] of logits z [n, V]; if asked, turn z in place into each row's gradient by its logits.

        Args:
            z: [n, V] logits W h + b in float32 or float64, to be overwritten.
            rows: which rows of all these are.
            tensors: what the loss needs beside the logits, for all rows.
            gradients: whether z must hold the gradient afterwards.
        """
        ...

    def plain(self, z: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Return the losses [N] of all logits z [N, V] by the plain formula, differentiable any number of times."""
        ...


def linear_row_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: RowLoss,
    tensors: tuple[Tensor | None, ...],
    *,
    per_row: bool = False,
    factor: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the loss of the logits hidden @ weight.T + bias, summed over rows or row by row, times a factor.

    Args:
        hidden: [N, E].
        weight: [V, E].
        bias: [V], or None.
        loss: the loss of a row of logits.
        tensors: handed to `loss`; they get no gradient.
        per_row: return [N] instead of the sum. The head's gradient is then computed in the backward pass, from logits
            made once more.
        factor: 1 / N for a mean; taken in before the gradients are rounded to their type, but for float16: there it
            comes in the backward pass, together with a loss scaler's, so that small gradients do not become 0.
        chunk_rows: rows of logits held at once; left out, as `default_chunk_rows` says.

    Returns:
        A scalar or [N], in float32, or float64 for float64 input.
    """
    dtype = compute_dtype(hidden, weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = _own_chunk_rows(weight, loss) if chunk_rows is None else chunk_rows
    if rows < 1:
        raise ValueError(f"chunk_rows must be 1 or more; got {rows}")
    asked = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    wanted = asked if torch.is_grad_enabled() else (False, False, False)
    early = FLOAT16_FACTOR if dtype == torch.float16 and not per_row else factor
    result: Tensor = _LinearRowLoss.apply(hidden, weight, bias, loss, per_row, early, rows, wanted, *tensors)[0]
    return result if early == factor else result * (factor / early)


def default_chunk_rows(weight: Tensor, buffers: int) -> int:
    """Return how many rows of logits fit into 64 MB on a CPU, or 512 MB on an accelerator, but at least 64.

    Args:
        weight: [V, E], the head; its type and device decide.
        buffers: how many [rows, V] tensors of at least float32 are held at once.
    """
    wide = 8 if weight.dtype == torch.float64 else 4
    narrow = weight.element_size() if weight.element_size() < 4 else 0
    budget = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES_ELSEWHERE)
    return max(FEWEST_ROWS, budget // (weight.shape[0] * (wide * buffers + narrow)))


def _own_chunk_rows(weight: Tensor, loss: RowLoss) -> int:
    if weight.device.type != "cpu" or not loss.takes_few_rows:
        return default_chunk_rows(weight, loss.buffers)
    # only the logits are of the chunk's size, in their own type; the rest is for what is worked on in the cache
    return max(FEWEST_ROWS, CHUNK_BYTES["cpu"] * 7 // 16 // (weight.shape[0] * weight.element_size()))


def at_least_float32(logits: Tensor) -> Tensor:
    """Return the logits in float32 where they are in half precision, else as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type in which a linear layer would multiply: autocast's where it is on, else the wider of the two."""
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and wider != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return wider


class _LinearRowLoss(torch.autograd.Function):
    """(loss, d hidden, d weight, d bias) of the head; see the module's docstring."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: RowLoss,
        per_row: bool,
        factor: float,
        chunk_rows: int,
        wanted: tuple[bool, bool, bool],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        if per_row:  # the head's gradient must wait for the rows' factors
            wanted = (wanted[0], False, False)
        losses, grads = _run_chunks(hidden, weight, bias, loss, tensors, chunk_rows, wanted, factor=factor)
        return (factor * (losses if per_row else losses.sum()), *grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, bias, ctx.loss, ctx.per_row, ctx.factor, ctx.chunk_rows = inputs[:7]
        ctx.mark_non_differentiable(*(grad for grad in output[1:] if grad is not None))
        ctx.set_materialize_grads(False)
        ctx.made = output[1:]
        ctx.save_for_backward(hidden, weight, bias, *inputs[8:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *tensors = ctx.saved_tensors
        rest = (None,) * (5 + len(tensors))
        if grad is None:
            return (None, None, None, *rest)
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # a second derivative is asked for: only the plain formula has one
            return (*_plain_gradients(hidden, weight, bias, ctx.loss, tuple(tensors), ctx.factor * grad, needs), *rest)

        def again(wanted: tuple[bool, bool, bool], row_factors: Tensor | None = None) -> tuple[Tensor | None, ...]:
            return _run_chunks(
                hidden, weight, bias, ctx.loss, tuple(tensors), ctx.chunk_rows, wanted, factor=ctx.factor,
                row_factors=row_factors,
            )[1]  # fmt: skip

        made, ctx.made = ctx.made, None  # given away, so that they need no copy; asked for once more, made once more
        if made is None:
            made = again((needs[0], needs[1] and not ctx.per_row, needs[2] and not ctx.per_row))
        if ctx.per_row and (needs[1] or needs[2]):
            made = (made[0], *again((False, needs[1], needs[2]), grad)[1:])
        if ctx.per_row:
            return (_scaled(made[0], grad[:, None]), *made[1:], *rest)
        return (*(_scaled(gradient, grad) for gradient in made), *rest)


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.mul_(factor)


def _run_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: RowLoss,
    tensors: tuple[Tensor | None, ...],
    chunk_rows: int,
    wanted: tuple[bool, bool, bool],
    *,
    factor: float,
    row_factors: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return the rows' losses [N] and the wanted gradients of their sum times `factor` and, if given, `row_factors`.

    A float16 head's gradient comes in float32: only what the backward pass multiplies it by brings it into range.
    """
    N, V = len(hidden), len(weight)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = hidden.new_empty(N, dtype=wide)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.empty_like(weight, dtype=wide) if wanted[1] else None
    d_bias = hidden.new_zeros(V, dtype=wide) if wanted[2] else None
    logits = hidden.new_empty(min(chunk_rows, N), V)
    step = _rows_at_once(loss, logits, wide)
    scratch = None if hidden.dtype == wide else hidden.new_empty(step, V, dtype=wide)
    for start in range(0, N, chunk_rows):
        h = hidden[start : start + chunk_rows]
        z = logits_into(logits[: len(h)], h, weight)
        for first in range(0, len(h), step):
            part = z[first : first + step]
            rows = slice(start + first, start + first + len(part))
            g = part if scratch is None else scratch[: len(part)].copy_(part)
            if bias is not None:
                g += bias
            losses[rows] = loss.in_place(g, rows, tensors, any(wanted))
            if row_factors is not None:
                g *= row_factors[rows, None]
            if d_bias is not None:
                d_bias.add_(g.sum(0), alpha=factor)
            if scratch is not None and (wanted[0] or wanted[1]):
                part.copy_(g)
        if d_weight is not None:
            add_head_gradient(d_weight, z, h, factor, first=start == 0)
        if d_hidden is not None:
            gradient_into(d_hidden[start : start + len(h)], z, weight, factor)
    if d_weight is not None and N == 0:
        d_weight.zero_()
    return losses, (
        d_hidden,
        d_weight if d_weight is None or weight.dtype == torch.float16 else d_weight.to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _rows_at_once(loss: RowLoss, logits: Tensor, wide: torch.dtype) -> int:
    """Return how many of a chunk's rows the loss gets at once."""
    if logits.device.type != "cpu" or not loss.takes_few_rows:
        return max(1, len(logits))
    return min(max(1, CACHE_BYTES // (logits.shape[1] * wide.itemsize)), max(1, len(logits)))


def _plain_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: RowLoss,
    tensors: tuple[Tensor | None, ...],
    grad: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, weight and bias, differentiable once more."""
    # views, for hidden may come from the weight itself (a head tied to the embedding): that way has its own gradient
    own = [None if tensor is None else tensor.view_as(tensor) for tensor in (hidden, weight, bias)]
    h, w, b = own
    assert h is not None
    assert w is not None
    z = F.linear(h, w, None if b is None else b.to(w.dtype))
    losses = loss.plain(at_least_float32(z), tensors)
    inputs = [tensor for tensor, need in zip(own, needs, strict=True) if need and tensor is not None]
    outputs = losses if grad.ndim else losses.sum()
    found = iter(torch.autograd.grad(outputs, inputs, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)
