"""Optimizers: rates of each parameter, flat minima, steps without gradients, projected updates, several as one."""

from llmtune.optim.changed_update import ChangedUpdate
from llmtune.optim.ema import EMA
from llmtune.optim.galore import GaLore
from llmtune.optim.groups import parameter_groups
from llmtune.optim.joint_projection import JointProjection, project_jointly
from llmtune.optim.mezo import MeZO, move_along
from llmtune.optim.muon import muon_groups
from llmtune.optim.sam import SAM, perturbed
from llmtune.optim.together import Together
from llmtune.optim.update_projection import Directions, UpdateProjection, project_change

__all__ = [
    "EMA",
    "SAM",
    "ChangedUpdate",
    "Directions",
    "GaLore",
    "JointProjection",
    "MeZO",
    "Together",
    "UpdateProjection",
    "move_along",
    "muon_groups",
    "parameter_groups",
    "perturbed",
    "project_change",
    "project_jointly",
]
