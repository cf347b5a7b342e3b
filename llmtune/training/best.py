"""The best evaluation so far: what "better" means, and which step it was at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from llmtune.errors import CheckpointError, did_you_mean
from llmtune.modules import unwrap
from llmtune.training.checkpoint_folder import step_name
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.training.run_state import changing, load_weights
from llmtune.types import Callback


class Best:
    """The best value of one metric so far and the step it was reached at.

    Args:
        metric: the name of the metric, as an evaluation reports it.
        mode: "min" where a smaller value is better, "max" where a larger one is.
        min_delta: by how much a value must be better than the best so far to count, at least 0.

    Raises:
        ValueError: `mode` or `min_delta` is out of its range.

    Example:
        >>> best = Best("eval_loss")
        >>> [best.update({"eval_loss": loss}, step) for step, loss in ((10, 2.0), (20, 3.0), (30, 1.0))]
        [True, False, True]
        >>> best.step, best.value
        (30, 1.0)
    """

    def __init__(self, metric: str, *, mode: Literal["min", "max"] = "min", min_delta: float = 0.0) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max"; got {mode!r}')
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be a number of at least 0; got {min_delta!r}")
        self.metric, self.mode, self.min_delta = metric, mode, min_delta
        self.value: float | None = None
        self.step: int | None = None

    def is_better(self, value: float) -> bool:
        """Return whether a value beats the best so far; NaN and the infinities never do."""
        if not math.isfinite(value):
            return False
        if self.value is None:
            return True
        gain = self.value - value if self.mode == "min" else value - self.value
        return gain > self.min_delta

    def update(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Take note of an evaluation and return whether it is the best so far; asked twice of a step, it says the same.

        Args:
            metrics: the evaluation's, by name.
            step: optimizer steps done.

        Raises:
            ValueError: the metric is not among them; the sentence names those there are.
        """
        value = self.read(metrics)
        if self.step == step and self.value == value:
            return True
        if not self.is_better(value):
            return False
        self.value, self.step = value, step
        return True

    def read(self, metrics: Mapping[str, Any]) -> float:
        """Return the metric's value.

        Raises:
            ValueError: the metric is not among `metrics`; the sentence names those there are.
        """
        if self.metric not in metrics:
            known = [name for name in metrics if name.startswith("eval_")] or list(metrics)
            raise ValueError(
                f"the evaluation reports no {self.metric!r}; it reports {', '.join(known) or 'nothing'}."
                + did_you_mean(self.metric, known)
            )
        return float(metrics[self.metric])

    def state_dict(self) -> dict[str, Any]:
        """Return metric, mode, value and step: JSON values."""
        return {"metric": self.metric, "mode": self.mode, "value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: it is of another metric or mode, whose values cannot be compared with this one's.
        """
        for name in ("metric", "mode"):
            if state[name] != getattr(self, name):
                raise CheckpointError(f"{name} was {state[name]!r} in the run and is {getattr(self, name)!r} now")
        self.value, self.step = state["value"], state["step"]


class KeepBest(Callback):
    """Keep the checkpoint of the best evaluation, whatever is rotated away, and put its weights back at the end.

    With a folder the step of every evaluation that is the best so far is saved; without one, what is trained is copied
    to main memory.

    Args:
        metric: the name of the metric, as the evaluation reports it.
        mode: "min" where a smaller value is better, "max" where a larger one is.
        restore: whether the loop puts the weights of the best evaluation back at the end of `fit`.

    Raises:
        ValueError: `mode` is neither.

    Example:
        >>> keep = KeepBest("eval_accuracy", mode="max")
        >>> keep.improved({"step": 10, "eval_accuracy": 0.75}), keep.improved({"step": 20, "eval_accuracy": 0.5})
        (True, False)
        >>> keep.best_step, keep.best_value
        (10, 0.75)
    """

    def __init__(self, metric: str = "eval_loss", *, mode: Literal["min", "max"] = "min", restore: bool = True) -> None:
        self.best, self.restore = Best(metric, mode=mode), restore
        self._copy: dict[str, Tensor] = {}

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation; None before the first."""
        return self.best.step

    @property
    def best_value(self) -> float | None:
        """The metric at the best evaluation; None before the first."""
        return self.best.value

    def improved(self, metrics: Mapping[str, Any]) -> bool:
        """Take note of an evaluation and return whether it is the best so far; asked twice of a step, it says the same.

        Args:
            metrics: the row of the evaluation's step: "step" and the metrics by name.

        Raises:
            ValueError: the metric is not among them; the sentence names those there are.
        """
        return self.best.update(metrics, int(metrics["step"]))

    def on_fit_start(self, loop: Any) -> None:
        """Raise ValueError where there will be no evaluation."""
        check_evaluates(loop, "KeepBest")

    def on_eval_end(self, loop: Any, metrics: dict[str, float]) -> None:
        """Take note of the evaluation; have the best one saved and kept, or its weights copied."""
        before = self.best_step
        if not self.improved({**metrics, "step": loop.step}):
            return
        if loop.settings.folder is not None:
            others = {c.best_step for c in loop.callbacks if isinstance(c, KeepBest) and c is not self}
            loop.keeper.protected = (loop.keeper.protected - ({before} - others)) | {loop.step}
            loop.keeper.wanted = True
        elif self.restore:
            self._copy = {name: tensor.detach().cpu().clone() for name, tensor in changing(unwrap(loop.model))}

    def on_fit_end(self, loop: Any) -> None:
        """Put the weights of the best evaluation back.

        Raises:
            CheckpointError: its checkpoint is damaged.
        """
        if not self.restore or self.best_step in (None, loop.step):
            return
        state = {"model": self._copy}
        if loop.settings.folder is not None:
            state = read_checkpoint(Path(loop.settings.folder) / step_name(int(self.best_step or 0)))
        load_weights(loop.model, state)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its step."""
        return self.best.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back. Raises what `Best.load_state_dict` raises."""
        self.best.load_state_dict(state)


def check_evaluates(loop: Any, who: str) -> None:
    """Raise ValueError where a loop has nothing to evaluate on, so that `who` would do nothing."""
    if loop.eval_data is None:
        raise ValueError(f"{who} goes by the evaluations, and there will be none: give the loop eval_data")
