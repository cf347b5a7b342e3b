"""The few exception classes of the house, and the helper that names near misses.

The sentences themselves stand where they are raised. Bad input raises `ValueError` or `TypeError`; the classes here are
for what a caller may want to catch by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class LlmtuneWarning(UserWarning):
    """A warning of this library's own; the project's tests turn it into an error."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite; raised before the optimizer step, so no weight has changed."""


class LossSpikeError(ArithmeticError):
    """A loss is far above those of the steps before; raised before the optimizer step, so no weight has changed."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another model, data set or run."""


def check_state(state: Mapping[str, object], keys: Iterable[str], what: str) -> None:
    """Raise CheckpointError where a saved state lacks one of the keys that a part needs.

    Args:
        state: what is to be loaded.
        keys: needed.
        what: the part's name, for the sentence.
    """
    if lacking := [key for key in keys if key not in state]:
        raise CheckpointError(f'the saved state has no "{lacking[0]}": it is none of {what}, it has {sorted(state)}')


class LawBroken(AssertionError):
    """A part breaks a law of its family; the message says which law, at which input, by how much."""


def nearest(wanted: str, names: Iterable[str], *, count: int = 3) -> list[str]:
    """Return up to `count` of `names` that look most like `wanted`, best first.

    Dotted names are compared whole and by their last part, so that `"q_prj"` finds `"model.layers.0.q_proj"`.
    """
    seen: dict[str, float] = {}
    for name in names:
        last = name.rsplit(".", 1)[-1]
        seen[name] = max(
            difflib.SequenceMatcher(None, wanted, name).ratio(), difflib.SequenceMatcher(None, wanted, last).ratio()
        )
    ranked = sorted((name for name, score in seen.items() if score >= 0.5), key=lambda name: -seen[name])
    return ranked[:count]


def did_you_mean(wanted: str, names: Iterable[str]) -> str:
    """Return ` Did you mean "a", "b"?` for the names nearest to `wanted`, or an empty string where none is near."""
    near = nearest(wanted, names)
    return " Did you mean " + ", ".join(f'"{name}"' for name in near) + "?" if near else ""
