"""Several changes of the same weights put together into one: averages, task arithmetic, TIES and DARE.

A *delta* is what a training did to a weight: tuned minus base. A model's deltas are a dict by parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from llmtune.errors import did_you_mean

METHODS = ("average", "task", "ties", "dare")
TRIMS = ("ties", "dare")  # those that look at density


@torch.no_grad()
def merge_deltas(
    deltas: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    method: str = "average",
    density: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the one change that several come to, entry by entry.

    average  sum_i w_i d_i / sum_i w_i
    task     sum_i w_i d_i
    ties     t_i = trim(w_i d_i),  s = sign(sum_i t_i),  the mean of those t_i whose sign is s
    dare     sum_i w_i m_i d_i / density,  m_i ~ Bernoulli(density)

    Task arithmetic is Ilharco et al., "Editing Models with Task Arithmetic" (2022), section 2. TIES is Yadav et al.,
    "TIES-Merging" (2023), section 4, whose factor lambda is a weight given to every model. There entries are trimmed
    over all parameters together, here in each tensor by itself, so that a tensor with small entries keeps its share;
    where the trimmed entries sum to zero no sign is elected, and the result is 0. PEFT elects before it weighs, so that
    a change subtracted votes as if it were added; here a weight counts in the vote. DARE is Yu et al., "Language Models
    are Super Mario" (2023), section 3.

    Args:
        deltas: one dict a model; the same names, and for each name tensors of one shape, any.
        weights: w_i, one a model, any signs; left out, all 1.
        method: "average", "task", "ties" or "dare".
        density: the share of entries that "ties" and "dare" keep, above 0 and at most 1.
        generator: what "dare" draws from, by names in the first dict's order and for each name by models.

    Returns:
        The merged change by the same names and in the same shapes, made in at least float32 and rounded once to the
        deltas' dtype.

    Raises:
        ValueError: there are no deltas, their names or shapes differ, an entry is not finite, a number is out of its
            range, or density or a generator is given to a method that would not look at it.
        TypeError: a tensor is not floating, or an argument has a wrong type.

    Example:
        >>> one, other = {"w": torch.tensor([4.0, -1.0, 0.5])}, {"w": torch.tensor([2.0, 3.0, -0.5])}
        >>> merge_deltas([one, other])["w"]
        tensor([3., 1., 0.])
        >>> merge_deltas([one, other], method="ties", density=0.7)["w"]
        tensor([3., 3., 0.])
    """
    _check_deltas(deltas)
    factors = _checked_weights(weights, len(deltas), method)
    _check_method(method, density, generator)
    _check_alike(deltas)
    found = {}
    for name, first in deltas[0].items():
        wide = reduce(torch.promote_types, (other[name].dtype for other in deltas), torch.float32)
        parts = [w * other[name].to(wide) for w, other in zip(factors, deltas, strict=True)]
        narrow = reduce(torch.promote_types, (other[name].dtype for other in deltas), first.dtype)
        found[name] = _merged(parts, method, density, generator, sum(factors)).to(narrow)
    return found


def trim(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor of which only the entries largest in magnitude are kept, the others being 0.

    floor(density * n) of the n entries stay, at least one; among equal ones the first.

    Args:
        tensor: any shape, without NaN.
        density: the share to keep, above 0 and at most 1.

    Returns:
        A tensor of the same shape.

    Raises:
        ValueError: density is out of its range.

    Example:
        >>> trim(torch.tensor([1.0, -3.0, 2.0, 0.5]), 0.5)
        tensor([ 0., -3.,  2.,  0.])
    """
    check_density(density)
    n = tensor.numel()
    kept = max(1, math.floor(density * n + 1e-6))  # so that 0.29 * 100 is 29
    if kept >= n:
        return tensor
    sizes = tensor.detach().abs().flatten()
    least = sizes.kthvalue(n - kept + 1).values
    above, equal = sizes > least, sizes == least
    mask = above | (equal & (equal.cumsum(0) <= kept - above.sum()))
    return torch.where(mask.view_as(tensor), tensor, torch.zeros_like(tensor))


def check_density(density: float) -> None:
    """Raise ValueError where `density` is no share above 0 and at most 1."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density is the share of entries to keep, above 0 and at most 1; got {density!r}")


def check_generator(generator: Any, method: str) -> None:
    """Raise where `generator` is none of torch's (TypeError), or the method would not look at it (ValueError)."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {generator!r}")
    if method != "dare":
        raise ValueError(f'"{method}" draws nothing: a generator is for "dare"')


def finite_numbers(weights: Any) -> list[float]:
    """Return weights as a list of floats.

    Raises:
        TypeError: they are no list of numbers.
        ValueError: one is not finite.
    """
    given = weights.tolist() if hasattr(weights, "tolist") else weights  # of a tensor or an array
    if not isinstance(given, Sequence) or not all(isinstance(weight, Real) for weight in given):
        raise TypeError(f"weights must be a list of numbers; got {weights!r}")
    found = [float(weight) for weight in given]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"weights must be finite numbers; got {found}")
    return found


def _merged(
    parts: list[Tensor], method: str, density: float, generator: torch.Generator | None, total: float
) -> Tensor:
    if method == "ties":
        return _elected(torch.stack([trim(part, density) for part in parts]))
    if method == "dare":
        parts = [_dropped(part, density, generator) for part in parts]
    merged = torch.stack(parts).sum(0)
    return merged / total if method == "average" else merged


def _elected(trimmed: Tensor) -> Tensor:
    """Return the mean over the models of those entries that have the sign of their sum; `trimmed` is [models, ...]."""
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (sign != 0)
    return torch.where(agree, trimmed, 0.0).sum(0) / agree.sum(0).clamp(min=1)


def _dropped(part: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    if density == 1:
        return part
    device = part.device if generator is None else generator.device
    mask = torch.rand(part.shape, generator=generator, device=device).to(part.device) < density
    return torch.where(mask, part / density, 0.0)


def _checked_weights(weights: Sequence[float] | None, count: int, method: str) -> list[float]:
    if count == 0:
        raise ValueError("there are no deltas to merge: give one dict of tensors a model")
    found = [1.0] * count if weights is None else finite_numbers(weights)
    if len(found) != count:
        raise ValueError(f"expected a weight for each of the {count} deltas; got {len(found)}")
    if method == "average" and not abs(sum(found)) > 0:
        raise ValueError(f'weights must not sum to 0, by which "average" divides; got {found}: use method="task"')
    return found


def _check_method(method: str, density: float, generator: torch.Generator | None) -> None:
    if method not in METHODS:
        known = ", ".join(f'"{name}"' for name in METHODS)
        raise ValueError(f"method must be one of {known}; got {method!r}.{did_you_mean(str(method), METHODS)}")
    check_density(density)
    if density != 1 and method not in TRIMS:
        raise ValueError(f'"{method}" keeps every entry: density={density} is for "ties" and "dare"')
    check_generator(generator, method)


def _check_deltas(deltas: Any) -> None:
    if not isinstance(deltas, Sequence) or not all(isinstance(each, Mapping) for each in deltas):
        raise TypeError(f"deltas must be a list with one dict of tensors for each model; got {deltas!r}")
    for index, each in enumerate(deltas):
        for name, tensor in each.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} in deltas[{index}] must be a tensor; got {tensor!r}")


def _check_alike(deltas: Sequence[Mapping[str, Tensor]]) -> None:
    first = deltas[0]
    for index, other in enumerate(deltas):
        odd = sorted(first.keys() ^ other.keys())
        if odd:
            raise ValueError(
                f"{odd[0]} is in deltas[{index if odd[0] in other else 0}] and not in "
                f"deltas[{0 if odd[0] in other else index}]: give zeros where a model has not changed"
            )
        for name, tensor in other.items():
            if not tensor.is_floating_point():
                raise TypeError(f"{name} in deltas[{index}] is {tensor.dtype}: a change of weights is floating")
            if tensor.shape != first[name].shape:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} in deltas[{index}] and {tuple(first[name].shape)} in deltas[0]"
                )
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} in deltas[{index}] has entries that are not finite")
