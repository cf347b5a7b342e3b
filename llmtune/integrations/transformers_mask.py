"""The mask function behind `attn_implementation="llmtune"`.

Transformers describes a mask by sizes and an opaque closure (batch, head, query, key) -> bool. Whatever is not surely
plain becomes a table. What is surely plain stays small:

    None                  the layer's own `is_causal`, nothing else
    bool [B, S]           that, and padding: True at the real keys
    int32 [B, T]          that, and packing: the document each token belongs to
    int64 [B, S]          that, and a window, and padding or packing: see `window_tensor`
    bool [B, 1, T, S]     the whole mask
    float [B, 1, T, S]    the same, to add, for models whose layers do not say themselves whether they are causal
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from llmtune.integrations.transformers_closures import Meaning, is_packed, meaning_of
from llmtune.integrations.transformers_support import carries_small_masks, modeling_file, refusal_of, tells_is_causal

_UNPADDED_TABLES: WeakIdKeyDictionary = WeakIdKeyDictionary()


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
        None, bool [B, S], int32 [B, T], int64 [B, S], or bool or float [B, 1, T, S]: see the top of this file.

    Raises:
        ValueError: the model computes its attention by itself and would read this mask wrongly.
    """
    from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

    why_not = refusal_of(modeling_file(type(config)))
    if why_not is not None:
        raise ValueError(f'{why_not}; load the model with attn_implementation="eager"')
    T, S = q_length, kv_length
    mask_function = causal_mask_function if mask_function is None else mask_function
    if not tells_is_causal(config):  # parts of such a model may add the mask to scores of their own, as with "eager"
        return eager_mask(
            batch_size=batch_size, q_length=T, kv_length=S, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs,
        )  # fmt: skip
    # Our masks count from the last key, and the query's offset may be a tensor, which is not read here.
    aligned = isinstance(q_offset, int) and q_offset + T == kv_offset + S
    known = meaning_of(mask_function)
    meaning = _plain(known, S, aligned, allow_is_causal_skip, allow_is_bidirectional_skip)
    if known is None and local_size is not None and kv_offset == 0 and S <= local_size:
        if (allow_is_causal_skip and aligned) or allow_is_bidirectional_skip:
            meaning = Meaning()  # a chunk that hides nothing, and the flag says that nothing has been joined to it
    if meaning is not None and (meaning.documents is None or (T == S and attention_mask is None)):
        real = _real_keys(attention_mask, S, kv_offset)
        if meaning.documents is None and meaning.window is None and real is None:
            return None
        if carries_small_masks(config):
            return _small(meaning, real, batch_size, S, kwargs.get("device", "cpu"))
    table: Any = sdpa_mask(
        batch_size=batch_size, q_length=T, kv_length=S, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False, **kwargs,
    )  # fmt: skip
    if attention_mask is None or bool(attention_mask.all()):
        table = torch.clone(table)  # no view, so that a view of it is known
        chunked = local_size is not None and known is None and not is_packed(mask_function)
        _UNPADDED_TABLES[table] = "chunked" if chunked else "plain"
    return table


def unpadded_table(mask: Tensor) -> str | None:
    """Return what is known of `mask` [B, 1, T, S] where it was made here for a batch without padding, else None.

    To such a table, or a slice that is all of it, a layer may add the documents it knows of: to a "plain" one, for the
    chunks of a "chunked" one would begin elsewhere in each document. A table of the user's own is unknown; so is one
    that a model has cut or moved, and then nothing is added to it.
    """
    whole = mask._base
    if whole is None or (whole.shape, whole.stride()) != (mask.shape, mask.stride()):
        whole = mask
    return _UNPADDED_TABLES.get(whole)


def _plain(meaning: Meaning | None, S: int, aligned: bool, causal_skip: bool, both_skip: bool) -> Meaning | None:
    """Return the meaning where a layer can add it to its own `is_causal`, less a window that hides nothing; else None.

    Either flag says which kind of mask this is, and that it need not be a table. Where a batch is packed both say no,
    and then only causal ones are known for what they are.
    """
    if meaning is None:
        return None
    if meaning.documents is None:
        allowed = (causal_skip and aligned) or (both_skip and (aligned or meaning.window is None))
    else:
        allowed = meaning.causal and aligned
    if not allowed:
        return None
    return meaning if meaning.window is None or meaning.window < S else Meaning(meaning.causal, None, meaning.documents)


def _real_keys(attention_mask: Tensor | None, S: int, kv_offset: int) -> Tensor | None:
    """Return bool [B, S], True at the real keys, or None where all are."""
    from transformers.masking_utils import prepare_padding_mask

    real = prepare_padding_mask(attention_mask, S, kv_offset)
    real = None if real is None else real[:, kv_offset : kv_offset + S]
    return None if real is None or bool(real.all()) else real


def _small(meaning: Meaning, real: Tensor | None, B: int, S: int, device: Any) -> Tensor | None:
    if meaning.window is not None:
        return window_tensor(meaning.window, B, S, real=real, documents=meaning.documents, device=device)
    return real if meaning.documents is None else meaning.documents.to(torch.int32)


_DOCUMENT = 1 << 32  # a window is smaller than this; an ordinary attention mask of 0 and 1 is, too


def window_tensor(
    size: int, B: int, S: int, *, real: Tensor | None = None, documents: Tensor | None = None, device: Any = "cpu"
) -> Tensor:
    """Return int64 [B, S] that says, at every key: the window's size + 2**32 * (1 + document); negative at padding.

    All is in the numbers, so that a model may copy the tensor or move it to another device.

    Args:
        size: of the window, >= 1.
        B: rows.
        S: keys.
        real: bool [B, S], False at padding.
        documents: [B, S] integers >= 0.
        device: where to make it.
    """
    said = torch.full((B, S), _DOCUMENT + min(size, _DOCUMENT - 1), dtype=torch.int64, device=device)
    if documents is not None:
        said = said + _DOCUMENT * documents.to(device=device, dtype=torch.int64)
    return said if real is None else torch.where(real.to(device), said, -said)


def read_window_tensor(said: Tensor) -> tuple[int, Tensor | None, Tensor | None] | None:
    """Return (size, real, documents) of a `window_tensor` [B, S], or None where `said` is none.

    `real` is None where all keys are; `documents` is None where there is one in every row.
    """
    if said.dtype != torch.int64 or int((numbers := said.abs())[0, 0]) < _DOCUMENT:
        return None
    real, documents = said > 0, (numbers // _DOCUMENT - 1).to(torch.int32)
    size = int(numbers[0, 0]) % _DOCUMENT
    return size, None if bool(real.all()) else real, documents if bool((documents != documents[:, :1]).any()) else None
