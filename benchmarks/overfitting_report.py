"""The table and the plot of `overfitting.py`: paired differences to plain fine-tuning, with their intervals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overfitting_data import NAMES

from llmtune.metrics.intervals import mean_and_interval

Runs = Mapping[tuple[str, str, int], Mapping[int, Mapping[str, Any]]]  # set, recipe, shots: seed: the run's numbers


def read(folder: Path) -> Runs:
    """Return all runs of a folder."""
    found: dict[tuple[str, str, int], dict[int, Mapping[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((one["data"], one["recipe"], one["shots"]), {})[one["seed"]] = one
    return found


def differences(
    runs: Runs, name: str, recipe: str, rival: str, shots: int, field: str = "test_accuracy"
) -> list[float]:
    """Return recipe - rival in points, for every seed that both have."""
    own, other = runs.get((name, recipe, shots), {}), runs.get((name, rival, shots), {})
    return [100 * (own[seed][field] - other[seed][field]) for seed in sorted(own.keys() & other.keys())]


def signed(values: Sequence[float]) -> str:
    """Return a mean difference and its interval as text; nothing where there is none."""
    if not values:
        return ""
    mean, half = mean_and_interval(values)
    return f"{mean:+.1f}" if half != half else f"{mean:+.1f} ± {half:.1f}"


def table(runs: Runs, *, shots: int, recipes: Sequence[str], rivals: Sequence[str], sets: Sequence[str]) -> str:
    """Return a Markdown table: a row for each set and recipe."""
    header = ["data", "recipe", "seeds", "accuracy", "macro-F1", "training rows", "gap", "loss", "CPU seconds"]
    header += [f"against {rival}" for rival in rivals]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in sets:
        for recipe in recipes:
            found = list(runs.get((name, recipe, shots), {}).values())
            if not found:
                continue
            cells = [NAMES[name], recipe, str(len(found))]
            for field in ("test_accuracy", "test_macro_f1"):
                mean, half = mean_and_interval([100 * one[field] for one in found])
                cells.append(f"{mean:.1f}" if half != half else f"{mean:.1f} ± {half:.1f}")
            train = 100 * statistics.mean(one["train_accuracy"] for one in found)
            test = 100 * statistics.mean(one["test_accuracy"] for one in found)
            cells += [f"{train:.1f}", f"{train - test:.1f}"]
            cells += [f"{statistics.mean(one[field] for one in found):.{places}f}"
                      for field, places in (("test_loss", 2), ("seconds", 0))]  # fmt: skip
            cells += ["" if r == recipe else signed(differences(runs, name, recipe, r, shots)) for r in rivals]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table(runs: Runs, *, shots: int, recipes: Sequence[str], rival: str, sets: Sequence[str]) -> str:
    """Return a Markdown table of differences to the rival: a row for each recipe, a column for each set."""
    lines = ["| part | " + " | ".join(NAMES[name] for name in sets) + " | seeds |", "|" + "---|" * (len(sets) + 2)]
    for recipe in recipes:
        cells = [differences(runs, name, recipe, rival, shots) for name in sets]
        if any(cells):
            seeds = "/".join(str(len(cell)) for cell in cells)
            lines.append(f"| {recipe} | " + " | ".join(map(signed, cells)) + f" | {seeds} |")
    return "\n".join(lines)


def plot(runs: Runs, path: Path, *, recipes: Sequence[str], sets: Sequence[str]) -> None:
    """Draw accuracy by examples a class: one panel a set, one line a recipe, with intervals, of three seeds or more."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "overfitting", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, len(sets), figsize=(2.6 * len(sets), 2.9), constrained_layout=True)
    for axis, name in zip(axes, sets, strict=True):
        for color, (place, recipe) in zip(
            ("#777777", "#d95f02", "#1b6ca8", "#2a9d5c"), enumerate(recipes), strict=False
        ):
            points = []
            for shots in (8, 16, 32):
                found = [100 * one["test_accuracy"] for one in runs.get((name, recipe, shots), {}).values()]
                if len(found) >= 3:  # the interval of two says nothing
                    points.append((shots * 1.04**place, *mean_and_interval(found)))
            if points:
                x, y, half = zip(*points, strict=True)
                axis.errorbar(x, y, yerr=[0 if h != h else h for h in half], fmt="o-", capsize=3, ms=3.5, lw=1.2,
                              color=color, label=recipe)  # fmt: skip
        axis.set(title=NAMES[name], xscale="log", xlim=(7, 37), xlabel="examples a class")
        axis.set_xticks((8, 16, 32), ("8", "16", "32"))
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on test rows, %")
    axes[0].legend(fontsize=7.5)
    figure.savefig(path, metadata={"Date": None})
