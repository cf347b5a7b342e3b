"""The torch optimizer inside of another program's wrapper."""

from __future__ import annotations

from typing import Any

import torch


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer whose step runs the hooks that are registered on it.

    Accelerate's wrapper, which Hugging Face's Trainer hands to its callbacks, is a torch optimizer by its class but
    takes no hooks; its step is that of the optimizer it holds, whose hooks are then run.

    Args:
        optimizer: a torch optimizer that has been made, or a wrapper with one as its `optimizer`.

    Raises:
        TypeError: it is neither.
    """
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise TypeError(f"a torch optimizer that has been made is expected; got {optimizer!r:.80}")
    return inner
