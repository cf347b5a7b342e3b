"""The child network of Child-Tuning-D: the entries with the most Fisher information."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def child_mask(fisher: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
    """Return where the share `p` of all entries with the largest Fisher information is.

    One threshold for all tensors together, as in the paper. Exactly round(p * entries) are chosen: of those that equal
    the threshold the first, in the order of `fisher` (the authors' program takes all of them, and so everything where
    more than 1 - p of the entries are 0).

    Args:
        fisher: {name: tensor of any shape}, 0 or more.
        p: above 0 and below 1.

    Returns:
        {name: bool tensor of the same shape}, True for the child network.

    Raises:
        ValueError: `p` is out of range, or keeps none or all of the entries; `fisher` is empty, negative or not finite.
        TypeError: an entry of `fisher` is no tensor of floats.

    Example:
        >>> child_mask({"a": torch.tensor([1.0, 5.0, 2.0]), "b": torch.tensor([3.0])}, 0.5)
        {'a': tensor([False,  True, False]), 'b': tensor([True])}

    Xu et al. 2021, "Raise a child in large language model: towards effective and generalizable fine-tuning".
    """
    check_share(p)
    if not fisher:
        raise ValueError("fisher names no parameter: there is no child network to choose")
    for name, value in fisher.items():
        _check(name, value)
    device = next(iter(fisher.values())).device
    flat = torch.cat([value.flatten().to(device) for value in fisher.values()])
    entries = len(flat)
    keep = round(p * entries)
    if keep in (0, entries):
        raise ValueError(f"p={p:g} of {entries} entries is {'none' if keep == 0 else 'all'} of them")
    threshold = flat.kthvalue(entries - keep + 1).values
    left = keep - int((flat > threshold).sum())  # how many of those at the threshold
    masks = {}
    for name, value in fisher.items():
        at = value.to(threshold.dtype) == threshold.to(value.device)
        chosen = at.flatten().nonzero()[:left, 0]
        mask = value.to(threshold.dtype) > threshold.to(value.device)
        mask.view(-1)[chosen] = True
        left -= len(chosen)
        masks[name] = mask
    return masks


def check_share(p: float) -> None:
    """Raise ValueError where p is no share of the entries above 0 and below 1."""
    if not 0 < p < 1:
        raise ValueError(f"p, the child's share of the entries, must be above 0 and below 1; got {p}")


def _check(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"the Fisher information of {name} must be a tensor of floats; got {value!r:.60}")
    if not bool(value.isfinite().all()) or bool((value < 0).any()):
        raise ValueError(f"the Fisher information of {name} must be finite, 0 or more: it is a mean of squares")
