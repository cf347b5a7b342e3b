"""WiSE-FT for adapters: the weights between the base and what an adapter makes of it, by scaling the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers, record_of
from llmtune.adapters.ia3 import IA3Linear
from llmtune.adapters.layer import AdapterLayer, bare_module
from llmtune.adapters.scaled import ScaledLayer
from llmtune.adapters.token_rows import TokenRows
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy
from llmtune.adapters.vera import VeRALinear
from llmtune.modules import unwrap
from llmtune.weights.interpolation import checked_number, on_line

Line = tuple[Tensor, Tensor]  # a trained tensor, and what it is where the layer changes nothing


@contextmanager
def interpolated(model: nn.Module, alpha: float, name: str = "default") -> Iterator[None]:
    """Let the model have, within the block, the weights between the base (alpha = 0) and the adapted model (alpha = 1).

    W + alpha * (the adapter's change of W), which is (1 - alpha) W + alpha (W + s B A): `weights.interpolate` of the
    merged models, without their states. For LoRA it is the scaling s that is multiplied. What an adapter trains as a
    copy (biases, heads, norms, rows of new tokens) goes along the line from the original to the copy. Afterwards all is
    as it was, bit for bit.

    Wortsman et al., "Robust fine-tuning of zero-shot models" (2022), section 3. To keep the result, `combine` with the
    weight alpha makes an adapter of it, or `merge` within the block merges it.

    Where others differ: scaling A and B by alpha each, or averaging A with its start, gives alpha^2 or no such line.

    Args:
        model: a model with the adapter, switched on; other adapters stay as they are.
        alpha: any finite number; beyond 0 ... 1 the line goes on.
        name: the adapter's name.

    Raises:
        ValueError: there is no such adapter; it is switched off or merged; its change does not go along a line as one
            of its tensors is scaled (DoRA, bottlenecks, prompts, prefixes, LoReFT); or alpha is not finite.
        TypeError: alpha is no number.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = attach(model, LoRA(rank=1, alpha=2))
        >>> _ = nn.init.ones_(model[0].lora_b)
        >>> x = torch.ones(1, 2)
        >>> with torch.no_grad(), interpolated(model, 0.5):
        ...     half = model(x) - model[0].base(x)
        >>> bool(torch.allclose(2 * half, model(x) - model[0].base(x)))
        True
    """
    alpha = checked_number("alpha", alpha)
    model = unwrap(model)
    record = record_of(model, name)
    layers = list(dict.fromkeys(adapter_layers(model, name)))
    if name in record.merged:
        raise ValueError(f'adapter "{name}" is merged into the weights: unmerge it first')
    if not all(layer.active for layer in layers):
        raise ValueError(f'adapter "{name}" is switched off, so that no alpha changes anything: switch it on first')
    lines = [line for layer in layers for line in _lines(layer)]
    scalings = [(layer, layer.scaling) for layer in layers if isinstance(layer, ScaledLayer)]
    before = [(tensor, tensor.detach().clone()) for tensor, _ in lines]
    try:
        with torch.no_grad():
            for layer, scaling in scalings:
                layer.scaling = alpha * scaling
            for tensor, start in lines:
                tensor.copy_(_at(alpha, start, tensor))
        yield
    finally:
        for layer, scaling in scalings:
            layer.scaling = scaling
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def _at(alpha: float, start: Tensor, trained: Tensor) -> Tensor:
    if alpha in (0, 1):
        return trained if alpha else start
    return on_line(start, trained, alpha)


def _lines(layer: AdapterLayer) -> list[Line]:
    """Return the tensors of a layer to be moved; of a layer that is scaled, none.

    Raises:
        ValueError: the layer's change is not proportional to what is moved.
    """
    bare = bare_module(layer)
    if isinstance(layer, ScaledLayer) and not layer.reads_weight:
        return []
    if isinstance(layer, TrainedBias):
        return [(layer.trained_bias, bare.bias if layer.original is None else layer.original)]  # type: ignore[list-item]
    if isinstance(layer, TrainedCopy):
        starts = dict(bare.named_parameters()) | dict(bare.named_buffers())
        own = [*layer.copy.named_parameters(), *layer.copy.named_buffers()]
        return [(tensor, starts[local]) for local, tensor in own if tensor.is_floating_point()]
    if isinstance(layer, TokenRows):
        weight: Any = bare.weight
        return [(layer.rows, weight[layer.index])] if layer.origin is layer else []
    if isinstance(layer, VeRALinear):
        return [(layer.lambda_b, torch.zeros_like(layer.lambda_b))]
    if isinstance(layer, IA3Linear):
        return [(layer.scale, torch.ones_like(layer.scale))]
    raise ValueError(
        f'adapter "{layer.adapter_name}" ({type(layer).__name__}) is no change of weights that can be scaled: '
        "where it can be merged, merge it and interpolate the states (weights.interpolate)"
    )
