"""Which process of a run prints and writes."""

from __future__ import annotations

from typing import Any


def is_main(loop: Any) -> bool:
    """Return whether this process is the one that prints and writes: the only one, or the first of several."""
    return bool(getattr(getattr(loop, "ranks", None), "main", True))
