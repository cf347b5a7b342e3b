"""Trying something on a model's adapters and having them all as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llmtune.adapters.attach import ATTRIBUTE
from llmtune.adapters.layer import AdapterLayer


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Undo on leaving the block, however it is left, what adapters were attached and detached in it.

    What requires a gradient and the random state are put back as well; weights that are written to are not.

    Args:
        model: the root, with adapters.
    """
    record = getattr(model, ATTRIBUTE)
    state = {name: value.copy() for name, value in vars(record).items()}
    state["flags"] = {name: dict(flags) for name, flags in record.flags.items()}
    layers = [
        (parent._modules, local, child)
        for parent in model.modules()
        for local, child in parent._modules.items()
        if isinstance(child, AdapterLayer)
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter, _ in flags if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for modules, local, child in layers:
            modules[local] = child
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        vars(record).update(state)
        setattr(model, ATTRIBUTE, record)
