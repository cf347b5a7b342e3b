"""The sums of a step: named means over micro-batches, the norm of all gradients, tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtune.training.sharding import give_up_gathered, is_dtensor, whole
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


def drop_gradients(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """Drop all gradients, and what the scaler knows of them: they may be taken more than once a step."""
    give_up_gathered(model)  # a shard keeps its gradient while FSDP holds the whole parameter in its place
    for parameter in model.parameters():
        parameter.grad = None
    if scaler.is_enabled():
        scaler._per_optimizer_states.clear()


def unscale(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Tensor:
    """Divide all gradients by the scaler's scale, also those that are not the optimizer's; return whether one is not
    finite.

    `GradScaler.unscale_` leaves the others scaled (a frozen weight's, that a callback asked for); one of them that
    overflowed makes the scaler pass over the step, as any.
    """
    scaler.unscale_(optimizer)
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    others = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in own]
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for gradient in map(_local, others):
        gradient.div_(scaler.get_scale())
        for overflow in found.values():
            overflow += (~gradient.isfinite().all()).to(overflow)
    return ~gradient_norm(model).isfinite()


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the Euclidean norm of all gradients of the model together, a scalar; of all shards together."""
    return _norm(_gradients(model))


def clip_gradients(model: nn.Module, largest: float | None) -> Tensor:
    """Scale all gradients down so that their norm is at most `largest`; return it from before, a scalar.

    Gradients that are not finite are left as they are, so that one sees where they arose.
    """
    gradients = _gradients(model)
    norm = _norm(gradients)
    if largest is not None and gradients:
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        local = [gradient if type(gradient) is Tensor else _local(gradient) for gradient in gradients]
        torch._foreach_mul_(local, torch.where(norm.isfinite(), factor, 1.0))
    return norm


def _gradients(model: nn.Module) -> list[Any]:
    give_up_gathered(model)
    found = (parameter.grad for parameter in model.parameters())
    return [gradient for gradient in found if gradient is not None]


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if is_dtensor(gradient) else gradient


def _norm(gradients: list[Any]) -> Tensor:
    if len({(type(gradient), gradient.dtype, gradient.device) for gradient in gradients}) == 1:
        if type(gradients[0]) is Tensor:  # the usual case, without get_total_norm's sorting by device
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if is_dtensor(gradient) else None, []).append(gradient)
    norms = [nn.utils.get_total_norm(found) for found in by_mesh.values()]
    if None not in by_mesh:
        norms = [whole(norm) for norm in norms]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm([whole(norm) for norm in norms])


def plain_numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with numbers in place of tensors and NumPy values of one entry: it is kept, saved and shown."""

    def plain(value: Any) -> Any:
        one = isinstance(value, Tensor | np.generic | np.ndarray) and math.prod(value.shape) == 1
        return value.item() if one else value

    return {name: plain(value) for name, value in row.items()}


def real_tokens(batch: Batch) -> int:
    """Return how many tokens of the batch are no padding; 0 where it has no "input_ids"."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    return int(mask.sum()) if mask is not None else (0 if ids is None else ids.numel())
