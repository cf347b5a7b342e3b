"""What protects a real encoder that learns one task after another: MiniLM, two streams of tasks, every method.

    python benchmarks/forgetting.py --models MODELS --data DATA [--streams clinc150 five] [--methods sequential ...]
        [--orders 0 1] [--seeds 0 1 2] [--minutes 60] [--jobs 2] [--dev --with strength=100]
    python benchmarks/forgetting.py ... --write

"clinc150": CLINC150 in 10 tasks of 15 intents that share none; the task is not known when scored, so the model chooses
among all intents. "five": TREC, SNIPS, BANKING77, CLINC150, emotion; the task is known, each has its own head. "known"
is the first stream with the task known. Joint training on all rows and the frozen probe stand beside.

One JSON file a run in results/forgetting/, with the whole matrix of scores and, where the task is not known, which task
rows are taken for in the end; a run that is there is not repeated. With `--dev` training rows that no run learns from
are scored, and the runs go to results/forgetting-choice/: strengths and rates were chosen there, with the first order
and seed 100.
`--models` and `--data` as for `overfitting.py`, with snips (github.com/sonos/nlu-benchmark) beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, add_run_options, run_jobs
from forgetting_data import Classifier, Stage, make_model, stream
from forgetting_report import write
from forgetting_table import JOINT, KNOWN, METHODS
from transformers.utils import logging

from llmtune.data import collate_padded
from llmtune.losses import classification_loss
from llmtune.metrics import ContinualMatrix
from llmtune.training import LoopSettings, Task, TaskSequence

FOLDER = RESULTS / "forgetting"
STREAMS = {"clinc150": ("clinc150", False), "known": ("clinc150", True), "five": ("five", True)}
STEPS = {"clinc150": 60, "five": 100}  # a task
SCORED = {"clinc150": 100, "five": 500}  # test rows a task


@dataclasses.dataclass(frozen=True)
class Job:
    """Which run."""

    stream: str
    method: str
    order: int
    seed: int
    changes: tuple[tuple[str, Any], ...] = ()
    dev: bool = False
    tasks: int | None = None  # the first so many

    @property
    def file(self) -> str:
        """The name of the run's file."""
        changes = "".join(f"-{key}={value}" for key, value in self.changes)
        changes += "" if self.tasks is None else f"-first={self.tasks}"
        return f"{self.stream}-{self.method}-{self.order}-{self.seed}{changes}.json".replace(" ", "_")


def without_task(stage: Stage, *, own: bool) -> Stage:
    """Return the stage with the task's number taken out of its rows; with `own` training rows keep it."""
    train, test = (
        [{k: v for k, v in row.items() if k != "task"} for row in rows] for rows in (stage.train, stage.test)
    )
    return dataclasses.replace(stage, train=stage.train if own else train, test=test)


@torch.no_grad()
def taken_for(model: Classifier, stages: list[Stage]) -> list[list[float]]:
    """Return, for the rows of each task (a line), which share is said to be of a class of each task."""
    model.eval()
    lines = []
    for stage in stages:
        batches = [collate_padded(stage.test[at : at + 50]) for at in range(0, len(stage.test), 50)]
        classes = torch.cat([model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1) for batch in batches])
        tasks = model.own[:-1, classes].int().argmax(0)
        lines.append([round((tasks == number).float().mean().item(), 4) for number in range(len(stages))])
    return lines


def run(job: Job, models: Path, data: Path) -> dict[str, Any]:
    """Train through the stream and return the scores."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.process_time()
    name, known = STREAMS[job.stream]
    stages = stream(models, data, name, job.order, test=SCORED[name], dev=job.dev)[: job.tasks]
    method = METHODS[job.method]
    knobs = {**method.settings, **method.streams.get(job.stream, {}), **dict(job.changes)}
    rate = knobs.pop("rate", method.rate)
    if not known:
        stages = [without_task(stage, own=knobs.get("own", False)) for stage in stages]
    model = make_model(models, stages, job.seed)
    settings = LoopSettings(
        max_steps=STEPS[name], rows_per_step=16, learning_rate=rate, warmup_steps=STEPS[name] // 10,
        weight_decay=0.01, precision="bf16", seed=job.seed, progress=False,
    )  # fmt: skip
    tasks = [Task(stage.name, stage.train, stage.test) for stage in stages]
    if job.method in JOINT:
        train, test = ([row for stage in stages for row in getattr(stage, part)] for part in ("train", "test"))
        tasks = [Task("all", train, test)]
        settings = dataclasses.replace(settings, max_steps=STEPS[name] * len(stages) * knobs.get("times", 1))
    sequence = TaskSequence(
        model, tasks, settings=settings, methods=method.make(stages, knobs), collate=collate_padded,
        loss=classification_loss, score="accuracy", scored="seen",
    )  # fmt: skip
    scores = [[score and round(score, 4) for score in row] for row in sequence.run().scores]
    found = {"stream": job.stream, "method": job.method, "order": job.order, "seed": job.seed, "rate": rate, **knobs,
             "seconds": round(time.process_time() - began, 1), "scores": scores}  # fmt: skip
    if job.method in JOINT:
        return found | {"accuracy": scores[0][0]}
    matrix = ContinualMatrix(scores)
    found |= {"accuracy": round(matrix.accuracy, 4), "forgetting": round(matrix.forgetting, 4)}
    return found if known else found | {"taken_for": taken_for(model, stages)}


def jobs(options: argparse.Namespace) -> Iterable[Job]:
    """Yield the runs that are asked for and not there."""
    changes = tuple((key, json.loads(value)) for key, value in (one.split("=") for one in options.changes))
    for seed in options.seeds:
        for order in options.orders:
            for name in options.streams:
                for method in options.methods:
                    job = Job(name, method, order, seed, changes, options.dev, options.tasks)
                    possible = STREAMS[name][1] or method not in KNOWN
                    if possible and not (options.folder / job.file).is_file():
                        yield job


def main() -> int:
    """Run what is missing; print a line a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_run_options(parser)
    parser.add_argument("--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--orders", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dev", action="store_true", help="score held-out training rows, to choose by")
    parser.add_argument("--with", dest="changes", nargs="+", default=[], help="settings in place of a method's own")
    parser.add_argument("--tasks", type=int, help="only the first so many, to choose by")
    options = parser.parse_args()
    if options.write:
        write(FOLDER, options.streams)
        return 0
    if (options.changes or options.tasks) and not options.dev:
        parser.error("--with and --tasks are for choosing: give --dev")
    options.folder = RESULTS / "forgetting-choice" if options.dev else FOLDER
    options.folder.mkdir(parents=True, exist_ok=True)

    def keep(job: Job, found: dict[str, Any]) -> None:
        (options.folder / job.file).write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(job.file, found["accuracy"], found.get("forgetting"), found["seconds"], flush=True)

    one = partial(run, models=options.models, data=options.data)
    run_jobs(jobs(options), one, keep, minutes=options.minutes, processes=options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
