"""Biases that go by the distance between query and key alone: T + S - 1 numbers for a head are enough, not T x S.

The distance is d = t + offset - s: 0 where query and key line up, positive where the key lies behind. As in `Causal`,
an offset left out is S - T: the last query lines up with the last key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtune.attention.host_ints import host_int


class RelativeBias:
    """A number for each head and distance, added to the scores. A bias of your own needs `heads` and `by_distance`.

    Attributes:
        heads: query heads, H.
        offset: where the queries begin among the keys; None is S - T.
    """

    heads: int
    offset: int | None = None

    def by_distance(self, distances: Tensor) -> Tensor:
        """Return the bias at these distances.

        Args:
            distances: int64 [n], each t + offset - s.

        Returns:
            [H, n] in the bias's own dtype, differentiable in its parameters. The caller casts.
        """
        raise NotImplementedError(f"{type(self).__name__} has no by_distance(distances)")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return what is trained: nothing, unless the bias is a module."""
        return iter(())

    def dense(
        self, T: int, S: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the bias as a table to add to the scores.

        Args:
            T: number of queries.
            S: number of keys.
            device: where to make it; a bias with parameters stays on their device where this is left out.
            dtype: of the table.

        Returns:
            [1, H, T, S], differentiable in the bias's parameters.
        """
        farthest = T - 1 + (S - T if self.offset is None else self.offset)
        count = max(T + S - 1, 0)
        line = self.by_distance(farthest - torch.arange(count, device=device))  # from the last query to the first
        line = line.to(dtype=dtype) if device is None else line.to(device=device, dtype=dtype)
        if T == 0 or S == 0:
            return line.new_zeros(1, self.heads, T, S)
        return line.unfold(1, S, 1).flip(1)[None]  # row i of the unfolded is query T - 1 - i


@dataclass(frozen=True)
class ALiBi(RelativeBias):
    """Attention with linear biases: keys count for less the farther away they are.

    -slope_h * |t + offset - s|

    Slopes are 2^(-8 h / H) for h = 1 ... H where H is a power of two. Else, with P the power of two below H, they are
    those of P heads, and then every second one (the first, the third ...) of 2 P heads, as the authors' code has it.
    Nothing is trained. The paper is causal and leaves the future open; here both sides weigh the same.

    Args:
        heads: query heads, >= 1.
        offset: an int; left out, it is S - T, as in `Causal`.

    Raises:
        TypeError: heads or offset is no integer.
        ValueError: there are no heads.

    >>> from llmtune.attention import ALiBi
    >>> ALiBi(heads=8).dense(2, 3)[0, 0]
    tensor([[-0.5000,  0.0000, -0.5000],
            [-1.0000, -0.5000,  0.0000]])

    Press et al., "Train Short, Test Long" (ICLR 2022), section 3.
    """

    heads: int
    offset: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", _at_least(1, self.heads, "heads"))
        object.__setattr__(self, "offset", _offset(self.offset))

    def by_distance(self, distances: Tensor) -> Tensor:
        """Return [H, n], in float64 where the device has it, at distances [n]. See `RelativeBias.by_distance`."""
        dtype = torch.float32 if distances.device.type == "mps" else torch.float64
        slopes = torch.tensor(alibi_slopes(self.heads), dtype=dtype, device=distances.device)
        return slopes[:, None] * -distances.abs()


class RelativePositionBias(nn.Module, RelativeBias):
    """T5's learned bias: one number for each head and bucket of distances.

    Near distances have a bucket each, farther ones share buckets that widen logarithmically, and all from
    `max_distance` on share the last. `weight` starts at 0, which adds nothing; T5's own is
    `relative_attention_bias.weight`, of the same shape. T5's relative position is s - t, the opposite of d.

    Args:
        heads: query heads, >= 1.
        buckets: how many there are; both directions: even, >= 4; one: >= 2.
        max_distance: where the last bucket begins; above the distances that have a bucket each.
        bidirectional: whether half of the buckets are for keys ahead of the query (an encoder); else all of these
            share bucket 0 with the query's own key (a decoder, where the mask hides them).
        offset: an int; left out, it is S - T, as in `Causal`.

    Shape:
        weight: [buckets, heads].

    Raises:
        TypeError: a number is no integer, or `bidirectional` neither True nor False.
        ValueError: a number is out of its range.

    >>> from llmtune.attention import RelativePositionBias
    >>> RelativePositionBias(heads=3).dense(5, 7).shape
    torch.Size([1, 3, 5, 7])

    Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 2.1.
    """

    def __init__(
        self,
        heads: int,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        offset: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(bidirectional, bool):
            raise TypeError(f"bidirectional must be True or False, got {bidirectional!r}")
        self.heads = _at_least(1, heads, "heads")
        self.buckets = _at_least(4 if bidirectional else 2, buckets, "buckets")
        if bidirectional and self.buckets % 2:
            raise ValueError(f"buckets must be even where each direction has half of them, got {buckets}")
        exact = self.buckets // (4 if bidirectional else 2)
        self.max_distance = _at_least(exact + 1, max_distance, "max_distance")
        self.bidirectional = bidirectional
        self.offset = _offset(offset)
        self.weight = nn.Parameter(torch.zeros(self.buckets, self.heads))

    def by_distance(self, distances: Tensor) -> Tensor:
        """Return [H, n], dtype and device those of `weight`, at distances [n]. See `RelativeBias.by_distance`."""
        bucket = distance_buckets(
            distances.to(self.weight.device), buckets=self.buckets, max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )  # fmt: skip
        return self.weight.index_select(0, bucket).t()

    def extra_repr(self) -> str:
        """Return what the module was made with."""
        return (
            f"heads={self.heads}, buckets={self.buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}, offset={self.offset}"
        )


def alibi_slopes(heads: int) -> list[float]:
    """Return the slope of each head, [H] positive numbers. See `ALiBi`."""
    power = 2 ** (heads.bit_length() - 1)
    extra = [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (heads - power), 2)]
    return [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)] + extra


def distance_buckets(distances: Tensor, *, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Return the bucket of each distance.

    n = |d| (both directions), or max(d, 0);  b buckets a direction, of which e = b // 2 are exact
    bucket = n where n < e, else min(b - 1, e + floor(log(n / e) / log(max_distance / e) * (b - e)))

    In both directions, keys ahead of the query (d < 0) have the second half of the buckets. The logarithm is taken in
    float32, in this order, as transformers does: where it is a whole number, rounding decides on the bucket.

    Args:
        distances: integers, any shape.
        buckets: in all.
        max_distance: > e.
        bidirectional: whether the future has buckets of its own.

    Returns:
        int64, the same shape, 0 ... buckets - 1.
    """
    own = buckets // 2 if bidirectional else buckets
    exact = own // 2
    far = distances.abs() if bidirectional else distances.clamp(min=0)
    growth = torch.log(far.clamp(min=exact).float() / exact) / math.log(max_distance / exact) * (own - exact)
    bucket = torch.where(far < exact, far, (exact + growth.long()).clamp(max=own - 1))
    return bucket + own * (distances < 0) if bidirectional else bucket


def _at_least(least: int, value: int, name: str) -> int:
    number = host_int(value, name)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _offset(offset: int | None) -> int | None:
    return None if offset is None else host_int(offset, "offset")
