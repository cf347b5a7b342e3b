"""Between the weights before fine-tuning and those after it: WiSE-FT."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmtune.weights.states import State, merge_states

TITLES = ("base_state", "tuned_state")
TENTHS = tuple(step / 10 for step in range(11))


def interpolate(base_state: State, tuned_state: State, alpha: float) -> dict[str, Tensor]:
    """Return the state on the straight line from one set of weights to another.

    theta = (1 - alpha) base + alpha tuned

    Wortsman et al., "Robust fine-tuning of zero-shot models" (2022), section 3 (WiSE-FT). alpha = 0 is the base and
    alpha = 1 the tuned model, bit for bit; an entry in which the two agree stays as it is, bit for bit, at every alpha.
    Numbers outside of 0 ... 1 go on along the line: task negation at alpha < 0, ExPO at alpha > 1.

    Where we differ: the authors' program multiplies and adds every entry of the state dict in its own dtype, so that a
    counter becomes a fraction, a weight that never changed is rounded, and bfloat16 is rounded three times. Here
    integers and booleans are the tuned model's, and what floats is computed in at least float32 and rounded once.

    For LoRA no state is needed: `llmtune.adapters.interpolated` scales the adapter, which is the same line, exactly.

    Args:
        base_state: tensors by name, of any shapes: a model's `state_dict()`, or `anchor_of(model)`.
        tuned_state: by the same names, of the same shapes.
        alpha: any finite number; 0.5 where there is nothing to choose it by.

    Returns:
        New tensors by the same names, on the tuned state's devices, in the wider of the two dtypes. What is tied in
        either state is tied.

    Raises:
        ValueError: alpha is not finite; the states differ in names or shapes; what is tied in one differs in the other;
            an entry would not be finite; or quantised weights differ.
        TypeError: alpha is no number, or a state is no dict of tensors.

    Example:
        >>> base, tuned = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}
        >>> interpolate(base, tuned, 0.25)
        {'w': tensor([1.5000, 2.0000])}
    """
    alpha = checked_number("alpha", alpha)

    def between(names: tuple[str, ...], tensors: list[Tensor]) -> Tensor:
        base, tuned = tensors
        if alpha in (0, 1):
            return tuned if alpha else base
        return on_line(base, tuned, alpha)

    return merge_states([base_state, tuned_state], TITLES, between, integers_from=1)


def interpolation_curve(
    base_state: State, tuned_state: State, score: Callable[[dict[str, Tensor]], Any], *,
    alphas: Sequence[float] = TENTHS,
) -> dict[float, Any]:  # fmt: skip
    """Return what `score` gives for the states on the line, by alpha.

    Args:
        base_state: as in `interpolate`, tensors of any shapes.
        tuned_state: by the same names, of the same shapes.
        score: takes a state; what it returns (a number, a dict of numbers) is handed on.
        alphas: any finite numbers, at least one.

    Raises:
        ValueError: there is no alpha, or as `interpolate`.
        TypeError: as `interpolate`.

    Example:
        >>> base, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> interpolation_curve(base, tuned, lambda state: state["w"].sum().item(), alphas=(0.0, 0.5, 1.0))
        {0.0: 0.0, 0.5: 1.0, 1.0: 2.0}
    """
    checked = [checked_number("alpha", alpha) for alpha in alphas]
    if not checked:
        raise ValueError("a curve needs at least one alpha; got none")
    return {alpha: score(interpolate(base_state, tuned_state, alpha)) for alpha in checked}


def on_line(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) base + alpha tuned in at least float32; exactly the entry where the two agree.

    Args:
        base: any shape, floating.
        tuned: the same shape, on the same device.
        alpha: finite.
    """
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    base, tuned = base.to(wide), tuned.to(wide)
    return torch.where(base == tuned, tuned, torch.lerp(base, tuned, alpha))


def checked_number(name: str, value: Any) -> float:
    """Return a number as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value}")
    return float(value)
