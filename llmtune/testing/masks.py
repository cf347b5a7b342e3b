"""The laws of a mask, for ours and for yours."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.attention.functional import available_backends, choose_backend, scaled_dot_product_attention
from llmtune.attention.mask_base import Mask
from llmtune.attention.masks import Causal, Dense
from llmtune.errors import LawBroken
from llmtune.testing.close import assert_close


def check_mask(mask: Mask) -> None:
    """Check that a mask keeps its own word.

    The laws: `dense(T, S)` is a boolean table of T queries and S keys, always the same; `tile` is a part of it, also of
    `mask & Causal()`, `span` leaves out no key that is seen, and `sees_all` is True only where no key is hidden; `&` is
    the intersection, in either order; `additive` is that table in numbers; attention under the mask is attention under
    its table, with every backend; inputs of other sizes than `fixed_sizes()` raise ValueError.

    Args:
        mask: any `llmtune.attention.Mask`. Sizes it leaves free are set to B=2, H=3, T=7, S=11.

    Raises:
        LawBroken: the message says which law, for which sizes.

    >>> from llmtune.attention import Causal, Padding
    >>> from llmtune.testing.masks import check_mask
    >>> check_mask(Causal() & Padding([3, 11]))
    """
    sizes = {"B": 2, "H": 3, "T": 7, "S": 11, **mask.fixed_sizes()}
    device = next((tensor.device for tensor in mask.tensors()), torch.device("cpu"))
    table = _table(mask, sizes, device)
    _tiles(mask, mask, table, sizes, device)
    _intersection(mask, table, sizes, device)
    both = mask & Causal()
    _tiles(mask, both, both.dense(sizes["T"], sizes["S"], device=device).expand_as(table), sizes, device)
    _additive(mask, table, sizes, device)
    _attention(mask, table, sizes, device)
    _wrong_sizes(mask, sizes, device)


def _law(name: str, mask: Mask, sizes: dict[str, int]) -> str:
    return f'mask law "{name}" ({type(mask).__name__}, ' + ", ".join(f"{k}={n}" for k, n in sizes.items()) + ")"


def _table(mask: Mask, sizes: dict[str, int], device: torch.device) -> Tensor:
    B, H, T, S = (sizes[letter] for letter in "BHTS")
    law = _law("dense(T, S) is a boolean table", mask, sizes)
    table = mask.dense(T, S, device=device)
    if not isinstance(table, Tensor) or table.dtype != torch.bool:
        raise LawBroken(f"{law}: got {table.dtype if isinstance(table, Tensor) else type(table).__name__}")
    fits = table.ndim in (2, 4) and table.shape[-2:] == (T, S)
    if table.ndim == 4:
        fits = fits and table.shape[0] in (1, B) and table.shape[1] in (1, H)
    if not fits:
        raise LawBroken(f"{law}: got shape {tuple(table.shape)}, neither [T, S] nor [B | 1, H | 1, T, S]")
    if not torch.equal(table, mask.dense(T, S, device=device)):
        raise LawBroken(f"{law}: a second call gave another table")
    return table.expand(B, H, T, S)


def _tiles(mask: Mask, seen_by: Mask, table: Tensor, sizes: dict[str, int], device: torch.device) -> None:
    """The laws of parts, of the mask itself or of an intersection (`seen_by`) with it, whose table is [B, H, T, S]."""
    T, S = sizes["T"], sizes["S"]
    with_causal = "" if seen_by is mask else ", of mask & Causal()"
    for queries in _parts_of(T):
        rows = table[..., queries.start : queries.stop, :]
        span = seen_by.span(queries, T, S)
        law = _law("span leaves out no key that is seen", mask, sizes) + f": {queries}{with_causal}"
        if not isinstance(span, range) or span.step != 1 or not 0 <= span.start <= span.stop <= S:
            raise LawBroken(f"{law}: expected a range of step 1 within 0 ... {S}, got {span!r}")
        if rows[..., : span.start].any() or rows[..., span.stop :].any():
            raise LawBroken(f"{law}: got {span}, but a query sees a key outside of it")
        for keys in _parts_of(S):
            part = rows[..., keys.start : keys.stop]
            where = f": {queries}, {keys}{with_causal}"
            _tile(
                seen_by, queries, keys, part, _law("tile is a part of dense(T, S)", mask, sizes) + where, sizes, device
            )
            if seen_by.sees_all(queries, keys, T, S) and not part.all():
                law = _law("sees_all is True only where no key is hidden", mask, sizes)
                raise LawBroken(f"{law}{where}: it is True, but a query does not see a key")


def _tile(
    mask: Mask, queries: range, keys: range, part: Tensor, law: str, sizes: dict[str, int], device: torch.device
) -> None:
    tile = mask.tile(queries, keys, sizes["T"], sizes["S"], device=device)
    if not isinstance(tile, Tensor) or tile.dtype != torch.bool:
        raise LawBroken(
            f"{law}: expected booleans, got {tile.dtype if isinstance(tile, Tensor) else type(tile).__name__}"
        )
    own = tile.shape[:-2]
    fits = len(own) in (0, 2) and all(n in (1, all_of) for n, all_of in zip(own, part.shape, strict=False))
    if not fits or tile.shape[-2:] != part.shape[-2:]:
        raise LawBroken(f"{law}: got shape {tuple(tile.shape)} for {len(queries)} queries and {len(keys)} keys")
    if not torch.equal(tile.expand_as(part), part):
        raise LawBroken(f"{law}: it is not that part of the table")


def _parts_of(size: int) -> list[range]:
    """Ranges within 0 ... size: the whole, none, each alone, and some that start and end anywhere."""
    pairs = {(0, size), (0, 0), (size, size), (0, size // 2), (size // 2, size), (size // 3, size - 1), (1, size)}
    pairs |= {(at, at + 1) for at in (*range(min(size, 7)), size - 1)}
    return [range(start, stop) for start, stop in sorted(pairs) if 0 <= start <= stop <= size]


def _intersection(mask: Mask, table: Tensor, sizes: dict[str, int], device: torch.device) -> None:
    T, S = sizes["T"], sizes["S"]
    random = torch.rand(T, S, generator=torch.Generator().manual_seed(0)) > 0.3
    for other in (Causal(), Dense(random.to(device)), mask, Causal() & Dense(random.to(device))):
        both = table & other.dense(T, S, device=device)
        for name, joined in {"mask & other": mask & other, "other & mask": other & mask}.items():
            if not torch.equal(joined.dense(T, S, device=device).expand_as(both), both):
                law = _law("& is the intersection", mask, sizes)
                raise LawBroken(f"{law}: {name}, with {type(other).__name__}, is not what both allow")


def _additive(mask: Mask, table: Tensor, sizes: dict[str, int], device: torch.device) -> None:
    B, H, T, S = (sizes[letter] for letter in "BHTS")
    law = _law("additive(T, S) is the table in numbers", mask, sizes)
    seen = table.any(dim=-1, keepdim=True)
    for dtype in (torch.float32, torch.float64):
        values, rows = mask.additive(T, S, dtype=dtype, device=device)
        if values.dtype != dtype:
            raise LawBroken(f"{law}: expected {dtype}, got {values.dtype}")
        wanted = torch.where(table | ~seen, 0.0, float("-inf"))
        if not torch.equal(values.expand(B, H, T, S), wanted.to(dtype)):
            raise LawBroken(f"{law}: not 0 where a query may attend (and in rows without keys) and -inf elsewhere")
        told = torch.ones_like(seen) if rows is None else rows.expand_as(seen)
        if not torch.equal(told, seen):
            raise LawBroken(f"{law}: it is wrong about which queries have a key")


def _attention(mask: Mask, table: Tensor, sizes: dict[str, int], device: torch.device) -> None:
    B, H, T, S = (sizes[letter] for letter in "BHTS")
    g = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, 5), (B, H, S, 5), (B, H, S, 3))
    query, key, value = (torch.randn(shape, generator=g, dtype=torch.float64).to(device) for shape in shapes)
    scores = (query @ key.transpose(2, 3) / 5**0.5).masked_fill(~table, float("-inf"))
    truth = torch.softmax(scores, dim=-1).nan_to_num(0.0) @ value
    for backend in ("auto", *available_backends()):
        try:
            out = scaled_dot_product_attention(query, key, value, mask=mask, backend=backend)
        except ValueError:
            if backend == choose_backend(query, key, value, mask=mask).name:
                raise
            continue  # a named backend need not take every mask
        assert isinstance(out, Tensor)
        what = f"{_law('attention under the mask is attention under its table', mask, sizes)}: backend {backend}"
        assert_close(out, truth, what=what)


def _wrong_sizes(mask: Mask, sizes: dict[str, int], device: torch.device) -> None:
    for letter in mask.fixed_sizes():
        wrong = {**sizes, letter: sizes[letter] + 1}
        try:
            mask.check(**wrong, device=device)
        except ValueError:
            continue
        raise LawBroken(f"{_law('other sizes raise ValueError', mask, sizes)}: {letter}={wrong[letter]} went through")
