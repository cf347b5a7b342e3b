"""Weights afterwards: states and changes of weights put together into one, and matrices brought down to a low rank."""

from llmtune.weights.deltas import merge_deltas, trim
from llmtune.weights.fisher_merge import fisher_merge
from llmtune.weights.interpolation import interpolate, interpolation_curve
from llmtune.weights.low_rank import LowRank, effective_rank, low_rank_matrix, low_rank_product
from llmtune.weights.soups import GreedySoup, greedy_soup, uniform_soup
from llmtune.weights.task_vectors import apply_task_vector, task_vector

__all__ = [
    "GreedySoup",
    "LowRank",
    "apply_task_vector",
    "effective_rank",
    "fisher_merge",
    "greedy_soup",
    "interpolate",
    "interpolation_curve",
    "low_rank_matrix",
    "low_rank_product",
    "merge_deltas",
    "task_vector",
    "trim",
    "uniform_soup",
]
