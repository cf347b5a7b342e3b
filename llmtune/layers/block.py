"""One layer of a Transformer: attention and feed-forward, each with its norm and added to the hidden states.

Models differ in where the norms stand and in what is added to what; `order` says it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from llmtune.attention.biases import RelativeBias
from llmtune.attention.cache_base import KeyValueCache
from llmtune.attention.mask_base import Mask
from llmtune.errors import did_you_mean

ORDERS = ("pre", "post", "sandwich", "output", "parallel", "parallel_shared")
_INPUT = ("pre", "sandwich", "parallel", "parallel_shared")  # what goes into a part is normalised
_OUTPUT = ("sandwich", "output")  # what comes out of a part is normalised


class TransformerBlock(nn.Module):
    """A layer of a Transformer, put together from its parts.

    With f a part (attention, cross-attention if there is one, feed-forward), in this order:

    - "pre" (GPT-2, Llama, T5): x + f(norm(x))
    - "post" (the paper, BERT, BART): norm(x + f(x))
    - "sandwich" (Gemma 2): x + norm'(f(norm(x)))
    - "output" (OLMo 2): x + norm(f(x))
    - "parallel" (GPT-NeoX): x + attention(norm(x)) + feed_forward(norm'(x))
    - "parallel_shared" (GPT-J, Phi): the same with one norm for both

    Dropout, in training mode, acts on each f(...) before it is added. A last norm after the layers, which "pre" and
    "parallel" models have, is the model's.

    Args:
        attention: a self-attention as `MultiHeadAttention`: it has a `width`, and takes hidden [B, T, E] and the
            keywords mask, bias, position_ids and cache.
        feed_forward: [B, T, E] -> [B, T, E]; `FeedForward`, or any other such module.
        norm: called with the width E, makes a norm: `nn.LayerNorm`, or `lambda width: nn.RMSNorm(width, eps=1e-6)`.
        order: where the norms stand, as above.
        cross_attention: a `MultiHeadAttention` with context_width, between the two: a decoder that reads an encoder.
        dropout: probability, 0 to 1.

    Attributes:
        attention, cross_attention, feed_forward: the parts; cross_attention may be None.
        attention_norm, cross_attention_norm, feed_forward_norm: the norm before each part ("post": after the sum), or
            None.
        attention_output_norm, cross_attention_output_norm, feed_forward_output_norm: of the part's result, or None.

    Raises:
        ValueError: the order is unknown or has no place for a cross-attention, the parts have different widths, or
            dropout is not between 0 and 1.

    >>> import torch
    >>> from llmtune.attention import Causal
    >>> from llmtune.layers import FeedForward, MultiHeadAttention, TransformerBlock
    >>> block = TransformerBlock(MultiHeadAttention(12, 4), FeedForward(12, 31))
    >>> block(torch.ones(1, 5, 12), mask=Causal()).shape
    torch.Size([1, 5, 12])

    Vaswani et al., "Attention Is All You Need" (2017), section 3.1; pre and post: Xiong et al., "On Layer Normalization
    in the Transformer Architecture" (2020); parallel: Wang and Komatsuzaki, "GPT-J-6B" (2021); sandwich: Gemma Team,
    "Gemma 2" (2024), section 2; output: OLMo Team, "2 OLMo 2 Furious" (2024), section 3.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        order: str = "pre",
        cross_attention: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(norm, nn.Module):
            raise ValueError(
                "norm makes a norm of a width, such as nn.LayerNorm or lambda width: nn.RMSNorm(width, eps=1e-6), "
                f"got a {type(norm).__name__} already made; every part needs its own"
            )
        if order not in ORDERS:
            names = ", ".join(f'"{name}"' for name in ORDERS)
            raise ValueError(f'there is no order "{order}", only {names}.{did_you_mean(order, ORDERS)}')
        if order.startswith("parallel") and cross_attention is not None:
            raise ValueError(f'order="{order}" has no place for a cross_attention; take "pre" or "post"')
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.width, self.order = _common_width(attention, feed_forward, cross_attention), order
        self.attention, self.cross_attention, self.feed_forward = attention, cross_attention, feed_forward
        self.dropout = nn.Dropout(dropout)
        for part in ("attention", "cross_attention", "feed_forward"):
            there = getattr(self, part) is not None
            shared = part == "feed_forward" and order == "parallel_shared"
            first = there and not shared and (order in _INPUT or order == "post")
            setattr(self, f"{part}_norm", norm(self.width) if first else None)
            setattr(self, f"{part}_output_norm", norm(self.width) if there and order in _OUTPUT else None)

    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Mask | None = None,
        bias: Tensor | RelativeBias | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        context: Tensor | None = None,
        context_mask: Mask | None = None,
        context_cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the hidden states after this layer.

        Args:
            hidden: [B, T, E].
            mask, bias, position_ids, cache: the self-attention's; see `MultiHeadAttention.forward`.
            context: [B, S, context_width], what the cross-attention reads.
            context_mask: which position may read which of `context`, such as the encoder's padding.
            context_cache: the cross-attention's own cache.

        Returns:
            [B, T, E].

        Raises:
            ValueError: an argument for the cross-attention is given and there is none; or a part refuses its inputs.
        """
        if hidden.ndim != 3 or hidden.shape[-1] != self.width:
            raise ValueError(f"hidden must be [B, T, {self.width}], got shape {tuple(hidden.shape)}")
        for_cross = {"context": context, "context_mask": context_mask, "context_cache": context_cache}
        given = [name for name, value in for_cross.items() if value is not None]
        if given and self.cross_attention is None:
            raise ValueError(f"{given[0]} has no effect without cross_attention; leave it out, or give the block one")

        def attend(inputs: Tensor) -> Tensor:
            return self.attention(inputs, mask=mask, bias=bias, position_ids=position_ids, cache=cache)

        def read(inputs: Tensor) -> Tensor:
            assert self.cross_attention is not None
            return self.cross_attention(inputs, context=context, mask=context_mask, cache=context_cache)

        if self.order.startswith("parallel"):
            first = self._norm("attention_norm", hidden)
            second = first if self.order == "parallel_shared" else self._norm("feed_forward_norm", hidden)
            return hidden + self.dropout(attend(first)) + self.dropout(self.feed_forward(second))
        hidden = self._add("attention", attend, hidden)
        if self.cross_attention is not None:
            hidden = self._add("cross_attention", read, hidden)
        return self._add("feed_forward", self.feed_forward, hidden)

    def _add(self, name: str, part: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E]: the hidden states and what a part makes of them."""
        inputs = self._norm(f"{name}_norm", hidden) if self.order in _INPUT else hidden
        made = self._norm(f"{name}_output_norm", part(inputs)) if self.order in _OUTPUT else part(inputs)
        hidden = hidden + self.dropout(made)
        return self._norm(f"{name}_norm", hidden) if self.order == "post" else hidden

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        return getattr(self, name)(hidden)

    def extra_repr(self) -> str:
        """Return the order, for printing."""
        return f"order={self.order!r}"


def _common_width(attention: nn.Module, feed_forward: nn.Module, cross_attention: nn.Module | None) -> int:
    """The width of all parts; a feed-forward of one's own need not tell its."""
    if cross_attention is not None and getattr(cross_attention, "context_width", 1) is None:
        raise ValueError("cross_attention must be made with context_width; this one is a self-attention")
    if getattr(attention, "context_width", None) is not None:
        raise ValueError("attention must be a self-attention; one with context_width goes in as cross_attention")
    width = getattr(attention, "width", None)
    if not isinstance(width, int):
        raise ValueError(f"attention must have a width, as MultiHeadAttention has; {type(attention).__name__} has none")
    for name, part in (("feed_forward", feed_forward), ("cross_attention", cross_attention)):
        other = getattr(part, "width", width)
        if other != width:
            raise ValueError(f"attention has a width of {width}, {name} of {other}; they must be the same")
    return width
