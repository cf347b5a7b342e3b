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
"""Parts against forgetting: Fisher information, elastic weight consolidation, distillation, and what has been kept."""

from llmtune.adapters.effective import anchor_of
from llmtune.forgetting.delta_norms import delta_norms
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.forgetting.retention import greedy_agreement, kl_to_base, perplexity_change, retention

__all__ = [
    "EWC",
    "DistillToBase",
    "anchor_of",
    "delta_norms",
    "diagonal_fisher",
    "greedy_agreement",
    "kl_to_base",
    "perplexity_change",
    "retention",
]
