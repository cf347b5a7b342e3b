"""A layer whose change is multiplied by a number that may be set anew without compiling anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmtune.adapters.layer import AdapterLayer


class ScaledLayer(AdapterLayer):
    """An adapter layer with `scaling`, a number that may be changed at any time.

    Args:
        base: the module replaced.
        adapter_name: the adapter the layer belongs to.

    Attributes:
        scaling: what the change is multiplied by.
    """

    def __init__(self, base: nn.Module, *, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        self._scaling = 1.0
        self._scale = torch.ones((), dtype=torch.float64, device="cpu")  # no buffer, so that no cast rounds it

    @property
    def scaling(self) -> float:
        """What the change is multiplied by."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = float(value)
        self._scale.fill_(value)

    def factor(self) -> Any:
        """Return the scaling as a number, or as a tensor for `torch.compile`, which would compile again for another."""
        return self._scale if torch.compiler.is_compiling() else self._scaling
