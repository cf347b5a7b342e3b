"""Masks that go by where a key lies: a sliding window, and a prefix that every query sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtune.attention.alignment import aligned_keys, offsets, positions
from llmtune.attention.host_ints import host_int, known_ints, one_or_each_row
from llmtune.attention.key_ranges import keys_between
from llmtune.attention.mask_base import Mask


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Query t sees key s where |t + offset - s| < size: its own key and size - 1 on either side.

    It says nothing about the future: a decoder uses `Causal() & SlidingWindow(size)`, which is what transformers calls
    `sliding_window=size` and what the paper has; an encoder uses the window alone.

    Args:
        size: >= 1.
        offset: an int, or [B] ints (one for each row). Left out, it is S - T, as in `Causal`: give both the same.

    Raises:
        TypeError: the size is no integer, or the offset neither an integer nor a list of them.
        ValueError: the size is below 1, or the offset is a tensor that does not hold integers.

    >>> from llmtune.attention import Causal, SlidingWindow
    >>> (Causal() & SlidingWindow(2)).dense(3, 3)
    tensor([[ True, False, False],
            [ True,  True, False],
            [False,  True,  True]])

    Beltagy et al., "Longformer" (2020), section 3.1; Jiang et al., "Mistral 7B" (2023), section 2.
    """

    size: int
    offset: int | Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", host_int(self.size, "size"))
        if self.size < 1:
            raise ValueError(f"size must be at least 1, where a query sees its own key alone, got {self.size}")
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
        own, key = aligned_keys(queries, self.offset, T, S, device), positions(keys, device)
        return (key > own - self.size) & (key < own + self.size)

    def span(self, queries: range, T: int, S: int) -> range:
        """Return the keys from the first query's first to the last query's last. See `Mask.span`."""
        ahead = offsets(self.offset, T, S)
        if len(queries) == 0 or not ahead:
            return range(0)
        return keys_between(queries.start + min(ahead) - self.size + 1, queries.stop - 1 + max(ahead) + self.size, S)

    def sees_all(self, queries: range, keys: range, T: int, S: int) -> bool:
        """Return whether both the first and the last query see both ends of the keys. See `Mask.sees_all`."""
        ahead = offsets(self.offset, T, S)
        back = queries.stop - 1 + max(ahead, default=0) - keys.start  # the largest distances there are, either way
        forth = keys.stop - 1 - queries.start - min(ahead, default=0)
        return max(back, forth) < self.size


@dataclass(frozen=True)
class PrefixCausal(Mask):
    """Query t sees key s where s < length (the prefix, seen by every query) or s <= t + offset.

    Args:
        lengths: how many keys the prefix has, 0 ... S: an int, or [B] ints (one for each row).
        offset: an int, or [B] ints. Left out, it is S - T, as in `Causal`.

    Raises:
        TypeError: lengths or offset are neither an integer nor a list of them.
        ValueError: a length is negative, a tensor does not hold integers, or lengths and offsets are for different
            batches. That no prefix is longer than S is checked when the mask is used.

    >>> from llmtune.attention import PrefixCausal
    >>> PrefixCausal(2).dense(3, 3)
    tensor([[ True,  True, False],
            [ True,  True, False],
            [ True,  True,  True]])

    Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 3.2.1.
    """

    lengths: int | Sequence[int] | Tensor
    offset: int | Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", one_or_each_row(self.lengths, "lengths"))
        if min(self._prefixes(), default=0) < 0:
            raise ValueError(f"lengths must not be negative, got {self.lengths}")
        if self.offset is not None:
            object.__setattr__(self, "offset", one_or_each_row(self.offset, "offset"))
        if isinstance(self.lengths, tuple) and isinstance(self.offset, tuple) and len(self.lengths) != len(self.offset):
            raise ValueError(
                f"lengths and offset must be as many, one for each row, got {len(self.lengths)} and {len(self.offset)}"
            )

    def _prefixes(self) -> tuple[int, ...]:
        return (self.lengths,) if isinstance(self.lengths, int) else known_ints(self.lengths)

    def _first_hidden(self, query: int, T: int, S: int) -> list[int]:
        """The first key that the query does not see, in each row: the larger of prefix and past."""
        lengths, ahead = self._prefixes(), offsets(self.offset, T, S)
        rows = max(len(lengths), len(ahead)) if lengths and ahead else 0
        return [max(lengths[b % len(lengths)], query + ahead[b % len(ahead)] + 1) for b in range(rows)]

    def fixed_sizes(self) -> dict[str, int]:
        """Return {"B": n} where every row has its own length or offset."""
        own = next((numbers for numbers in (self.lengths, self.offset) if isinstance(numbers, tuple)), None)
        return {} if own is None else {"B": len(own)}

    def fit(self, T: int, S: int) -> None:
        """See `Mask.fit`."""
        super().fit(T, S)
        if max(self._prefixes(), default=0) > S:
            raise ValueError(f"the prefix lengths are {list(self._prefixes())}, but there are only {S} keys (S)")

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [T, S], or [B, 1, T, S] where rows differ. See `Mask.dense`."""
        return self.tile(range(T), range(S), T, S, device=device)

    def tile(self, queries: range, keys: range, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [t, s], or [B, 1, t, s] where rows differ. See `Mask.tile`."""
        self.fit(T, S)
        own, key = aligned_keys(queries, self.offset, T, S, device), positions(keys, device)
        if isinstance(self.lengths, int):
            return (key < self.lengths) | (key <= own)
        lengths = torch.tensor(known_ints(self.lengths), dtype=torch.long, device=device)
        return (key < lengths[:, None, None, None]) | (key <= own)

    def span(self, queries: range, T: int, S: int) -> range:
        """Return the keys up to the last that the last query sees. See `Mask.span`."""
        return keys_between(0, max(self._first_hidden(queries.stop - 1, T, S), default=0), S)

    def sees_all(self, queries: range, keys: range, T: int, S: int) -> bool:
        """Return whether the first query sees the last key in every row. See `Mask.sees_all`."""
        return all(keys.stop <= hidden for hidden in self._first_hidden(queries.start, T, S))
