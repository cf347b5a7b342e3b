"""Which query may attend to which key, as small frozen records that compose with `&`.

A mask says what it means (causal, padding, documents), so that a backend can skip work instead of reading a table; and
every mask knows its table, `dense(T, S)`, for the backends that need it. True means: may attend. Anything additive is a
bias, not a mask. Documents packed into a row are in `documents.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtune.attention.alignment import aligned_keys, offsets, positions
from llmtune.attention.host_ints import host_ints, known_ints, one_or_each_row
from llmtune.attention.key_ranges import KeyRanges, kept_ranges, keys_between
from llmtune.attention.mask_base import Mask


@dataclass(frozen=True)
class Causal(Mask):
    """Query t sees key s where s <= t + offset.

    Args:
        offset: an int, or [B] ints (one for each row). Left out, it is S - T: the last query sees the last key, as
            decoding with a cache needs. Torch's `is_causal=True` aligns to the first key; the two agree at T == S.

    Raises:
        TypeError: the offset is neither an integer nor a list of them.
        ValueError: the offset is a tensor that does not hold integers.

    >>> from llmtune.attention import Causal
    >>> Causal().dense(2, 3)
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """

    offset: int | Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        if self.offset is not None:
            object.__setattr__(self, "offset", one_or_each_row(self.offset, "offset"))

    def fixed_sizes(self) -> dict[str, int]:
        """Return {"B": n} where every row has its own offset."""
        return {"B": len(self.offset)} if isinstance(self.offset, tuple) else {}

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [T, S], or [B, 1, T, S] where every row has its own offset. See `Mask.dense`."""
        return self.tile(range(T), range(S), T, S, device=device)

    def tile(self, queries: range, keys: range, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [t, s], or [B, 1, t, s] where every row has its own offset. See `Mask.tile`."""
        return positions(keys, device) <= aligned_keys(queries, self.offset, T, S, device)

    def span(self, queries: range, T: int, S: int) -> range:
        """Return the keys up to the last that the last query sees. See `Mask.span`."""
        return keys_between(0, queries.stop + max(offsets(self.offset, T, S), default=0), S)

    def sees_all(self, queries: range, keys: range, T: int, S: int) -> bool:
        """Return whether the first query sees the last key in every row. See `Mask.sees_all`."""
        return keys.stop - 1 <= queries.start + min(offsets(self.offset, T, S), default=0)


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
        if self.real is not None and (self.real.dtype != torch.bool or self.real.ndim != 2):
            raise ValueError(
                f"real must be bool [B, S], got {self.real.dtype} of shape {tuple(self.real.shape)}; "
                "Padding.from_attention_mask takes a tokenizer's"
            )
        if self.key_lengths is not None:
            lengths = host_ints(self.key_lengths, "key_lengths")
            if min(lengths, default=0) < 0:
                raise ValueError(f"key_lengths must not be negative, got {list(lengths)}")
            object.__setattr__(self, "key_lengths", lengths)

    @classmethod
    def from_attention_mask(cls, mask: Tensor) -> Padding:
        """Return the padding of a Hugging Face `attention_mask`: right, left or any other.

        Args:
            mask: [B, S], 1 (or True) at real tokens and 0 at padding.

        Raises:
            TypeError: the mask is no tensor.
            ValueError: the mask is not [B, S], or holds anything but 0 and 1 (an additive mask is a bias).
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"an attention mask must be a tensor [B, S] of 0 and 1, got {type(mask).__name__}")
        if mask.ndim != 2:
            raise ValueError(f"an attention mask must be [B, S], got shape {tuple(mask.shape)}; Dense takes a table")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("an attention mask must hold only 0 and 1; an additive mask is a bias")
        return cls(real=mask.to(torch.bool))

    def fixed_sizes(self) -> dict[str, int]:
        """Return {"B": rows}, and "S" where the real keys are given as a table."""
        if self.real is not None:
            return {"B": self.real.shape[0], "S": self.real.shape[1]}
        return {"B": len(known_ints(self.key_lengths))}

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the table of real keys, bool [B, S], where there is one."""
        return () if self.real is None else (self.real,)

    def fit(self, T: int, S: int) -> None:
        """See `Mask.fit`."""
        super().fit(T, S)
        if self.real is None and max(known_ints(self.key_lengths), default=0) > S:
            raise ValueError(f"key_lengths are {list(known_ints(self.key_lengths))}, but there are only {S} keys (S)")

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [B, 1, T, S]. See `Mask.dense`."""
        return self.tile(range(T), range(S), T, S, device=device)

    def tile(self, queries: range, keys: range, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [B, 1, t, s], in which all queries share one row of memory. See `Mask.tile`."""
        self.fit(T, S)
        if self.real is not None:
            real = self.real[:, keys.start : keys.stop]
        else:
            lengths = torch.tensor(known_ints(self.key_lengths), dtype=torch.long, device=device)
            real = positions(keys, device) < lengths[:, None]
        return real[:, None, None, :].expand(-1, 1, len(queries), -1)

    def span(self, queries: range, T: int, S: int) -> range:
        """Return the keys that are real in any row, and those between them. See `Mask.span`."""
        if self.real is None:
            return keys_between(0, max(known_ints(self.key_lengths), default=0), S)
        ranges = self._ranges_of(self.real)
        return range(S) if ranges is None else ranges.span(queries)

    def sees_all(self, queries: range, keys: range, T: int, S: int) -> bool:
        """Return whether these keys are real in every row; False where a row has gaps. See `Mask.sees_all`."""
        if self.real is None:
            return keys.stop <= min(known_ints(self.key_lengths), default=0)
        ranges = self._ranges_of(self.real)
        return ranges is not None and ranges.sees_all(queries, keys)

    def _ranges_of(self, real: Tensor) -> KeyRanges | None:
        return kept_ranges(self, (real,), lambda: KeyRanges.of_table(real[:, None]))


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

    def span(self, queries: range, T: int, S: int) -> range:
        """Return the keys that any of these queries sees, and those between them. See `Mask.span`."""
        ranges = self._ranges_of()
        return range(S) if ranges is None else ranges.span(queries)

    def sees_all(self, queries: range, keys: range, T: int, S: int) -> bool:
        """Return whether they do; False where the keys of a query have gaps. See `Mask.sees_all`."""
        ranges = self._ranges_of()
        return ranges is not None and ranges.sees_all(queries, keys)

    def _ranges_of(self) -> KeyRanges | None:
        return kept_ranges(self, (self.tensor,), lambda: KeyRanges.of_table(self.tensor))
