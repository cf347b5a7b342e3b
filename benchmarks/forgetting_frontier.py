"""The table and the plot of `forgetting_lm.py`: what was learned against what was lost, a point a setting."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetting_report import DOCS

TITLES = {"gsm8k": "GSM8K", "multi30k": "Multi30k, into German"}
STYLES = {
    "full": ("#222222", "o-"), "early stopping": ("#222222", "x:"), "WiSE-FT": ("#1b6ca8", "s--"),
    "LoRA": ("#d95f02", "o-"), "LoRA, scaled": ("#d95f02", "s--"), "L2-SP": ("#8c5a3c", "^-"), "EWC": ("#7b4fa3", "v-"),
    "distillation": ("#2a9d5c", "D-"), "LoRA and distillation": ("#5a7d2a", "D-"), "own texts": ("#c2366b", "P-"),
    "WikiText replay": ("#b8860b", "*-"),
}  # fmt: skip
Points = Mapping[str, Sequence[Mapping[str, Any]]]  # name: its points


def read(folder: Path, task: str) -> Points:
    """Return all points of a task by name, each with what was learned; those on a run's way or line with its rate."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"{task}-*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        for point in one["points"]:
            rate = "" if point["name"] == one["method"] else f" of {one['method']} {one['value']:g}"
            more = {"learned": one["base_loss"] - point["loss"], "setting": f"{point['value']:g}{rate}",
                    "run": one["value"], "perplexity_rise": point["perplexity"] - point["base_perplexity"]}  # fmt: skip
            found.setdefault(point["name"], []).append({**point, **more})
    return found


def table(points: Points) -> str:
    """Return a Markdown table, a row a point."""
    lines = ["| method | rate, strength, step or place | learned | perplexity | KL to base | same token |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name in (name for name in STYLES if name in points):
        for point in sorted(points[name], key=lambda point: (point["run"], point["value"])):
            lines.append(
                f"| {name} | {point['setting']} | {point['learned']:.3f} | {point['perplexity_rise']:+.2f} | "
                f"{point['kl_to_base']:.4f} | {100 * point['greedy_agreement']:.1f} % |"
            )
    return "\n".join(lines)


def plot(all_points: Mapping[str, Points], path: Path) -> None:
    """Draw what was learned over KL to the base, a panel a task, a line a method and run."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "frontier", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, len(all_points), figsize=(4.6 * len(all_points), 4.2), constrained_layout=True)
    for axis, (task, points) in zip(axes, all_points.items(), strict=True):
        for name, (color, style) in STYLES.items():
            some = points.get(name, [])
            apart = name in ("early stopping", "WiSE-FT", "LoRA, scaled")  # a line a run
            for number, run in enumerate(sorted({p["run"] for p in some}) if apart else [None]):
                line = sorted((p for p in some if run in (None, p["run"])), key=lambda p: p["kl_to_base"])
                axis.plot([p["kl_to_base"] for p in line], [p["learned"] for p in line], style, color=color, ms=4, lw=1,
                          label=None if number else name)  # fmt: skip
        axis.set(title=TITLES[task], xscale="log", xlabel="KL to the base on WikiText-2, nats a token")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("learned: fall of the held-out loss, nats a token")
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def better_by(points: Points, first: str, second: str) -> list[tuple[float, float]]:
    """Return (learned, KL of first / KL of second) at each point of the second, the first's being read off its line.

    The first's points are joined by straight lines from (0, 0) to the end of the run, for each run that both
    have; where it has learned less everywhere, nothing is compared.
    """
    found = []
    for run in sorted({point["run"] for point in points.get(second, ())}):
        line = sorted((p["learned"], p["kl_to_base"]) for p in points.get(first, ()) if p["run"] == run)
        line += [(p["learned"], p["kl_to_base"]) for p in points.get("full", ()) if p["run"] == run]
        line = [(0.0, 0.0), *sorted(line)]
        for point in (p for p in points[second] if p["run"] == run):
            for (x0, y0), (x1, y1) in itertools.pairwise(line):
                if x0 <= point["learned"] <= x1 and x1 > x0:
                    between = y0 + (y1 - y0) * (point["learned"] - x0) / (x1 - x0)
                    found.append((point["learned"], between / point["kl_to_base"]))
                    break
    return found


def write_frontier(folder: Path, tasks: Sequence[str]) -> None:
    """Print a table of what was learned and lost for each task, and draw it into the docs."""
    found = {task: read(folder, task) for task in tasks}
    for task, points in found.items():
        print(f"\n{TITLES[task]}\n\n{table(points)}\n")
        for learned, ratio in better_by(points, "WiSE-FT", "early stopping"):
            print(f"WiSE-FT's KL at {learned:.3f} learned: {ratio:.2f} times early stopping's")
    plot({task: points for task, points in found.items() if points}, DOCS / "forgetting-lm.svg")
