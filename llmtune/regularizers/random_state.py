"""torch's random state on a model's devices: whether a pass draws, and passes that draw the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RandomState = dict[torch.device, Tensor]
"""State of torch's generator, by device."""


def random_state(model: nn.Module) -> RandomState:
    """Return torch's random state on the CPU and on every device that the model has parameters on."""
    cpu = torch.device("cpu")
    devices = {parameter.device for parameter in model.parameters()} - {cpu, torch.device("meta")}
    return {cpu: torch.get_rng_state()} | {d: torch.get_device_module(d).get_rng_state(d) for d in devices}


def same_state(one: RandomState, other: RandomState) -> bool:
    """Return whether nothing was drawn between two states."""
    return all(torch.equal(state, other[device]) for device, state in one.items())


@contextmanager
def drawing_again(model: nn.Module, state: RandomState) -> Iterator[None]:
    """Run the block from an earlier random state, and put that of before it back afterwards.

    Args:
        model: whose devices the state is of.
        state: what `random_state` gave. Two passes that start from it draw the same dropout.
    """
    before = random_state(model)
    _put_back(state)
    try:
        yield
    finally:
        _put_back(before)


def _put_back(states: RandomState) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
