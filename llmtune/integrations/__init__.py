"""The doors into Hugging Face's own code."""

from llmtune.integrations.transformers_attention import register
from llmtune.integrations.transformers_support import refusal

__all__ = ["refusal", "register"]
