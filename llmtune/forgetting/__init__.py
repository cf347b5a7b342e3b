"""Parts against forgetting: Fisher information, elastic weight consolidation, distillation from the base model."""

from llmtune.adapters.effective import anchor_of
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher

__all__ = ["EWC", "DistillToBase", "anchor_of", "diagonal_fisher"]
