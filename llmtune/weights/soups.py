"""Soups: the average of the weights of several models that were fine-tuned from one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from llmtune.weights.states import State, merge_states, titles_of, weighted_mean


class GreedySoup(NamedTuple):
    """What `greedy_soup` found.

    Attributes:
        state: the soup, tensors of the states' shapes by name.
        members: the numbers of the states in it, in the order in which they were taken.
        score: the soup's.
        scores: each state's own.
    """

    state: dict[str, Tensor]
    members: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def uniform_soup(states: Sequence[State]) -> dict[str, Tensor]:
    """Return the mean of states: sum_i theta_i / n.

    Wortsman et al., "Model soups" (2022), section 2. Sums are made in float64 (float32 on Apple's GPUs) and rounded
    once, so that an entry in which all agree stays as it is; the authors' program adds up v / n in the states' dtype,
    integers as well. Here integers and booleans are the first state's. Running statistics of batch normalisation are
    averaged like the rest; they are those of none of the models, so measure them anew.

    For adapters `combine` with weights 1 / n is the mean of their changes of weights. The mean of A and that of B is
    not.

    Args:
        states: tensors by name, of any shapes; the same names and shapes in all.

    Returns:
        New tensors by the same names, in the widest dtype that the states have there.

    Raises:
        ValueError: there is no state; they differ in names or shapes; what is tied in one differs in another; an entry
            would not be finite; or quantised weights differ.
        TypeError: a state is no dict of tensors.

    Example:
        >>> import torch
        >>> uniform_soup([{"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([2.0, 5.0])}])
        {'w': tensor([1.5000, 5.0000])}
    """
    titles = titles_of(states)
    ones = [1.0] * len(states)
    return merge_states(states, titles, lambda _, tensors: weighted_mean(tensors, ones), integers_from=0)


def greedy_soup(states: Sequence[State], score: Callable[[dict[str, Tensor]], float]) -> GreedySoup:
    """Return the soup that takes states in, the best first, as long as the held-out score gets no worse.

    Wortsman et al., "Model soups" (2022), recipe 1: states are ordered by their own score, and one is taken in where
    the mean with it scores at least as high as without. So the soup scores no lower than the best state alone. For n
    states `score` is asked 2 n - 1 times. Choose by data that is neither trained nor reported on.

    Args:
        states: tensors by name, of any shapes; the same names and shapes in all.
        score: takes a state and returns a number, higher is better.

    Raises:
        ValueError: a score is NaN, or as `uniform_soup`.
        TypeError: as `uniform_soup`.

    Example:
        >>> import torch
        >>> states = [{"w": torch.tensor(value)} for value in (0.0, 5.0, 3.0)]
        >>> soup = greedy_soup(states, score=lambda state: -abs(state["w"].item() - 2.0))
        >>> soup.members, soup.state, soup.scores
        ((2, 0), {'w': tensor(1.5000)}, (-2.0, -3.0, -1.0))
    """
    titles = titles_of(states)
    scores = []
    for state, title in zip(states, titles, strict=True):
        scores.append(_scored(score, uniform_soup([state]), title))
    order = sorted(range(len(states)), key=lambda index: -scores[index])
    members, best, state = [order[0]], scores[order[0]], uniform_soup([states[order[0]]])
    for index in order[1:]:
        candidate = uniform_soup([states[member] for member in (*members, index)])
        found = _scored(score, candidate, f"the soup with {titles[index]}")
        if found >= best:
            members, best, state = [*members, index], found, candidate
    return GreedySoup(state, tuple(members), best, tuple(scores))


def _scored(score: Callable[[dict[str, Tensor]], float], state: dict[str, Tensor], title: str) -> float:
    found = float(score(state))
    if math.isnan(found):
        raise ValueError(f"the score of {title} is NaN: a soup is chosen by numbers that can be compared")
    return found
