"""Optimizers: which parameters get which learning rate and weight decay."""

from llmtune.optim.groups import parameter_groups

__all__ = ["parameter_groups"]
