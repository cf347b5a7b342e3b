"""The tables and plots of `forgetting.py`: each method's runs, and differences paired by order and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.metrics import ContinualMatrix, compare_curves, mean_and_interval, paired_difference

DOCS = Path(__file__).parent.parent / "docs" / "how-to"
JOINT, SEQUENTIAL = "joint", "sequential"
PLOTTED = (
    SEQUENTIAL,
    "EWC",
    "LwF",
    "GPM, update",
    "replay",
    "DER++",
    "SeqLoRA",
    "IncLoRA",
    "O-LoRA",
    "a LoRA a task",
    "first task, then statistics",
)
Runs = Mapping[str, Mapping[tuple[int, int], Mapping[str, Any]]]  # method: (order, seed): the run's numbers


def read(folder: Path, stream: str) -> Runs:
    """Return all runs of a stream."""
    found: dict[str, dict[tuple[int, int], Mapping[str, Any]]] = {}
    for path in sorted(folder.glob(f"{stream}-*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(one["method"], {})[one["order"], one["seed"]] = one
    return found


def table(runs: Runs) -> str:
    """Return a Markdown table, the best method first: accuracy after the last task, forgetting, differences."""
    header = ["method", "runs", "accuracy", "forgetting", f"against {SEQUENTIAL}", f"against {JOINT}", "CPU seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    mean = {name: mean_and_interval(_column(some, "accuracy")).mean for name, some in runs.items()}
    for name in sorted(runs, key=lambda name: -mean[name]):
        some = runs[name]
        cells = [name, str(len(some)), _text(mean_and_interval(_column(some, "accuracy")))]
        forgot = all("forgetting" in one for one in some.values())  # not where all tasks were trained at once
        cells.append(_text(mean_and_interval(_column(some, "forgetting"))) if forgot else "")
        cells += [difference(runs, name, rival) for rival in (SEQUENTIAL, JOINT)]
        cells.append(f"{mean_and_interval([one['seconds'] for one in some.values()]).mean:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(runs: Runs, name: str, rival: str) -> str:
    """Return name - rival in points of accuracy over the runs that both have, as text; nothing where there are none."""
    own, other = runs.get(name, {}), runs.get(rival, {})
    both = sorted(own.keys() & other.keys())
    if name == rival or not both:
        return ""
    values, others = ([100 * some[key]["accuracy"] for key in both] for some in (own, other))
    return _text(paired_difference(values, others), sign="+")


def taken_for(runs: Runs) -> str:
    """Return a Markdown table of which tasks' classes the rows of all tasks are said to be of in the end, in %; nothing
    where no run says it."""
    lines = ["| method | runs | its own task | an earlier one | a later one |", "|---|---|---|---|---|"]
    for name, some in runs.items():
        squares = [one["taken_for"] for one in some.values() if "taken_for" in one]
        if squares:
            rows = [(i, line) for square in squares for i, line in enumerate(square)]
            parts = [(line[i], sum(line[:i]), sum(line[i + 1 :])) for i, line in rows]
            means = [f"{100 * sum(values) / len(rows):.1f}" for values in zip(*parts, strict=True)]
            lines.append("| " + " | ".join([name, str(len(squares)), *means]) + " |")
    return "\n".join(lines) if lines[2:] else ""


def orderings(runs: Runs, pairs: Sequence[tuple[str, str]]) -> str:
    """Return a Markdown table of claims that one method beats another."""
    lines = ["| claim | difference in points | runs |", "|---|---|---|"]
    for first, second in pairs:
        count = len(runs.get(first, {}).keys() & runs.get(second, {}).keys())
        if count:
            lines.append(f"| {first} > {second} | {difference(runs, first, second)} | {count} |")
    return "\n".join(lines)


def plot(runs: Runs, path: Path) -> None:
    """Draw the mean accuracy over the tasks seen so far, after each task."""
    chosen = {name: [ContinualMatrix(one["scores"]) for one in runs[name].values()] for name in PLOTTED if name in runs}
    path.write_text(compare_curves(chosen), encoding="utf-8")


def write(folder: Path, streams: Sequence[str]) -> None:
    """Print all tables as Markdown and draw the plots into the docs."""
    claims = (("replay", "LwF"), ("LwF", "EWC"), ("replay", "EWC"), ("LwF", SEQUENTIAL),
              ("EWC", SEQUENTIAL), ("EWC", "own classes"),
              ("IncLoRA", "SeqLoRA"), ("O-LoRA", "IncLoRA"),
              ("a LoRA a task", JOINT), ("A-GEM, update", "A-GEM, gradient"))  # fmt: skip
    for stream in streams:
        if runs := read(folder, stream):
            print(f"\n{stream}\n\n{table(runs)}\n\n{orderings(runs, claims)}\n\n{taken_for(runs)}")
            if JOINT in runs:  # "known" is there for single questions
                plot(runs, DOCS / f"forgetting-{stream}.svg")


def _column(some: Mapping[Any, Mapping[str, Any]], field: str) -> list[float]:
    return [100 * one[field] for one in some.values()]


def _text(interval: tuple[float, float], sign: str = "") -> str:
    mean, half = interval
    return f"{mean:{sign}.1f}" if half != half else f"{mean:{sign}.1f} ± {half:.1f}"
