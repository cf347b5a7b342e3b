"""What any module may be asked: the module inside its wrappers, and train or eval mode for the length of a block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def check_module(model: Any) -> None:
    """Raise TypeError where `model` is no torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model, that is a torch module, is expected; got {model!r}")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile` and data-parallel wrappers; the model itself where there are none."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_fsdp(module: nn.Module) -> bool:
    """Return whether torch's FSDP gathers the module's parameters and reduces their gradients."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where that is not loaded nothing is sharded
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@contextmanager
def train_mode(model: nn.Module, training: bool = True) -> Iterator[None]:
    """Put every module of the model into train mode, and each back into its own mode afterwards.

    Args:
        model: any module.
        training: False for eval mode.
    """
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of the model into eval mode, and each back into its own mode afterwards."""
    with train_mode(model, False):
        yield
