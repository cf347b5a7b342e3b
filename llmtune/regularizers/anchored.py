"""What the two forms of L2-SP share: anchors by bare name, and a state that tells one from another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import Anchor, check_dtype, check_strength
from llmtune.adapters.effective import EffectiveParameter, choose_parameters, effective_parameters
from llmtune.errors import CheckpointError, did_you_mean
from llmtune.modules import unwrap
from llmtune.types import Callback

Names = Collection[str] | Callable[[str], bool] | None


class Anchored(Callback):
    """Parameters by bare name with the values they are held to; a callback, so that checkpoints carry checksums.

    Args:
        anchor: {bare name: tensor of the parameter's shape}; or the model itself, for its effective parameters that are
            trained, as they are now.
        strength: 0 or more.
        without: bare names, or a function of one: not to be anchored.
        dtype: what anchors are rounded to; None for no rounding.
        device: where they stay; None for the parameters' own.

    Raises:
        ValueError: the anchor is empty or not finite, or is not in `dtype`; `strength` is negative or not finite; or
            `dtype` is none of floats.
        TypeError: a value of the anchor is no tensor of floats, or `without` is one string.
    """

    def __init__(
        self, anchor: Mapping[str, Tensor] | nn.Module, strength: float, *, without: Names = None,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        check_strength("strength", strength)
        check_dtype(dtype)
        kept: Any = {"dtype": dtype, "device": None if device is None else torch.device(device)}
        if isinstance(without, str):
            raise TypeError(f"new must be a list of names or a function of a name; got the one string {without!r}")
        if isinstance(anchor, nn.Module):
            entries = choose_parameters(anchor, None)
            self.anchors = {name: Anchor.of(e, **kept) for name, e in entries.items() if not is_among(name, without)}
        else:
            for name, value in anchor.items():
                _check_value(name, value)
            held = {name: value for name, value in anchor.items() if not is_among(name, without)}
            self.anchors = {name: Anchor(name, copy=value.detach().clone(), **kept) for name, value in held.items()}
        if not self.anchors:
            raise ValueError("the anchor names no parameter: there is nothing to hold")
        self.strength = float(strength)

    def anchored(self, model: nn.Module) -> dict[str, EffectiveParameter]:
        """Return all effective parameters of the model, having made sure that the anchored ones are among them.

        Raises:
            ValueError: one is not, or has another shape, is quantised, or tied and adapted in one place; names it.
        """
        entries = effective_parameters(unwrap(model))
        for name, anchor in self.anchors.items():
            if name not in entries:
                raise ValueError(f'the anchor names "{name}", which the model has not.{did_you_mean(name, entries)}')
            entries[name].check()
            shape = entries[name].parameter.shape
            if shape != anchor.shape:
                raise ValueError(
                    f"{name} is {[*shape]} in the model and {[*anchor.shape]} in the anchor: another model's?"
                )
        return entries

    def state_dict(self) -> dict[str, Any]:
        """Return what tells this one from another: its numbers, and checksums of the anchor."""
        return {"strength": self.strength, "anchor": {name: anchor.mark() for name, anchor in self.anchors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a saved state is this one's own; there is nothing to take back.

        Raises:
            CheckpointError: a number or the anchor is another; names the first difference.
        """
        kind, own = type(self).__name__, self.state_dict()
        for key in own:
            if key != "anchor" and state.get(key) != own[key]:
                raise CheckpointError(f"the saved {kind} had {key} {state.get(key)}; this one has {own[key]}")
        for name in (*own["anchor"], *state["anchor"]):
            if own["anchor"].get(name) != state["anchor"].get(name):
                raise CheckpointError(
                    f"the saved {kind} had another anchor of {name}: make this one of the same tensors (save them once)"
                )


def is_among(name: str, names: Names) -> bool:
    """Return whether a bare name is meant by names or by a function of a name; None means none."""
    return False if names is None else bool(names(name)) if callable(names) else name in names


def _check_value(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"the anchor of {name} must be a tensor of floats; got {value!r:.60}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"the anchor of {name} is not finite")
