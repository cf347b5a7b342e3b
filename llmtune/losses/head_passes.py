"""Passes over the rows of a linear head that make losses and gradients without the [N, V] logits.

The first goes over the rows, a chunk at a time: logits, losses, the logits' gradient in their place, and the products
of that with hidden states and head. In half precision the head's gradient is a sum over chunks that must not be rounded
before it is whole, and a sum in float32 takes twice the head's own memory. Where that is much, a second pass makes the
head's gradient a block of tokens at a time, over all rows at once. Logits whose gradient nobody holds any more it makes
once more. Held are those of the last chunk, in the chunk's own buffer, and those of the first E rows, in the memory of
the head's gradient: [V, E] numbers have room for them until the result itself is written, and each block lies where its
result will.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtune.losses.head_products import add_head_gradient, gradient_into, logits_into
from llmtune.losses.row_loss import ColumnLoss, RowLoss

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

CACHE_BYTES = 2**20  # a CPU works through a chunk this much at a time, so that a row is read from memory once
SUM_BYTES = {"cpu": 24 * 2**20}  # a float32 sum of the head's gradient may take this much
SUM_BYTES_ELSEWHERE = 512 * 2**20
BLOCK_BYTES = {"cpu": 4 * 2**20}  # the second pass holds this much of the logits
BLOCK_BYTES_ELSEWHERE = 64 * 2**20
ROWS_AT_ONCE = 4096  # of one product of the second pass
FLOAT16_ROWS_AT_ONCE = 512  # of gradients that nothing has made smaller: the sum of many is beyond float16


@dataclass(frozen=True)
class HeadRows:
    """Rows that go through a head: hidden [N, E], weight [V, E], bias [V] or None, their loss and what it is given.

    Attributes:
        chunk_rows: rows of logits held at once.
        factor: of the loss, taken into its gradients.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    loss: RowLoss
    tensors: tuple[Tensor | None, ...]
    chunk_rows: int
    factor: float

    @property
    def wide(self) -> torch.dtype:
        """The type of losses and sums: float64 for float64, else float32."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def one_chunk(self) -> bool:
        return len(self.hidden) <= self.chunk_rows

    @property
    def has_sums(self) -> bool:
        """Whether the loss gives each row's log sum exp as well."""
        return self.hidden.dtype != self.wide and isinstance(self.loss, ColumnLoss)

    @property
    def by_columns(self) -> bool:
        """Whether the head's gradient takes the second pass: a float32 sum over chunks would take too much memory."""
        if self.one_chunk or not self.has_sums:
            return False
        return self.weight.numel() * 4 > SUM_BYTES.get(self.weight.device.type, SUM_BYTES_ELSEWHERE)

    @property
    def waits(self) -> bool:
        """Whether the head's gradient must wait for the factor that brings it into the range of float16."""
        return self.by_columns and self.hidden.dtype == torch.float16


def losses_and_gradients(
    rows: HeadRows, wanted: tuple[bool, bool, bool], row_factors: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Gradients]:
    """Return the losses [N], their log sum exp [N] where the loss gives it, and the wanted gradients.

    The gradients are those of the losses' sum times `rows.factor` and, if given, the `row_factors` [N]. A float16
    head's comes in float32 where it is a sum over chunks: what the backward pass multiplies it by brings it into range.
    """
    hidden, weight, bias = rows.hidden, rows.weight, rows.bias
    N, V = len(hidden), len(weight)
    by_columns = rows.by_columns
    losses = hidden.new_empty(N, dtype=rows.wide)
    sums = torch.empty_like(losses) if rows.has_sums else None
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    second = by_columns and wanted[1]
    kind = weight.dtype if rows.one_chunk or second else rows.wide
    d_weight = weight.new_empty(weight.shape, dtype=kind) if wanted[1] else None  # in one piece, as weight may not be
    d_bias = hidden.new_zeros(V, dtype=rows.wide) if wanted[2] else None
    logits = hidden.new_empty(min(rows.chunk_rows, N), V)
    for chunk in _chunks(N, rows.chunk_rows, full_last=second):
        h = hidden[chunk]
        z = logits_into(logits[: len(h)], h, weight)
        _turn_into_gradient(rows, z, chunk.start, losses, sums, any(wanted), d_bias, row_factors)
        if d_hidden is not None:
            gradient_into(d_hidden[chunk], z, weight, rows.factor)
        if d_weight is not None and not second:
            add_head_gradient(d_weight, z, h, rows.factor, first=chunk.start == 0)
        elif d_weight is not None and chunk.stop < N:
            _hold(rows, d_weight, z, chunk.start)
    if d_weight is not None and N == 0:
        d_weight.zero_()
    if d_weight is not None and sums is not None and second:
        d_weight = head_gradient(rows, sums, held=(d_weight, logits))
    elif d_weight is not None and weight.dtype != torch.float16:
        d_weight = d_weight.to(weight.dtype)
    return losses, sums, (d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype))


def _chunks(count: int, size: int, *, full_last: bool) -> list[slice]:
    """Return slices of at most `size` rows; if asked, the last is full and the others are of like sizes."""
    whole = count - size if full_last else count
    step = -(-whole // -(-whole // size)) if full_last else size
    starts = list(range(0, whole, step))
    return [slice(a, min(a + step, whole)) for a in starts] + ([slice(whole, count)] if full_last else [])


def _turn_into_gradient(
    rows: HeadRows,
    z: Tensor,
    start: int,
    losses: Tensor,
    sums: Tensor | None,
    gradients: bool,
    d_bias: Tensor | None,
    row_factors: Tensor | None,
) -> None:
    """Turn a chunk's logits z [n, V] into their gradient, if asked; write its losses and sums and add to `d_bias`."""
    step = _rows_at_once(rows, z)
    scratch = None if z.dtype == rows.wide else z.new_empty(step, z.shape[1], dtype=rows.wide)
    for first in range(0, len(z), step):
        part = z[first : first + step]
        here = slice(start + first, start + first + len(part))
        g = part if scratch is None else scratch[: len(part)].copy_(part)
        if rows.bias is not None:
            g += rows.bias
        if sums is not None and isinstance(rows.loss, ColumnLoss):
            losses[here], sums[here] = rows.loss.in_place_and_sums(g, here, rows.tensors, gradients)
        else:
            losses[here] = rows.loss.in_place(g, here, rows.tensors, gradients)
        if row_factors is not None:
            g *= row_factors[here, None]
        if d_bias is not None:
            d_bias.add_(g.sum(0), alpha=rows.factor)
        if scratch is not None and gradients:
            part.copy_(g)


def head_gradient(
    rows: HeadRows,
    sums: Tensor,
    *,
    held: tuple[Tensor, Tensor] | None = None,
    row_factors: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Return the gradient [V, E] by the head, in its type: the second pass.

    Args:
        rows: as the first pass took them.
        sums: [N], each row's log sum exp, from the first pass.
        held: gradients of logits that are there already, or None: (those of the first E rows, in the memory [V, E] of
            the result, as `_hold` laid them; those of the last rows [n, V]).
        row_factors: [N], or None: a factor for each row's loss.
        scale: a scalar, or None: one more factor, taken in before the gradient is rounded.
    """
    hidden, N = rows.hidden, len(rows.hidden)
    d_weight, last = (rows.weight.new_empty(rows.weight.shape), hidden[:0]) if held is None else held
    first_known = 0 if held is None else min(hidden.shape[1], N - len(last))
    nothing = hidden.new_zeros(1, 1)
    most, blocks = _blocks(rows)
    buffer = hidden.new_empty(most * (blocks[0].stop - blocks[0].start))
    for columns in blocks:
        out, total = d_weight[columns], None
        for start in range(0, N, most):
            here = slice(start, min(start + most, N))
            z = buffer[: (here.stop - start) * len(out)].view(-1, len(out))
            left = max(start, min(here.stop, first_known)), max(start, min(here.stop, N - len(last)))
            if start < first_known:
                z[: left[0] - start] = out.view(-1, len(out))[start : left[0]]
            if left[1] < here.stop:
                z[left[1] - start :] = last[left[1] - N + len(last) : here.stop - N + len(last), columns]
            if left[0] < left[1]:
                _columns_gradient(rows, z[left[0] - start : left[1] - start], left[0], columns, sums, row_factors)
            if most == N and scale is None:
                torch.addmm(nothing, z.T, hidden, beta=0, alpha=rows.factor, out=out)
                continue
            product = torch.addmm(nothing, z.T, hidden[here], beta=0, alpha=rows.factor)
            total = product.to(rows.wide) if total is None else total.add_(product)
        if total is not None:
            out.copy_(total if scale is None else total.mul_(scale))
    return d_weight


def _hold(rows: HeadRows, d_weight: Tensor, gradients: Tensor, start: int) -> None:
    """Lay gradients [n, V] of the logits from row `start` on into the memory of `d_weight` [V, E], where they fit."""
    room = max(0, min(len(gradients), d_weight.shape[1] - start))
    for columns in _blocks(rows)[1] if room else []:
        block = d_weight[columns]
        block.view(-1, len(block))[start : start + room] = gradients[:room, columns]


def _blocks(rows: HeadRows) -> tuple[int, list[slice]]:
    """Return how many rows the second pass multiplies at once, and the blocks of tokens that it takes in turn."""
    V, most = len(rows.weight), FLOAT16_ROWS_AT_ONCE if rows.hidden.dtype == torch.float16 else ROWS_AT_ONCE
    most = min(len(rows.hidden), most)
    budget = BLOCK_BYTES.get(rows.weight.device.type, BLOCK_BYTES_ELSEWHERE)
    width = min(V, max(64, budget // (most * rows.weight.element_size()) // 64 * 64))
    return most, [slice(start, min(start + width, V)) for start in range(0, V, width)]


def _columns_gradient(
    rows: HeadRows, z: Tensor, start: int, columns: slice, sums: Tensor, row_factors: Tensor | None
) -> None:
    """Write into z [n, c] the gradient of the losses of n rows, from `start` on, by some of their logits."""
    assert isinstance(rows.loss, ColumnLoss)
    logits_into(z, rows.hidden[start : start + len(z)], rows.weight[columns])
    step = _rows_at_once(rows, z)
    scratch = z.new_empty(step, z.shape[1], dtype=rows.wide)
    for first in range(0, len(z), step):
        part = z[first : first + step]
        here = slice(start + first, start + first + len(part))
        g = scratch[: len(part)].copy_(part)
        if rows.bias is not None:
            g += rows.bias[columns]
        rows.loss.columns_in_place(g, here, columns, len(rows.weight), rows.tensors, sums)
        if row_factors is not None:
            g *= row_factors[here, None]
        part.copy_(g)


def _rows_at_once(rows: HeadRows, z: Tensor) -> int:
    """Return how many of the rows of z [n, c] the loss gets at once."""
    if z.device.type != "cpu" or not rows.loss.takes_few_rows:
        return max(1, len(z))
    return min(max(1, CACHE_BYTES // (z.shape[1] * rows.wide.itemsize)), max(1, len(z)))
