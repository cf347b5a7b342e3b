"""Weights afterwards: changes of weights put together into one, and matrices brought down to a low rank."""

from llmtune.weights.deltas import merge_deltas, trim
from llmtune.weights.low_rank import LowRank, low_rank_matrix, low_rank_product

__all__ = ["LowRank", "low_rank_matrix", "low_rank_product", "merge_deltas", "trim"]
