"""Which parts help where a real encoder meets little data: MiniLM, four data sets, a few examples a class.

    python benchmarks/overfitting.py --models MODELS --data DATA [--sets trec6 ...] [--recipes plain ...] [--shots 16]
        [--seeds 0 1 2 3 4] [--minutes 60] [--write]
    python benchmarks/overfitting.py ... --dev --recipes plain --seeds 100 101 --with rate=1e-4     to choose

One JSON file a run in results/overfitting/; a run that is there is not repeated. Every recipe sees the same examples in
the same order, from the same random head, in each seed; so differences are taken seed by seed. With `--dev` the rows
scored are other rows of the training file and runs go to `--runs`: rates and strengths were chosen there, with seeds of
100 and above, which draw other examples than the seeds that are reported.

`--models` holds the folder minilm-l6-v2 (huggingface.co/sentence-transformers/all-MiniLM-L6-v2); `--data` holds trec6,
tweeteval_emotion, banking77 and clinc150 with train.jsonl and test.jsonl, rows of "text" and "label": Li and Roth's
questions, github.com/cardiffnlp/tweeteval, github.com/PolyAI-LDN/task-specific-datasets, github.com/clinc/oos-eval.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from overfitting_data import NAMES, Rows, load, predictions
from overfitting_recipes import PARTS, RECIPES, Recipe, recipe_for, train
from overfitting_report import parts_table, plot, read, table
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

PLOT = Path(__file__).parent.parent / "docs" / "how-to" / "overfitting.svg"


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


def run(options: argparse.Namespace, name: str, title: str, shots: int, seed: int) -> dict[str, Any]:
    """Train once and return what came of it."""
    began = time.process_time()
    recipe = changed(recipe_for(title, name), options.changes)
    data = load(options.models, options.data, name, shots=shots, seed=seed, dev=options.dev)
    model = train(options.models, name, recipe, data, seed)
    seconds = time.process_time() - began
    scored = {f"test_{key}": value for key, value in scores(model, data.test).items()}
    seen = {
        f"train_{key}": value for key, value in scores(model, data.train[:: max(1, len(data.train) // 400)]).items()
    }
    numbers = {key: round(value, 5) for key, value in {**scored, **seen, "seconds": seconds}.items()}
    plain = dataclasses.asdict(Recipe())
    settings = {key: value for key, value in dataclasses.asdict(recipe).items() if value != plain[key]}
    return {"data": name, "recipe": title, "shots": shots, "seed": seed, **numbers, "rate": recipe.rate, **settings}


def changed(recipe: Recipe, changes: list[str]) -> Recipe:
    """Return the recipe with fields set by texts like rate=1e-4."""
    return dataclasses.replace(recipe, **{key: _value(text) for key, text in (one.split("=") for one in changes)})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


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
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--shots", type=int, nargs="+", default=[16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--minutes", type=float, default=60.0, help="no run is begun after so many")
    parser.add_argument("--write", action="store_true", help="print the tables and draw the plot of the runs there")
    parser.add_argument("--dev", action="store_true", help="score held-out training rows, to choose by")
    parser.add_argument("--with", dest="changes", nargs="+", default=[])
    parser.add_argument("--runs", type=Path, default=RESULTS / "overfitting")
    options = parser.parse_args()
    if options.dev and options.runs == RESULTS / "overfitting":
        parser.error("--dev is for choosing: give --runs another folder")
    if options.write:
        write(options.runs)
        return 0
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.runs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for shots in options.shots:
        for seed in options.seeds:
            for name in options.sets:
                for title in options.recipes:
                    label = "-".join([name, title, str(shots), str(seed), *options.changes]).replace(" ", "_")
                    path = options.runs / f"{label}.json"
                    if path.is_file():
                        continue
                    if time.monotonic() > end:
                        print("out of time; call again to go on")
                        return 0
                    found = run(options, name, title, shots, seed)
                    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
                    print(label, *(f"{k}={v:.3f}" for k, v in found.items() if isinstance(v, float)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
