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
