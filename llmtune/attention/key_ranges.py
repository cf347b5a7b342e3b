"""Which keys each query sees some of, and which it sees all of: a table in four numbers a query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def keys_between(start: int, stop: int, S: int) -> range:
    """Return start ... stop - 1 as far as they are keys, 0 ... S - 1; an empty range where none is."""
    start = min(max(start, 0), S)
    return range(start, max(start, min(stop, S)))


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """For each query, over all rows and heads: read from a mask's tensors once, then planned with on the host.

    Args:
        some: [T] pairs (start, stop): outside of these keys the query sees none, in any row.
        every: [T] pairs (start, stop): it sees each of these keys, in every row. Empty where a row has gaps.
        S: number of keys.

    Where the lists hold one pair only, it stands for every query.
    """

    some: list[tuple[int, int]]
    every: list[tuple[int, int]]
    S: int

    @classmethod
    def of_table(cls, table: Tensor) -> KeyRanges:
        """Return the ranges of a table, bool [..., T, S]; a T of 1 stands for every query."""
        S = table.shape[-1]
        if table.numel() == 0:
            return cls([(0, S)], [(S, 0)], S)
        numbers = table.to(torch.uint8)
        count = numbers.sum(dim=-1)
        first = numbers.argmax(dim=-1).masked_fill(count == 0, S)  # of equal entries, argmax takes the first
        end = (S - numbers.flip(-1).argmax(dim=-1)).masked_fill(count == 0, 0)
        return cls.of_rows(first, end, count, S)

    @classmethod
    def of_rows(cls, first: Tensor, end: Tensor, count: Tensor, S: int) -> KeyRanges:
        """Return the ranges over all rows.

        Args:
            first: [..., T] integers, the first key the query sees in the row; S where it sees none.
            end: [..., T], one past the last key it sees; 0 where it sees none.
            count: [..., T], how many keys it sees.
            S: number of keys.
        """
        first, end, count = (numbers.reshape(-1, numbers.shape[-1]) for numbers in (first, end, count))
        gaps = count != end - first  # also where there are no keys: first is S then, and end 0
        sides = (first.amin(0), end.amax(0), first.masked_fill(gaps, S).amax(0), end.masked_fill(gaps, 0).amin(0))
        numbers = torch.stack(sides, dim=1).tolist()  # the one read from the device
        return cls([(row[0], row[1]) for row in numbers], [(row[2], row[3]) for row in numbers], S)

    def span(self, queries: range) -> range:
        """Return the keys outside of which these queries see none. See `Mask.span`."""
        pairs = self._of(self.some, queries)
        return keys_between(min((a for a, _ in pairs), default=0), max((b for _, b in pairs), default=0), self.S)

    def sees_all(self, queries: range, keys: range) -> bool:
        """Return whether each of these queries sees all of these keys, as far as is known. See `Mask.sees_all`."""
        return all(a <= keys.start and keys.stop <= b for a, b in self._of(self.every, queries))

    @staticmethod
    def _of(pairs: list[tuple[int, int]], queries: range) -> list[tuple[int, int]]:
        return pairs if len(pairs) == 1 else pairs[queries.start : queries.stop]


def kept_ranges(mask: object, tensors: tuple[Tensor, ...], make: Callable[[], KeyRanges]) -> KeyRanges | None:
    """Return what `make` says of a mask that holds these tensors, made once and kept by the mask until they change.

    None where they cannot be read: they are on the meta device, or a graph is being traced.
    """
    if torch.compiler.is_compiling() or any(x.is_meta for x in tensors):
        return None
    if any(x.is_inference() for x in tensors):  # nobody counts their changes
        return make()
    versions, kept = tuple(x._version for x in tensors), mask.__dict__.get("_ranges")
    if kept is None or kept[0] != versions:
        kept = versions, make()
        object.__setattr__(mask, "_ranges", kept)  # not part of what the mask says, so the record stays frozen
    return kept[1]
