"""How the changes that several adapters make to one module become one change, a product of two factors again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmtune.adapters.layer import AdapterLayer, wide
from llmtune.adapters.lora import LowRankLayer
from llmtune.weights.deltas import merge_deltas, trim
from llmtune.weights.low_rank import LowRank, low_rank_matrix, low_rank_product

EXACT, DENSE = ("cat", "linear"), ("ties", "dare", "magnitude_prune")
METHODS = (*EXACT, "svd", *DENSE)
Merge = Callable[[list[Tensor], list[float]], Tensor]


def merge_of(method: str, density: float | None, generator: torch.Generator | None) -> Merge | None:
    """Return what makes one tensor of several that are written out; None for the methods that sum."""
    if method not in DENSE or density is None:
        return None

    def merge(tensors: list[Tensor], factors: list[float]) -> Tensor:
        if method == "magnitude_prune":
            return merge_deltas([{"": trim(tensor, density)} for tensor in tensors], factors, method="task")[""]
        deltas = [{"": tensor} for tensor in tensors]
        return merge_deltas(deltas, factors, method=method, density=density, generator=generator)[""]

    return merge


def merged(parts: Sequence[tuple[float, Tensor]], merge: Merge | None) -> Tensor:
    """Return the sum of weight * tensor, or what `merge` makes of them.

    Args:
        parts: weights and tensors of one shape, matrices or biases [out].
        merge: from `merge_of`.
    """
    if merge is None:
        return torch.stack([weight * tensor for weight, tensor in parts]).sum(0)
    return merge([tensor for _, tensor in parts], [weight for weight, _ in parts])


def combined_weight(
    place: str, layers: Sequence[tuple[float, AdapterLayer]], *, method: str, rank: int | None, merge: Merge | None
) -> LowRank:
    """Return the combined change of one module's weight, in the weight's own layout.

    Args:
        place: the module's name, for the sentences.
        layers: (weight, layer) of each adapter that changes it.
        method: one of `METHODS`.
        rank: to bring the change down to; None for the largest that one of the layers has.
        merge: from `merge_of`.

    Returns:
        left [rows, r], right [r, columns] and the relative error.

    Raises:
        ValueError: an exact method is asked for a change of full rank, or nothing says to which rank.
        TypeError: a layer does not change the weight by a matrix.
    """
    full = next((layer for _, layer in layers if layer.low_rank() is None), None)
    if full is not None and method in EXACT:
        raise ValueError(
            f'adapter "{full.adapter_name}" changes {place} by a matrix of full rank ({type(full).__name__}), which '
            f'"{method}" cannot hold exactly: use method="svd" with a rank'
        )
    if full is not None or merge is not None:
        change = merged([(weight, _matrix(place, layer)) for weight, layer in layers], merge)
        return low_rank_matrix(change, rank or _rank(place, layers))
    low = [(weight, factors) for weight, layer in layers if (factors := layer.low_rank()) is not None]
    left = torch.cat([weight * scaling * wide(one) for weight, (one, _, scaling) in low], dim=1)
    right = torch.cat([wide(other) for _, (_, other, _) in low])
    smaller = min(left.shape[0], right.shape[1])
    if method == "cat" and left.shape[1] <= smaller:
        return LowRank(left, right, 0.0)
    if method in EXACT:  # a product whose inner size is beyond its smaller side is exact at that side
        return low_rank_product(left, right, smaller if method == "cat" else None)._replace(error=0.0)
    return low_rank_product(left, right, rank or _rank(place, layers))


def change_of_bias(layer: AdapterLayer) -> Tensor | None:
    """Return the change [out] of the bias by a layer that changes the weight, or None where it leaves it alone."""
    if isinstance(layer, LowRankLayer):
        return None if layer.lora_bias is None else layer.scaling * wide(layer.lora_bias)
    return layer.deltas().get("bias")


def _matrix(place: str, layer: AdapterLayer) -> Tensor:
    delta = layer.deltas().get("weight")
    if delta is None or delta.ndim != 2:
        raise TypeError(
            f'adapter "{layer.adapter_name}" ({type(layer).__name__}) does not change the weight of {place} by a '
            "matrix, so LoRA cannot hold what it does"
        )
    return delta


def _rank(place: str, layers: Sequence[tuple[float, AdapterLayer]]) -> int:
    low = [factors[0].shape[1] for _, layer in layers if (factors := layer.low_rank()) is not None]
    known = [*low, *(layer.rank for _, layer in layers if isinstance(layer, LowRankLayer))]
    if not known:
        raise ValueError(f"no adapter has a rank at {place}: give the rank to bring its change down to")
    return max(known)
