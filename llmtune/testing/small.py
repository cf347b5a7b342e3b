"""A small network to try a part on, and ways to move it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallModel(nn.Module):
    """A small float64 network to try a penalty on: two linear layers with one weight, a norm, and a frozen scale."""

    def __init__(self, *, width: int = 5, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(width, width)
            self.second = nn.Linear(width, width)
            self.norm = nn.LayerNorm(width)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(width, classes)
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] for x [n, width]."""
        hidden: Tensor = self.second(self.drop(torch.tanh(self.first(x)))) * self.scale
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def moved(model: nn.Module, *, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Move every trainable parameter of the model, in place, by seeded noise, and return the model.

    Args:
        model: any module.
        seed: of the noise.
        scale: its standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter))
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name.

    Args:
        model: any module.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
