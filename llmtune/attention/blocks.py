"""Cutting attention into blocks: which queries meet which keys, a cache's worth of scores at a time.

Blocks of one shape, and the same part of the mask, are computed together. A plan is made once for a mask and its sizes;
all layers that share the mask share the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtune.attention.bands import Band, bands
from llmtune.attention.mask_base import Mask
from llmtune.attention.tiles import Places

SCORES = 2**18  # scores [.., t, s] held at once: a mebibyte in float32, what a core's second-level cache holds
NARROW, WIDE = 64, 128  # queries of a block, where keys are few and where they are many
FEW_KEYS = 512

Place = tuple[int, int, int]  # row, first query, first key
Shape = tuple[int, int, int | None, int | None]  # queries, keys, lowest and highest distance


class Group:
    """Blocks of the same shape.

    Args:
        at: (row, first query, first key) of every block.
        t: queries of each.
        s: keys of each.
        lower, upper: in every block, query i sees the keys j with i + lower <= j <= i + upper; None: no bound acts.
        tabled: whether the mask must be asked for its table instead.
    """

    def __init__(
        self,
        at: tuple[Place, ...],
        t: int,
        s: int,
        lower: int | None = None,
        upper: int | None = None,
        *,
        tabled: bool = False,
    ) -> None:
        self.at, self.t, self.s, self.tabled = at, t, s, tabled
        self.lower, self.upper = lower, upper
        self.queries = Places(tuple((row, q) for row, q, _ in at), t)
        self.keys = Places(tuple((row, k) for row, _, k in at), s)
        self._corners: tuple[tuple[slice, Tensor], ...] | None = None

    def corners(self, dtype: torch.dtype, device: torch.device) -> tuple[tuple[slice, Tensor], ...]:
        """Return what to add to which columns of the scores [.., t, s], 0 and -inf, to hide the keys off the band."""
        if self._corners is None or any(x.dtype != dtype or x.device != device for _, x in self._corners):
            found, hidden = [], torch.full((self.t, self.s), float("-inf"), dtype=dtype, device=device)
            if self.upper is not None:
                found.append((slice(self.upper + 1, self.s), hidden[:, self.upper + 1 :].triu()))
            if self.lower is not None:
                width = min(self.lower + self.t - 1, self.s)
                found.append((slice(0, width), hidden[:, :width].tril(self.lower - 1)))
            self._corners = tuple(found)
        return self._corners


@dataclass(frozen=True)
class Plan:
    """The blocks of a call: together they hold every query that sees a key exactly once.

    Args:
        groups: of blocks.
        covers: whether every query is in a block.
    """

    groups: tuple[Group, ...]
    covers: bool


def banded_plan(mask: Mask | None, B: int, heads: int, T: int, S: int, *, together: bool) -> Plan | None:
    """Return the blocks of a mask that is made of bands, or None where it is not.

    Args:
        mask: fits the sizes.
        B: rows.
        heads: query heads.
        T: queries.
        S: keys.
        together: whether blocks of one shape may be computed together; a bias differs from block to block.
    """
    if mask is None:
        return _banded(mask, B, heads, T, S, together)
    key = (B, heads, T, S, together, mask.versions())
    kept = mask.__dict__.get("_plan")
    if kept is None or kept[0] != key or key[-1] is None:
        kept = key, _banded(mask, B, heads, T, S, together)
        object.__setattr__(mask, "_plan", kept)  # not part of what the mask says, so the record stays frozen
    return kept[1]


def _banded(mask: Mask | None, B: int, heads: int, T: int, S: int, together: bool) -> Plan | None:
    found = bands(mask, B, T, S)
    return None if found is None else _plan(tuple(_grouped(found, heads, together)), B * T)


def tabled_plan(mask: Mask, B: int, T: int, S: int) -> Plan:
    """Return the blocks of any mask: each over the span of keys that the mask does not rule out.

    Args:
        mask: fits the sizes.
        B: rows.
        T: queries.
        S: keys.
    """
    groups = []
    for start in range(0, T, WIDE):
        queries = range(start, min(start + WIDE, T))
        keys = mask.span(queries, T, S)
        if len(keys):
            tabled = not mask.sees_all(queries, keys, T, S)
            groups += [Group(((row, start, keys.start),), len(queries), len(keys), tabled=tabled) for row in range(B)]
    return _plan(tuple(groups), B * T)


def _plan(groups: tuple[Group, ...], queries: int) -> Plan:
    return Plan(groups, sum(len(group.at) * group.t for group in groups) == queries)


def _grouped(found: tuple[Band, ...], heads: int, together: bool) -> Iterator[Group]:
    alike: dict[Shape, list[Place]] = {}
    for band in found:
        for place, shape in _cut(band):
            alike.setdefault(shape, []).append(place)
    for (t, s, lower, upper), places in alike.items():
        most = max(1, SCORES // (heads * t * s)) if together else 1
        for first in range(0, len(places), most):
            yield Group(tuple(places[first : first + most]), t, s, lower, upper)


def _cut(band: Band) -> Iterator[tuple[Place, Shape]]:
    """Yield the place and the shape of every block of a band."""
    keys, lower, upper = band.keys, band.lower, band.upper
    reach = len(keys) if lower is None or upper is None else upper - lower
    height = NARROW if reach <= FEW_KEYS else WIDE
    for start in range(band.queries.start, band.queries.stop, height):
        stop = min(start + height, band.queries.stop)
        first = keys.start if lower is None else max(keys.start, start + lower)
        last = keys.stop if upper is None else min(keys.stop, stop + upper)
        t, s, shift = stop - start, last - first, start - first
        low = None if lower is None or lower + shift <= 1 - t else lower + shift
        high = None if upper is None or upper + shift >= s - 1 else upper + shift
        yield (band.row, start, first), (t, s, low, high)
