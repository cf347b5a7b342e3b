"""Task vectors: what a training did to the weights, to be scaled, added, taken away and put onto a model again."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.errors import did_you_mean
from llmtune.weights.interpolation import checked_number
from llmtune.weights.states import State, check_finite, check_quantised, check_states, floats, tied_groups

TITLES = ("base_state", "tuned_state")


@torch.no_grad()
def task_vector(base_state: State, tuned_state: State) -> dict[str, Tensor]:
    """Return what a training did to the weights: tuned - base.

    Ilharco et al., "Editing Models with Task Arithmetic" (2022), section 2. Integers and booleans, which have no
    direction, are left out. Several vectors become one by `merge_deltas` (task arithmetic, TIES, DARE).

    Where we differ: the authors' program subtracts in the states' dtype, and leaves out int64 and uint8 alone. Here the
    vector is in at least float32.

    For an adapter the vector is the difference of two `anchor_of(model)`, with the adapter off and on, and `combine`
    does the arithmetic on the changes of weights themselves; it is never the difference of A and of B.

    Args:
        base_state: tensors by name, of any shapes.
        tuned_state: by the same names, of the same shapes.

    Returns:
        Floating tensors by name, in at least float32, on the tuned state's devices; exactly 0 where nothing changed.

    Raises:
        ValueError: the states differ in names or shapes; what is tied in one differs in the other; a difference is not
            finite; or quantised weights differ.
        TypeError: a state is no dict of tensors.

    Example:
        >>> task_vector({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])})
        {'w': tensor([2., 0.])}
    """
    states = (base_state, tuned_state)
    check_states(states, TITLES)
    found: dict[str, Tensor] = {}
    for group in tied_groups(states, TITLES):
        base, tuned = (state[group[0]].detach() for state in states)
        if not floats(tuned):
            check_quantised(group[0], [tuned, base])
            continue
        wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
        base, tuned = base.to(tuned.device, wide), tuned.to(wide)
        change = torch.where(base == tuned, 0.0, tuned - base)
        check_finite(group[0], change, [tuned, base])
        found |= dict.fromkeys(group, change)
    return {name: found[name] for name in base_state if name in found}


@torch.no_grad()
def apply_task_vector(base_state: State, vector: State, scale: float = 1.0) -> dict[str, Tensor]:
    """Return a state with a change of weights added: base + scale * vector.

    A negative scale takes the task away (Ilharco et al. 2022, section 3). Computed in at least float32 and rounded once
    to the base's dtype. The authors' program warns of names that are in one of the two only, by print, and goes on.

    Args:
        base_state: tensors by name, of any shapes.
        vector: floating tensors of the same shapes, from `task_vector` or `merge_deltas`. What it does not name stays
            as it is, bit for bit; of tied names one is enough.
        scale: any finite number.

    Returns:
        New tensors by the base's names, in its dtypes and on its devices; what is tied there is tied.

    Raises:
        ValueError: a name is not the base's (names the nearest), or of another shape; tied names have two changes; an
            entry would not be finite; or scale is not finite.
        TypeError: the base or the vector is no dict of tensors, a change or what it is added to is not floating, or
            scale is no number.

    Example:
        >>> base, vector = {"w": torch.tensor([1.0, 2.0]), "step": torch.tensor(3)}, {"w": torch.tensor([2.0, 0.0])}
        >>> apply_task_vector(base, vector, -0.5)
        {'w': tensor([0., 2.]), 'step': tensor(3)}
    """
    scale = checked_number("scale", scale)
    check_states([base_state], ["base_state"])
    check_states([vector], ["vector"])
    _check_vector(base_state, vector)
    groups = tied_groups([base_state], ["base_state"])
    changes = {group: _change(group, vector) for group in groups}
    made: dict[str, Tensor] = {}
    for group, change in changes.items():
        base = base_state[group[0]].detach()
        if change is None or scale == 0:
            value = base.clone()
        else:
            wide = torch.promote_types(torch.promote_types(base.dtype, change.dtype), torch.float32)
            added = change.to(base.device, wide)
            value = torch.where(added == 0, base.to(wide), base.to(wide) + scale * added).to(base.dtype)
            check_finite(group[0], value, [base, value])
        made |= dict.fromkeys(group, value)
    return {name: made[name] for name in base_state}


def _change(group: tuple[str, ...], vector: State) -> Tensor | None:
    """Return the change of the one tensor that the names of a group stand for, or None."""
    given = [name for name in group if name in vector]
    for name in given[1:]:
        if not torch.equal(vector[name], vector[given[0]]):
            raise ValueError(f"{given[0]} and {name} are one tied tensor in base_state, and vector changes them apart")
    return vector[given[0]].detach() if given else None


def _check_vector(base_state: State, vector: State) -> None:
    for name, change in vector.items():
        if name not in base_state:
            raise ValueError(f"{name} is in vector and not in base_state.{did_you_mean(name, base_state)}")
        base = base_state[name]
        for tensor, title in ((base, "base_state"), (change, "vector")):
            if not floats(tensor):
                raise TypeError(f"{name} is {tensor.dtype} in {title}: a change of weights is floating")
        if base.shape != change.shape:
            raise ValueError(f"{name} is {[*change.shape]} in vector and {[*base.shape]} in base_state")
