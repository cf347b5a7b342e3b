"""The random state of a computation that runs twice: two passes of one step must draw the same dropout masks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

TorchStates = dict[torch.device, Tensor]
"""State of torch's generator, by device."""


def torch_states(tensors: Iterable[Tensor]) -> TorchStates:
    """Return torch's random state on the CPU and on every other device the tensors are on.

    Args:
        tensors: of any shape; only their devices count.
    """
    cpu = torch.device("cpu")
    others = {tensor.device for tensor in tensors} - {cpu, torch.device("meta")}
    return {cpu: torch.get_rng_state()} | {d: torch.get_device_module(d).get_rng_state(d) for d in others}


def set_torch_states(states: TorchStates) -> None:
    """Put back what `torch_states` returned."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def random_states(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Return the random state of Python, NumPy and torch.

    Args:
        tensors: of any shape; only their devices count.
    """
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch_states(tensors)}


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    set_torch_states(states["torch"])
