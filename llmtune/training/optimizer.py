"""The optimizer and the schedule a loop uses unless it is told otherwise."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from llmtune.errors import did_you_mean
from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import is_dtensor

_OWN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}  # what the loop itself gives a schedule


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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed: dict[str, Any] = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay}
    plain: dict[str, Any] = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    groups = [
        {**group, "fused": _fused(group["params"], settings.fused)} for group in (decayed, plain) if group["params"]
    ]
    fused = all(group["fused"] for group in groups)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)
    return optimizer, _schedule(optimizer, settings, total_steps)


def check_configured(made: Any) -> tuple[torch.optim.Optimizer, Any]:
    """Return what `configure_optimizer` gave.

    Raises:
        TypeError: it is no pair of an optimizer and a schedule that steps without a metric.
    """
    pair = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    plateau = isinstance(pair[1], torch.optim.lr_scheduler.ReduceLROnPlateau)
    if not hasattr(pair[0], "param_groups") or not hasattr(pair[1], "step") or plateau:
        came = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise TypeError(
            f"configure_optimizer must return (optimizer, schedule), a schedule that steps without a metric; got "
            f"{came}. For a constant rate give torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)"
        )
    return pair


def check_schedule(settings: LoopSettings, total_steps: int) -> None:
    """Try the schedule on an optimizer of nothing.

    Raises:
        ValueError: the schedule knows no such option, or lacks one; or one is out of range.
    """
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    name, options = settings.schedule, settings.schedule_options
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    known = set(inspect.signature(make).parameters) - _OWN
    for option in options:
        if option not in known:
            raise ValueError(
                f'the schedule "{name}" takes {", ".join(sorted(known)) or "no"} options; schedule_options has '
                f"{option!r}.{did_you_mean(option, known)}"
            )
    said = f'the schedule "{name}" with schedule_options={dict(options)}'
    try:
        scheduler = _schedule(torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate), settings, total_steps)
        factors = {
            step: scheduler.lr_lambdas[0](step) for step in {0, min(settings.warmup_steps, total_steps), total_steps}
        }
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{said} cannot be made: {error}") from error
    if not all(isinstance(factor, float | int) and 0 <= factor < float("inf") for factor in factors.values()):
        raise ValueError(f"{said} gives {factors}, by step, as factors of the learning rate: check the options")
    peak = factors[min(settings.warmup_steps, total_steps)]
    if name == "warmup_stable_decay" and settings.warmup_steps < total_steps and peak < 1:
        raise ValueError(
            f"{said} is at {peak:.3g} of the learning rate, and not at its peak, after its {settings.warmup_steps} "
            f"steps of warm-up: its parts are longer than the {total_steps} steps of the run"
        )


def _schedule(optimizer: torch.optim.Optimizer, settings: LoopSettings, total_steps: int) -> Any:
    from transformers import get_scheduler

    return get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(settings.schedule_options),
    )


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
