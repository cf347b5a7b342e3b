"""Regularizers: penalties, consistency losses and noise, for a large model that meets a small data set."""

from llmtune.regularizers.child_mask import child_mask
from llmtune.regularizers.child_tuning import ChildTuning
from llmtune.regularizers.decoupled_l2sp import DecoupledL2SP, pull_back
from llmtune.regularizers.delta_norm import DeltaNorm
from llmtune.regularizers.l2sp import L2SP
from llmtune.regularizers.products import product_norms

__all__ = ["L2SP", "ChildTuning", "DecoupledL2SP", "DeltaNorm", "child_mask", "product_norms", "pull_back"]
