"""Models merged by how sure each is of each weight: the average weighted by Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmtune.errors import did_you_mean
from llmtune.weights.deltas import finite_numbers
from llmtune.weights.states import State, check_states, floats, merge_states, titles_of, weighted_mean, work_dtype


def fisher_merge(
    states: Sequence[State], fishers: Sequence[State], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Return the average of states in which each entry counts as much as its model's Fisher information of it.

    theta = sum_i w_i F_i theta_i / sum_i w_i F_i,   and where that is 0 / 0: sum_i w_i theta_i / sum_i w_i

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (2022), equation 4: the mode of the product of
    normal approximations of the models' posteriors. Sums are made in float64 (float32 on Apple's GPUs), rounded once.

    Where we differ: the paper does not say what happens where no model has information. The authors' program takes the
    first model's value there, by a floor of 1e-6 under its Fisher information alone, which decides for the first model
    also wherever all information is less than that. Here there is no floor, so a factor common to all F changes
    nothing, and entries without information are averaged by the weights. That program divides each F_i by its norm as
    well: to do so put 1 / ||F_i|| into the weights.

    For adapters give effective weights, `anchor_of(model)`, and `diagonal_fisher`, which is of those. On A and on B
    apart the formula would average factors of products that have nothing to do with each other.

    Args:
        states: tensors by name, of any shapes; the same names and shapes in all. Changes of weights instead of weights
            give the change of the merged weights.
        fishers: one dict a state, from `diagonal_fisher`: 0 or more, in the weights' shapes, by the same names; of tied
            names by one of them. A weight that no dict names must be the same in all states.
        weights: w_i, 0 or more, not all 0; left out, all 1.

    Returns:
        New tensors by the states' names, in the widest dtype that they have there; integers are the first state's.

    Raises:
        ValueError: a number of states, dicts and weights does not fit; states or dicts differ in names or shapes; a
            weight differs and has no Fisher information; an entry of that is negative or not finite; weights are
            negative or all 0; or as `uniform_soup`.
        TypeError: an argument is no list of dicts of tensors, or of numbers.

    Example:
        >>> states = [{"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([5.0, 5.0, 5.0])}]
        >>> fishers = [{"w": torch.tensor([3.0, 0.0, 0.0])}, {"w": torch.tensor([1.0, 2.0, 0.0])}]
        >>> fisher_merge(states, fishers)
        {'w': tensor([2., 5., 3.])}
    """
    titles = titles_of(states)
    check_states(states, titles)
    factors = _checked_weights(weights, len(states))
    _check_fishers(states, fishers)

    def merged(names: tuple[str, ...], tensors: list[Tensor]) -> Tensor:
        mean = weighted_mean(tensors, factors)
        name = _fisher_name(names, fishers[0])
        if name is None:
            if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
                raise ValueError(f"{names[0]} differs between the states, and fishers do not name it")
            return tensors[0]
        total, sure = torch.zeros_like(mean), torch.zeros_like(mean)
        for tensor, fisher, factor in zip(tensors, fishers, factors, strict=True):
            share = factor * fisher[name].to(mean.device, work_dtype(mean))
            total += share * tensor
            sure += share
        return torch.where(sure > 0, total / sure, mean)

    return merge_states(states, titles, merged)


def _fisher_name(names: tuple[str, ...], fisher: State) -> str | None:
    """Return the one of several tied names by which there is Fisher information."""
    given = [name for name in names if name in fisher]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} are one tied tensor: give its Fisher information by one name")
    return given[0] if given else None


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    found = [1.0] * count if weights is None else finite_numbers(weights)
    if len(found) != count:
        raise ValueError(f"expected a weight for each of the {count} states; got {len(found)}")
    if min(found) < 0 or sum(found) == 0:
        raise ValueError(f"weights must be 0 or more, and not all 0; got {found}")
    return found


def _check_fishers(states: Sequence[State], fishers: Any) -> None:
    if isinstance(fishers, Mapping | str) or not isinstance(fishers, Sequence):
        raise TypeError(f"fishers must be a list with one dict for each state; got a {type(fishers).__name__}")
    if len(fishers) != len(states):
        raise ValueError(f"expected Fisher information of each of the {len(states)} states; got {len(fishers)}")
    check_states(fishers, [f"fishers[{index}]" for index in range(len(fishers))])
    for index, fisher in enumerate(fishers):
        for name, values in fisher.items():
            if name not in states[index]:
                raise ValueError(
                    f"{name} is in fishers[{index}] and not in the states: the Fisher information is of another model."
                    + did_you_mean(name, states[index])
                )
            if values.shape != states[index][name].shape or not floats(values) or not floats(states[index][name]):
                raise ValueError(
                    f"{name} is {[*values.shape]} of {values.dtype} in fishers[{index}] and "
                    f"{[*states[index][name].shape]} of {states[index][name].dtype} in the states"
                )
            if not bool(((values >= 0) & values.isfinite()).all()):
                raise ValueError(f"{name} in fishers[{index}] has entries that are negative or not finite")
