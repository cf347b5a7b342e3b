"""Parts against forgetting: Fisher information, elastic weight consolidation and its kin, distillation."""

from llmtune.adapters.effective import anchor_of
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.forgetting.mas import MemoryAwareSynapses, output_sensitivity
from llmtune.forgetting.memory import penalty_memory
from llmtune.forgetting.online_ewc import OnlineEWC
from llmtune.forgetting.synaptic import SynapticIntelligence, path_importance

__all__ = [
    "EWC",
    "DistillToBase",
    "MemoryAwareSynapses",
    "OnlineEWC",
    "SynapticIntelligence",
    "anchor_of",
    "diagonal_fisher",
    "output_sensitivity",
    "path_importance",
    "penalty_memory",
]
