"""Watch a run overfit: the same measurements on training rows and on held-out rows, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from llmtune.forgetting.likelihood import predict
from llmtune.losses.chunked import at_least_float32, default_chunk_rows
from llmtune.metrics.calibration import CalibrationBins, top_predictions
from llmtune.modules import unwrap
from llmtune.training.best import check_evaluates
from llmtune.training.checks import check_rows
from llmtune.training.evaluation import Totals, add_sums, mean_by_name, share_of
from llmtune.training.part_trains import check_whole
from llmtune.training.randomness import derive_seed
from llmtune.training.switches import autocast
from llmtune.types import Batch, Callback, Rows

PredictionsOf = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

MEASURES = ("nll", "accuracy", "calibration_error")


class GeneralizationGap(Callback):
    """Add to each evaluation the same means of training rows, and the gaps; and how well predictions are calibrated.

    "eval_train_loss" (and so on for each part of the loss), of training rows
    "eval_loss_gap", eval_loss - eval_train_loss
    "eval_nll", "eval_accuracy", "eval_calibration_error", of the predictions for eval_data, and the three with
    "eval_train_..." of those for training rows
    "eval_nll_gap", eval_nll - eval_train_nll, and "eval_accuracy_gap", eval_train_accuracy - eval_accuracy

    A gap grows as a run overfits. Both sides are measured by `loop.eval_step` with the same weights: in eval mode,
    without penalties, with those weights that the evaluation is of. The loss a step reports is no such measure: it is
    under dropout and noise, and of weights that had not seen these rows; before the second epoch that is no training
    loss at all. "eval_loss" is the loss as the loop has it, with label smoothing where it smooths, on both sides;
    "nll" is the plain mean -log p(target).

    The numbers are part of the evaluation itself, so `EarlyStopping`, `KeepBest`, `LogTo` and the CSV have them by
    name, in whatever order callbacks are given. The run is bit for bit the run without it, resumed or not: training
    rows are a sample drawn from the run's seed, the same at each evaluation. Only sums and counts are kept, exchanged
    between processes; of a language model's logits a few labelled rows at a time. An evaluation costs that of eval_data
    and of the training rows twice, or with `predictions=None` once.

    Args:
        rows: the training side: how many rows of `train_data` to draw, or the rows themselves, which a stream needs;
            left out, as many as eval_data has, or all.
        predictions: "labels": of the places that carry a label, classes [B] or [B, T] or tokens, shifted for a causal
            model. Or a function (model, batch) -> (logits [..., C], targets [...], -100 for none). Or None: the loss
            alone.
        bins: of the calibration error (see `llmtune.metrics.expected_calibration_error`).

    Raises:
        ValueError: a number is out of its range; or, at the start of the run, there is nothing to evaluate on, or no
            training rows to draw.
        TypeError: `predictions` is none of the three, or `rows` neither a number nor rows.

    Example:
        >>> from llmtune.testing.loop import uneven_rows
        >>> from llmtune.testing.models import tiny_llama
        >>> from llmtune.training import LoopSettings, TrainingLoop
        >>> settings = LoopSettings(max_steps=20, rows_per_step=5, learning_rate=0.01, progress=False)
        >>> history = TrainingLoop(
        ...     tiny_llama(), uneven_rows(5), settings=settings, eval_data=uneven_rows(5, seed=1),
        ...     callbacks=[GeneralizationGap()],
        ... ).fit()
        >>> history[-1]["eval_loss_gap"] > 1, history[-1]["eval_train_accuracy"] > history[-1]["eval_accuracy"]
        (True, True)
    """

    def __init__(
        self,
        *,
        rows: int | Rows | None = None,
        predictions: Literal["labels"] | PredictionsOf | None = "labels",
        bins: int = 15,
    ) -> None:
        if isinstance(rows, int):
            check_whole("rows", rows)
        elif rows is not None:
            check_rows(rows, "rows")
        if predictions not in ("labels", None) and not callable(predictions):
            raise TypeError(f'predictions must be "labels", None, or a function of (model, batch); got {predictions!r}')
        CalibrationBins(bins)  # checks it
        self.rows, self.predictions, self.bins = rows, predictions, bins

    def on_fit_start(self, loop: Any) -> None:
        """Check that there will be evaluations and that there are training rows.

        Raises:
            ValueError: there is nothing to evaluate on; or no training rows to draw, or too few.
        """
        check_evaluates(loop, "GeneralizationGap")
        self._training_rows(loop)

    def during_evaluation(self, loop: Any, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the means of the training rows, of the predictions, and the gaps, by name.

        Raises:
            ValueError: no training row that is looked at has a target; the predictions do not fit the loss; or the loss
                has a part of a name that is measured here.
        """
        watched = MEASURES if self.predictions is not None else ()
        if twice := [name for name in watched if name in means]:
            raise ValueError(
                f'GeneralizationGap measures "{twice[0]}", which the loss reports as a part of its own: rename the '
                "part, or give predictions=None to compare the loss and its parts alone"
            )
        train = self._measure(loop, self._training_rows(loop), loss=True)
        held_out = {**means, **(self._measure(loop, loop.eval_data, loss=False) if watched else {})}
        found = {f"train_{name}": value for name, value in train.items()}
        found |= {name: value for name, value in held_out.items() if name not in means}
        for name in ("loss", "nll"):
            if name in train and name in held_out:
                found[f"{name}_gap"] = held_out[name] - train[name]
        if self.predictions is not None:
            found["accuracy_gap"] = train["accuracy"] - held_out["accuracy"]
        return found

    def _training_rows(self, loop: Any) -> Rows:
        if self.rows is not None and not isinstance(self.rows, int):
            return self.rows
        if loop.stream is not None:
            raise ValueError(
                "train_data is a stream, from which GeneralizationGap cannot draw rows without taking them from the "
                "run: give it rows=, a list of training rows"
            )
        have = len(loop.train_data)
        count = self.rows if self.rows is not None else min(len(loop.eval_data), have)
        if count > have:
            raise ValueError(f"GeneralizationGap is to look at {count} training rows, and train_data has {have}")
        generator = torch.Generator().manual_seed(derive_seed(loop.settings.seed, "training rows looked at"))
        return Subset(loop.train_data, sorted(torch.randperm(have, generator=generator)[:count].tolist()))

    def _measure(self, loop: Any, rows: Rows, *, loss: bool) -> dict[str, float]:
        """Return means over the rows: of what the loss sums, where asked for, and of the predictions."""
        totals: Totals = {}
        bins = CalibrationBins(self.bins)
        for batch, counts in share_of(loop, rows):
            sums, targets = loop.eval_step(batch) if loss else ({}, {})
            nll, seen = self._look(loop, batch, bins if counts else CalibrationBins(self.bins))
            if counts:
                add_sums(totals, {**sums, "nll": nll}, {**targets, "nll": seen})
        shares = loop.ranks.shares((totals, bins))
        means, together = mean_by_name(share for share, _ in shares), CalibrationBins(self.bins)
        together.merge(share for _, share in shares)
        if not means:
            what = "the training rows that GeneralizationGap looks at" if loss else "eval_data"
            raise ValueError(
                f"no row of {what} has a target: every label is ignored (-100), or none has what the loss asks for"
            )
        if self.predictions is not None:
            means |= {"accuracy": together.accuracy(), "calibration_error": together.error()}
        return means

    def _look(self, loop: Any, batch: Batch, bins: CalibrationBins) -> tuple[float, int]:
        """Count a batch's predictions in `bins` and return (the sum of -log p(target), over how many)."""
        nll, seen = 0.0, 0
        if self.predictions is None:
            return nll, seen
        with autocast(loop.device, loop.settings.precision):
            for logits, targets in self._predictions(loop, loop.prepare_batch(batch)):
                bins.add(*top_predictions(logits, targets))
                z, t = at_least_float32(logits).flatten(0, -2), targets.flatten()
                nll += float(F.cross_entropy(z, t, reduction="sum"))
                seen += int((t != -100).sum())
        return nll, seen

    def _predictions(self, loop: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        if callable(self.predictions):
            yield self.predictions(loop.called_model, batch)
            return
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim not in (1, 2):
            came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
            raise ValueError(
                f"GeneralizationGap reads predictions at integer labels, [B] or [B, T]; got {came}: give it "
                "predictions=, a function of (model, batch), or predictions=None to compare the loss alone"
            )
        found, wanted = predict(unwrap(loop.model), batch), loop.count_targets(batch)
        if len(found.labels) != wanted:
            raise ValueError(
                f"GeneralizationGap finds predictions at {len(found.labels)} labels of a batch, and the loss counts "
                f"{wanted} targets there: give it predictions=, a function of (model, batch), or predictions=None to "
                "compare the loss alone"
            )
        classes = found.rows.shape[1] if found.head is None else found.head.classes
        size = default_chunk_rows(found.rows.new_empty(classes, 0), buffers=3)
        for rows, targets in zip(found.rows.split(size), found.labels.split(size), strict=True):
            yield found.logits(rows), targets
