"""Hand a run's numbers to any logger: a function of (values, step)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from llmtune.errors import LlmtuneWarning
from llmtune.training.averages import Averages
from llmtune.types import Callback


class LogTo(Callback):
    """Call `function(values, step)` every so many steps, at each evaluation, and for what is left at the end.

    The values are those since the last call, averaged as their meaning asks (see
    `llmtune.training.averages.Averages`: the loss over targets, tokens per second over all seconds); those of an
    evaluation come in a call of their own, with their names ("eval_loss", ...). Only the main process calls.

    A logger that is down must not cost the run: where the function raises, the first time a warning says so, and
    training goes on; later values are still offered to it. `failures` counts the calls that raised.

    Args:
        function: takes (dict of floats by name, optimizer steps done).
        every: optimizer steps between calls; the default is the settings' `log_every`.

    Raises:
        TypeError: `function` cannot be called.
        ValueError: `every` is no whole number of at least 1.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> from llmtune.training import LoopSettings, TrainingLoop
        >>> rows = [{"input_ids": [5, 7, 11, 13], "labels": [5, 7, 11, 13]}] * 4
        >>> seen = []
        >>> log = LogTo(lambda values, step: seen.append((step, sorted(values))), every=2)
        >>> settings = LoopSettings(max_steps=3, rows_per_step=2, progress=False)
        >>> _ = TrainingLoop(tiny_llama(), rows, settings=settings, callbacks=[log]).fit()
        >>> [step for step, names in seen]
        [2, 3]
        >>> {"grad_norm", "learning_rate", "loss", "tokens_per_second"} <= set(seen[0][1])
        True
    """

    def __init__(self, function: Callable[[dict[str, float], int], Any], *, every: int | None = None) -> None:
        if not callable(function):
            raise TypeError(f"LogTo takes a function of (values, step); got {function!r}")
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"every must be a whole number of at least 1, or None; got {every!r}")
        self.function, self.every = function, every
        self.failures = 0
        self._averages = Averages()

    def on_fit_start(self, loop: Any) -> None:
        """Begin anew."""
        self._averages, self.failures = Averages(), 0

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Take the step in, and hand the numbers on where it is time."""
        self._averages.add(metrics)
        if loop.step % (self.every or loop.settings.log_every) == 0 or loop.step == loop.total_steps:
            self._hand_on(loop, self._averages.take())

    def on_eval_end(self, loop: Any, metrics: dict[str, float]) -> None:
        """Hand the evaluation's numbers on."""
        found = {name: value for name, value in metrics.items() if name.startswith("eval_")}
        self._hand_on(loop, {name: float(value) for name, value in found.items() if isinstance(value, int | float)})

    def on_fit_end(self, loop: Any) -> None:
        """Hand on what is left of a run that ended early."""
        self._hand_on(loop, self._averages.take())

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Hand on what is left: the last steps are those one wants to see."""
        self._hand_on(loop, self._averages.take())

    def _hand_on(self, loop: Any, values: dict[str, float]) -> None:
        if not values or not loop.ranks.main:
            return
        try:
            self.function(values, loop.step)
        except Exception as error:  # whatever a logger raises: the run is worth more than its log
            self.failures += 1
            if self.failures == 1:
                warnings.warn(
                    f"logging at step {loop.step} failed and training goes on without that entry; later failures are "
                    f"counted in silence: {type(error).__name__}: {error}",
                    LlmtuneWarning,
                    stacklevel=2,
                )
