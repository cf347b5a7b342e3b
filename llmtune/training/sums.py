"""The sums of a step: named means over micro-batches, the norm of all gradients, tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.types import Batch


def add_share(metrics: dict[str, Any], values: Mapping[str, Any], share: float) -> None:
    """Add a micro-batch's means, times its share of the step's targets, to the step's; without waiting for the device.

    Args:
        metrics: the step's means so far, scalars by name; changed in place.
        values: the micro-batch's means, tensors or numbers by name.
        share: of the targets, 0 to 1.
    """
    for name, value in values.items():
        part = torch.as_tensor(value).detach().float() * share
        metrics[name] = metrics[name] + part if name in metrics else part


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the Euclidean norm of all gradients of the model together, a scalar."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradients(model: nn.Module, largest: float | None) -> Tensor:
    """Scale all gradients down so that their norm is at most `largest`; return it from before, a scalar.

    Gradients that are not finite are left as they are, so that one sees where they arose.
    """
    norm = gradient_norm(model)
    if largest is not None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, torch.where(norm.isfinite(), factor, 1.0))
    return norm


def real_tokens(batch: Batch) -> int:
    """Return how many tokens of the batch are no padding; 0 where it has no "input_ids"."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    return int(mask.sum()) if mask is not None else (0 if ids is None else ids.numel())


def mean_by_name(batches: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, float]:
    """Return the sum over all batches' sums divided by that of their counts, name by name.

    Args:
        batches: (sums, counts) of each batch, of the same names; a name whose counts are all 0 is left out.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for batch_sums, batch_counts in batches:
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
            counts[name] = counts.get(name, 0.0) + float(batch_counts[name])
    return {name: sums[name] / counts[name] for name in sums if counts[name]}
