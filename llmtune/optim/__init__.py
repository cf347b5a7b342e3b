"""Optimizers: rates and decay of each parameter, flat minima, steps without gradients, two optimizers as one."""

from llmtune.optim.ema import EMA
from llmtune.optim.galore import GaLore
from llmtune.optim.groups import parameter_groups
from llmtune.optim.mezo import MeZO, move_along
from llmtune.optim.muon import muon_groups
from llmtune.optim.sam import SAM, perturbed
from llmtune.optim.together import Together

__all__ = ["EMA", "SAM", "GaLore", "MeZO", "Together", "move_along", "muon_groups", "parameter_groups", "perturbed"]
