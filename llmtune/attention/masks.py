"""Which query may attend to which key, as small frozen records that compose with `&`.

A mask says what it means (causal, padding, documents), so that a backend can skip work instead of reading a table; and
every mask knows its table, `dense(T, S)`, for the backends that need it. True means: may attend. Anything additive is a
bias, not a mask. Lengths and cuts are kept as ints on the host, because backends plan with them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmtune.attention.mask_base import Mask


@dataclass(frozen=True)
class Causal(Mask):
    """Query t sees key s where s <= t + offset.

    Args:
        offset: an int, or [B] ints (one for each row). Left out, it is S - T: the last query sees the last key, as
            decoding with a cache needs. Torch's `is_causal=True` aligns to the first key; the two agree at T == S.

    Raises:
        ValueError: the offset is a tensor that does not hold integers.

    >>> from llmtune.attention import Causal
    >>> Causal().dense(2, 3)
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """

    offset: int | Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.offset, Tensor) and self.offset.ndim == 0:
            object.__setattr__(self, "offset", int(self.offset))
        elif self.offset is not None and not isinstance(self.offset, int):
            object.__setattr__(self, "offset", _host_ints(self.offset, "offset"))

    def fixed_sizes(self) -> dict[str, int]:
        """Return {"B": n} where every row has its own offset."""
        return {"B": len(self.offset)} if isinstance(self.offset, tuple) else {}

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [T, S], or [B, 1, T, S] where every row has its own offset. See `Mask.dense`."""
        query, key = torch.arange(T, device=device)[:, None], torch.arange(S, device=device)
        if self.offset is None or isinstance(self.offset, int):
            return key <= query + (S - T if self.offset is None else self.offset)
        return key <= query + torch.tensor(_ints(self.offset), device=device)[:, None, None, None]


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """The first n keys of each row are real; the rest is padding and no query sees it.

    It says nothing about queries: the output at a padded query is to be ignored, it is not 0.

    Args:
        key_lengths: [B] ints, 0 <= n <= S.
        real: instead of key_lengths, bool [B, S], True at the real keys; `from_attention_mask` makes it.

    Raises:
        ValueError: a length is negative, or both or neither are given.

    >>> from llmtune.attention import Padding
    >>> Padding([1, 3]).dense(1, 3)[:, 0, 0]
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """

    key_lengths: Sequence[int] | Tensor | None = None
    real: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.key_lengths is None) == (self.real is None):
            raise ValueError("Padding takes key_lengths, or a table of real keys through Padding.from_attention_mask")
        if self.key_lengths is not None:
            lengths = _host_ints(self.key_lengths, "key_lengths")
            if min(lengths, default=0) < 0:
                raise ValueError(f"key_lengths must not be negative, got {list(lengths)}")
            object.__setattr__(self, "key_lengths", lengths)

    @classmethod
    def from_attention_mask(cls, mask: Tensor) -> Padding:
        """Return the padding of a Hugging Face `attention_mask`: right, left or any other.

        Args:
            mask: [B, S], 1 (or True) at real tokens and 0 at padding.

        Raises:
            ValueError: the mask is not [B, S], or holds anything but 0 and 1 (an additive mask is a bias).
        """
        if mask.ndim != 2:
            raise ValueError(f"an attention mask must be [B, S], got shape {tuple(mask.shape)}; Dense takes a table")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("an attention mask must hold only 0 and 1; an additive mask is a bias")
        return cls(real=mask.to(torch.bool))

    def fixed_sizes(self) -> dict[str, int]:
        """Return {"B": rows}, and "S" where the real keys are given as a table."""
        if self.real is not None:
            return {"B": self.real.shape[0], "S": self.real.shape[1]}
        return {"B": len(_ints(self.key_lengths))}

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the table of real keys, bool [B, S], where there is one."""
        return () if self.real is None else (self.real,)

    def fit(self, T: int, S: int) -> None:
        """See `Mask.fit`."""
        super().fit(T, S)
        if self.real is None and max(_ints(self.key_lengths), default=0) > S:
            raise ValueError(f"key_lengths are {list(_ints(self.key_lengths))}, but there are only {S} keys (S)")

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [B, 1, T, S]. See `Mask.dense`."""
        self.fit(T, S)
        real = self.real
        if real is None:
            lengths = torch.tensor(_ints(self.key_lengths), dtype=torch.long, device=device)
            real = torch.arange(S, device=device) < lengths[:, None]
        return real[:, None, None, :].expand(-1, 1, T, S)


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
            queries, keys = len(_ints(self.cu_seqlens)) - 1, len(_ints(self.key_cu_seqlens)) - 1
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
        return {"T": _ints(self.cu_seqlens)[-1], "S": _ints(self.key_cu_seqlens or self.cu_seqlens)[-1]}

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
        query = _ids(_ints(self.cu_seqlens), device)
        key = query if self.key_cu_seqlens is None else _ids(_ints(self.key_cu_seqlens), device)
        return query[:, None] == key


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A mask given as a table.

    Args:
        tensor: bool, True where the query may attend: [T, S], or [B, H, T, S] in which B, H and T may be 1.

    Raises:
        ValueError: the table is not boolean (anything additive is a bias), or has neither 2 nor 4 dimensions: [B, T, S]
            and [H, T, S] look alike, so 3 are refused.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor) or self.tensor.dtype != torch.bool:
            got = self.tensor.dtype if isinstance(self.tensor, Tensor) else type(self.tensor).__name__
            raise ValueError(f"Dense takes a boolean tensor, got {got}; pass an additive mask as bias")
        if self.tensor.ndim not in (2, 4):
            raise ValueError(
                f"Dense takes [T, S] or [B, H, T, S], got shape {tuple(self.tensor.shape)}; "
                "make it [B, 1, T, S] for a table for each row, or [1, H, T, S] for one for each head"
            )

    def fixed_sizes(self) -> dict[str, int]:
        """Return the sizes of the table; a 1 before the last dimension is repeated, so it leaves its size free."""
        letters = "BHTS"[-self.tensor.ndim :]
        return {k: n for k, n in zip(letters, self.tensor.shape, strict=True) if n != 1 or k == "S"}

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the table, [T, S] or [B, H, T, S]."""
        return (self.tensor,)

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return the table, repeated to T queries. See `Mask.dense`."""
        self.fit(T, S)
        return self.tensor.expand(*self.tensor.shape[:-2], T, S)


def _host_ints(values: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    if isinstance(values, Tensor):
        if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} must be integers [n], got {values.dtype} of shape {tuple(values.shape)}")
        return tuple(values.tolist())
    return tuple(operator.index(value) for value in values)


def _ints(values: Sequence[int] | Tensor | None) -> tuple[int, ...]:
    assert isinstance(values, tuple)  # __post_init__ made it one
    return values


def _running_sum(lengths: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    cuts = [0]
    for length in _host_ints(lengths, name):
        cuts.append(cuts[-1] + length)
    return tuple(cuts)


def _cuts(values: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    cuts = _host_ints(values, name)
    if len(cuts) < 2 or cuts[0] != 0:
        raise ValueError(f"{name} must start at 0 and then hold the end of every document, got {list(cuts)}")
    for at, (start, end) in enumerate(pairwise(cuts), start=1):
        if end < start:
            raise ValueError(f"{name} must be ascending, but entry {at} is {end} after {start}")
    return cuts


def _ids(cuts: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    lengths = torch.tensor([end - start for start, end in pairwise(cuts)], device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=cuts[-1])
