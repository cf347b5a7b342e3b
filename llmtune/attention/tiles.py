"""Moving blocks of queries and keys between a call's tensors and the small dense ones a block is computed on.

A call's tensors are seen as [B, K, R, length, size] with R = H / K query heads to a key head (R = 1 for keys and
values); a group of n blocks as [n * K, R * length, size], so that grouped heads need no repeated keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Places:
    """Where n blocks of one length begin.

    Args:
        starts: (row, first position) of every block.
        length: of each.
    """

    def __init__(self, starts: tuple[tuple[int, int], ...], length: int) -> None:
        self.starts, self.length = starts, length
        row, start = starts[0]
        step = starts[1][1] - start if len(starts) > 1 else 0
        in_step = step > 0 and all(place == (row, start + i * step) for i, place in enumerate(starts))
        self.step = step if in_step else 0  # > 0 where the blocks lie in one row at equal distances
        self.rows = len(starts) > 1 and all(place == (row + i, start) for i, place in enumerate(starts))

    def load(self, x: Tensor, heads: slice, dtype: torch.dtype) -> Tensor:
        """Return the blocks of x [B, K, R, L, size] for k of its heads: [n * k, R * length, size], a view if it can."""
        row, start = self.starts[0]
        n, k, R, size = len(self.starts), heads.stop - heads.start, x.shape[2], x.shape[4]
        if n == 1 and R == 1 and x.dtype == dtype and x.stride(4) == 1:
            return x[row, heads, 0, start : start + self.length]
        made = torch.empty(n, k, R, self.length, size, dtype=dtype, device=x.device)
        for place, part in self._parts(x, heads, may_overlap=True):
            made[place].copy_(part)
        return made.view(n * k, R * self.length, size)

    def store(self, x: Tensor, heads: slice, blocks: Tensor, *, add: bool) -> None:
        """Write blocks [n * k, R * length, size] into x [B, K, R, L, size], or add them to what is there."""
        blocks = blocks.view(len(self.starts), -1, x.shape[2], self.length, x.shape[4])
        for place, part in self._parts(x, heads, may_overlap=not add):
            if add:
                part.add_(blocks[place])
            else:
                part.copy_(blocks[place])

    def _parts(self, x: Tensor, heads: slice, *, may_overlap: bool) -> Iterator[tuple[slice | int, Tensor]]:
        """Yield which blocks, and where they lie in x: all in one view where their places are regular."""
        row, start = self.starts[0]
        if self.step and (may_overlap or self.step >= self.length):
            run = x[row, heads, :, start : self.starts[-1][1] + self.length]
            yield slice(None), run.unfold(2, self.length, self.step).permute(2, 0, 1, 4, 3)
        elif self.rows:
            yield slice(None), x[row : row + len(self.starts), heads, :, start : start + self.length]
        else:
            for i, (row, start) in enumerate(self.starts):
                yield i, x[row, heads, :, start : start + self.length]


def diagonals(values: Tensor, t: int, s: int) -> Tensor:
    """Return the table [H, t, s] whose entry (i, j) is values[:, j - i + t - 1], from values [H, t + s - 1]."""
    return values.unfold(1, s, 1).flip(1)


def sum_diagonals(table: Tensor) -> Tensor:
    """Return the sums [H, t + s - 1] of a table [H, t, s] over equal j - i: the transpose of `diagonals`."""
    H, t, s = table.shape
    length = t + s - 1
    skewed = table.new_zeros(H, t * length + 1)
    skewed.as_strided((H, t, s), (skewed.stride(0), length - 1, 1), t - 1).copy_(table)
    return skewed[:, : t * length].view(H, t, length).sum(1)
