"""Average the weights of a run, evaluate the average, and end with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from llmtune.errors import CheckpointError
from llmtune.modules import unwrap
from llmtune.optim.ema import EMA, check_decay
from llmtune.training.best import KeepBest
from llmtune.training.sharding import spread_like
from llmtune.types import Callback


class AverageWeights(Callback):
    """Keep a running average of what is trained, taken after optimizer steps: an `EMA`, or with decay None SWA's mean.

    Training goes on with the trained weights, and these are what checkpoints hold as the model; the average lies beside
    them in the callback's state, so that a resumed run has the very average of one that was not stopped. A step that
    was passed over (`on_bad_step`, an overflow under fp16) is not averaged. A run that ends before the first average
    ends with the weights as trained.

    Args:
        decay: of the EMA, above 0 and below 1; None for equal weights.
        start: optimizer steps before the first that is averaged, at least 0.
        every: optimizer steps between two that are averaged, at least 1.
        evaluate: whether evaluations, as soon as there is an average, are of the averaged weights.
        final: whether the model has the averaged weights at the end of `fit`.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> from llmtune.training import LoopSettings, TrainingLoop
        >>> rows, average = [{"input_ids": [5, 7, 11], "labels": [5, 7, 11]}] * 4, AverageWeights(decay=None, start=2)
        >>> settings = LoopSettings(max_steps=5, rows_per_step=2, progress=False)
        >>> _ = TrainingLoop(tiny_llama(), rows, settings=settings, callbacks=[average]).fit()
        >>> average.ema.updates
        3
    """

    ema: EMA | None = None

    def __init__(
        self,
        decay: float | None = 0.999,
        *,
        start: int = 0,
        every: int = 1,
        evaluate: bool = True,
        final: bool = True,
    ) -> None:
        check_decay(decay)
        for name, value, least in (("start", start, 0), ("every", every, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        self.decay, self.start, self.every = decay, start, every
        self.evaluate, self.final = evaluate, final
        self._loaded: Mapping[str, Any] | None = None

    def on_fit_start(self, loop: Any) -> None:
        """Begin, or go on with the average of a checkpoint.

        Raises:
            ValueError: the run ends before the first average; or a `KeepBest` would put back trained weights, of which
                the evaluations were not.
        """
        if self.start + self.every > loop.total_steps:
            raise ValueError(
                f"nothing would be averaged: the first average is due after step {self.start + self.every} and the run "
                f"has {loop.total_steps} steps; set start and every lower"
            )
        if (self.evaluate or self.final) and any(isinstance(c, KeepBest) and c.restore for c in loop.callbacks):
            raise ValueError(
                "KeepBest puts back the trained weights of the best evaluation, AverageWeights evaluates and ends with "
                "averaged ones: give KeepBest restore=False, or AverageWeights evaluate=False and final=False"
            )
        if self.ema is None or loop.step == 0 or self._loaded is not None:
            self.ema = EMA(unwrap(loop.model), decay=self.decay)
        if self._loaded is not None:
            own, saved = self.ema.averages, self._loaded["averages"]
            spread = {name: spread_like(value, own[name]) if name in own else value for name, value in saved.items()}
            self.ema.load_state_dict({**self._loaded, "averages": spread})
            self._loaded = None

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Take the step's weights into the average."""
        passed_over = metrics.get("skipped") or metrics.get("overflow")
        since = loop.step - self.start
        if self.ema is not None and since > 0 and since % self.every == 0 and not passed_over:
            self.ema.update()

    def around_evaluation(self, loop: Any) -> AbstractContextManager[Any]:
        """Let the model hold the averaged weights while it is evaluated."""
        ready = self.evaluate and self.ema is not None and self.ema.updates > 0
        return self.ema.averaged() if ready and self.ema is not None else nullcontext()

    def on_fit_end(self, loop: Any) -> None:
        """Put the averaged weights into the model."""
        if self.final and self.ema is not None and self.ema.updates > 0:
            self.ema.apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the average, and by which numbers it is taken."""
        state = self._loaded or (None if self.ema is None else self.ema.state_dict())
        return {"decay": self.decay, "start": self.start, "every": self.every, "ema": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back.

        Raises:
            CheckpointError: the run's average was taken by other numbers.
        """
        for name in ("decay", "start", "every"):
            if state[name] != getattr(self, name):
                raise CheckpointError(f"{name} was {state[name]!r} in the run and is {getattr(self, name)!r} now")
        self._loaded = state["ema"]
