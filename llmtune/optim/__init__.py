"""Optimizers and what goes with them: learning rates and decay by group, averages of weights, low-rank gradients."""

from llmtune.optim.ema import EMA
from llmtune.optim.galore import GaLore
from llmtune.optim.groups import parameter_groups

__all__ = ["EMA", "GaLore", "parameter_groups"]
