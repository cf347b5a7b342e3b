"""The Transformer's layers, put together from `llmtune.attention`: multi-head attention, feed-forward, block."""

from llmtune.layers.block import TransformerBlock
from llmtune.layers.feed_forward import FeedForward, geglu, swiglu
from llmtune.layers.heads import merge_heads, split_heads
from llmtune.layers.multi_head_attention import MultiHeadAttention

__all__ = [
    "FeedForward",
    "MultiHeadAttention",
    "TransformerBlock",
    "geglu",
    "merge_heads",
    "split_heads",
    "swiglu",
]
