"""`attn_implementation="llmtune"`: this library's attention in models of Hugging Face transformers.

Transformers wants two functions under one name. The mask function (`transformers_mask.py`) is called once for each
forward pass; what it returns travels through the model to the attention function, which every attention layer calls.
They must be registered together: a name without a mask function gets no mask, and padding is attended to unnoticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from llmtune.attention.documents import Documents
from llmtune.attention.functional import scaled_dot_product_attention
from llmtune.attention.mask_base import Mask
from llmtune.attention.masks import Causal, Dense, Padding
from llmtune.attention.window import SlidingWindow
from llmtune.integrations.transformers_mask import attention_mask_function, read_window_tensor, unpadded_table
from llmtune.integrations.transformers_support import NAME

# What some models hand to their attention that changes its result and that we do not have.
_NOT_TAKEN = ("indices", "block_indices", "sinks", "cache", "alibi", "attention_bias", "head_mask", "output_attentions")
_CUTS_BESIDE_TABLE = (
    "cu_seq_lens_q cannot be joined to a mask [B, 1, T, S]: pass one row without padding and without attention_mask, "
    "or put the documents into the mask"
)


def register() -> None:
    """Make `attn_implementation="llmtune"` known to transformers. Calling it again changes nothing.

    From then on `AutoModel.from_pretrained(..., attn_implementation="llmtune")` and
    `model.set_attn_implementation("llmtune")` use `llmtune.attention.scaled_dot_product_attention` with the backend
    that "auto" chooses: in training and in generation, padded on either side or packed.

    A packed batch (position ids that restart at every document, and no padding) keeps its documents apart in decoders
    and in encoders; transformers' own functions do so in decoders only, and only without an attention mask and a cache.
    Transformers tells position ids to the attention layers only where the model hands them on. DistilBERT, ModernBERT,
    ESM, Splinter and Jina embeddings v3 do not: pass them `cu_seq_lens_q` too, which they hand on. LayoutLM, MarkupLM
    and MobileBERT hand on neither and cannot be packed; Llama 4 can, without an attention mask and a cache.
    `llmtune.testing.check_packing_invariant` shows whether a model can be packed by its position ids.

    Models that compute attention by themselves cannot take this name, though transformers lets them: `refusal` says
    which and why. There are no attention weights to return: `output_attentions=True` is refused, but GPT-2, OPT and
    StableLM keep it to themselves and return an empty tuple. The numbers at padded positions, meaningless anyway, are
    others than with "eager". Under `torch.compile` attention runs between the compiled graphs, not in them.

    >>> from llmtune.integrations.transformers_attention import register
    >>> from llmtune.testing.models import tiny_llama
    >>> register()
    >>> tiny_llama(attention="llmtune").config._attn_implementation
    'llmtune'
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _between_graphs(attention_function))
    AttentionMaskInterface.register(NAME, _between_graphs(attention_mask_function))


@functools.cache
def _between_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Both functions read values of masks and positions, which a traced graph cannot."""
    return torch.compiler.disable(function)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as an attention layer of transformers asks for it (names and order are transformers').

    Args:
        module: the layer; its `is_causal` and `training` are read.
        query: [B, H, T, D].
        key: [B, K, S, D].
        value: [B, K, S, Dv].
        attention_mask: what the mask function made: bool [B, S] padding, int32 [B, T] documents, int64 [B, S] a window
            with either, bool [B, 1, T, S] the whole mask; or an additive [B | 1, H | 1, T, S] of the user's, the whole
            mask too.
        scaling: what the products are multiplied by.
        dropout: probability; acts only while the module is in training mode.
        is_causal: overrides the module's own; without effect beside a whole mask.
        sliding_window: a query sees only keys nearer than this; without effect beside a whole mask, which has it.
        softcap: bound of the scores.
        s_aux: [H], the logits of the sinks.
        position_bias: [B | 1, H | 1, T, S], added to the scores.
        position_ids: [B | 1, T]; a document starts where they restart, if T is S and nothing is padded.
        cu_seq_lens_q: [n+1] ints, the cuts between documents in the only row; goes before position_ids.
        cu_seq_lens_k: [n+1] ints, the same for the keys.
        **kwargs: what the model hands to all its layers; what would change the result is refused.

    Returns:
        (out [B, T, H, Dv], None): there are no attention weights to return.

    Raises:
        ValueError: the layer asks for something this attention does not have; the sentence names layer and argument.
    """
    _refuse(module, kwargs)
    bias = position_bias
    if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.dtype != torch.bool:
        if cu_seq_lens_q is not None:
            raise ValueError(_CUTS_BESIDE_TABLE)
        bias, mask = attention_mask if bias is None else bias + attention_mask, None
    else:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        packing = None if _is_cross(module) else position_ids
        mask = _mask(query, key, attention_mask, causal, sliding_window, packing, cu_seq_lens_q, cu_seq_lens_k)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(query.dtype)
    out = scaled_dot_product_attention(
        query, key, value, mask=mask, bias=bias, scale=scaling, dropout_p=dropout if module.training else 0.0,
        softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    for name in _NOT_TAKEN:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f"{type(module).__name__} hands {name} to its attention, which "
                'attn_implementation="llmtune" cannot take; use "eager" or "sdpa" for this model'
            )


def _is_cross(module: nn.Module) -> bool:
    """Cross-attention layers are handed the decoder's position ids, which say nothing about the encoder's keys."""
    return bool(getattr(module, "is_cross_attention", False)) or "Cross" in type(module).__name__


Made = TypeVar("Made")


class _Shared:
    """Masks made from tensors that travel through a forward pass, so that all its layers share one mask and its plan.

    What is made from several tensors hangs below each of them, and lives as long as they: so it must never hold them.
    """

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}
        self.more: WeakIdKeyDictionary = WeakIdKeyDictionary()


_SHARED = _Shared()


def _mask(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    window: int | None,
    position_ids: Tensor | None,
    cuts: Tensor | None,
    key_cuts: Tensor | None,
) -> Mask | None:
    (B, _, T, _), S = query.shape, key.shape[2]
    causal = causal and T > 1  # a single query is the last one: it sees all keys
    said = _Said() if attention_mask is None else _shared((attention_mask,), "said", lambda: _said_by(attention_mask))
    if position_ids is not None and (T != S or T == 1 or position_ids.ndim != 2 or not said.unpadded):
        position_ids = None  # beside padding or a cache, positions that start at 0 again are no sign of packing
    if said.whole and not said.unpadded and cuts is not None:
        raise ValueError(_CUTS_BESIDE_TABLE)

    def make() -> Mask | None:
        parts: list[Mask | None] = []
        if not said.whole:
            sizes = {size for size in (window, said.window) if size is not None and size < S}
            parts += [Causal() if causal else None, *(SlidingWindow(size) for size in sorted(sizes))]
        if cuts is not None:
            parts.append(_documents_of_cuts(B, cuts, key_cuts, causal))
        elif position_ids is not None:
            parts.append(_documents_of_positions(position_ids, B))
        if said.chunked and any(isinstance(part, Documents) for part in parts):
            raise ValueError(
                "the chunks of chunked attention begin anew in every packed document, which transformers counts only "
                "without attention_mask and cache: pass no attention_mask, and use_cache=False"
            )
        return _joined([*parts, said.mask])

    told = (attention_mask, cuts, key_cuts, position_ids)
    sources = tuple(x for x in told if isinstance(x, Tensor))
    others = tuple("tensor" if isinstance(x, Tensor) else x if x is None else tuple(x) for x in told)
    return _shared(sources, (B, T, S, causal, window, others), make)


@dataclass(frozen=True, eq=False)
class _Said:
    """What the tensor says that the mask function made.

    whole: it is the whole mask, to which at most documents are added; chunked: not even these.
    """

    mask: Mask | None = None
    window: int | None = None
    unpadded: bool = True
    whole: bool = False
    chunked: bool = False


def _said_by(attention_mask: Tensor) -> _Said:
    """Read the four kinds of tensor that `attention_mask_function` returns."""
    if attention_mask.ndim == 4:
        table = unpadded_table(attention_mask)
        return _Said(Dense(attention_mask.clone()), None, table is not None, True, table == "chunked")
    if attention_mask.dtype == torch.int32:
        return _Said(_documents_of_ids(attention_mask), None, False)
    window = read_window_tensor(attention_mask)
    if window is not None:
        size, real, ids = window
        mask = (
            _documents_of_ids(ids) if ids is not None else None if real is None else Padding.from_attention_mask(real)
        )
        return _Said(mask, size, mask is None)
    return _Said(Padding.from_attention_mask(attention_mask.clone()), None, False)


def _shared(sources: tuple[Tensor, ...], what: Any, make: Callable[[], Made]) -> Made:
    """Return what `make` gives, kept while all of the tensors it is made from live and as long as none is changed."""
    if not sources or any(x.is_inference() for x in sources):  # nobody counts what is changed in inference mode
        return make()
    node = _SHARED
    for source in sources:
        node = node.more.setdefault(source, _Shared())
    made = node.made
    key = (what, tuple(x._version for x in sources))
    if key not in made:
        with torch.inference_mode(False):  # what is made here may be needed for training later on
            made[key] = make()
    return made[key]


def _joined(parts: list[Mask | None]) -> Mask | None:
    mask = None
    for part in parts:
        if part is not None:
            mask = part if mask is None else mask & part
    return mask


def _documents_of_cuts(B: int, cuts: Tensor, key_cuts: Tensor | None, causal: bool) -> Mask:
    if B != 1:
        raise ValueError(f"cu_seq_lens_q cuts the documents of one row, but the batch has {B}; pack into one row")
    same = key_cuts is None or torch.equal(cuts, key_cuts)
    if causal and not same:
        raise ValueError("causal attention needs cu_seq_lens_q and cu_seq_lens_k to be the same: pack without a cache")
    return Documents(cuts) if same else Documents(cuts, key_cuts)


def _documents_of_ids(ids: Tensor) -> Mask:
    if ids.shape[0] > 1:
        return Documents.from_ids(ids.clone())
    starts = (ids[0, 1:] != ids[0, :-1]).nonzero()[:, 0] + 1
    return Documents((0, *starts.tolist(), ids.shape[1]))


def _documents_of_positions(position_ids: Tensor, B: int) -> Mask | None:
    """Packed positions go up by one or back to the smallest; others (skips, grids of patches) tell of no documents."""
    steps = position_ids.diff(dim=1)
    restarts = steps != 1
    back = position_ids[:, 1:] == position_ids.amin(dim=1, keepdim=True)
    if not bool(restarts.any()) or not bool((~restarts | (back & (steps <= 0))).all()):
        return None
    ids = torch.nn.functional.pad(restarts.to(torch.int32).cumsum(dim=1), (1, 0))
    return _documents_of_ids(ids.expand(B, -1))
