"""Parts against forgetting: Fisher information, elastic weight consolidation, distillation from the base model, and
adapters for task after task."""

from llmtune.adapters.effective import anchor_of
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.forgetting.inflora import InfLoRAReport, inflora_start, protected_inputs
from llmtune.forgetting.input_directions import designed_rows, extended_basis
from llmtune.forgetting.orthogonal_lora import OrthogonalLoRA, OverlapReport, row_overlap
from llmtune.forgetting.slao import SLAO, merged_b, orthonormal_start

__all__ = [
    "EWC",
    "SLAO",
    "DistillToBase",
    "InfLoRAReport",
    "OrthogonalLoRA",
    "OverlapReport",
    "anchor_of",
    "designed_rows",
    "diagonal_fisher",
    "extended_basis",
    "inflora_start",
    "merged_b",
    "orthonormal_start",
    "protected_inputs",
    "row_overlap",
]
