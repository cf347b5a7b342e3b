"""Flooding: keep the training loss from sinking below a level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmtune.types import Callback


def flood(loss: Tensor, level: float) -> Tensor:
    """Return |loss - level| + level: above the level the loss itself, below it the loss turned round.

    The level is of the mean over all that a step learns from. Under gradient accumulation the function of each
    micro-batch's mean is another objective, by Jensen's inequality never a smaller one: use `Flooding` there.

    Args:
        loss: a scalar, the mean loss of a whole step.
        level: larger than 0.

    Returns:
        A scalar.

    Raises:
        ValueError: the level is not larger than 0, or the loss is no scalar.

    Ishida et al., "Do We Need Zero Training Loss After Achieving Zero Training Error?" (2020), section 3.2.

    Example:
        >>> import torch
        >>> flood(torch.tensor(0.25), 1.0).item()
        1.75
    """
    _check_level(level)
    if loss.ndim != 0:
        raise ValueError(f"the level is of a mean loss, a scalar; got a loss of shape {[*loss.shape]}")
    return (loss - level).abs() + level


@dataclass
class Flooding(Callback):
    """Flood the loss of a whole step: where its mean is below the level, the step's gradient points up.

        gradient of |L - level| + level = sign(L - level) * gradient of L

    L is the mean over all the step's targets, over all micro-batches and processes, and without penalties, whose
    gradient stays. So the gradient is that of `flood` of the whole step's loss however the
    step is cut. Each row of the history gets "flooded", 1 where the step pointed up. Evaluation is untouched. In a
    `SharpnessAware` loop each of the two gradients is turned by the loss of its own pass, so that the steps are those
    of the flooded loss; "flooded" is then of the second. Callbacks behind this one hear of the turned gradient:
    `SynapticIntelligence`, which is about the task's own, stands before it.

    Args:
        level: of the loss, larger than 0. Of a language model, whose loss cannot reach 0, a little below what
            validation shows.

    Raises:
        ValueError: the level is not larger than 0.

    Ishida et al. 2020. Where we differ: the authors' line of code is applied to every mini-batch; copied into a loop
    that accumulates, it floods micro-batches one by one, which is another objective for every micro-batch size.
    """

    at_the_weights = True
    level: float

    def __post_init__(self) -> None:
        _check_level(self.level)
        self._flooded = 0

    def on_task_gradients(self, loop: Any) -> None:
        """Turn the gradients round where the step's mean loss is below the level; see `Flooding`."""
        self._flooded = int(float(loop.means["loss"]) < self.level)
        for parameter in loop.model.parameters() if self._flooded else ():
            if parameter.grad is not None:
                parameter.grad.neg_()

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Add "flooded" to the step's row."""
        metrics["flooded"] = self._flooded


def _check_level(level: float) -> None:
    if not (level > 0 and math.isfinite(level)):
        raise ValueError(f"level must be a finite number larger than 0; got {level}")
