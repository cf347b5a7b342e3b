"""The inputs on which attention's laws are checked: every kind of mask, at sizes that are different primes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmtune.attention.documents import Documents
from llmtune.attention.mask_base import Mask
from llmtune.attention.masks import Causal, Dense, Padding
from llmtune.attention.window import PrefixCausal, SlidingWindow


class Case(NamedTuple):
    """Sizes, and a mask that fits them."""

    name: str
    B: int
    H: int
    K: int
    T: int
    S: int
    mask: Mask | None = None

    def __str__(self) -> str:
        return f"{self.name}, B={self.B}, H={self.H}, K={self.K}, T={self.T}, S={self.S}"


def cases() -> Iterator[Case]:
    """Every kind of mask; sizes are different primes wherever heads need not divide."""
    g = torch.Generator().manual_seed(7)
    left = torch.ones(2, 11, dtype=torch.bool)
    left[0, :4], left[1, :10] = False, False
    table = torch.rand(2, 1, 7, 11, generator=g) > 0.5
    table[0, 0, 3], table[1, 0, 6] = False, False
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 3, 3, 4, 5, 5]])
    joined = SlidingWindow(4) & Documents([0, 6, 11]) & Padding([9, 3])
    yield Case("no mask", 2, 3, 3, 7, 11)
    yield Case("grouped heads", 2, 6, 3, 7, 11)
    yield Case("one key head", 2, 5, 1, 7, 11)
    yield Case("causal", 2, 6, 3, 11, 11, Causal())
    yield Case("causal with a cache", 2, 3, 3, 7, 11, Causal())
    yield Case("causal, more queries than keys", 2, 6, 3, 11, 7, Causal())
    yield Case("causal, offset -2", 2, 6, 3, 7, 7, Causal(-2))
    yield Case("causal, an offset for each row", 2, 6, 3, 7, 11, Causal([1, 5]))
    yield Case("right padding, one row empty", 3, 6, 3, 7, 11, Padding([4, 0, 11]))
    yield Case("left padding and causal", 2, 6, 3, 11, 11, Causal() & Padding.from_attention_mask(left))
    yield Case("documents and causal", 2, 6, 3, 11, 11, Causal() & Documents([0, 2, 3, 3, 11]))
    yield Case("documents, keys cut otherwise", 2, 6, 3, 7, 11, Documents([0, 2, 3, 7], [0, 7, 7, 11]))
    yield Case("documents by ids and causal", 2, 6, 3, 11, 11, Causal() & Documents.from_ids(ids))
    yield Case("a window and causal", 2, 6, 3, 11, 11, Causal() & SlidingWindow(3))
    yield Case("a window on both sides, more keys", 2, 6, 3, 7, 11, SlidingWindow(2))
    yield Case("a window, documents and padding", 2, 6, 3, 11, 11, joined)
    yield Case("a prefix for each row", 2, 6, 3, 7, 11, PrefixCausal([0, 6]))
    yield Case("a table for each row", 2, 6, 3, 7, 11, Dense(table))
    yield Case("a table for each head", 2, 6, 3, 7, 11, Dense(torch.rand(1, 6, 7, 11, generator=g) > 0.5))
    yield Case("a single query", 2, 6, 3, 1, 11, Causal() & Padding([11, 3]))
    yield Case("a single key", 2, 6, 3, 7, 1)


def draw(case: Case, dtype: torch.dtype, *, D: int = 5, Dv: int = 13, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [B, H, T, D], key [B, K, S, D] and value [B, K, S, Dv] for a case, drawn in float64."""
    g = torch.Generator().manual_seed(seed)
    B, H, K, T, S = case.B, case.H, case.K, case.T, case.S
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, Dv))
    query, key, value = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return query, key, value
