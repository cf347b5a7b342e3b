"""Measures of a model: how well it predicts text."""

from llmtune.metrics.language import perplexity

__all__ = ["perplexity"]
