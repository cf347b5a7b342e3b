"""What any module may be asked: the module inside its wrappers, and a mode for the length of a block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
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


@lru_cache(maxsize=256)
def marked(kind: Any) -> Any:
    """Return an empty subclass of a module's class, with its name, for the length of a block in which hooks are there.

    torch.compile does not look for new hooks (`skip_nnmodule_hook_guards`), but it does look at modules' types: a model
    that was compiled without the hooks is compiled once more with them, and runs without them afterwards.
    """
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})


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


@contextmanager
def reference_pass(model: nn.Module) -> Iterator[None]:
    """Run the model within the block as a fixed reference beside its own training, without a trace.

    Eval mode, no gradients; afterwards every module is in its own mode again and the random state is as before.

    Args:
        model: the bare module, with at least one parameter.
    """
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device.index or 0]
    kind = "cuda" if device.type == "cpu" else device.type
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):
        yield
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()  # before torch 2.11 training is given the reference's casts, without graph
