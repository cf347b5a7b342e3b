"""A small run with everything in it that going on after a kill could forget."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtune.data.collate import collate_padded
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


class RestlessRows:
    """Rows that come out otherwise each time: tokens swapped and added by Python's, NumPy's and torch's random state.

    Args:
        rows: how many.
    """

    def __init__(self, rows: int = 13) -> None:
        self.rows = uneven_rows(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = list(self.rows[index]["input_ids"])
        ids[random.randrange(len(ids))] = random.randrange(3, 97)
        if np.random.rand() < 0.5:
            ids.append(int(np.random.randint(3, 97)))
        ids = [int(torch.randint(3, 97, ())) if torch.rand(()) < 0.2 else token for token in ids]
        return {"input_ids": ids, "labels": [-100, *ids[1:]]}


class RememberingPenalty(Callback):
    """A penalty with state: it pulls the output head to the mean of where it has been."""

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros(97, 26), 0

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar."""
        return 0.05 * (model.get_parameter("lm_head.weight") - self.mean).square().sum()

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Take the head as it is now into the mean."""
        self.count += 1
        self.mean = self.mean + (loop.model.lm_head.weight.detach() - self.mean) / self.count

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and how many it is of."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.mean, self.count = state["mean"].clone(), int(state["count"])


def restless_run(
    folder: Path, *, kind: type[TrainingLoop] = TrainingLoop, steps: int = 11, background: bool = False
) -> TrainingLoop:
    """Return a run with dropout, random rows, accumulation, and a penalty that has state; it saves every second step.

    Args:
        folder: for its checkpoints.
        kind: the loop's class.
        steps: optimizer steps.
        background: whether checkpoints are written in a thread.
    """
    settings = LoopSettings(
        max_steps=steps, rows_per_step=4, rows_per_micro_batch=2, learning_rate=1e-2, folder=folder, save_every=2,
        background_save=background, progress=False,
    )  # fmt: skip
    return kind(
        tiny_gpt2(dropout=0.2), RestlessRows(), settings=settings, collate=collate_padded,
        penalties=[RememberingPenalty()],
    )  # fmt: skip
