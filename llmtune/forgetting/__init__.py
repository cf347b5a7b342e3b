"""Parts against forgetting: Fisher information, EWC, distillation from the base model, projection of updates."""

from llmtune.adapters.effective import anchor_of
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
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
