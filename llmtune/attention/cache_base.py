"""What every cache of keys and values does, wherever it keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmtune.attention.host_ints import host_ints


class Store(NamedTuple):
    """Room for keys [B, K, capacity, D] and values [B, K, capacity, Dv]."""

    keys: Tensor
    values: Tensor

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return self.keys.shape[2]

    def between(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return views of the tokens start ... end - 1, [B, K, end - start, D] and [B, K, end - start, Dv]."""
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def write(self, start: int, key: Tensor, value: Tensor) -> None:
        """Copy key [B, K, t, D] and value [B, K, t, Dv] to the tokens from `start` on."""
        for room, new in zip(self.between(start, start + key.shape[2]), (key, value), strict=True):
            room.copy_(new)


def make_store(
    key_shape: tuple[int, int, int, int], value_size: int, dtype: torch.dtype, device: torch.device | str | None
) -> Store:
    """Return room for keys of shape [B, K, capacity, D] and values of size Dv."""
    with torch.inference_mode(False):  # else a cache filled under inference_mode could not go on under no_grad
        keys = torch.empty(key_shape, dtype=dtype, device=device)
        return Store(keys, torch.empty((*key_shape[:3], value_size), dtype=dtype, device=device))


class KeyValueCache:
    """What the caches have in common. Use `GrowingCache` or `StaticCache`.

    A cache is for decoding without gradients: it raises where a key or a value carries one.

    With a window, keys that no later query can see are dropped after each call: the last `window - 1` are held for the
    next. Its attention must then have `Causal() & SlidingWindow(window)` as mask. A mask that knows every key, such as
    `Padding.from_attention_mask`, is made for the last S columns, S being the keys that `update` returns.

    Args:
        window: the size of a sliding window in tokens; left out, every key stays.

    Raises:
        ValueError: the window is not positive.
    """

    def __init__(self, window: int | None = None) -> None:
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise ValueError(f"window must be a positive number of tokens, or None for no window, got {window}")
        self.window = window
        self._kept: Store | None = None
        self._start = self._end = self._length = 0

    @property
    def length(self) -> int:
        """The tokens seen so far, those included that a window has dropped: the position of the next one."""
        return self._length

    @property
    def held(self) -> int:
        """The tokens kept for the next call: with t new ones it returns held + t, from position length - held on."""
        return self._end - self._start

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the new tokens and return all that their queries may see.

        Args:
            key: [B, K, t, D], any t; rotated already where the model has rotary positions.
            value: [B, K, t, Dv].

        Returns:
            (keys, values): [B, K, S, D] and [B, K, S, Dv], S = held + t: the latest tokens, in their order.

        Raises:
            ValueError: key and value do not fit each other or what is held, carry a gradient, or do not fit in.
        """
        self._check(key, value)
        t = key.shape[2]
        if self._make_room(key, value):
            assert self._kept is not None
            self._kept.write(self._end, key, value)
            self._end += t
            seen = self._kept.between(self._start, self._end)
            if self.window is not None:
                self._start = max(self._start, self._end - (self.window - 1))
        else:
            seen = self._join(key, value)
            self._keep_tail(*seen)
        self._length += t
        return seen

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Make row i what row rows[i] was, as beam search needs after each step. An empty cache stays as it is.

        Args:
            rows: [n] ints from 0 to B - 1.

        Raises:
            TypeError: a row is no integer.
            ValueError: a row does not exist, or a static cache would change its number of rows.
        """
        chosen = host_ints(rows, "rows")
        if self._kept is None:
            return
        B = self._kept.keys.shape[0]
        if any(not 0 <= row < B for row in chosen):
            raise ValueError(f"rows must be between 0 and {B - 1}, for the cache has {B}, got {list(chosen)}")
        self._take_rows(torch.tensor(chosen, dtype=torch.long, device=self._kept.keys.device))

    def reset(self) -> None:
        """Forget everything: the next token is the first."""
        self._start = self._end = self._length = 0

    def _make_room(self, key: Tensor, value: Tensor) -> bool:
        """Make the store such that the new tokens fit behind those held; False where they are not to be stored."""
        raise NotImplementedError(f"{type(self).__name__} has no _make_room(key, value)")

    def _keep_tail(self, keys: Tensor, values: Tensor) -> None:
        """Hold the last window - 1 of keys [B, K, S, D] and values [B, K, S, Dv], S >= window."""
        raise NotImplementedError(f"{type(self).__name__} has no _keep_tail(keys, values)")

    def _take_rows(self, rows: Tensor) -> None:
        """Reorder by [n] indices that exist."""
        raise NotImplementedError(f"{type(self).__name__} has no _take_rows(rows)")

    def _join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What is held with the new tokens behind it, [B, K, held + t, D] and [B, K, held + t, Dv], not stored."""
        if self._kept is None or self.held == 0:
            return key, value
        keys, values = self._kept.between(self._start, self._end)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                "key and value must be [B, K, t, D] and [B, K, t, Dv] of the same tokens, "
                f"got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if key.dtype != value.dtype or key.device != value.device:
            raise ValueError(
                "key and value must have one dtype and one device, "
                f"got {key.dtype} on {key.device} and {value.dtype} on {value.device}"
            )
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError(
                f"a cache keeps no gradient, but the {'key' if key.requires_grad else 'value'} requires one: "
                "decode under torch.no_grad(), train without a cache"
            )
        if self._kept is None:
            return
        for name, new, old in (("key", key, self._kept.keys), ("value", value, self._kept.values)):
            if (*new.shape[:2], new.shape[3]) != (*old.shape[:2], old.shape[3]):
                raise ValueError(
                    f"the cache holds {name}s of {old.shape[0]} rows, {old.shape[1]} heads and size {old.shape[3]}, "
                    f"got {new.shape[0]}, {new.shape[1]} and {new.shape[3]}: reset() a growing cache first"
                )
            if new.dtype != old.dtype or new.device != old.device:
                raise ValueError(
                    f"the cache holds {name}s in {old.dtype} on {old.device}, got {new.dtype} on {new.device}"
                )
