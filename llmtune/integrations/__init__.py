"""The doors into Hugging Face's own code."""

from llmtune.integrations.transformers_attention import register

__all__ = ["register"]
