"""What a quickstart shows and writes: one table, two plots, a history for each way."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib.util import find_spec
from math import log
from pathlib import Path

from llmtune.quickstart.ways import WAYS, Result, held_out_loss

HEAD = (
    "way", "new: before", "new: after", "old: before", "old: after", "trainable parameters", "seconds", "peak MiB",
)  # fmt: skip
COLORS = {"full": "C3", "lora": "C0", "distill": "C2", "ewc": "C1"}
STYLES = {"full": "-", "lora": "-", "distill": "--", "ewc": ":"}


def table(results: Sequence[Result]) -> str:
    """Return the results as a table of plain text, perplexities of the held-out texts in the first four columns."""
    lines = [HEAD, *(_cells(result) for result in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]

    def shown(line: Sequence[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    return "\n".join([shown(lines[0]), "  ".join("-" * width for width in widths), *map(shown, lines[1:])])


def write_files(results: Sequence[Result], out: Path) -> list[str]:
    """Write the table and each way's history as CSV and, where matplotlib is installed, the plots as PNG.

    Args:
        results: one for each way.
        out: an existing folder.

    Returns:
        A line for each thing written, or that could not be.
    """
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEAD)
        for r in results:
            writer.writerow([WAYS[r.way], *r.new, *r.old, r.trained, round(r.seconds, 2), round(r.peak / 2**20, 1)])
    histories = [r.history.to_csv(out / f"history-{r.way}.csv") for r in results]
    lines = [f"table:    {out / 'table.csv'}", f"history:  {', '.join(map(str, histories))}"]
    if find_spec("matplotlib") is None:
        lines.append('plots:    none, because matplotlib is not installed (pip install "llmtune[plot]")')
    else:
        lines.append(f"plots:    {_plot_learning(results, out)}, {_plot_forgetting(results, out)}")
    adapters = [f"{r.adapter} ({r.checked})" for r in results if r.adapter is not None]
    return [*lines, *(f"adapter:  {adapter}" for adapter in adapters)]


def _cells(r: Result) -> tuple[str, ...]:
    perplexities = (f"{value:,.2f}" for value in (*r.new, *r.old))
    return (WAYS[r.way], *perplexities, f"{r.trained:,}", f"{r.seconds:.1f}", f"{r.peak / 2**20:,.0f}")


def _plot_learning(results: Sequence[Result], out: Path) -> Path:
    """Draw the losses on the new domain over the steps, without what DistillToBase and EWC add to them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    learned, held_out = figure.subplots(1, 2)
    for r in results:
        style, color, label = STYLES[r.way], COLORS[r.way], WAYS[r.way]
        name = held_out_loss(r.history)
        losses = r.history.column(name.removeprefix("eval_"))
        learned.plot(range(1, len(losses) + 1), losses, style, color=color, label=label)
        points = [(0, log(r.new[0])), *((row["step"], row[name]) for row in r.history if name in row)]
        held_out.plot(*zip(*points, strict=True), style, color=color, label=label, marker="o", markersize=4)
    for axes, title in ((learned, "training loss, each step on other texts"), (held_out, "loss on held-out texts")):
        axes.set(title=f"New domain: {title}", xlabel="optimizer step", ylabel="nats a token")
        axes.grid(alpha=0.3)
        axes.legend()
    return _saved(figure, out / "learning.png")


def _plot_forgetting(results: Sequence[Result], out: Path) -> Path:
    """Draw the perplexities of both domains after each way, and a line where they stood before."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    names = [WAYS[r.way].replace(" + ", "\n+ ").replace("full ", "full\n") for r in results]
    panels = (
        ("New domain: what was learned", [r.new for r in results]),
        ("Old domain: what was forgotten", [r.old for r in results]),
    )
    for axes, (title, pairs) in zip(figure.subplots(1, 2), panels, strict=True):
        before, after = pairs[0][0], [pair[1] for pair in pairs]
        bars = axes.bar(names, after, color=[COLORS[r.way] for r in results], width=0.6)
        axes.bar_label(bars, [f"{value:.2f}" for value in after], label_type="center", color="white", weight="bold")
        inside = before <= 3 * max(after)  # else the line would press the bars flat
        note = "" if inside else " (above the picture)"
        axes.axhline(before, color="black", linestyle="--", label=f"before tuning: {before:.2f}{note}")
        axes.set(title=title, ylabel="held-out perplexity (lower is better)")
        axes.set_ylim(0, 1.3 * max(*after, before if inside else 0))
        axes.legend(loc="upper right")
    return _saved(figure, out / "forgetting.png")


def _saved(figure: object, path: Path) -> Path:
    figure.savefig(path, dpi=130)  # type: ignore[attr-defined]
    return path
