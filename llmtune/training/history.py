"""What a run recorded: a list of rows, a CSV file, a plot."""

from __future__ import annotations

import csv
import html
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class History(list[dict[str, Any]]):
    """The rows of a run, oldest first: one dict an optimizer step, with "step" and the step's metrics.

    A list, so `pandas.DataFrame(history)` works; rows of steps with an evaluation carry "eval_..." entries as well.
    """

    def column(self, name: str) -> list[Any]:
        """Return the values of one entry over the rows that have it.

        Raises:
            KeyError: no row has it; the sentence lists the names there are.
        """
        values = [row[name] for row in self if name in row]
        if not values:
            raise KeyError(f"no row of the history has {name!r}; there are: {', '.join(self.names()) or 'no rows'}")
        return values

    def names(self) -> list[str]:
        """Return the names of all entries, in the order they first appear."""
        return list(dict.fromkeys(name for row in self for name in row))

    def to_csv(self, path: str | Path) -> Path:
        """Write the rows as CSV, in one move, and return its path; one that fails leaves an older file as it was."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=self.names())
                writer.writeheader()
                writer.writerows(self)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def plot(
        self, names: Iterable[str] = ("loss", "grad_norm", "learning_rate"), *, path: str | Path | None = None
    ) -> Any:
        """Draw one panel an entry over the steps and return the matplotlib figure.

        A loss is drawn with its running mean, and with the evaluation's values where there are any.

        Args:
            names: entries to draw; those that no row has are left out.
            path: where to write the figure; the suffix chooses the format.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no row has any of the names.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('plotting needs matplotlib: pip install "llmtune[plot]"') from error
        shown = [name for name in names if any(name in row for row in self)]
        if not shown:
            raise ValueError(f"no row of the history has any of {list(names)}; there are: {self.names()}")
        figure = Figure(figsize=(5 * len(shown), 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            self._panel(axes, name)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _panel(self, axes: Any, name: str) -> None:
        rows = [row for row in self if name in row]
        steps, values = [row["step"] for row in rows], [float(row[name]) for row in rows]
        smooth = name.endswith("loss") and len(values) >= 20
        axes.plot(steps, values, alpha=0.35 if smooth else 1.0, color="C0", label=name)
        if smooth:
            width = max(len(values) // 20, 2)
            means = [sum(values[max(i - width + 1, 0) : i + 1]) / min(i + 1, width) for i in range(len(values))]
            axes.plot(steps, means, color="C0", label=f"mean of {width} steps")
        evaluated = [row for row in self if f"eval_{name}" in row]
        if evaluated:
            axes.plot([row["step"] for row in evaluated], [row[f"eval_{name}"] for row in evaluated], "o-", color="C1",
                      label=f"eval_{name}")  # fmt: skip
        axes.set(title=name.replace("_", " "), xlabel="optimizer step")
        axes.grid(alpha=0.3)
        if smooth or evaluated:
            axes.legend()

    def _repr_html_(self) -> str:
        names = self.names()
        shown = list(self) if len(self) <= 20 else [*self[:10], *self[-10:]]

        def line(cells: Iterable[Any], tag: str) -> str:
            texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
            return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

        body = [line((row.get(name, "") for name in names), "td") for row in shown]
        note = f"<p>{len(self)} steps" + (", the first and last 10 shown</p>" if len(shown) < len(self) else "</p>")
        return note + "<table>" + line(names, "th") + "".join(body) + "</table>"
