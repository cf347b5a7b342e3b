"""Whether EWC's best strength depends on the size of the batches that its importances are taken from.

    python benchmarks/ewc_batches.py --models MODELS --data DATA [--seeds 100] [--minutes 60] [--jobs 2] [--write]

The importance of a weight is the mean over examples of its squared gradient. Some public implementations square the
gradient of a batch's mean loss instead, which is about so many times smaller as there are rows in a batch. Three tasks
of the stream "clinc150" of `forgetting.py`, scored on training rows that no run learns from, with importances of 96
rows by both ways and a grid of strengths. `--write` prints the table and puts it into results/ewc-batches.json, with
how far the importances of single examples, taken in batches of 1, 8 and 32, are from one another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, add_run_options, machine, run_jobs
from forgetting import without_task
from forgetting_data import make_model, stream
from torch import Tensor, nn
from transformers.utils import logging

from llmtune.data import collate_padded
from llmtune.forgetting import EWC, anchor_of, diagonal_fisher
from llmtune.losses import classification_loss
from llmtune.modules import eval_mode
from llmtune.training import LoopSettings, Task, TaskMethod, TaskRun, TaskSequence
from llmtune.types import Batch

FOLDER, FILE = RESULTS / "ewc-batches", RESULTS / "ewc-batches.json"
STRENGTHS = (1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7)
BATCHES = (1, 8, 32)
TASKS, STEPS, EXAMPLES = 3, 60, 96


def squared_batch_means(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the mean over batches of the squared gradient of the batch's mean loss, as is done elsewhere."""
    found: dict[str, Tensor] = {}
    count = 0
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with eval_mode(model):
        for batch in batches:
            gradients = torch.autograd.grad(classification_loss(model, batch), list(trained.values()))
            for name, gradient in zip(trained, gradients, strict=True):
                found[name] = found.get(name, 0) + gradient.square()
            count += 1
    return {name: total / count for name, total in found.items()}


def single_examples(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradient: the library's."""
    return diagonal_fisher(model, batches, kind="empirical")


class Held(TaskMethod):
    """EWC with the sum of all tasks' importances and the newest weights as the anchor."""

    def __init__(self, rows: int, strength: float, *, squared_means: bool) -> None:
        self.rows, self.strength = rows, strength
        self.importances = squared_batch_means if squared_means else single_examples
        self.total: dict[str, Tensor] = {}
        self.anchor: Any = None
        self.apart = 0.0  # the largest difference between importances of batches of 1, 8 and 32, of the largest

    def before_task(self, run: TaskRun) -> None:
        """Add the penalty."""
        if run.index:
            run.penalties.append(EWC(self.total, self.anchor, self.strength))

    def after_task(self, run: TaskRun) -> None:
        """Take the importances."""
        places = torch.randperm(len(run.task.train))[:EXAMPLES].tolist()
        rows = [run.task.train[place] for place in places]

        def taken(size: int) -> dict[str, Tensor]:
            batches = [collate_padded(rows[i : i + size]) for i in range(0, len(rows), size)]
            return self.importances(run.model, batches)

        new = taken(self.rows)
        if run.index == 0 and self.importances is single_examples:
            for other in (taken(size) for size in BATCHES if size != self.rows):
                self.apart = max(self.apart, *(float((new[n] - other[n]).abs().max() / new[n].max()) for n in new))
        self.total = {name: value + self.total.get(name, 0) for name, value in new.items()}
        self.anchor = anchor_of(run.model)


def run(job: tuple[str, float, int], models: Path, data: Path) -> dict[str, Any]:
    """Train three tasks and return the scores."""
    kind, strength, seed = job
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stages = [without_task(one, own=True) for one in stream(models, data, "clinc150", 0, test=100, dev=True)[:TASKS]]
    settings = LoopSettings(
        max_steps=STEPS, rows_per_step=16, learning_rate=1e-4, warmup_steps=6, weight_decay=0.01, precision="bf16",
        seed=seed, progress=False,
    )  # fmt: skip
    held = Held(int(kind.split()[-1]), strength, squared_means=kind.startswith("squared"))
    history = TaskSequence(
        make_model(models, stages, seed), [Task(one.name, one.train, one.test) for one in stages], settings=settings,
        methods=[held], collate=collate_padded, loss=classification_loss, score="accuracy", scored="seen",
    ).run()  # fmt: skip
    last = history.scores[-1]
    return {"kind": kind, "strength": strength, "seed": seed, "accuracy": sum(last) / len(last), "apart": held.apart}


KINDS = ("single examples 1", *(f"squared means {rows}" for rows in BATCHES[1:]))


def _file(kind: str, strength: float, seed: int) -> Path:
    return FOLDER / f"{kind.replace(' ', '-')}-{strength:g}-{seed}.json"


def keep(job: tuple[str, float, int], found: dict[str, Any]) -> None:
    """Write a run's file."""
    _file(*job).write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(*job, found["accuracy"], found["apart"], flush=True)


def write() -> None:
    """Print the table, and keep it."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    table: dict[str, dict[str, float]] = {}
    print("| importances of | " + " | ".join(f"{strength:g}" for strength in STRENGTHS) + " | best strength |")
    print("|---" * (len(STRENGTHS) + 2) + "|")
    for kind in KINDS:
        row = {}
        for strength in STRENGTHS:
            some = [one["accuracy"] for one in found if (one["kind"], one["strength"]) == (kind, strength)]
            row[f"{strength:g}"] = round(100 * sum(some) / len(some), 1) if some else float("nan")
        best = max(row, key=lambda strength: row[strength])
        title = f"squared means of {kind.split()[-1]} rows" if kind.startswith("squared") else "single examples"
        print(f"| {title} | " + " | ".join(f"{value:.1f}" for value in row.values()) + f" | {best} |")
        table[kind] = row
    apart = max(one["apart"] for one in found)
    print(f"\nimportances of single examples in batches of 1, 8 and 32 differ by {apart:.1e} of the largest at most")
    result = {"machine": machine(), "seeds": sorted({one["seed"] for one in found}), "accuracy": table, "apart": apart}
    FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run what is missing; print a line a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_run_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    options = parser.parse_args()
    if options.write:
        write()
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = [(kind, strength, seed) for seed in options.seeds for kind in KINDS for strength in STRENGTHS]
    wanted = [job for job in wanted if not _file(*job).is_file()]
    one = partial(run, models=options.models, data=options.data)
    run_jobs(wanted, one, keep, minutes=options.minutes, processes=options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
