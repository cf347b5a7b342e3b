"""What `overfitting.py` compares, chosen by rule on 1000 held-out rows of each data set's training file.

The recipe's parts are one choice for all data sets: the candidate with the best mean over three of them, each at its
better rate. All candidates are run with one seed; the best three of them once more, with two further seeds on TREC and
emotion, where seeds differ by more than candidates do. CLINC150 is left out of that and sees only the choice of the
rate. Rates are chosen for each data set: the recipe's, plain fine-tuning's, and that of plain fine-tuning with the
pooler that a classifier of transformers has. These seeds draw other examples than the seeds that are reported.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from overfitting_data import NAMES
from overfitting_recipes import CHOICE, RECIPES
from overfitting_run import Job

FIRST = (100,)
SEEDS = {"trec6": (100, 101, 102), "tweeteval_emotion": (100, 101, 102), "banking77": FIRST, "clinc150": FIRST}
FINALISTS = 3
CHOOSING = ("trec6", "tweeteval_emotion", "banking77")
RIVALS = ("plain", "plain, own pooler")
RATES = (1e-4, 3e-4, 1e-3)
SAM = {"sharpness": 0.05}
COMBINED: tuple[dict[str, Any], ...] = (
    SAM,
    {"contrast": 0.5, **SAM},
    {"contrast": 0.5, "together": 4, **SAM},
    {"contrast": 0.5, "refit": True, **SAM},
    {"contrast": 0.5, "together": 4, "refit": True, **SAM},
    {"contrast": 0.5, "average": 0.5, **SAM},
    {"contrast": 0.5, "tokens": 0.1, **SAM},
    {"contrast": 0.9, "temperature": 0.1, "together": 4, "refit": True},
    {"head": "probe", **SAM},
    {"head": "probe", "contrast": 0.5},
    {"head": "probe", "contrast": 0.5, **SAM},
    {"head": "probe", "contrast": 0.5, "together": 4, **SAM},
    {"head": "probe", "contrast": 0.5, "tokens": 0.1, **SAM},
)
MANY = ("banking77", "clinc150")  # classes; a new head needs a higher rate there
Work = Callable[[Iterable[Job], Callable[[Job, dict[str, Any]], None]], bool]


def rates(name: str, title: str, parts: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the rates that are tried."""
    if title in RIVALS:
        return RATES
    return RATES[1:] if name in MANY and parts.get("head") != "probe" else RATES[:2]


def choose(work: Work) -> None:
    """Run the candidates that were not run yet, and write what is best beside all runs.

    Args:
        work: runs jobs and hands each with its numbers to a function.
    """
    runs: list[dict[str, Any]] = json.loads(CHOICE.read_text(encoding="utf-8"))["runs"] if CHOICE.is_file() else []
    chosen: dict[str, Any] = {}
    try:
        run_all(runs, CHOOSING, [("recipe", parts) for parts in COMBINED], work, first=True)
        finalists = sorted(COMBINED, key=lambda parts: -_mean(runs, parts, first=True))[:FINALISTS]
        run_all(runs, CHOOSING, [("recipe", parts) for parts in finalists], work)
        chosen["parts"] = max(finalists, key=lambda parts: _mean(runs, parts))
        tried = [("recipe", chosen["parts"]), *((title, {}) for title in RIVALS)]
        run_all(runs, NAMES, tried, work)
        chosen["rates"] = {name: {title: best(runs, name, title, parts)[1] for title, parts in tried} for name in NAMES}
    finally:
        lines = ",\n  ".join(json.dumps(run) for run in sorted(runs, key=json.dumps))
        rows = "1000 held-out rows of the training file, 16 examples a class"
        text = f'{{\n "rows": "{rows}",\n "chosen": {json.dumps(chosen)},\n "runs": [\n  {lines}\n ]\n}}\n'
        CHOICE.write_text(text, encoding="utf-8")


def run_all(
    runs: list[dict[str, Any]],
    names: Iterable[str],
    tried: Iterable[tuple[str, Mapping[str, Any]]],
    work: Work,
    *,
    first: bool = False,
) -> None:
    """Run what is missing at every rate, with the first seed or with all, and add it to `runs`."""
    seen = {_key(run["data"], run["recipe"], run["seed"], run["settings"]) for run in runs}

    def missing() -> Iterator[Job]:
        for name in sorted(names, key=MANY.__contains__, reverse=True):  # the long ones first
            for seed in FIRST if first else SEEDS[name]:
                for title, parts in tried:
                    for rate in rates(name, title, parts):
                        if _key(name, title, seed, {"rate": rate, **parts}) not in seen:
                            yield Job(name, title, 16, seed, replace(RECIPES[title], rate=rate, **parts), dev=True)

    def done(job: Job, numbers: dict[str, Any]) -> None:
        settings = {key: value for key, value in job.settings.items() if key != "pooler"}
        found = {key: numbers[f"test_{key}"] for key in ("accuracy", "macro_f1", "loss")}
        runs.append({"data": job.data, "recipe": job.title, "seed": job.seed, "settings": settings, **found,
                     "device": numbers["device"]})  # fmt: skip

    if not work(missing(), done):
        raise SystemExit("out of time; call again to go on")


def best(
    runs: Iterable[Mapping[str, Any]], name: str, title: str, parts: Mapping[str, Any], *, first: bool = False
) -> tuple[float, float]:
    """Return (mean accuracy over the first seed or over all, rate) at the best rate."""
    seeds = FIRST if first else SEEDS[name]
    scores = {_key(run["data"], run["recipe"], run["seed"], run["settings"]): run["accuracy"] for run in runs}
    tried = rates(name, title, parts)
    return max((statistics.mean(scores[_key(name, title, seed, {"rate": rate, **parts})] for seed in seeds), rate)
               for rate in tried)  # fmt: skip


def _mean(runs: Iterable[Mapping[str, Any]], parts: Mapping[str, Any], *, first: bool = False) -> float:
    return statistics.mean(best(runs, name, "recipe", parts, first=first)[0] for name in CHOOSING)


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True)
