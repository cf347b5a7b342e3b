"""Stop a run that no longer gets better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llmtune.training.best import Best, check_evaluates
from llmtune.types import Callback


class EarlyStopping(Callback):
    """End the run after `patience` evaluations in a row that are not better than the best one.

    The run ends in order, after the step it is in, with a checkpoint. To have the weights of the best evaluation and
    not of the last one, give the loop a `KeepBest` as well: both mean the same by "better".

    Args:
        metric: the name of the metric, as the evaluation reports it.
        patience: how many evaluations in a row may fail to be better; at least 1.
        mode: "min" where a smaller value is better, "max" where a larger one is.
        min_delta: by how much a value must be better than the best so far to count. A value that is not finite never
            counts.

    Raises:
        ValueError: `patience`, `mode` or `min_delta` is out of its range.
    """

    def __init__(
        self,
        metric: str = "eval_loss",
        *,
        patience: int = 3,
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
    ) -> None:
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"patience must be a whole number of at least 1; got {patience!r}")
        self.best, self.patience = Best(metric, mode=mode, min_delta=min_delta), patience
        self.waited = 0

    def on_fit_start(self, loop: Any) -> None:
        """Check that there will be evaluations; end at once a resumed run that had been stopped.

        Raises:
            ValueError: there is nothing to evaluate on, or only the end of the run is evaluated.
        """
        check_evaluates(loop, "EarlyStopping")
        if loop.settings.eval_every is None:
            raise ValueError("EarlyStopping needs evaluations on the way, not only at the end: set eval_every")
        self._stop_if_over(loop)

    def on_eval_end(self, loop: Any, metrics: dict[str, float]) -> None:
        """Count the evaluations since the best one."""
        self.waited = 0 if self.best.update(metrics, loop.step) else self.waited + 1
        self._stop_if_over(loop)

    def _stop_if_over(self, loop: Any) -> None:
        if self.waited < self.patience or loop.step >= loop.total_steps:
            return
        metric, best = self.best.metric, self.best
        if best.step is None:
            loop.stop(f"{metric} was no finite number in {self.waited} evaluations")
        else:
            loop.stop(
                f"{metric} got no better than {best.value:.6g}, of step {best.step}, in {self.waited} evaluations"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its step, and how many evaluations came since."""
        return {**self.best.state_dict(), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back. Raises what `Best.load_state_dict` raises."""
        self.best.load_state_dict(state)
        self.waited = int(state["waited"])
