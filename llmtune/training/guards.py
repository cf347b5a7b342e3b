"""What stops or passes over a bad step: a loss or gradient that is not finite, a loss far above the recent ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from llmtune.errors import LossSpikeError, NonFiniteError

RECENT, FEWEST = 32, 8  # a loss is compared with the median of this many steps before it, once there are a few
MOST_SKIPPED = 10  # in a row


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


def check_spike(history: Sequence[Mapping[str, Any]], loss: float, factor: float | None, *, step: int) -> None:
    """Raise where a loss is more than `factor` times the median of the steps before it, where that is above 0.

    Args:
        history: rows with "loss"; those "skipped" do not count. The last 32 are looked at, once there are 8.
        loss: of the step that is about to be taken.
        factor: above 1; None looks at nothing.
        step: the step's number, from 1, for the sentence.

    Raises:
        LossSpikeError: names the step, the loss and the median.
    """
    if factor is None:
        return
    recent = [row["loss"] for row in history[-RECENT:] if "loss" in row and not row.get("skipped")]
    if len(recent) >= FEWEST and loss > factor * (median := statistics.median(recent)) > 0:
        raise LossSpikeError(
            f"step {step}: the loss {loss:.4g} is more than {factor:g} times {median:.4g}, the median of the "
            f"{len(recent)} steps before; no weight has been changed by this step"
        )


def pass_over(history: Sequence[Mapping[str, Any]], on_bad_step: str, error: ArithmeticError) -> None:
    """Raise `error` unless a bad step is to be skipped; also where the last ten have been: it does not get better."""
    recent = history[-MOST_SKIPPED:]
    if on_bad_step == "raise" or (len(recent) == MOST_SKIPPED and all(row.get("skipped") for row in recent)):
        raise error
