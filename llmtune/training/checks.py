"""What the loop checks of its rows, its loss and its gradients, each with one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.errors import NonFiniteError
from llmtune.types import Penalty

RESERVED = {"loss", "penalty", "targets", "overflow", "grad_norm", "learning_rate", "step", "tokens", "seconds"}


def check_rows(rows: Any, what: str) -> None:
    """Raise where `rows` cannot be trained on: no length or index (TypeError), or empty (ValueError)."""
    if isinstance(rows, Mapping) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        kind = type(rows).__name__
        raise TypeError(f"{what} must be rows with a length and an index (a list, a PackedDataset); got {kind}")
    if len(rows) == 0:
        raise ValueError(f"{what} is empty: there are no rows to go through")


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError where no parameter requires a gradient, or one that does is float16."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: attach an adapter, or unfreeze some")
    half = [name for name, parameter in trained.items() if parameter.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{half[0]} is trained in float16, which one step of the optimizer can overflow: load the model in float32 "
            'and give precision="fp16", or train an adapter, which is float32 by itself'
        )


def loss_and_parts(result: Any, *, trained: bool = True) -> tuple[Tensor, Mapping[str, Any]]:
    """Return (loss, parts) of what `compute_loss` gave.

    Args:
        result: a scalar tensor, or (scalar tensor, named parts).
        trained: whether the loss must carry a gradient.

    Raises:
        ValueError: the loss is no scalar, or carries no gradient; or a part has a name of the loop's own.
    """
    loss, parts = result if isinstance(result, tuple) else (result, {})
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"compute_loss must return a scalar tensor, or (scalar, parts); got {came}")
    taken = sorted(RESERVED & set(parts))
    if taken:
        raise ValueError(f'a part of the loss cannot be called "{taken[0]}", which the loop reports itself: rename it')
    if trained and not loss.requires_grad:
        raise ValueError("the loss carries no gradient: it reaches no trainable parameter, or was made under no_grad")
    return loss, parts


def check_finite(model: nn.Module, metrics: Mapping[str, Any], *, step: int, scale: float) -> None:
    """Raise where a step's loss, penalty or gradient is NaN or infinite.

    An overflow of the gradient under fp16's loss scale is passed over as long as the scale can be lowered.

    Args:
        model: the model whose `.grad` were measured.
        metrics: "loss", "grad_norm" and, where there are such, "penalty" and "overflow", as numbers.
        step: the step's number, from 1, for the sentence.
        scale: fp16's loss scale.

    Raises:
        NonFiniteError: names the step and the first parameter concerned.
    """
    for name in ("loss", "penalty"):
        value = metrics.get(name, 0.0)
        if not math.isfinite(value):
            raise NonFiniteError(f"step {step}: the {name} is {value}; no weight has been changed by this step")
    if math.isfinite(metrics["grad_norm"]) or (metrics.get("overflow") and scale > 1):
        return
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    where = f"first in {bad[0]}" if bad else "in its norm alone"
    raise NonFiniteError(f"step {step}: the gradient is not finite, {where}; no weight has been changed by this step")


def checked_penalty(penalty: Penalty, model: nn.Module) -> Tensor:
    """Return `penalty(model)` in float32, a scalar.

    Raises:
        ValueError: it is no scalar tensor, or carries no gradient; names the penalty.
    """
    value = penalty(model)
    if not isinstance(value, Tensor) or value.ndim != 0 or (torch.is_grad_enabled() and not value.requires_grad):
        name = getattr(penalty, "__name__", type(penalty).__name__)
        raise ValueError(
            f"the penalty {name} must return a scalar tensor that reaches a trainable parameter; got {value!r}"
        )
    return value.float()


def check_one_process() -> None:
    """Raise RuntimeError under several processes: each would train on the same rows and write the same checkpoints."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise RuntimeError(f"this loop runs in one process; started in {ranks}, each would train on the same rows")
