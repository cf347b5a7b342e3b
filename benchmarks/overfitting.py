"""Which parts help where a real encoder meets little data: MiniLM, four data sets, a few examples a class.

    python benchmarks/overfitting.py --models MODELS --data DATA [--sets trec6 ...] [--recipes plain ...] [--shots 16]
        [--seeds 0 1 2 3 4] [--minutes 60] [--device cuda] [--jobs 2]
    python benchmarks/overfitting.py ... --choose      what to compare, by rows held out for that: comes first
    python benchmarks/overfitting.py ... --write       the tables, and the plot in the docs, of the runs there are

One JSON file a run in results/overfitting/; a run that is there is not repeated. Every recipe sees the same examples in
the same order, from the same random head, in each seed; so differences are taken seed by seed. What is compared was
chosen by rule, on other rows of the training file and with other seeds (`overfitting_choose.py`).

`--models` holds the folder minilm-l6-v2 (huggingface.co/sentence-transformers/all-MiniLM-L6-v2); `--data` holds trec6,
tweeteval_emotion, banking77 and clinc150 with train.jsonl and test.jsonl, rows of "text" and "label": Li and Roth's
questions, github.com/cardiffnlp/tweeteval, github.com/PolyAI-LDN/task-specific-datasets, github.com/clinc/oos-eval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, add_run_options, run_jobs
from overfitting_choose import choose
from overfitting_data import NAMES
from overfitting_recipes import PARTS, RECIPES, recipe_for
from overfitting_report import parts_table, plot, read, table
from overfitting_run import Job, run

FOLDER = RESULTS / "overfitting"
PLOT = Path(__file__).parent.parent / "docs" / "how-to" / "overfitting.svg"


def jobs(options: argparse.Namespace) -> Iterable[Job]:
    """Yield the runs that are asked for and not there."""
    for shots in options.shots:
        for seed in options.seeds:
            for title in options.recipes:
                for name in options.sets:
                    job = Job(name, title, shots, seed, recipe_for(title, name))
                    if not (FOLDER / job.file).is_file():
                        yield job


def work(wanted: Iterable[Job], options: argparse.Namespace, done: Callable[[Job, dict[str, Any]], None]) -> bool:
    """Run jobs in several processes until the time is up; return whether all were run."""

    def tell(job: Job, numbers: dict[str, Any]) -> None:
        done(job, numbers)
        print(job.file, *(f"{k}={v:.3f}" for k, v in numbers.items() if isinstance(v, float)), flush=True)

    one = partial(run, models=options.models, data=options.data, device=options.device)
    return run_jobs(wanted, one, tell, minutes=options.minutes, processes=options.jobs)


def keep(job: Job, numbers: dict[str, Any]) -> None:
    """Write a run's file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / job.file).write_text(json.dumps(numbers) + "\n", encoding="utf-8")


def write(folder: Path) -> None:
    """Print the tables of the runs in a folder as Markdown, and draw the plot into the docs."""
    runs, main_recipes = read(folder), [title for title in RECIPES if title not in PARTS]
    for shots in (8, 16, 32):
        print(f"\n{shots} examples a class\n")
        print(table(runs, shots=shots, recipes=main_recipes, rivals=("plain", "plain, own pooler"), sets=list(NAMES)))
    print("\nOne part at a time, 16 examples a class: accuracy in points against plain\n")
    print(parts_table(runs, shots=16, recipes=list(PARTS), rival="plain", sets=list(NAMES)))
    plot(runs, PLOT, recipes=("plain, own pooler", "plain", "recipe", "probe alone"),
         sets=[name for name in NAMES if (name, "recipe", 16) in runs])  # fmt: skip


def main() -> int:
    """Run what is missing; print a line a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_run_options(parser)
    parser.add_argument("--sets", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--shots", type=int, nargs="+", default=[16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--choose", action="store_true", help="run the candidates on held-out training rows instead")
    options = parser.parse_args()
    if options.write:
        write(FOLDER)
        return 0
    torch.set_num_threads(1)
    if options.choose:
        choose(lambda wanted, done: work(wanted, options, done))
        return 0
    work(jobs(options), options, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
