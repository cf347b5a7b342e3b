"""Attention that is exact, masks that compose, and backends to choose between.

`scaled_dot_product_attention` is the one door; `reference.py` is the formula itself, the truth for tests. Beside them
stand the biases that go by distance, the position encodings, and the key/value caches for decoding.
"""

from llmtune.attention.biases import ALiBi, RelativeBias, RelativePositionBias
from llmtune.attention.cache import GrowingCache, StaticCache
from llmtune.attention.cache_base import KeyValueCache
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
from llmtune.attention.positions import (
    LearnedPositions,
    RotaryEmbedding,
    SinusoidalPositions,
    apply_rotary,
    sinusoidal_positions,
)
from llmtune.attention.rotary_config import scaling_from_config
from llmtune.attention.rotary_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    RotaryScaling,
    YaRNScaling,
    rotary_frequencies,
)
from llmtune.attention.window import PrefixCausal, SlidingWindow

__all__ = [
    "ALiBi",
    "BackendChoice",
    "Causal",
    "Dense",
    "Documents",
    "DynamicNTKScaling",
    "GrowingCache",
    "Intersection",
    "KeyValueCache",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "Mask",
    "Padding",
    "PrefixCausal",
    "RelativeBias",
    "RelativePositionBias",
    "RotaryEmbedding",
    "RotaryScaling",
    "SinusoidalPositions",
    "SlidingWindow",
    "StaticCache",
    "YaRNScaling",
    "apply_rotary",
    "available_backends",
    "choose_backend",
    "merge_attention",
    "rotary_frequencies",
    "scaled_dot_product_attention",
    "scaling_from_config",
    "sinusoidal_positions",
]
