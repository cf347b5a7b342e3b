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

    The laws: `dense(T, S)` is a boolean table of T queries and S keys, always the same; `&` is the intersection, in
    either order; `additive` is that table in numbers; attention under the mask is attention under its table, with every
    backend; inputs of other sizes than `fixed_sizes()` raise ValueError.

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
    _intersection(mask, table, sizes, device)
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
