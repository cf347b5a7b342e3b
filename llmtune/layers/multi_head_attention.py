"""Attention with its projections, put together from `llmtune.attention`; to itself, or to a context.

Four linear layers called `query`, `key`, `value` and `output`, so that adapters find them by name. What differs between
the models (rotary positions, norms on queries and keys, biases on the scores, sinks, a cache) is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmtune.attention.biases import RelativeBias
from llmtune.attention.cache_base import KeyValueCache
from llmtune.attention.case import AttentionCase
from llmtune.attention.functional import available_backends, scaled_dot_product_attention
from llmtune.attention.mask_base import Mask
from llmtune.attention.positions import RotaryEmbedding, apply_rotary
from llmtune.errors import did_you_mean
from llmtune.layers.heads import merge_heads, split_heads


class MultiHeadAttention(nn.Module):
    """Project, attend in every head, join the heads and project back.

    output(concat_h attention(rotary(norm(query_h(x))), rotary(norm(key_h(c))), value_h(c))), where c is x itself, or
    `context` in a cross-attention.

    The weights are nn.Linear's: [out, in], started as torch starts them. Dropout acts in training mode only.

    Args:
        width: E, of what comes in and goes out.
        heads: H, of the queries.
        key_heads: K, of the keys and values; H must be a multiple of it. Left out, H; 1 is multi-query attention.
        head_size: D. Left out, E / H.
        context_width: width of `context`. Given, this is a cross-attention; left out, a self-attention.
        bias: whether the projections have one.
        output_bias: whether the output projection has one; left out, as `bias`.
        qk_norm: called with a size, makes a norm; the queries and the keys get one each, before the rotation.
        qk_norm_over: "head" normalises every head by itself (size D; Qwen3), "projection" all heads of a token together
            (sizes H * D and K * D; OLMo 2).
        rotary: what turns queries and keys by their positions; one module may serve all layers.
        scale: what the products are multiplied by; left out, D ** -0.5. T5 has 1.0.
        softcap: bounds the scores to -softcap ... softcap.
        sinks: whether each head has one more, learned logit that takes attention away from all keys; it starts at 0.
        dropout: probability, 0 to 1, that an attention weight is dropped.
        backend: "auto", or a name from `llmtune.attention.available_backends()`.

    Attributes:
        query, key, value, output: the projections, [H * D, E], [K * D, E | context_width] (both) and [E, H * D].
        query_norm, key_norm: the norms, or None.
        sinks: [H], or None.

    Raises:
        ValueError: the sizes do not fit together, a knob is out of its range, or has no effect here.

    >>> from llmtune.attention import Causal
    >>> from llmtune.layers import MultiHeadAttention
    >>> attention = MultiHeadAttention(12, 4, key_heads=2)
    >>> attention(torch.ones(1, 5, 12), mask=Causal()).shape
    torch.Size([1, 5, 12])

    Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2; grouped heads: Ainslie et al., "GQA" (2023);
    norms on queries and keys: Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (2023), section
    2; sinks: OpenAI, "gpt-oss" (2025), section 2.2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_size: int | None = None,
        context_width: int | None = None,
        bias: bool = True,
        output_bias: bool | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        qk_norm_over: str = "head",
        rotary: RotaryEmbedding | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_sizes(width=width, heads=heads, key_heads=key_heads, head_size=head_size, context_width=context_width)
        self.width, self.heads, self.key_heads = width, heads, heads if key_heads is None else key_heads
        self.head_size, self.context_width = width // heads if head_size is None else head_size, context_width
        _check_norm(qk_norm, qk_norm_over)
        _check_knobs(scale, softcap, dropout, backend)
        _check_rotary(rotary, self.head_size, context_width)
        source = width if context_width is None else context_width
        inner, key_inner = self.heads * self.head_size, self.key_heads * self.head_size
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(source, key_inner, bias=bias)
        self.value = nn.Linear(source, key_inner, bias=bias)
        self.output = nn.Linear(inner, width, bias=bias if output_bias is None else output_bias)
        whole = qk_norm_over == "projection"
        self.query_norm = None if qk_norm is None else qk_norm(inner if whole else self.head_size)
        self.key_norm = None if qk_norm is None else qk_norm(key_inner if whole else self.head_size)
        self.qk_norm_over, self.rotary = qk_norm_over, rotary
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.scale, self.softcap, self.dropout, self.backend = scale, softcap, dropout, backend

    def forward(
        self,
        hidden: Tensor,
        *,
        context: Tensor | None = None,
        mask: Mask | None = None,
        bias: Tensor | RelativeBias | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return what every position takes from the positions it may see.

        Args:
            hidden: [B, T, E].
            context: [B, S, context_width], what a cross-attention attends to. It may be left out where the cache holds
                its keys already; given again, it is not projected again.
            mask: which position may attend to which; left out, every one to every one. A decoder needs `Causal()`.
            bias: added to the scores: [T, S], [B, H, T, S] (a size may be 1), `ALiBi` or a `RelativePositionBias`.
            position_ids: [B | 1, T] ints, where the tokens stand, for the rotary embedding. Left out, they count on
                from `cache.length`, or from 0.
            cache: a self-attention adds its T keys and values to it, and attends to all it holds then. A
                cross-attention fills it once and reads it from then on.

        Returns:
            [B, T, E].

        Raises:
            ValueError: a shape does not fit, or an argument is missing or has no effect here.
        """
        self._check(hidden, context, position_ids, cache)
        if cache is not None:
            self._check_fits(hidden, context, mask, bias, cache)
        query = self._project(self.query, self.query_norm, hidden, self.heads)
        if context is None and self.context_width is None:
            context = hidden
        if self.context_width is not None and cache is not None and cache.length > 0:
            key = value = query.new_empty(query.shape[0], self.key_heads, 0, self.head_size)
        else:
            assert context is not None
            key = self._project(self.key, self.key_norm, context, self.key_heads)
            value = split_heads(self.value(context), self.key_heads)
        if self.rotary is not None:
            if position_ids is None:
                start = 0 if cache is None else cache.length
                position_ids = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
            query, key = apply_rotary(query, key, *self.rotary(position_ids))
        if cache is not None:
            key, value = cache.update(key, value)
        out = scaled_dot_product_attention(
            query, key, value, mask=mask, bias=bias, scale=self.scale, softcap=self.softcap, sinks=self.sinks,
            dropout_p=self.dropout if self.training else 0.0, backend=self.backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return self.output(merge_heads(out))

    def _project(self, linear: nn.Module, norm: nn.Module | None, inputs: Tensor, heads: int) -> Tensor:
        """[B, T, E] -> [B, heads, T, D], normalised."""
        projected = linear(inputs)
        if norm is None:
            return split_heads(projected, heads)
        # A norm may answer in float32, as under autocast; queries, keys and values must share a dtype.
        if self.qk_norm_over == "projection":
            return split_heads(norm(projected).to(projected.dtype), heads)
        return norm(split_heads(projected, heads)).to(projected.dtype)

    def _check(
        self, hidden: Tensor, context: Tensor | None, position_ids: Tensor | None, cache: KeyValueCache | None
    ) -> None:
        if hidden.ndim != 3 or hidden.shape[-1] != self.width:
            raise ValueError(f"hidden must be [B, T, {self.width}], got shape {tuple(hidden.shape)}")
        B, T = hidden.shape[:2]
        if self.context_width is None:
            if context is not None:
                raise ValueError("a self-attention takes no context; give context_width to make a cross-attention")
        elif context is None:
            if cache is None or cache.length == 0:
                raise ValueError(f"a cross-attention needs context, [B, S, {self.context_width}], got none")
        else:
            if context.ndim != 3 or context.shape[0] != B or context.shape[2] != self.context_width:
                raise ValueError(f"context must be [{B}, S, {self.context_width}], got shape {tuple(context.shape)}")
            if cache is not None and cache.length not in (0, context.shape[1]):
                raise ValueError(
                    f"the cache holds a context of {cache.length} positions, but this one has {context.shape[1]}; "
                    "start with a new cache"
                )
        if self.context_width is not None and cache is not None and cache.window is not None:
            raise ValueError(
                f"a cross-attention needs its whole context, but this cache has a window of {cache.window}: "
                "make it without one"
            )
        if position_ids is not None:
            if self.rotary is None:
                raise ValueError("position_ids have no effect without rotary; leave them out")
            if position_ids.ndim != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != T:
                raise ValueError(f"position_ids must be [{B}, {T}] or [1, {T}], got shape {tuple(position_ids.shape)}")

    def _check_fits(
        self,
        hidden: Tensor,
        context: Tensor | None,
        mask: Mask | None,
        bias: Tensor | RelativeBias | None,
        cache: KeyValueCache,
    ) -> None:
        """Check mask and bias before anything goes into the cache, which would then hold tokens that were refused."""
        (B, T, _), one = hidden.shape, hidden.new_empty(())
        new = T if self.context_width is None else 0 if cache.length or context is None else context.shape[1]
        key = one.expand(B, self.key_heads, cache.held + new, self.head_size)
        bias = one.expand(bias.shape) if isinstance(bias, Tensor) and bias.is_floating_point() else bias
        AttentionCase(one.expand(B, self.heads, T, self.head_size), key, key, mask, bias)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"heads={self.heads}, key_heads={self.key_heads}, head_size={self.head_size}, backend={self.backend!r}"


def _check_sizes(
    *, width: int, heads: int, key_heads: int | None, head_size: int | None, context_width: int | None
) -> None:
    sizes = {"width": width, "heads": heads, "key_heads": key_heads, "head_size": head_size}
    for name, size in {**sizes, "context_width": context_width}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    if head_size is None and width % heads:
        raise ValueError(
            f"a width of {width} cannot be split into {heads} equal heads; give head_size, or a width that is a "
            f"multiple of heads"
        )
    if key_heads is not None and heads % key_heads:
        raise ValueError(f"heads must be a multiple of key_heads, got {heads} and {key_heads}")


def _check_norm(qk_norm: Callable[[int], nn.Module] | None, qk_norm_over: str) -> None:
    if qk_norm_over not in ("head", "projection"):
        raise ValueError(f'qk_norm_over must be "head" or "projection", got "{qk_norm_over}"')
    if isinstance(qk_norm, nn.Module):
        raise ValueError(
            "qk_norm makes a norm of a given size, such as nn.RMSNorm or lambda size: nn.RMSNorm(size, eps=1e-6), "
            f"got a {type(qk_norm).__name__} already made; queries and keys need one each"
        )
    if qk_norm is None and qk_norm_over != "head":
        raise ValueError(f'qk_norm_over="{qk_norm_over}" has no effect without qk_norm')


def _check_knobs(scale: float | None, softcap: float | None, dropout: float, backend: str) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}; leave it out for none")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
    names = available_backends()
    if backend not in ("auto", *names):
        known = ", ".join(f'"{name}"' for name in ("auto", *names))
        raise ValueError(f'there is no attention backend "{backend}", only {known}.{did_you_mean(backend, names)}')


def _check_rotary(rotary: RotaryEmbedding | None, head_size: int, context_width: int | None) -> None:
    if rotary is None:
        return
    if context_width is not None:
        raise ValueError(
            "a cross-attention takes no rotary: positions in the context and in the sequence cannot be compared"
        )
    if rotary.dim > head_size:
        raise ValueError(f"rotary turns {rotary.dim} numbers of each head, but head_size is only {head_size}")
