"""The random state of a computation that runs twice: two passes of one step must draw the same dropout masks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Return the random state of Python, NumPy, torch on the CPU, and of every other device the tensors are on.

    Args:
        tensors: of any shape; only their devices count.
    """
    devices = {tensor.device for tensor in tensors} - {torch.device("cpu")}
    states: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    for device in devices:
        if device.type != "meta":
            states[str(device)] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    for name in states.keys() - {"python", "numpy", "cpu"}:
        torch.get_device_module(torch.device(name)).set_rng_state(states[name], torch.device(name))
