"""One run of `overfitting.py`: train once, and score."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from overfitting_data import Rows, load, predictions
from overfitting_recipes import Recipe, train
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging


@dataclass(frozen=True)
class Job:
    """Which run: the data set, the recipe's title and its settings, examples a class, and the seed."""

    data: str
    title: str
    shots: int
    seed: int
    recipe: Recipe
    dev: bool = False  # scored on rows held out of the training file

    @property
    def file(self) -> str:
        """The name of the run's file."""
        return f"{self.data}-{self.title}-{self.shots}-{self.seed}.json".replace(" ", "_")

    @property
    def settings(self) -> dict[str, Any]:
        """What the recipe has beyond plain fine-tuning."""
        plain = asdict(Recipe())
        return {key: value for key, value in asdict(self.recipe).items() if value != plain[key] or key == "rate"}


def scores(model: nn.Module, rows: Rows) -> dict[str, float]:
    """Return accuracy, macro-F1 and the mean loss over all rows."""
    logits, labels = predictions(model, rows)
    found, C = logits.argmax(-1), logits.shape[-1]
    hits = torch.bincount(labels[found == labels], minlength=C).float()
    both = torch.bincount(labels, minlength=C) + torch.bincount(found, minlength=C)
    f1 = (2 * hits / both.clamp(min=1))[both > 0]  # as scikit-learn's: over the classes that are there or found
    return {
        "accuracy": (found == labels).float().mean().item(),
        "macro_f1": f1.mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def run(job: Job, models: Path, data: Path, device: str) -> dict[str, Any]:
    """Train once and return what came of it."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.process_time()
    rows = load(models, data, job.data, shots=job.shots, seed=job.seed, dev=job.dev)
    model = train(models, job.data, job.recipe, rows, job.seed, device)
    seconds = time.process_time() - began
    scored = {f"test_{key}": value for key, value in scores(model, rows.test).items()}
    some = rows.train[:: max(1, len(rows.train) // 400)]
    seen = {f"train_{key}": value for key, value in scores(model, some).items()}
    numbers = {key: round(value, 5) for key, value in {**scored, **seen, "seconds": seconds}.items()}
    where = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    return {"data": job.data, "recipe": job.title, "shots": job.shots, "seed": job.seed, **numbers, **job.settings,
            **where}  # fmt: skip
