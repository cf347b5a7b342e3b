"""Which key a query lines up with: t + offset, for masks that go by the distance between queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtune.attention.host_ints import known_ints


def positions(part: range, device: torch.device | str | None) -> Tensor:
    """Return the numbers of these queries or keys, int64 [n]."""
    return torch.arange(part.start, part.start + len(part), device=device)


def offsets(offset: int | Sequence[int] | Tensor | None, T: int, S: int) -> tuple[int, ...]:
    """Return a mask's offsets: one for all rows (S - T where it was left out), or [B]."""
    if offset is None:
        return (S - T,)
    return (offset,) if isinstance(offset, int) else known_ints(offset)


def aligned_keys(
    queries: range, offset: int | Sequence[int] | Tensor | None, T: int, S: int, device: torch.device | str | None
) -> Tensor:
    """Return t + offset for these queries, int64 [t, 1], or [B, 1, t, 1] where every row has its own offset."""
    query = positions(queries, device)[:, None]
    if offset is None or isinstance(offset, int):
        return query + offsets(offset, T, S)[0]
    return query + torch.tensor(known_ints(offset), dtype=torch.long, device=device)[:, None, None, None]
