"""The search for the noise in a ball that moves predictions most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtune.adapters.record import check_whole
from llmtune.regularizers.perturbation import Norm, climb, example_norms


@dataclass(frozen=True)
class Search:
    """How the worst noise is looked for; the knobs of `smart_loss`, checked."""

    epsilon: float
    steps: int
    step_size: float | None
    start: float
    norm: Norm

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon must be a finite number larger than 0; got {self.epsilon}")
        check_whole("steps", self.steps)
        if self.step_size is not None and not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ValueError(f"step_size must be a finite number larger than 0, or None; got {self.step_size}")
        if not 0 < self.start <= 1:
            raise ValueError(f"start must be larger than 0 (there the slope is 0) and at most 1; got {self.start}")
        if self.norm not in ("l2", "linf"):
            raise ValueError(f'norm must be "l2" or "linf"; got {self.norm!r}')

    def first(self, zeros: Tensor, real: Tensor, examples: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the noise [B, T, E] to start from: normal, of size start * epsilon, 0 on padding."""
        noise = torch.randn(zeros.shape, dtype=zeros.dtype, device=zeros.device, generator=generator) * real[..., None]
        size = self.start * self.epsilon
        if self.norm == "linf":
            return (size * noise).clamp(-self.epsilon, self.epsilon)
        return noise * (size / example_norms(noise, examples).clamp(min=torch.finfo(noise.dtype).tiny))

    def worst(self, divergence: Callable[[Tensor], Tensor], noise: Tensor, real: Tensor, examples: Tensor) -> Tensor:
        """Return the noise [B, T, E] after all steps up the sum over rows of the divergence."""
        step = 2 * self.epsilon if self.step_size is None else self.step_size
        for _ in range(self.steps):
            noise = noise.detach().requires_grad_()
            (slope,) = torch.autograd.grad(divergence(noise), noise)
            slope = slope * real[..., None]
            noise = climb(noise.detach(), slope, examples, step=step, radius=self.epsilon, norm=self.norm)
        return noise.detach()
