"""torch's random state on a model's devices: whether a pass draws, and passes that draw the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llmtune.optim.draws import TorchStates, set_torch_states, torch_states


def same_state(one: TorchStates, other: TorchStates) -> bool:
    """Return whether nothing was drawn between two states."""
    return all(torch.equal(state, other[device]) for device, state in one.items())


@contextmanager
def drawing_again(model: nn.Module, state: TorchStates) -> Iterator[None]:
    """Run the block from an earlier random state, and put that of before it back afterwards.

    Args:
        model: whose devices the state is of.
        state: what `torch_states` gave. Two passes that start from it draw the same dropout.
    """
    before = torch_states(model.parameters())
    set_torch_states(state)
    try:
        yield
    finally:
        set_torch_states(before)
