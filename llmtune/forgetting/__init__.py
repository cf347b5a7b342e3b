"""Parts against forgetting: Fisher information, elastic weight consolidation, distillation, replay of predictions."""

from llmtune.adapters.effective import anchor_of
from llmtune.forgetting.cached_teacher import with_teacher
from llmtune.forgetting.dark_replay import DERLoss
from llmtune.forgetting.distill_from_cache import DistillFromCache
from llmtune.forgetting.distill_to_model import DistillToModel
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.forgetting.self_synthesis import self_synthesised

__all__ = [
    "EWC",
    "DERLoss",
    "DistillFromCache",
    "DistillToBase",
    "DistillToModel",
    "anchor_of",
    "diagonal_fisher",
    "self_synthesised",
    "with_teacher",
]
