"""What the closures say by which transformers describes a mask.

A closure (batch, head, query, key) -> bool cannot be read in general. Transformers' own can: they are known by their
code objects, so that nothing else is ever taken for one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Meaning:
    """What a mask says, where it says nothing else.

    Args:
        causal: no query sees a key after it.
        window: a query sees only keys nearer than this, on either side.
        documents: [B, T] integers, the document each token belongs to; a query sees only its own.
        past_only: the window bounds the past alone, so it is one only together with causal.
    """

    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None
    past_only: bool = False


def meaning_of(function: Callable[..., Any]) -> Meaning | None:
    """Return what a closure of transformers' says, or None where it is not surely known.

    Args:
        function: (batch, head, query position, key position) -> bool.
    """
    from transformers import masking_utils as known

    said = _read(function, known, Meaning())
    return None if said is None or (said.past_only and not said.causal) else said


def is_packed(function: Callable[..., Any]) -> bool:
    """Return whether a closure, known or not, keeps the documents of a packed batch apart."""
    from transformers import masking_utils

    known: Any = masking_utils
    code = getattr(function, "__code__", None)
    if code is known.and_masks(known.causal_mask_function).__code__:
        return any(is_packed(part) for part in _captured(function)["mask_functions"])
    return code is known.packed_sequence_mask_function(None).__code__


def _read(function: Callable[..., Any], known: Any, said: Meaning) -> Meaning | None:
    """Return `said` and what `function` adds to it."""

    def is_made_by(maker: str, *example: Any) -> bool:
        return hasattr(known, maker) and getattr(known, maker)(*example).__code__ is getattr(function, "__code__", None)

    if function is known.causal_mask_function:
        return replace(said, causal=True)
    if function is known.bidirectional_mask_function:
        return said
    if is_made_by("and_masks", known.causal_mask_function):
        all_said: Meaning | None = said
        for part in _captured(function)["mask_functions"]:
            all_said = None if all_said is None else _read(part, known, all_said)
        return all_said
    if is_made_by("sliding_window_overlay", 1):
        said = replace(said, past_only=True)
        return _joined(said, window=_captured(function)["sliding_window"])
    if is_made_by("sliding_window_bidirectional_overlay", 1):  # the distance itself is still seen
        return _joined(said, window=_captured(function)["sliding_window"] + 1)
    if is_made_by("packed_sequence_mask_function", None):
        return _joined(said, documents=_captured(function)["packed_sequence_mask"])
    if is_made_by("remap_positions_for_packed_sequence", None, None):  # positions in a document go up by one
        return _read(_captured(function)["mask_function"], known, said)
    return None


def _joined(said: Meaning, **more: Any) -> Meaning | None:
    """Two windows, or two kinds of documents, are no mask of transformers'."""
    return None if any(getattr(said, name) is not None for name in more) else replace(said, **more)


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    cells: Any = function.__closure__
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
