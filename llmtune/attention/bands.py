"""What most masks come to: rectangles of queries and keys, each with a band of distances.

Causal, sliding-window, prefix, padding and document masks, joined in any way, let a run of queries see one run of keys,
from a lowest to a highest distance. A backend that knows these bands computes nothing else, and needs no table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from llmtune.attention.alignment import offsets
from llmtune.attention.documents import Documents
from llmtune.attention.host_ints import known_ints
from llmtune.attention.mask_base import Intersection, Mask
from llmtune.attention.masks import Causal, Padding
from llmtune.attention.window import PrefixCausal, SlidingWindow


@dataclass(frozen=True)
class Band:
    """In one row, query t of `queries` sees the keys s of `keys` with t + lower <= s <= t + upper.

    Args:
        row: which row of the batch.
        queries: a run of queries; every one of them sees a key.
        keys: a run of keys.
        lower, upper: bounds of s - t; None where there is no bound.
    """

    row: int
    queries: range
    keys: range
    lower: int | None = None
    upper: int | None = None


def bands(mask: Mask | None, B: int, T: int, S: int) -> tuple[Band, ...] | None:
    """Return the bands of a mask, or None where it is no union of bands (a table, a mask of the user's own).

    No query is in two bands; a query that is in none sees no key.

    Args:
        mask: fits B rows, T queries and S keys; None lets every query see every key.
        B: rows.
        T: queries.
        S: keys.
    """
    found: list[Band] = []
    for row in range(B):
        here: list[Band] = [Band(row, range(T), range(S))]
        for part in _parts(mask):
            refined = _refine(part, here, row, T, S)
            if refined is None:
                return None
            here = refined
        found += [clipped for band in here if (clipped := _clip(band)) is not None]
    return tuple(found)


def has_part(mask: Mask | None, *kinds: type[Mask]) -> bool:
    """Return whether a mask is of one of these kinds, or joined from parts of which one is."""
    return any(isinstance(part, kinds) for part in _parts(mask))


def _parts(mask: Mask | None) -> tuple[Mask, ...]:
    return () if mask is None else mask.parts if isinstance(mask, Intersection) else (mask,)


def _refine(part: Mask, here: list[Band], row: int, T: int, S: int) -> list[Band] | None:
    """Return the bands of one row under one more mask, or None where it is not of a kind known here."""
    if isinstance(part, Causal):
        return [_bounded(band, None, _of_row(offsets(part.offset, T, S), row)) for band in here]
    if isinstance(part, SlidingWindow):
        offset = _of_row(offsets(part.offset, T, S), row)
        return [_bounded(band, offset - part.size + 1, offset + part.size - 1) for band in here]
    if isinstance(part, PrefixCausal):
        return [half for band in here for half in _prefix(part, band, T, S)]
    if isinstance(part, Padding):
        real = _real_keys(part, row)
        return None if real is None else [replace(band, keys=_common(band.keys, real)) for band in here]
    if isinstance(part, Documents):
        documents = _documents(part, row)
        if documents is None:
            return None
        return [
            replace(band, queries=_common(band.queries, queries), keys=_common(band.keys, keys))
            for band in here
            for queries, keys in documents
        ]
    return None


def _of_row(numbers: tuple[int, ...], row: int) -> int:
    """One number for all rows, or one for each."""
    return numbers[row] if len(numbers) > 1 else numbers[0]


def _bounded(band: Band, lower: int | None, upper: int | None) -> Band:
    lowers = [bound for bound in (band.lower, lower) if bound is not None]
    uppers = [bound for bound in (band.upper, upper) if bound is not None]
    return replace(band, lower=max(lowers, default=None), upper=min(uppers, default=None))


def _prefix(part: PrefixCausal, band: Band, T: int, S: int) -> tuple[Band, Band]:
    """The queries that see no further than the prefix, and those that do."""
    length = part.lengths if isinstance(part.lengths, int) else known_ints(part.lengths)[band.row]
    offset = _of_row(offsets(part.offset, T, S), band.row)
    queries = band.queries
    cut = min(max(length - offset, queries.start), queries.stop)
    early = replace(band, queries=range(queries.start, cut), keys=_common(band.keys, range(length)))
    return early, _bounded(replace(band, queries=range(cut, queries.stop)), None, offset)


def _real_keys(part: Padding, row: int) -> range | None:
    """The real keys of a row as a run, or None where padding lies between them."""
    if part.real is None:
        return range(known_ints(part.key_lengths)[row])
    at = part.real[row].nonzero()[:, 0].tolist()
    if not at:
        return range(0)
    return range(at[0], at[-1] + 1) if at[-1] + 1 - at[0] == len(at) else None


def _documents(part: Documents, row: int) -> list[tuple[range, range]] | None:
    """The documents of a row, queries and keys, or None where one lies in pieces."""
    if part.query_ids is not None:
        key_ids = part.query_ids if part.key_ids is None else part.key_ids
        queries, keys = _runs_of(part.query_ids[row]), _runs_of(key_ids[row])
        where = dict(keys)
        return [(run, where[value]) for value, run in queries if value in where] if len(where) == len(keys) else None
    cuts = known_ints(part.cu_seqlens)
    key_cuts = cuts if part.key_cu_seqlens is None else known_ints(part.key_cu_seqlens)
    return [(range(*q), range(*k)) for q, k in zip(pairwise(cuts), pairwise(key_cuts), strict=True)]


def _runs_of(ids: Tensor) -> list[tuple[int, range]]:
    if ids.numel() == 0:
        return []
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(value, range(a, b)) for value, a, b in zip(values.tolist(), starts, ends, strict=True)]


def _common(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def _clip(band: Band) -> Band | None:
    """Leave out the queries that see no key, and the keys that no query sees."""
    queries, keys, lower, upper = band.queries, band.keys, band.lower, band.upper
    if lower is not None and upper is not None and lower > upper:
        return None
    if upper is not None and len(queries):
        queries = _common(queries, range(keys.start - upper, queries.stop))
        keys = _common(keys, range(keys.start, queries.stop + upper))
    if lower is not None and len(queries):
        queries = _common(queries, range(queries.start, keys.stop - lower))
        keys = _common(keys, range(queries.start + lower, keys.stop))
    return replace(band, queries=queries, keys=keys) if len(queries) and len(keys) else None
