"""Keys and values of the tokens before, kept so that decoding computes each of them once.

One cache serves one attention layer. `update` takes the keys and values of the new tokens and returns all that their
queries may see, the contiguous latest ones, so that masks aligned to the last key (`Causal()`, `SlidingWindow(size)`)
mean what they mean without a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.attention.cache_base import KeyValueCache, make_store

_SPARE = 64  # tokens: the least room a growing cache makes beyond what it needs


class GrowingCache(KeyValueCache):
    """A cache that takes as much memory as it needs, and any batch.

    It grows by half at a time, so that each token is copied a few times at most, however long the sequence. What
    `update` returned is a view that is never written to again.

    Args:
        window: the size of a sliding window; a prompt of any length still sees all the keys it needs, and afterwards
            at most a few times `window` tokens are held.

    Raises:
        ValueError: the window is not positive.

    >>> import torch
    >>> from llmtune.attention import Causal, scaled_dot_product_attention
    >>> from llmtune.attention.cache import GrowingCache
    >>> cache = GrowingCache()
    >>> for x in torch.randn(5, 2, 3, 1, 8):  # five tokens, one after the other
    ...     keys, values = cache.update(x, x)
    ...     out = scaled_dot_product_attention(x, keys, values, mask=Causal())
    >>> keys.shape, cache.length
    (torch.Size([2, 3, 5, 8]), 5)
    """

    def reset(self) -> None:
        """Forget everything and free the memory; the next batch may have other sizes."""
        super().reset()
        self._kept = None

    def _make_room(self, key: Tensor, value: Tensor) -> bool:
        t = key.shape[2]
        if self._kept is not None and self._end + t <= self._kept.capacity:
            return True
        if self.window is not None and t >= self.window:  # nearly all of it is dropped at once
            return False
        held = (key[:, :, :0], value[:, :, :0])
        if self._kept is not None:
            held = self._kept.between(self._start, self._end)
        self._renew(*held, spare=t)
        return True

    def _keep_tail(self, keys: Tensor, values: Tensor) -> None:
        assert self.window is not None
        start = keys.shape[2] - (self.window - 1)
        self._renew(keys[:, :, start:], values[:, :, start:])

    def _take_rows(self, rows: Tensor) -> None:
        assert self._kept is not None
        keys, values = self._kept.between(self._start, self._end)
        self._renew(keys.index_select(0, rows), values.index_select(0, rows))

    def _renew(self, keys: Tensor, values: Tensor, *, spare: int = 0) -> None:
        """Hold these alone, in a new store with room for `spare` more tokens, and half as many again."""
        needed = keys.shape[2] + spare
        B, K, _, D = keys.shape
        self._kept = make_store(
            (B, K, needed + max(_SPARE, needed // 2), D), values.shape[3], dtype=keys.dtype, device=keys.device
        )
        self._kept.write(0, keys, values)
        self._start, self._end = 0, keys.shape[2]


class StaticCache(KeyValueCache):
    """A cache whose memory is taken once, before the first token.

    What `update` returns is a view of that memory: it is good until the next `update`, `reorder` or `reset`.

    Args:
        rows: B, the sequences decoded together.
        heads: K, key heads.
        max_length: the most tokens of a sequence, prompt and decoded ones.
        head_size: D.
        value_size: Dv; left out, D.
        window: the size of a sliding window. The memory is then for at most 2 * window tokens, however large
            max_length; when it is full, what is still needed moves to its beginning. (A ring of `window` tokens would
            have to be put in order for every call.) A call with more tokens than fit is joined outside of it.
        dtype: of keys and values.
        device: where they are.

    Raises:
        ValueError: a size is not positive.

    >>> import torch
    >>> from llmtune.attention.cache import StaticCache
    >>> cache = StaticCache(2, 3, 11, 8)
    >>> keys, values = cache.update(torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8))
    >>> keys.shape
    torch.Size([2, 3, 7, 8])
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        max_length: int,
        head_size: int,
        value_size: int | None = None,
        *,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(window)
        value_size = head_size if value_size is None else value_size
        sizes = {"rows": rows, "heads": heads, "max_length": max_length, "head_size": head_size}
        for name, size in {**sizes, "value_size": value_size}.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        self.max_length = max_length
        capacity = max_length if window is None else min(max_length, 2 * window)
        self._kept = make_store((rows, heads, capacity, head_size), value_size, dtype=dtype, device=device)

    def _make_room(self, key: Tensor, value: Tensor) -> bool:
        assert self._kept is not None
        t = key.shape[2]
        if self.length + t > self.max_length:
            raise ValueError(
                f"the cache takes {self.max_length} tokens (max_length), has seen {self.length} and is given {t} more: "
                "make a longer one, or reset() it"
            )
        if self._end + t <= self._kept.capacity:
            return True
        if self.held + t > self._kept.capacity:
            return False
        keys, values = self._kept.between(self._start, self._end)
        if self.held > self._start:  # the places they come from and go to overlap
            keys, values = keys.clone(), values.clone()
        self._hold(keys, values)
        return True

    def _keep_tail(self, keys: Tensor, values: Tensor) -> None:
        assert self.window is not None
        start = keys.shape[2] - (self.window - 1)
        self._hold(keys[:, :, start:], values[:, :, start:])

    def _take_rows(self, rows: Tensor) -> None:
        assert self._kept is not None
        B = self._kept.keys.shape[0]
        if rows.shape[0] != B:
            raise ValueError(f"a static cache of {B} rows keeps its number, got {rows.shape[0]} rows to take")
        keys, values = self._kept.between(self._start, self._end)
        self._kept.write(self._start, keys.index_select(0, rows), values.index_select(0, rows))

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Hold these alone, from the beginning of the store on."""
        assert self._kept is not None
        self._kept.write(0, keys, values)
        self._start, self._end = 0, keys.shape[2]
