"""Numbers of many steps as one: each averaged, summed or taken last, as its meaning asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEWEST = frozenset({"learning_rate", "peak_memory"})
PER_STEP = frozenset({"grad_norm", "penalty", "overflow"})
SUMMED = ("tokens", "seconds")
SKIPPED = frozenset({"step", "targets", "tokens_per_second", *SUMMED})


class Averages:
    """The numbers of the steps since the last call of `take`.

    The loss and its parts are means over targets and are weighted by them, so that the average is that of all targets;
    `grad_norm` and `penalty` are averaged over steps, `flops_utilisation` over seconds; the newest `learning_rate` and
    `peak_memory` stand; "tokens_per_second" is all tokens over all seconds. What is no number is left out.

    Example:
        >>> averages = Averages()
        >>> averages.add({"step": 1, "loss": 4.0, "targets": 1, "tokens": 10, "seconds": 1.0})
        >>> averages.add({"step": 2, "loss": 2.0, "targets": 3, "tokens": 50, "seconds": 2.0})
        >>> averages.take()
        {'loss': 2.5, 'tokens_per_second': 20.0}
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._totals = dict.fromkeys(SUMMED, 0.0)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in the row of a step; entries of an evaluation ("eval_...") are passed over."""
        self.steps += 1
        for name in SUMMED:
            self._totals[name] += row.get(name, 0.0)
        for name, value in row.items():
            if name in SKIPPED or name.startswith("eval_") or not isinstance(value, int | float):
                continue
            weight = _weight(name, row)
            kept = 0.0 if name in NEWEST else 1.0
            self._sums[name] = self._sums.get(name, 0.0) * kept + weight * value
            self._weights[name] = self._weights.get(name, 0.0) * kept + weight

    def take(self) -> dict[str, float]:
        """Return the numbers by name and begin anew; empty where no step came in."""
        values = {name: total / self._weights[name] for name, total in self._sums.items() if self._weights[name]}
        if self._totals["seconds"] > 0 and self._totals["tokens"] > 0:
            values["tokens_per_second"] = self._totals["tokens"] / self._totals["seconds"]
        self._clear()
        return values


def _weight(name: str, row: Mapping[str, Any]) -> float:
    if name in NEWEST or name in PER_STEP:
        return 1.0
    return float(row.get("seconds" if name == "flops_utilisation" else "targets", 1.0))
