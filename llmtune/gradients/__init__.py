"""Gradients of single examples, by one engine: a plain loop, or hooks where they agree with it."""

from llmtune.gradients.per_example import per_example_gradients

__all__ = ["per_example_gradients"]
