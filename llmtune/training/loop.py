"""The training loop: one class to read in a sitting and subclass where your method differs.

One optimizer step is `training_step(batches)`: `accumulate_gradients` leaves the gradients, `clip_gradients` bounds
them, the optimizer applies them. Override the method that your idea changes; the others need no care.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.reach import check_gradients
from llmtune.data.collate import collate_packed
from llmtune.errors import LossSpikeError, NonFiniteError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.modules import train_mode
from llmtune.training.checks import check_run, loss_and_parts, scalar, sum_of_penalties, targets_of, total_of, try_out
from llmtune.training.distributed import Ranks
from llmtune.training.evaluation import evaluation_means
from llmtune.training.guards import check_finite, check_spike, pass_over
from llmtune.training.history import History
from llmtune.training.optimizer import adamw_with_schedule, check_configured, steps_in_all
from llmtune.training.out_of_memory import within_memory
from llmtune.training.randomness import fetch_rows, rows_of_step, seed_everything
from llmtune.training.resume import Keeper
from llmtune.training.run_state import run_state, take_back
from llmtune.training.settings import LoopSettings
from llmtune.training.signals import StopSignals, told_by
from llmtune.training.streams import StreamRows, is_stream
from llmtune.training.sums import add_share, clip_gradients, drop_gradients, plain_numbers, real_tokens, unscale
from llmtune.training.switches import autocast, compiled, recomputing
from llmtune.training.watchers import watchers
from llmtune.training.workers import BatchesAhead
from llmtune.types import Batch, Callback, LossFunction, LossResult, Penalty, Rows


class TrainingLoop:
    """Train a model on rows of data; every method may be overridden.

    The gradient of a step is that of the mean loss over all the step's targets, whatever the split into micro-batches
    and processes and however unevenly targets are spread over them: a loss is an ordinary mean, the loop does all
    scaling. Whatever a step draws at random is a pure function of (seed, step), so a resumed run repeats it.

    Args:
        model: the module to train; only parameters that require a gradient are touched. It stays on its device.
        train_data: rows, a sequence or map-style data set of dicts ("input_ids", "labels", ...); or a stream of such
            rows, an iterable with `state_dict` and `load_state_dict`.
        settings: a `LoopSettings`.
        collate: makes a batch of a list of rows: `collate_packed`, `collate_padded`, or your own.
        eval_data: rows to evaluate on, or None.
        penalties: functions of the model added to the loss whatever the batch, once per optimizer step.
        callbacks: `Callback` objects, called in this order, after penalties that are callbacks themselves.
        loss: a `LossFunction`: `loss(model, batch)` is a mean over `loss.count_targets(batch)` targets.
        tokenizer: written into checkpoints beside the weights, and there for callbacks; the loop itself needs none.

    Raises:
        ValueError: the data is empty, no parameter of the model requires a gradient, or the settings do not fit.
        TypeError: the data is neither rows by number nor a stream.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> rows = [{"input_ids": [5, 7, 11, 13], "labels": [5, 7, 11, 13]}] * 4
        >>> settings = LoopSettings(max_steps=2, rows_per_step=2, progress=False)
        >>> history = TrainingLoop(tiny_llama(), rows, settings=settings).fit()
        >>> [row["step"] for row in history]
        [1, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Rows | Any,
        *,
        settings: LoopSettings,
        collate: Callable[[list[Any]], Batch] = collate_packed,
        eval_data: Rows | None = None,
        penalties: Sequence[Penalty] = (),
        callbacks: Sequence[Callback] = (),
        loss: LossFunction = causal_lm_loss,
        tokenizer: Any = None,
    ) -> None:
        check_run(model, train_data, eval_data, settings)
        self.model, self.train_data, self.eval_data = model, train_data, eval_data
        self.settings, self.collate, self.loss, self.tokenizer = settings, collate, loss, tokenizer
        self.called_model = compiled(model, settings.compile)  # what a loss calls: the model, compiled or as it is
        self.stream = StreamRows(train_data) if is_stream(train_data) else None
        self.ranks = Ranks(model)
        self.penalties = list(penalties)
        self.callbacks = watchers(self.penalties, callbacks, show=settings.progress and self.ranks.main)
        self.history = History()
        self.step, self.evaluated, self.stopped = 0, 0, ""  # steps done, the last one evaluated, why it ended early
        self.total_steps = steps_in_all(settings, train_data)
        self.rows_per_micro_batch = settings.rows_per_micro_batch or -(-settings.rows_per_step // self.ranks.world)
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.keeper, self.signals = Keeper(), StopSignals()  # of checkpoints; of what asks the run to stop

    def configure_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return (optimizer, learning-rate scheduler): AdamW over what requires a gradient, the settings' schedule."""
        return adamw_with_schedule(self.model, self.settings, self.total_steps)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return all batches of one optimizer step, those of every process: a function of (seed, step) alone.

        Args:
            step: which optimizer step, from 0.
        """
        in_step, size = self.settings.rows_per_step, self.rows_per_micro_batch
        if self.stream is not None:
            rows = self.stream.take(step, in_step)
        else:
            rows = fetch_rows(self.train_data, self.row_indices(step), seed=self.settings.seed, first=step * in_step)
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def row_indices(self, step: int) -> list[int]:
        """Return which rows of the data make up step `step`: the next ones of an endless chain of shuffled epochs."""
        run, length = self.settings, len(self.train_data)
        return rows_of_step(step, length=length, size=run.rows_per_step, seed=run.seed, epochs=run.epochs)

    def prepare_batch(self, batch: Batch) -> Batch:
        """Return the batch on the model's device."""
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets `compute_loss` takes its mean; the loss's own count.

        Raises:
            TypeError: the loss has no `count_targets`; give it one, or override this method.
        """
        return targets_of(self.loss, batch)

    def compute_loss(self, model: nn.Module, batch: Batch) -> LossResult:
        """Return the mean loss over `count_targets(batch)` targets, or (mean loss, named parts to log)."""
        return self.loss(model, batch)

    def penalty(self) -> Tensor | None:
        """Return the sum of the penalties, a scalar, or None where there are none; called once per optimizer step."""
        return sum_of_penalties(self.penalties, self.model)

    def accumulate_gradients(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Leave in `.grad` the gradient of the mean loss over all targets of `batches`, plus the penalty's.

        Of several processes each computes its share, and all get the whole gradient. Earlier gradients are dropped; the
        model's train or eval mode stays. Works without `fit`.

        Returns:
            The named means: "loss", the loss's parts, "penalty" where there is one (tensors), and "targets", the count;
            under fp16 "overflow", 1 where the scaled gradient was not finite.

        Raises:
            ValueError: no batch has a target (all labels -100); the loss is no scalar with a gradient; or, at the first
                step, no gradient reaches a parameter that an adapter trains.
        """
        counts = [self.count_targets(batch) for batch in batches]
        total = total_of(counts, step=self.step + 1)
        drop_gradients(self.model, self.scaler)
        metrics: dict[str, Any] = {}
        with self.ranks.together(self.model, metrics):
            for batch, count in self.ranks.share(batches, counts):
                with autocast(self.device, self.settings.precision):
                    loss, parts = loss_and_parts(self.compute_loss(self.called_model, self.prepare_batch(batch)))
                self.scaler.scale(loss * (count / total)).backward()
                add_share(metrics, {"loss": loss, **parts}, count / total)
        if self.scaler.is_enabled():
            metrics["overflow"] = unscale(self.model, self.optimizer, self.scaler).float()
        if self.step == 0:
            check_gradients(self.model)
        self.means = metrics  # for callbacks: of the step so far, over all micro-batches and processes
        self._emit("on_task_gradients")
        if (penalty := self.penalty()) is not None:
            scalar(penalty, "penalty()").backward()
            metrics["penalty"] = penalty.detach()
        return metrics | {"targets": total}

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to `clip_norm` where they exceed it; return their norm from before, a scalar."""
        return clip_gradients(self.model, self.settings.clip_norm)

    def training_step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Take ONE OPTIMIZER STEP and return its metrics (elsewhere the name means one micro-batch).

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; no weight has changed.
            LossSpikeError: the loss is far above the recent ones, where the settings look at that.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        metrics = within_memory(self, batches)
        self._emit("on_before_optimizer_step")
        metrics = plain_numbers(metrics | {"grad_norm": self.clip_gradients()})
        try:
            check_finite(self.model, metrics, step=self.step + 1, scale=self.scaler.get_scale())
            check_spike(self.history, metrics.get("loss", 0.0), self.settings.spike_factor, step=self.step + 1)
        except (NonFiniteError, LossSpikeError) as error:
            pass_over(self.history, self.settings.on_bad_step, error)
            return metrics | {"learning_rate": learning_rate, "skipped": 1}
        self.scaler.step(self.optimizer)  # under fp16 it passes over a step whose scaled gradient overflowed
        self.scaler.update()
        if not metrics.get("overflow"):
            self.scheduler.step()
        return metrics | {"learning_rate": learning_rate}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the means over `eval_data`, names with "eval_" before them; only sums and counts are kept.

        Raises:
            ValueError: there is no `eval_data`, or none of it has a target.
            NonFiniteError: a mean is NaN or infinite.
        """
        if self.eval_data is None:
            raise ValueError("there is nothing to evaluate on: give the loop eval_data")
        return {f"eval_{name}": mean for name, mean in evaluation_means(self).items()}

    def eval_step(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (sums, counts) of one batch, by name: the loss and its parts, summed over the batch's targets."""
        count = self.count_targets(batch)
        if count == 0:
            return {}, {}
        with autocast(self.device, self.settings.precision):
            loss, parts = loss_and_parts(self.compute_loss(self.called_model, self.prepare_batch(batch)), trained=False)
        values = {"loss": loss, **parts}
        return {name: value * count for name, value in values.items()}, dict.fromkeys(values, count)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and JSON values. A subclass with state adds its own entries."""
        return run_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: the state is of another model, data set or run; the sentence names the first difference.
        """
        take_back(self, state)

    @cached_property
    def _configured(self) -> tuple[torch.optim.Optimizer, Any]:
        self.ranks.settle(self.model)
        return check_configured(self.configure_optimizer())

    optimizer = property(lambda self: self._configured[0], doc="The optimizer.")
    scheduler = property(lambda self: self._configured[1], doc="The learning-rate scheduler.")

    def fit(self, *, resume: bool = False, strict: bool = False) -> History:
        """Run the steps not yet done and return the history.

        A first SIGTERM or SIGINT lets the step end, saves, and leaves: with SystemExit(143) or KeyboardInterrupt.

        Args:
            resume: go on from the newest whole checkpoint in the settings' folder; with none there, start afresh.
            strict: raise where a newer checkpoint is damaged, instead of skipping it with a line that says why.

        Raises:
            CheckpointError: the folder holds a run already and `resume` is False, or holds another run's.
            NonFiniteError: the loss or a gradient is NaN or infinite.
            LossSpikeError: the loss is far above the recent ones, where the settings look at that.
            ValueError: a step has no target, or packed documents see each other in this model.
        """
        self.keeper.start(self, resume=resume, strict=strict)
        self.ranks.start_equal(self.model)
        try:
            with self.signals, train_mode(self.model), recomputing(self.model, self.settings.activation_checkpointing):
                self._run()
        except BaseException as error:
            try:
                self.keeper.finish(self, error)
            finally:
                self._emit("on_exception", error)
            raise
        return self.history

    def save(self) -> Path | None:
        """Write a checkpoint of the present step into the settings' folder; return its path, None without a folder.

        Of several processes all must call it. Under `background_save` it may still be being written.
        """
        return self.keeper.save(self)

    def stop(self, reason: str) -> None:
        """End the run after this step, as if it were the last; a run that is resumed stays ended."""
        self.stopped = reason

    def _run(self) -> None:
        run = self.settings
        ahead = BatchesAhead(self.micro_batches, seed=run.seed, workers=run.data_workers, end=self.total_steps)
        if self._goes_on():
            try_out(self, ahead.get(self.step, self.rows_per_micro_batch))
        self._emit("on_fit_start")
        if self._evaluation_due() and self.evaluated != self.step:
            self._look(self.history[-1])  # a signal had come between that step and its evaluation
            self.keeper.record_anew(self.history)
        self.leave_if_told()
        while self._goes_on():
            self._emit("on_step_start")
            began = time.perf_counter()
            batches = ahead.get(self.step, self.rows_per_micro_batch)
            seed_everything(run.seed, "step", self.step)
            metrics = self.training_step(batches)
            self.step += 1
            tokens, seconds = sum(map(real_tokens, batches)), time.perf_counter() - began
            row = plain_numbers({"step": self.step, **metrics, "tokens": tokens, "seconds": seconds})
            self.history.append(row)
            self._emit("on_step_end", row)
            self._look(row)
            self.keeper.record(row)
            self.leave_if_told()
        self.keeper.finish(self)
        self._emit("on_fit_end")

    def _look(self, row: dict[str, Any]) -> None:
        """Evaluate and save where that is due after the step that `row` is of."""
        if self._evaluation_due():
            row.update(plain_numbers(self.evaluate()))
            self.evaluated = self.step
            self._emit("on_eval_end", row)
        row.update(plain_numbers(row))  # callbacks may have added to it
        every = self.settings.save_every
        if not self._goes_on() or self.keeper.wanted or (every and self.step % every == 0):
            self.save()

    def _goes_on(self) -> bool:
        return self.step < self.total_steps and not self.stopped

    def _evaluation_due(self) -> bool:
        every = self.settings.eval_every
        at_this_step = not self._goes_on() or (every is not None and self.step % every == 0)
        return self.eval_data is not None and self.step > 0 and at_this_step

    def leave_if_told(self) -> None:
        """Leave `fit` where a signal has told any of the processes to.

        Raises:
            Told: also a KeyboardInterrupt after SIGINT, a SystemExit after SIGTERM.
        """
        if self.signals.watching and (number := max(self.ranks.exchange(self.signals.received))):
            raise told_by(number, self.step, self.settings.folder)

    def _emit(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)
