"""Merging over quantised layers: plain ones with the merged weight in their place, for a while or for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import AdapterLayer, adapter_chain, named_places
from llmtune.adapters.quantized import as_linear, dequantized_dtype, has_hooks, quantized_kind

Swap = tuple[AdapterLayer, nn.Module, nn.Linear]  # what stands around it, the quantised layer, the plain one


def is_quantised(place: tuple[nn.Module, str]) -> bool:
    """Return whether a module and a local name mean the weight of a layer that bitsandbytes has quantised."""
    return place[1] == "weight" and quantized_kind(place[0]) is not None


def plain_dtype(layer: nn.Module, model: nn.Module, dequantize: bool | torch.dtype) -> torch.dtype:
    """Return the dtype of the plain layer: the one asked for, or that of the weight before it was quantised."""
    return dequantize if isinstance(dequantize, torch.dtype) else dequantized_dtype(layer, model)


def check_plain(layer: nn.Module, name: str, dequantize: bool | torch.dtype) -> None:
    """Raise where a quantised layer may not, or cannot, make place for a plain one.

    Args:
        layer: the quantised layer.
        name: its weight's, for the sentence.
        dequantize: the argument of `merge`.

    Raises:
        ValueError: it was not asked for, the dtype is none of floats, or the layer has hooks.
    """
    if dequantize is False:
        raise ValueError(
            f"{name} is quantised ({quantized_kind(layer)}), and rounding it again would lose most of the change: pass "
            "dequantize=True to put a plain linear layer with the merged weight in its place"
        )
    if isinstance(dequantize, torch.dtype) and not dequantize.is_floating_point:
        raise ValueError(f"dequantize must be True or a floating dtype; got {dequantize}")
    if has_hooks(layer):
        raise ValueError(f"the layer of {name} has hooks, which a plain layer in its place would not have: remove them")


def put_plain(
    model: nn.Module,
    values: Mapping[tuple[nn.Module, str], Callable[[], Tensor]],
    dequantize: bool | torch.dtype,
) -> tuple[list[Swap], float]:
    """Put plain layers under the adapters in the place of quantised ones.

    Args:
        model: the model.
        values: for the weight of each quantised layer a function that gives the merged one, [out, in] in float32.
        dequantize: the argument of `merge`.

    Returns:
        What was swapped, and the largest rounding.
    """
    chains = [chain for _, module in named_places(model) if (chain := adapter_chain(module))]
    holders = {id(chain[-1].base): chain[-1] for chain in chains}
    swaps, rounding = [], 0.0
    for (layer, _), value in values.items():
        exact = value()
        plain = as_linear(layer, exact, plain_dtype(layer, model, dequantize))
        rounding = max(rounding, float((plain.weight.to(exact.dtype) - exact).abs().max()))
        holder = holders[id(layer)]
        holder.base = plain
        swaps.append((holder, layer, plain))
    return swaps, rounding
