"""The optimizer and the schedule a loop uses unless it is told otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import is_dtensor


def adamw_with_schedule(
    model: nn.Module, settings: LoopSettings, total_steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Return (AdamW, scheduler) over the parameters that require a gradient.

    Weight decay goes to tensors of two or more dimensions only. The schedule is that of `transformers.get_scheduler`.

    Args:
        model: the model to train.
        settings: learning rate, weight decay, schedule and warm-up.
        total_steps: optimizer steps of the whole run.

    Raises:
        ValueError: `fused=True` is asked for, and only some parameters are spread over processes.
    """
    from transformers import get_scheduler

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed: dict[str, Any] = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay}
    plain: dict[str, Any] = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    groups = [
        {**group, "fused": _fused(group["params"], settings.fused)} for group in (decayed, plain) if group["params"]
    ]
    fused = all(group["fused"] for group in groups)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)
    scheduler = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(settings.schedule_options),
    )
    return optimizer, scheduler


def steps_in_all(settings: LoopSettings, rows: Any) -> int:
    """Return the optimizer steps of a run: `max_steps`, or what `epochs` passes over the rows take."""
    if settings.max_steps is not None:
        return settings.max_steps
    return -(-(settings.epochs or 0) * len(rows) // settings.rows_per_step)


def _fused(parameters: list[nn.Parameter], wanted: bool | None) -> bool:
    mixed = len({is_dtensor(parameter) for parameter in parameters}) > 1
    if wanted and mixed:
        raise ValueError(
            "fused=True cannot update parameters that are spread over processes together with others that are not: "
            "leave fused out"
        )
    if wanted is not None:
        return wanted
    return not mixed and all(
        p.device.type in ("cuda", "cpu", "xpu", "mps") and p.is_floating_point() for p in parameters
    )
