"""Look at a model in the middle of a run and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llmtune.modules import train_mode
from llmtune.training.randomness import fixed_randomness

PACKED = 1 << 20
"""Integer buffers of this size or more are packed weights, which a forward pass leaves alone: no copy is kept."""


@contextmanager
def untouched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put back after the block what a forward pass or `generate` may change.

    That is: the random state, train and eval modes, buffers, gradients, and the entries of `config` and
    `generation_config` where the model has such.

    Args:
        model: the model the block runs.
        training: the mode in which the block finds the model: train or eval.
    """
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and (buffer.is_floating_point() or buffer.numel() < PACKED)
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    configs = [getattr(model, name) for name in ("config", "generation_config") if hasattr(model, name)]
    entries = [(config, dict(vars(config))) for config in configs if hasattr(config, "__dict__")]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with train_mode(model, training), fixed_randomness():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
        for config, before in entries:
            vars(config).clear()
            vars(config).update(before)
