"""The penalty that keeps AdaLoRA's A and B near orthogonal, so that E stands for singular values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtune.adapters.adalora_config import AdaLoRA, adalora_layers
from llmtune.adapters.attach import record_of
from llmtune.adapters.autocast import no_autocast
from llmtune.adapters.record import check_positive
from llmtune.modules import unwrap


class AdaLoRAOrthogonality:
    """A penalty: strength * the mean, over every A and B of an adapter, of ||A A^T - I|| and ||B^T B - I||.

    The norm is Frobenius's, and not squared: so it is in PEFT and in the authors' code, and the default strength is
    made for it. (The paper, in equation 4, adds up the squares.)

    Args:
        strength: above 0; left out, the record's `orthogonality`.
        name: the adapter's name.

    Raises:
        ValueError: `strength` is not above 0.

    Example:
        >>> from llmtune.adapters import AdaLoRA, AdaLoRAOrthogonality, attach
        >>> model = nn.Sequential(nn.Linear(5, 7))
        >>> _ = attach(model, AdaLoRA(initial_rank=4, target_rank=2, alpha=8, total_steps=3))
        >>> round(AdaLoRAOrthogonality(1.0)(model).item(), 1)  # A and B start near 0, and the length of I is 2
        2.0

    Reference:
        Zhang et al., "AdaLoRA" (2023), section 3.1, equation 4.
    """

    def __init__(self, strength: float | None = None, *, name: str = "default") -> None:
        if strength is not None:
            check_positive("strength", strength)
        self.strength, self.name = strength, name

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar in at least float32 with gradient to A and B.

        Args:
            model: with the adapter.

        Raises:
            ValueError: there is no such adapter, it is no AdaLoRA, or it asks for no penalty.
        """
        model = unwrap(model)
        config = record_of(model, self.name).configs[self.name]
        if not isinstance(config, AdaLoRA):
            raise ValueError(f'adapter "{self.name}" is {type(config).__name__}: this penalty is AdaLoRA\'s')
        strength = config.orthogonality if self.strength is None else self.strength
        if not strength:
            raise ValueError(
                f'adapter "{self.name}" has orthogonality=0: leave the penalty out, or give it a strength of its own'
            )
        layers = adalora_layers(model, self.name).values()
        matrices = [matrix for layer in layers for matrix in (layer.lora_a, layer.lora_b.T)]
        device = matrices[0].device
        with no_autocast(device):
            return strength * torch.stack([_apart(matrix).to(device) for matrix in matrices]).mean()


def _apart(rows: Tensor) -> Tensor:
    """Return ||M M^T - I|| of a matrix [r, n]."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
