"""The optimizer and the schedule a loop uses unless it is told otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmtune.training.settings import LoopSettings


def adamw_with_schedule(
    model: nn.Module, settings: LoopSettings, total_steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Return (AdamW, scheduler) over the parameters that require a gradient.

    Weight decay goes to tensors of two or more dimensions only. The schedule is that of `transformers.get_scheduler`.

    Args:
        model: the model to train.
        settings: learning rate, weight decay, schedule and warm-up.
        total_steps: optimizer steps of the whole run.
    """
    from transformers import get_scheduler

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay}
    plain = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (decayed, plain) if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=_fused(trained, settings.fused))
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
    if wanted is not None:
        return wanted
    return all(p.device.type in ("cuda", "cpu", "xpu", "mps") and p.is_floating_point() for p in parameters)
