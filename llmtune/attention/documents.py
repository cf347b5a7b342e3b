"""The mask of documents packed into one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmtune.attention.mask_base import Mask, host_ints, known_ints


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
            ValueError: the ids are not integers of these shapes.
        """
        for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
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
        self.fit(T, S)
        if self.query_ids is not None:
            keys = self.query_ids if self.key_ids is None else self.key_ids
            return self.query_ids[:, None, :, None] == keys[:, None, None, :]
        query = _ids(known_ints(self.cu_seqlens), device)
        key = query if self.key_cu_seqlens is None else _ids(known_ints(self.key_cu_seqlens), device)
        return query[:, None] == key


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


def _ids(cuts: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    lengths = torch.tensor([end - start for start, end in pairwise(cuts)], device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=cuts[-1])
