"""The mask function behind `attn_implementation="llmtune"`.

Transformers describes a mask by sizes and an opaque closure (batch, head, query, key) -> bool. A closure cannot be read
in general, so whatever is not surely plain becomes a table. What is surely plain stays small:

    None                  the layer's own `is_causal`, nothing else
    bool [B, S]           that, and padding: True at the real keys
    int32 [B, T]          that, and packing: the document each token belongs to
    bool [B, 1, T, S]     the whole mask
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# The tables made here for a batch without padding: to these a layer may add the documents it knows of. A table of the
# user's own is never in here; neither is one that a model has cut or moved, and then nothing is added to it.
UNPADDED_TABLES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def attention_mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what the attention layers of one forward pass need to know of their mask (transformers' names and order).

    Args:
        batch_size: B.
        q_length: T.
        kv_length: S.
        q_offset: the position of the first query, an int or (static caches) a tensor.
        kv_offset: the position of the first key.
        mask_function: (batch, head, query position, key position) -> bool; left out, causal.
        attention_mask: bool [B, n], False at padding, n positions from 0 on.
        local_size: the size of the sliding window or chunk inside `mask_function`.
        allow_is_causal_skip: False where a causal mask must come as a table.
        allow_is_bidirectional_skip: True where a bidirectional mask need not come as a table.
        config: the model's; says whether the model can carry a small mask.
        **kwargs: handed on to transformers' `sdpa_mask` where a table is made.

    Returns:
        None, bool [B, S], int32 [B, T] or bool [B, 1, T, S]: see the top of this file.

    Raises:
        ValueError: the model computes its attention by itself and would read this mask wrongly.
    """
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )

    kind: Any = type(config)
    _check_takes_attention(kind)
    mask_function = causal_mask_function if mask_function is None else mask_function
    carries = _carries_small_masks(kind)
    # Causal counts from the last key in our attention, and the query's offset may be a tensor, which is not read here.
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if carries and aligned and q_length == kv_length and attention_mask is None:
        documents = _document_ids(mask_function, kv_length)
        if documents is not None:
            return documents.to(torch.int32)
    # Either flag says which kind of mask this is, and that nothing else has been joined to it.
    if local_size is None:
        plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    else:  # a window or a chunk that hides nothing
        plain = kv_offset == 0 and kv_length <= local_size
    if plain and ((allow_is_causal_skip and aligned) or allow_is_bidirectional_skip):
        real = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        real = None if real is None else real[:, kv_offset : kv_offset + kv_length]
        if real is None or bool(real.all()):
            return None
        if carries:
            return real
    table = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False, **kwargs,
    )  # fmt: skip
    if attention_mask is None or bool(attention_mask.all()):
        UNPADDED_TABLES[table] = True
    return table


def _document_ids(function: Callable[..., Any], S: int) -> Tensor | None:
    """Return the ids [B, T] where `function` is exactly "causal within each document" over S keys, else None."""
    causal, ids = False, None
    for fact in _facts(function, S):
        if isinstance(fact, Tensor):
            ids = fact
        elif fact == "causal":
            causal = True
        elif fact == "unknown":
            return None
    return ids if causal else None


def _facts(function: Callable[..., Any], S: int) -> Iterator[str | Tensor]:
    """Yield what a closure of transformers' says: "causal", the ids of its documents, or "unknown".

    Closures are known by their code objects, so only transformers' own are ever taken for one of them.
    """
    from transformers import masking_utils as known

    def is_made_by(maker: str, *example: Any) -> bool:
        return hasattr(known, maker) and getattr(known, maker)(*example).__code__ is getattr(function, "__code__", None)

    if function is known.causal_mask_function:
        yield "causal"
    elif is_made_by("and_masks", known.causal_mask_function):
        for part in _captured(function)["mask_functions"]:
            yield from _facts(part, S)
    elif is_made_by("packed_sequence_mask_function", None):
        yield _captured(function)["packed_sequence_mask"]
    elif is_made_by("remap_positions_for_packed_sequence", None, None):  # positions in a document go up by one
        yield from _facts(_captured(function)["mask_function"], S)
    elif not (is_made_by("sliding_window_overlay", None) and _captured(function)["sliding_window"] >= S):
        yield "unknown"


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    cells: Any = function.__closure__
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


@functools.cache
def _carries_small_masks(config: Hashable) -> bool:
    """Models written for flash attention pass 2-D masks through untouched; others may slice or add to a table."""
    return any(getattr(kind, "_supports_flash_attn", False) for kind in _classes(_modeling_file(config)))


@functools.cache
def _check_takes_attention(config: Hashable) -> None:
    """Transformers takes a registered name for any model, but one with attention of its own would misread our mask."""
    file = _modeling_file(config)
    if hasattr(file, "ALL_ATTENTION_FUNCTIONS"):
        return
    if any("Attention" in kind.__name__ and issubclass(kind, nn.Module) for kind in _classes(file)):
        assert file is not None
        raise ValueError(
            f"{file.__name__.rsplit('.', 1)[-1]} computes its attention by itself and does not take "
            'attn_implementation="llmtune"; load the model with attn_implementation="eager"'
        )


def _modeling_file(config: Any) -> ModuleType | None:
    """The modeling_x.py beside a configuration class's configuration_x.py, where that has been imported."""
    for parent in config.__mro__:
        name = parent.__module__.replace(".configuration_", ".modeling_")
        if name != parent.__module__ and name in sys.modules:
            return sys.modules[name]
    return None


def _classes(file: ModuleType | None) -> list[type]:
    """The classes defined in a file, not those it imports."""
    found = [] if file is None else vars(file).values()
    return [kind for kind in found if isinstance(kind, type) and kind.__module__ == getattr(file, "__name__", None)]
