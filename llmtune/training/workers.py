"""Batches made ahead of the step that needs them, by other processes: possible because a step's are a pure function."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llmtune.training.randomness import keyed_randomness, seed_cpu
from llmtune.training.signals import ignore_in_worker
from llmtune.types import Batch


class BatchesAhead:
    """`micro_batches(step)` under randomness keyed by (seed, step), in this process or ahead of time in others.

    Without workers the process's random state on the CPU is left at what the making of the batches made of it.

    Args:
        micro_batches: step to batches; with workers it must depend on the step alone.
        seed: of the run.
        workers: processes; 0 makes the batches here, when they are asked for.
        end: steps of the run.
    """

    def __init__(self, micro_batches: Callable[[int], list[Batch]], *, seed: int, workers: int, end: int) -> None:
        self._make, self._seed, self._workers, self._end = micro_batches, seed, workers, end
        self._iterator: Iterator[list[Batch]] | None = None
        self._next, self._size = -1, 0
        self._last: list[Batch] = []

    def get(self, step: int, size: int) -> list[Batch]:
        """Return the batches of `step`.

        Args:
            step: from 0; steps in order are those that were made ahead.
            size: rows of a micro-batch; where it changes, what was made ahead is forgotten.

        Raises:
            Exception: what was raised where they were made.
        """
        if self._workers == 0:
            seed_cpu(self._seed, "batches", step)  # whoever asks seeds the step itself anew: nothing is put back
            return self._make(step)
        if step == self._next - 1 and size == self._size:
            return self._last
        if self._iterator is None or step != self._next or size != self._size:
            self._iterator = iter(self._loader(step))
        made = next(self._iterator)
        if isinstance(made, _Failed):
            raise made.error from RuntimeError(f"in a data worker:\n{made.text}")
        self._next, self._size, self._last = step + 1, size, made
        return self._last

    def _loader(self, start: int) -> Any:
        steps: Any = range(start, self._end)
        context = "fork" if sys.platform.startswith("linux") else None  # the model is not sent to each worker
        return DataLoader(
            _Steps(self._make, self._seed), batch_size=None, sampler=steps, num_workers=self._workers,
            multiprocessing_context=context, worker_init_fn=ignore_in_worker,
            generator=torch.Generator(),  # else it draws from the run's own
            collate_fn=_as_it_is,  # else it makes tensors of arrays and lists of tuples
        )  # fmt: skip


def _as_it_is(batches: list[Batch]) -> list[Batch]:
    return batches


@dataclass(frozen=True)
class _Failed:
    error: Exception
    text: str


class _Steps(Dataset[Any]):
    """The steps of a run as rows by number, for torch's loader."""

    def __init__(self, make: Callable[[int], list[Batch]], seed: int) -> None:
        self._make, self._seed, self._sent = make, seed, False

    def __getitem__(self, step: int) -> list[Batch] | _Failed:
        try:
            with keyed_randomness(self._seed, "batches", step):
                batches = self._make(step)
            if not self._sent:
                _check_sendable(batches)
                self._sent = True
            return batches
        except Exception as error:
            return _Failed(_as_sent(error), traceback.format_exc())


def _check_sendable(batches: list[Batch]) -> None:
    """Raise where batches cannot be sent: torch would wait for them for ever.

    Raises:
        TypeError: names the value.
    """
    for batch in batches:
        for name, value in batch.items():
            try:
                ForkingPickler.dumps(value) if not isinstance(value, torch.Tensor) else None
            except Exception as error:
                raise TypeError(
                    f"a batch's {name!r}, a {type(value).__name__}, cannot be sent from a data worker: {error}; set "
                    "data_workers=0, or leave it out"
                ) from error


def _as_sent(error: Exception) -> Exception:
    """Return the error, or its words in one that can be sent."""
    try:
        ForkingPickler.dumps(error)
        copy.copy(error)  # is made anew as by who receives it
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
