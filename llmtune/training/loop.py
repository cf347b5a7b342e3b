"""The training loop: one class to read in a sitting and subclass where your method differs.

One optimizer step is `training_step(batches)`: `accumulate_gradients` leaves the gradients, `clip_gradients` bounds
them, the optimizer applies them. Override the method that your idea changes; the others need no care.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.reach import check_gradients
from llmtune.data.collate import collate_packed
from llmtune.errors import NonFiniteError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.packed import check_documents_apart
from llmtune.modules import eval_mode, train_mode
from llmtune.training.checks import (
    check_finite,
    check_one_process,
    check_rows,
    check_trainable,
    checked_penalty,
    loss_and_parts,
)
from llmtune.training.history import History
from llmtune.training.optimizer import adamw_with_schedule
from llmtune.training.progress import Progress
from llmtune.training.randomness import fixed_randomness, rows_of_step, seed_everything
from llmtune.training.resume import check_can_save, load_newest, refuse_used_folder, run_state, save_run, take_back
from llmtune.training.settings import LoopSettings
from llmtune.training.sums import add_share, clip_gradients, gradient_norm, mean_by_name, real_tokens
from llmtune.types import Batch, Callback, LossFunction, LossResult, Penalty, Rows


class TrainingLoop:
    """Train a model on rows of data; every method may be overridden.

    The gradient of a step is that of the mean loss over all the step's targets, whatever the split into micro-batches
    and however unevenly targets are spread over them: a loss is an ordinary mean, and the loop does all scaling.

    Args:
        model: the module to train; only parameters that require a gradient are touched. It stays on its device.
        train_data: rows, a sequence or map-style data set of dicts ("input_ids", "labels", ...).
        settings: a `LoopSettings`.
        collate: makes a batch of a list of rows: `collate_packed`, `collate_padded`, or your own.
        eval_data: rows to evaluate on, or None.
        penalties: functions of the model added to the loss whatever the batch, once per optimizer step.
        callbacks: `Callback` objects, called in this order, after penalties that are callbacks themselves.
        loss: a `LossFunction`: `loss(model, batch)` is a mean over `loss.count_targets(batch)` targets.

    Raises:
        ValueError: the data is empty, or no parameter of the model requires a gradient.
        TypeError: the data has no length or cannot be indexed.

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
        train_data: Rows,
        *,
        settings: LoopSettings,
        collate: Callable[[list[Any]], Batch] = collate_packed,
        eval_data: Rows | None = None,
        penalties: Sequence[Penalty] = (),
        callbacks: Sequence[Callback] = (),
        loss: LossFunction = causal_lm_loss,
    ) -> None:
        check_rows(train_data, "train_data")
        if eval_data is not None:
            check_rows(eval_data, "eval_data")
        elif settings.eval_every is not None:
            raise ValueError(f"eval_every={settings.eval_every} needs eval_data; none was given")
        check_trainable(model)
        self.model, self.train_data, self.eval_data = model, train_data, eval_data
        self.settings, self.collate, self.loss = settings, collate, loss
        self.penalties = list(penalties)
        own = [Progress()] if settings.progress else []
        watching = [*(p for p in self.penalties if isinstance(p, Callback)), *callbacks, *own]
        self.callbacks = list({id(watcher): watcher for watcher in watching}.values())  # each once
        self.history = History()
        self.step = 0
        self.total_steps: int = settings.max_steps or math.ceil(
            (settings.epochs or 0) * len(train_data) / settings.rows_per_step
        )
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self._optimizer: tuple[torch.optim.Optimizer, Any] | None = None

    def configure_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return (optimizer, learning-rate scheduler): AdamW over what requires a gradient, the settings' schedule."""
        return adamw_with_schedule(self.model, self.settings, self.total_steps)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the batches of one optimizer step: a pure function of (seed, step), which makes resuming exact.

        Args:
            step: which optimizer step, from 0.
        """
        rows = [self.train_data[index] for index in self.row_indices(step)]
        size = self.settings.rows_per_micro_batch or len(rows)
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
        count = getattr(self.loss, "count_targets", None)
        if count is None:
            raise TypeError(
                f"the loop must know over how many targets {self.loss!r} takes its mean: give it a "
                "count_targets(batch) method, or override TrainingLoop.count_targets"
            )
        return int(count(batch))

    def compute_loss(self, model: nn.Module, batch: Batch) -> LossResult:
        """Return the mean loss over `count_targets(batch)` targets, or (mean loss, named parts to log)."""
        return self.loss(model, batch)

    def penalty(self) -> Tensor | None:
        """Return the sum of the penalties, a scalar, or None where there are none; called once per optimizer step."""
        if not self.penalties:
            return None
        return torch.stack([checked_penalty(penalty, self.model) for penalty in self.penalties]).sum()

    def accumulate_gradients(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Leave in `.grad` the gradient of the mean loss over all targets of `batches`, plus the penalty's.

        Earlier gradients are dropped. Works without `fit`, and leaves the model's train or eval mode alone.

        Returns:
            The named means: "loss", the loss's parts, "penalty" where there is one (tensors on the model's device), and
            "targets", the count; under fp16 "overflow", 1 where the scaled gradient was not finite.

        Raises:
            ValueError: no batch has a target (all labels -100); the loss is no scalar with a gradient; or, at the first
                step, no gradient reaches a parameter that an adapter trains.
        """
        counts = [self.count_targets(batch) for batch in batches]
        total = sum(counts)
        if total == 0:
            raise ValueError(
                f"step {self.step + 1} has no target to learn from: in its {len(batches)} micro-batches every label is "
                f"ignored (-100). Check the labels of rows {self.row_indices(self.step)[:8]}, or drop such rows"
            )
        self.model.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()  # so that gradients may be taken more than once a step
        metrics: dict[str, Any] = {}
        for batch, count in zip(batches, counts, strict=True):
            if count == 0:
                continue
            with self._autocast():
                loss, parts = loss_and_parts(self.compute_loss(self.model, self.prepare_batch(batch)))
            self.scaler.scale(loss * (count / total)).backward()
            add_share(metrics, {"loss": loss, **parts}, count / total)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            metrics["overflow"] = (~gradient_norm(self.model).isfinite()).float()
        if self.step == 0:
            check_gradients(self.model)
        self._emit("on_task_gradients")
        penalty = self.penalty()
        if penalty is not None:
            penalty.backward()
            metrics["penalty"] = penalty.detach()
        return metrics | {"targets": total}

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to `clip_norm` where they exceed it; return their norm from before, a scalar."""
        return clip_gradients(self.model, self.settings.clip_norm)

    def training_step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Take ONE OPTIMIZER STEP and return its metrics (elsewhere the name means one micro-batch).

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; no weight has changed.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        metrics = self.accumulate_gradients(batches)
        self._emit("on_before_optimizer_step")
        metrics["grad_norm"] = self.clip_gradients()
        metrics = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        check_finite(self.model, metrics, step=self.step + 1, scale=self.scaler.get_scale())
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
        rows, size = self.eval_data, self.settings.rows_per_micro_batch or self.settings.rows_per_step
        with eval_mode(self.model), fixed_randomness():  # looking changes nothing
            means = mean_by_name(
                self.eval_step(self.collate([rows[i] for i in range(start, min(start + size, len(rows)))]))
                for start in range(0, len(rows), size)
            )
        if not means:
            raise ValueError("no row of eval_data has a target: every label is ignored (-100)")
        if not all(map(math.isfinite, means.values())):
            raise NonFiniteError(f"step {self.step}: the evaluation gives {means}")
        return {f"eval_{name}": mean for name, mean in means.items()}

    def eval_step(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (sums, counts) of one batch, by name: the loss and its parts, summed over the batch's targets."""
        count = self.count_targets(batch)
        if count == 0:
            return {}, {}
        with self._autocast():
            loss, parts = loss_and_parts(self.compute_loss(self.model, self.prepare_batch(batch)), trained=False)
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

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; `configure_optimizer` is called when it is first needed."""
        return self._configured()[0]

    @property
    def scheduler(self) -> Any:
        """The learning-rate scheduler."""
        return self._configured()[1]

    def fit(self, *, resume: bool = False) -> History:
        """Run the steps not yet done and return the history.

        Args:
            resume: go on from the newest whole checkpoint in the settings' folder; with none there, start afresh.

        Raises:
            CheckpointError: the folder holds a run already and `resume` is False, or holds another run's.
            NonFiniteError: the loss or a gradient is NaN or infinite.
            ValueError: a step has no target, or packed documents see each other in this model.
        """
        check_one_process()
        if resume:
            load_newest(self)
        else:
            refuse_used_folder(self.settings.folder)
            seed_everything(self.settings.seed)
        check_can_save(self)
        try:
            with train_mode(self.model):
                self._run()
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide what went wrong
                self._write_history()
            self._emit("on_exception", error)
            raise
        return self.history

    def save(self) -> Path | None:
        """Write a checkpoint of the present step into the settings' folder; return its path, None without a folder."""
        path = save_run(self)
        if path is not None:
            self._write_history()
            self._emit("on_save", path)
        return path

    def _run(self) -> None:
        settings = self.settings
        if self.step < self.total_steps:
            with fixed_randomness():  # whatever the trial draws, the first step finds the random state untouched
                check_documents_apart(self.model, self.prepare_batch(self.micro_batches(self.step)[0]))
        self._emit("on_fit_start")
        while self.step < self.total_steps:
            self._emit("on_step_start")
            began = time.perf_counter()
            batches = self.micro_batches(self.step)
            metrics = self.training_step(batches)
            self.step += 1
            row = {"step": self.step, **metrics, "tokens": sum(map(real_tokens, batches))}
            row["seconds"] = time.perf_counter() - began
            last = self.step == self.total_steps
            self.history.append(row)
            self._emit("on_step_end", row)
            if self.eval_data is not None and (last or (settings.eval_every and self.step % settings.eval_every == 0)):
                row.update(self.evaluate())
                self._emit("on_eval_end", row)
            if last or (settings.save_every and self.step % settings.save_every == 0):
                self.save()
        self._emit("on_fit_end")

    def _configured(self) -> tuple[torch.optim.Optimizer, Any]:
        if self._optimizer is None:
            self._optimizer = self.configure_optimizer()
        return self._optimizer

    def _autocast(self) -> Any:
        dtype = torch.float16 if self.settings.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.settings.precision != "float32")

    def _emit(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def _write_history(self) -> None:
        if self.settings.folder is not None and self.history:
            self.history.to_csv(Path(self.settings.folder) / "history.csv")
