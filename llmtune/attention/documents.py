"""The mask of documents packed into one row."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmtune.attention.host_ints import host_ints, known_ints
from llmtune.attention.key_ranges import KeyRanges, kept_ranges, keys_between
from llmtune.attention.mask_base import Mask


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Several documents lie end to end in a row; a query sees only the keys of its own document.

    It says nothing about the future: a packed decoder uses `Causal() & Documents(...)`.

    Args:
        cu_seqlens: [n+1] ints, ascending from 0 to T: document i is the queries cu_seqlens[i] ... cu_seqlens[i+1] - 1,
            the same in every row of the batch.
        key_cu_seqlens: [n+1] ints from 0 to S, the same for the keys; left out, as the queries, and T must be S.
        query_ids, key_ids: instead of cuts; `from_ids` makes them.

    Raises:
        ValueError: the cuts do not start at 0 or are not ascending, or queries and keys have not the same number of
            documents. That they end at T and S is checked when the mask is used.

    >>> from llmtune.attention import Documents
    >>> Documents.from_lengths([2, 1]).dense(3, 3)
    tensor([[ True,  True, False],
            [ True,  True, False],
            [False, False,  True]])
    """

    cu_seqlens: Sequence[int] | Tensor | None = None
    key_cu_seqlens: Sequence[int] | Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.cu_seqlens is None) == (self.query_ids is None):
            raise ValueError("Documents takes cu_seqlens, or ids through Documents.from_ids")
        stray = "key_ids" if self.query_ids is None else "key_cu_seqlens"
        if getattr(self, stray) is not None:
            raise ValueError(
                f"{stray} belongs to the other way of giving documents: give cuts for both, or ids for both"
            )
        for name in ("cu_seqlens", "key_cu_seqlens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _cuts(getattr(self, name), name))
        if self.key_cu_seqlens is not None:
            queries, keys = len(known_ints(self.cu_seqlens)) - 1, len(known_ints(self.key_cu_seqlens)) - 1
            if queries != keys:
                raise ValueError(f"cu_seqlens cuts {queries} documents, key_cu_seqlens {keys}: they must be as many")

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | Tensor, key_lengths: Sequence[int] | Tensor | None = None
    ) -> Documents:
        """Return the mask of documents of these lengths, laid end to end.

        Args:
            lengths: [n] ints, the tokens of each document; they sum to T.
            key_lengths: [n] ints that sum to S; left out, as `lengths`.
        """
        keys = None if key_lengths is None else _running_sum(key_lengths, "key_lengths")
        return cls(_running_sum(lengths, "lengths"), keys)

    @classmethod
    def from_ids(cls, query_ids: Tensor, key_ids: Tensor | None = None) -> Documents:
        """Return the mask under which a query sees the keys that carry its id; rows may be cut differently.

        Args:
            query_ids: [B, T] integers.
            key_ids: [B, S] integers; left out, as `query_ids`, and T must be S.

        Raises:
            TypeError: the ids are no tensor.
            ValueError: the ids are not integers of these shapes.
        """
        for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
            if ids is not None and not isinstance(ids, Tensor):
                raise TypeError(f"{name} must be a tensor [B, length] of integers, got {type(ids).__name__}")
            if ids is not None and (ids.ndim != 2 or ids.is_floating_point() or ids.is_complex()):
                raise ValueError(f"{name} must be integers, a row each, got {ids.dtype} of shape {tuple(ids.shape)}")
        if key_ids is not None and key_ids.shape[0] != query_ids.shape[0]:
            raise ValueError(f"query_ids have {query_ids.shape[0]} rows, key_ids {key_ids.shape[0]}")
        return cls(query_ids=query_ids, key_ids=key_ids)

    def fixed_sizes(self) -> dict[str, int]:
        """Return T and S, and B where the documents are given as ids."""
        if self.query_ids is not None:
            keys = self.query_ids if self.key_ids is None else self.key_ids
            return {"B": self.query_ids.shape[0], "T": self.query_ids.shape[1], "S": keys.shape[1]}
        return {"T": known_ints(self.cu_seqlens)[-1], "S": known_ints(self.key_cu_seqlens or self.cu_seqlens)[-1]}

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the ids, [B, T] and [B, S], where there are any."""
        return tuple(ids for ids in (self.query_ids, self.key_ids) if ids is not None)

    def fit(self, T: int, S: int) -> None:
        """See `Mask.fit`."""
        sizes = self.fixed_sizes()
        how = "cu_seqlens must end at T" if self.query_ids is None else "there must be an id for every token"
        if sizes["T"] != T:
            raise ValueError(f"Documents covers {sizes['T']} queries, but there are {T} (T): {how}")
        if sizes["S"] != S:
            if self.key_cu_seqlens is None and self.key_ids is None:
                how = "where T and S differ, give the documents of the keys too"
            raise ValueError(f"Documents covers {sizes['S']} keys, but there are {S} (S): {how}")

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [T, S], or [B, 1, T, S] where the documents are given as ids. See `Mask.dense`."""
        return self.tile(range(T), range(S), T, S, device=device)

    def tile(self, queries: range, keys: range, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [t, s], or [B, 1, t, s] where the documents are given as ids. See `Mask.tile`."""
        self.fit(T, S)
        if self.query_ids is not None:
            key_ids = self.query_ids if self.key_ids is None else self.key_ids
            query, key = self.query_ids[:, queries.start : queries.stop], key_ids[:, keys.start : keys.stop]
            return query[:, None, :, None] == key[:, None, None, :]
        query_cuts, key_cuts = self._cuts()
        return _document_of(queries, query_cuts, device)[:, None] == _document_of(keys, key_cuts, device)

    def span(self, queries: range, T: int, S: int) -> range:
        """Return the keys from the first query's document to the last's. See `Mask.span`."""
        self.fit(T, S)
        if self.query_ids is not None:
            ranges = self._ranges_of(self.query_ids)
            return range(S) if ranges is None else ranges.span(queries)
        if torch.compiler.is_compiling():  # a traced graph is to fit other cuts too
            return range(S)
        if len(queries) == 0:
            return range(0)
        query_cuts, key_cuts = self._cuts()
        first, last = bisect_right(query_cuts, queries.start) - 1, bisect_left(query_cuts, queries.stop) - 1
        return keys_between(key_cuts[first], key_cuts[last + 1], S)

    def sees_all(self, queries: range, keys: range, T: int, S: int) -> bool:
        """Return whether they are of one document; False where an id comes back later. See `Mask.sees_all`."""
        self.fit(T, S)
        if self.query_ids is not None:
            ranges = self._ranges_of(self.query_ids)
            return ranges is not None and ranges.sees_all(queries, keys)
        if torch.compiler.is_compiling():
            return False
        if len(queries) == 0 or len(keys) == 0:
            return True
        query_cuts, key_cuts = self._cuts()
        document = bisect_right(query_cuts, queries.start) - 1
        own = key_cuts[document] <= keys.start and keys.stop <= key_cuts[document + 1]
        return own and queries.stop <= query_cuts[document + 1]

    def _cuts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return known_ints(self.cu_seqlens), known_ints(self.key_cu_seqlens or self.cu_seqlens)

    def _ranges_of(self, query_ids: Tensor) -> KeyRanges | None:
        key_ids = query_ids if self.key_ids is None else self.key_ids
        return kept_ranges(self, self.tensors(), lambda: _ranges_of_ids(query_ids, key_ids))


def _running_sum(lengths: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    cuts = [0]
    for length in host_ints(lengths, name):
        cuts.append(cuts[-1] + length)
    return tuple(cuts)


def _cuts(values: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    cuts = host_ints(values, name)
    if len(cuts) < 2 or cuts[0] != 0:
        raise ValueError(f"{name} must start at 0 and then hold the end of every document, got {list(cuts)}")
    for at, (start, end) in enumerate(pairwise(cuts), start=1):
        if end < start:
            raise ValueError(f"{name} must be ascending, but entry {at} is {end} after {start}")
    return cuts


def _document_of(part: range, cuts: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    """Return the document of each of these tokens, int64 [n]."""
    first, last = 0, len(cuts) - 1
    if not torch.compiler.is_compiling():  # a traced graph is to fit other cuts too
        first, last = bisect_right(cuts, part.start) - 1, bisect_left(cuts, part.stop)  # no others can be theirs
    ends = torch.tensor(cuts[first + 1 : last + 1], dtype=torch.long, device=device)
    return first + torch.bucketize(torch.arange(part.start, part.start + len(part), device=device), ends, right=True)


def _ranges_of_ids(query_ids: Tensor, key_ids: Tensor) -> KeyRanges:
    """Return each query's keys, from ids [B, T] and [B, S], without a [B, T, S] table."""
    (B, T), S = query_ids.shape, key_ids.shape[1]
    if query_ids.numel() == 0 or S == 0:
        return KeyRanges([(0, S)], [(S, 0)], S)
    _, number = torch.cat((query_ids, key_ids), dim=1).unique(return_inverse=True)  # 0, 1, ... in place of the ids
    number = number + (int(number.max()) + 1) * torch.arange(B, device=number.device)[:, None]  # each row its own
    query, key = number[:, :T], number[:, T:].flatten()
    position = torch.arange(S, device=key.device).repeat(B)
    size = int(number.max()) + 1
    first = position.new_full((size,), S).scatter_reduce(0, key, position, "amin")
    end = position.new_zeros(size).scatter_reduce(0, key, position + 1, "amax")
    count = torch.bincount(key, minlength=size)
    return KeyRanges.of_rows(first[query], end[query], count[query], S)
