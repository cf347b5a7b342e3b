"""Losses of a linear head's logits, row by row, without the [N, V] logits: the engine of cross-entropy and divergence.

The logits of a language model's head are often the largest tensor of a training step. Here they are made a chunk of
rows at a time; each chunk is turned into its own gradient in place, multiplied back onto the hidden states and the
head, and is gone before the next one comes. So the gradients are ready after the forward pass, and the backward pass
scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.head_passes import HeadRows, head_gradient, losses_and_gradients
from llmtune.losses.row_loss import RowLoss

CHUNK_BYTES = {"cpu": 64 * 2**20}
CHUNK_BYTES_ELSEWHERE = 512 * 2**20  # an accelerator needs larger chunks to be busy
OWN_CHUNK, HALF_CHUNK = (
    8,
    11,
)  # sixteenths of it on a CPU for the logits, in float32 and in half: the rest stands beside
FEWEST_ROWS = 64  # every chunk reads the whole head: it must be worth its while
FLOAT16_FACTOR = 2.0**-5  # neither makes large gradients infinite nor small ones 0, as 1 / N would


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
    budget = CHUNK_BYTES["cpu"] * (HALF_CHUNK if weight.element_size() < 4 else OWN_CHUNK) // 16
    return max(FEWEST_ROWS, budget // (weight.shape[0] * weight.element_size()))


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
    """(loss, d hidden, d weight, d bias, log sum exp of each row) of the head; see the module's docstring."""

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
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        rows = HeadRows(hidden, weight, bias, loss, tensors, chunk_rows, factor)
        losses, sums, made = losses_and_gradients(rows, _made_at_once(rows, per_row, wanted))
        return (factor * (losses if per_row else losses.sum()), *made, sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, bias, ctx.loss, ctx.per_row, ctx.factor, ctx.chunk_rows = inputs[:7]
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        ctx.set_materialize_grads(False)
        ctx.made, ctx.sums = output[1:4], output[4]
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
        rows = HeadRows(hidden, weight, bias, ctx.loss, tuple(tensors), ctx.chunk_rows, ctx.factor)
        made, ctx.made = ctx.made, None  # given away, so that they need no copy; asked for once more, made once more
        if made is None:
            made = losses_and_gradients(rows, _made_at_once(rows, ctx.per_row, needs))[2]
        if not ctx.per_row:
            d_hidden, d_weight, d_bias = (None if gradient is None else gradient.mul_(grad) for gradient in made)
            if needs[1] and rows.waits:
                d_weight = head_gradient(rows, ctx.sums, scale=grad)
            return (d_hidden, d_weight, d_bias, *rest)
        d_hidden, d_weight, d_bias = (None if made[0] is None else made[0].mul_(grad[:, None])), None, None
        if needs[1] and rows.by_columns:
            d_weight = head_gradient(rows, ctx.sums, row_factors=grad)
        left = (False, needs[1] and d_weight is None, needs[2])
        if any(left):
            _, again, d_bias = losses_and_gradients(rows, left, grad)[2]
            d_weight = again if d_weight is None else d_weight
        return (d_hidden, d_weight, d_bias, *rest)


def _made_at_once(rows: HeadRows, per_row: bool, wanted: tuple[bool, bool, bool]) -> tuple[bool, bool, bool]:
    """Return which gradients need not wait for the factors that the backward pass brings."""
    return wanted[0], wanted[1] and not per_row and not rows.waits, wanted[2] and not per_row


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
