"""How many bytes a penalty will hold, before it holds them."""

from __future__ import annotations

import torch
from torch import nn

from llmtune.adapters.effective import Choice, choose_parameters


def penalty_memory(
    model: nn.Module, *, parameters: Choice = None, dtype: torch.dtype | None = None, path: bool = False,
    importance: bool = True,
) -> int:  # fmt: skip
    """Return the bytes that `EWC`, `OnlineEWC`, `MemoryAwareSynapses` or `SynapticIntelligence` holds for a model.

    Each holds two tensors for a parameter: its importance, of its shape, and its anchor. The anchor of a weight that is
    frozen under low-rank adapters is that weight itself, beside copies of the adapters' factors. Any other is a copy.
    However many tasks there were, it stays two. `SynapticIntelligence` holds a third, the path of the task that runs;
    `L2SP` has the anchor alone.

    What comes and goes is not counted: a copy of one chunk while the penalty is computed; the sums that
    `diagonal_fisher` and `output_sensitivity` hold once more; and in a step of `SynapticIntelligence` the gradient and
    the value from before, and of a frozen weight under adapters its gradient in `.grad`.

    Args:
        model: any module, with its adapters attached.
        parameters: as the penalty gets it.
        dtype: as the penalty gets it. With `device="cpu"` the bytes (but for the path) are the CPU's.
        path: whether it is `SynapticIntelligence`.
        importance: False for `L2SP`, which has none.

    Returns:
        Bytes; of an adapter whose B is still 0 a little more than is held, its factors being no part of the anchor.

    Raises:
        ValueError: a name is not the model's, or nothing is chosen.
        TypeError: `parameters` is one string.

    Example:
        >>> layer = nn.Linear(300, 200, bias=False)
        >>> penalty_memory(layer), penalty_memory(layer, dtype=torch.bfloat16), penalty_memory(layer, path=True)
        (480000, 240000, 720000)
    """
    total = 0
    for entry in choose_parameters(model, parameters).values():
        own, size = entry.parameter.dtype, entry.parameter.numel()
        wide = torch.promote_types(own, torch.float32)
        total += size * (dtype or (wide if path else torch.float32)).itemsize if importance else 0
        factors = entry.factors()
        if entry.parameter.requires_grad or len(factors) < len(entry.layers):
            total += size * (dtype or (wide if entry.layers else own)).itemsize
        total += sum(
            tensor.numel() * tensor.itemsize
            for left, right, _ in (factors if not entry.parameter.requires_grad else [])
            for tensor in (left, right)
        )
        total += size * wide.itemsize if path else 0
    return total
