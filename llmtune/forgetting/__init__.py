"""Parts against forgetting: Fisher information, elastic weight consolidation, distillation, replay of predictions."""
"""Parts against forgetting: Fisher information, elastic weight consolidation, distillation from the base model, and
adapters for task after task."""
"""Parts against forgetting: Fisher information, elastic weight consolidation and its kin, distillation."""
"""Parts against forgetting: Fisher information, EWC, distillation from the base model, projection of updates."""

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
from llmtune.forgetting.gem import AveragedGEM, ReferenceProjection, averaged_gem, reference_gradients
from llmtune.forgetting.gradient_directions import gradient_directions
from llmtune.forgetting.orthogonal import extend_basis, input_basis
from llmtune.forgetting.projected import GradientProjectionMemory, OrthogonalGradientDescent
from llmtune.forgetting.protected import project_lora_a, protected_parameters

__all__ = [
    "EWC",
    "AveragedGEM",
    "DistillToBase",
    "GradientProjectionMemory",
    "OrthogonalGradientDescent",
    "ReferenceProjection",
    "anchor_of",
    "averaged_gem",
    "diagonal_fisher",
    "extend_basis",
    "gradient_directions",
    "input_basis",
    "project_lora_a",
    "protected_parameters",
    "reference_gradients",
]
