"""What a person sees of a run in a notebook: a bar and a table that grow in place."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable
from typing import Any

from llmtune.training.averages import Averages
from llmtune.training.memory import peak_memory
from llmtune.types import Callback

HEADERS = {"learning_rate": "lr", "tokens_per_second": "tokens/s"}
FIRST = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second")


def in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel, which shows HTML; nothing is imported to find out."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


class NotebookView(Callback):
    """Show a run in a notebook: a bar, and a table with a row every `log_every` steps and at each evaluation.

    A row has the averages of the steps since the row before. The table is at most 20 rows, the first and the last
    ones; the history has them all. Showing it is left out where this is not the main process.

    Args:
        seconds: least time between two redrawings of the bar; rows are drawn at once.

    Raises:
        ImportError: at the start of the run, where IPython is not installed.
    """

    def __init__(self, *, seconds: float = 0.3) -> None:
        self.seconds = seconds
        self.rows: list[dict[str, Any]] = []
        self._handle: Any = None
        self._averages = Averages()
        self._note = ""
        self._start = (0, 0.0)
        self._drawn = 0.0

    def on_fit_start(self, loop: Any) -> None:
        """Show the banner and the empty bar."""
        from IPython.display import HTML, display

        from llmtune.training.progress import banner

        self.rows, self._averages, self._note, self._handle = [], Averages(), "", None
        self._start = (loop.step, time.monotonic())
        if loop.ranks.main:
            display(HTML(f"<pre>{html.escape(banner(loop))}</pre>"))
            self._handle = display(HTML(self.html(loop)), display_id=True)

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Move the bar; add a row where it is time."""
        self._averages.add(metrics)
        due = loop.step % loop.settings.log_every == 0 or loop.step == loop.total_steps
        if due:
            self.rows.append({"step": loop.step, **self._averages.take()})
        if due or time.monotonic() - self._drawn >= self.seconds:
            self._draw(loop)

    def on_eval_end(self, loop: Any, metrics: dict[str, float]) -> None:
        """Put the evaluation into the step's row."""
        if not self.rows or self.rows[-1]["step"] != loop.step:
            self.rows.append({"step": loop.step, **self._averages.take()})
        self.rows[-1].update({name: value for name, value in metrics.items() if name.startswith("eval_")})
        self._draw(loop)

    def on_fit_end(self, loop: Any) -> None:
        """Say that the run is done and what it took."""
        saved = f", saved in {loop.settings.folder}" if loop.settings.folder is not None else ""
        self._note = f"done, peak memory {peak_memory() / 2**20:,.0f} MiB{saved}"
        self._draw(loop)

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Say what ended the run."""
        self._note = f"ended by {type(error).__name__}"
        self._draw(loop)

    def html(self, loop: Any) -> str:
        """Return the bar and the table as HTML."""
        first, began = self._start
        passed = time.monotonic() - began
        left = passed / (loop.step - first) * (loop.total_steps - loop.step) if loop.step > first else 0.0
        times = f"{_clock(passed)} passed" + (f", about {_clock(left)} left" if left else "")
        said = f"{loop.step} of {loop.total_steps} steps, {times}" + (f": {self._note}" if self._note else "")
        bar = f'<progress value="{loop.step}" max="{max(loop.total_steps, 1)}" style="width: 24em"></progress>'
        return f"<div>{bar} {html.escape(said)}</div>{_table(self.rows)}"

    def _draw(self, loop: Any) -> None:
        if self._handle is not None:
            from IPython.display import HTML

            self._handle.update(HTML(self.html(loop)))
            self._drawn = time.monotonic()


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    found = dict.fromkeys(name for row in rows for name in row)
    names = [*(name for name in FIRST if name in found), *(name for name in found if name not in FIRST)]
    shown = rows if len(rows) <= 20 else [*rows[:10], *rows[-10:]]
    body = [_line((row.get(name, "") for name in names), "td") for row in shown]
    if len(shown) < len(rows):
        body.insert(10, _line(["..."] * len(names), "td"))
    return "<table>" + _line((HEADERS.get(name, name) for name in names), "th") + "".join(body) + "</table>"


def _line(cells: Iterable[Any], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(_text(cell))}</{tag}>" for cell in cells) + "</tr>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
