"""Parts against forgetting: importance penalties, distillation, replayed predictions, projected updates, adapters for
task after task, and what has been kept."""

from llmtune.adapters.effective import anchor_of
from llmtune.forgetting.cached_teacher import with_teacher
from llmtune.forgetting.class_statistics import ClassStatistics
from llmtune.forgetting.dark_replay import DERLoss
from llmtune.forgetting.delta_norms import delta_norms
from llmtune.forgetting.distill_from_cache import DistillFromCache
from llmtune.forgetting.distill_to_model import DistillToModel
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.forgetting.gem import AveragedGEM, ReferenceProjection, averaged_gem, reference_gradients
from llmtune.forgetting.gradient_directions import gradient_directions
from llmtune.forgetting.inflora import InfLoRAReport, designed_rows, inflora_start
from llmtune.forgetting.mas import MemoryAwareSynapses, output_sensitivity
from llmtune.forgetting.memory import penalty_memory
from llmtune.forgetting.online_ewc import OnlineEWC
from llmtune.forgetting.orthogonal import extend_basis, input_basis
from llmtune.forgetting.orthogonal_lora import OrthogonalLoRA, OverlapReport, row_overlap
from llmtune.forgetting.projected import GradientProjectionMemory, OrthogonalGradientDescent
from llmtune.forgetting.protected import project_lora_a, protected_parameters
from llmtune.forgetting.retention import greedy_agreement, kl_to_base, perplexity_change, retention
from llmtune.forgetting.self_synthesis import self_synthesised
from llmtune.forgetting.slao import SLAO, merged_b, orthonormal_start
from llmtune.forgetting.synaptic import SynapticIntelligence, path_importance

__all__ = [
    "EWC",
    "SLAO",
    "AveragedGEM",
    "ClassStatistics",
    "DERLoss",
    "DistillFromCache",
    "DistillToBase",
    "DistillToModel",
    "GradientProjectionMemory",
    "InfLoRAReport",
    "MemoryAwareSynapses",
    "OnlineEWC",
    "OrthogonalGradientDescent",
    "OrthogonalLoRA",
    "OverlapReport",
    "ReferenceProjection",
    "SynapticIntelligence",
    "anchor_of",
    "averaged_gem",
    "delta_norms",
    "designed_rows",
    "diagonal_fisher",
    "extend_basis",
    "gradient_directions",
    "greedy_agreement",
    "inflora_start",
    "input_basis",
    "kl_to_base",
    "merged_b",
    "orthonormal_start",
    "output_sensitivity",
    "path_importance",
    "penalty_memory",
    "perplexity_change",
    "project_lora_a",
    "protected_parameters",
    "reference_gradients",
    "retention",
    "row_overlap",
    "self_synthesised",
    "with_teacher",
]
