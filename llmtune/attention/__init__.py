"""Attention that is exact, masks that compose, and backends to choose between.

`scaled_dot_product_attention` is the one door; `reference.py` is the formula itself, the truth for tests.
"""

from llmtune.attention.documents import Documents
from llmtune.attention.functional import (
    BackendChoice,
    available_backends,
    choose_backend,
    scaled_dot_product_attention,
)
from llmtune.attention.mask_base import Intersection, Mask
from llmtune.attention.masks import Causal, Dense, Padding
from llmtune.attention.merge import merge_attention

__all__ = [
    "BackendChoice",
    "Causal",
    "Dense",
    "Documents",
    "Intersection",
    "Mask",
    "Padding",
    "available_backends",
    "choose_backend",
    "merge_attention",
    "scaled_dot_product_attention",
]
