"""Sharpness-aware steps in the loop: the whole step's gradient, taken a second time uphill of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.errors import CheckpointError
from llmtune.optim.sam import perturbed
from llmtune.training.loop import TrainingLoop
from llmtune.training.randomness import fixed_randomness
from llmtune.types import Batch


class SharpnessAware(TrainingLoop):
    """A loop whose gradient is that at w + rho * g / ||g||, g being the gradient at w: SAM, or ASAM.

    Set `rho` and `adaptive` on a subclass or on the loop. Before another subclass of the loop it makes that one
    sharpness-aware: `class Careful(SharpnessAware, DPO)`. See `llmtune.optim.perturbed` for the move.

    g is the gradient of the whole step over all processes, unscaled, penalties with it; so neither the cut into
    micro-batches nor the processes change the result, where a move for each micro-batch would. Clipping, checks, skips
    of bad steps and the scaler see the second gradient alone. Both passes draw the same dropout masks, and the random
    state goes on as after one. Callbacks hear `on_task_gradients` once, of the second gradient; those that ask for the
    gradient `at_the_weights` hear it of the first one too.

    The history has the loss and its parts at w, and "sharpness", how much higher the loss is uphill. Evaluation is of
    w. A step costs two, and one copy of what is trained.

    Attributes:
        rho: how far to move, above 0.
        adaptive: ASAM in place of SAM.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> from llmtune.training.settings import LoopSettings
        >>> rows = [{"input_ids": [5, 7, 11, 13], "labels": [5, 7, 11, 13]}] * 4
        >>> settings = LoopSettings(max_steps=2, rows_per_step=2, progress=False)
        >>> loop = SharpnessAware(tiny_llama(), rows, settings=settings)
        >>> loop.rho = 0.1
        >>> [row["sharpness"] > 0 for row in loop.fit()]
        [True, True]
    """

    rho: float = 0.05
    adaptive: bool = False

    def accumulate_gradients(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Leave the gradient from uphill; the rest is as `TrainingLoop.accumulate_gradients` says.

        Raises:
            ValueError: rho is not above 0; or what a plain step raises.
        """
        callbacks = self.callbacks
        self.callbacks = [callback for callback in callbacks if getattr(callback, "at_the_weights", False)]
        try:
            with fixed_randomness():
                here = super().accumulate_gradients(batches)
        finally:
            self.callbacks = callbacks
        with perturbed(self.model, self.rho, adaptive=self.adaptive):
            there = super().accumulate_gradients(batches)
        overflow = {name: there[name] for name in ("overflow",) if name in there}
        return there | here | overflow | {"sharpness": there["loss"] - here["loss"]}

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state, with rho and adaptive in it."""
        return super().state_dict() | {"sharpness": {"rho": self.rho, "adaptive": self.adaptive}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: rho or adaptive is another; or what a plain loop refuses.
        """
        then, now = state.get("sharpness"), {"rho": self.rho, "adaptive": self.adaptive}
        if then != now:
            raise CheckpointError(f"the run was sharpness-aware with {then} and is so with {now} now: set what it had")
        super().load_state_dict(state)
