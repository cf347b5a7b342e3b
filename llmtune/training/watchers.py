"""Who watches a run: penalties that are callbacks, the callbacks, and what shows the run to a person."""

from __future__ import annotations

from collections.abc import Sequence

from llmtune.training.notebook import NotebookView, in_notebook
from llmtune.training.progress import Progress
from llmtune.types import Callback, Penalty


def watchers(penalties: Sequence[Penalty], callbacks: Sequence[Callback], *, show: bool) -> list[Callback]:
    """Return what watches a run, each once and in this order: penalties that are callbacks, callbacks, the view.

    Args:
        penalties: of the run.
        callbacks: of the run.
        show: whether a person sees the run: a table in a notebook, else a bar.
    """
    shown = any(isinstance(callback, NotebookView | Progress) for callback in callbacks)
    view: list[Callback] = [NotebookView() if in_notebook() else Progress()] if show and not shown else []
    watching = [*(penalty for penalty in penalties if isinstance(penalty, Callback)), *callbacks, *view]
    return list({id(watcher): watcher for watcher in watching}.values())
