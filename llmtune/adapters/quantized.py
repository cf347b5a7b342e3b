"""Frozen weights in 4 or 8 bits under trained adapters (QLoRA), kept and multiplied by bitsandbytes.

    y = x dequantised(W)^T + scaling * (x A^T) B^T

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023): NF4 in blocks of 64 whose scales are quantised
once more (section 3). Dettmers et al., "LLM.int8()" (2022). The adapters are the same as over plain weights; what is
here is how a model gets such weights, what they are in floating numbers, and what keeps them trainable on a CPU.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import AdapterLayer, bare_module, named_places
from llmtune.adapters.record import Targets, check_expressions
from llmtune.adapters.targets import is_conv1d, linear_places, matching
from llmtune.modules import check_module

KINDS = ("nf4", "int8")
_PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' flag for packing weights anew in eval mode


def quantize(model: nn.Module, kind: str = "nf4", *, exclude: Targets = ()) -> tuple[str, ...]:
    """Put bitsandbytes' quantised layers in the place of a model's linear layers, for adapters to be trained over.

    What is replaced: every `nn.Linear` and GPT-2's `Conv1D` but the output head of a Hugging Face model, and no
    subclass of them. Products are computed in the dtype the weight had. There is no way back to the exact weights.

    A model too large to be loaded first is quantised while transformers loads it, and works with adapters alike:
    `from_pretrained(name, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True,
    bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16))`. That is also
    the way to a model that `save_pretrained` writes quantised; one from here has no such entry in its configuration.

    Args:
        model: without adapters, its weights on the device they are to stay on; changed in place.
        kind: "nf4", 4.13 bits a weight, or "int8", 8 bits and a scale for each output.
        exclude: suffixes, or one regular expression, of modules to leave as they are.

    Returns:
        The names of the layers replaced.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: `kind` is unknown, nothing is left to replace, a weight is tied or on the meta device, the model has
            adapters, or `exclude` matches nothing. The model is then as it was.

    Example:
        >>> from llmtune.adapters import LoRA, attach, quantize
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> len(quantize(model))  # doctest: +SKIP
        14
        >>> report = attach(model, LoRA(rank=4, alpha=8))
    """
    check_module(model)
    check_expressions("exclude", exclude)
    if kind not in KINDS:
        raise ValueError(f'kind must be "nf4" or "int8"; got {kind!r}')
    places = dict(named_places(model))
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise ValueError("the model has adapters: quantise it first, then attach them")
    out = matching(exclude, [place for place in places if place], what="exclude") if exclude else {}
    left = {place for some in out.values() for place in some}
    wanted = {
        place: places[place]
        for place in linear_places(model, places)
        if place not in left and (type(places[place]) is nn.Linear or is_conv1d(places[place]))
    }
    _check_quantizable(model, wanted)
    new = {id(module): _quantized(module, kind) for module in wanted.values()}
    for parent in list(model.modules()):
        for local, child in parent._modules.items():
            if id(child) in new:
                parent._modules[local] = new[id(child)]
    return tuple(wanted)


def quantized_kind(module: nn.Module) -> str | None:
    """Return "nf4", "fp4" or "int8" for a layer of bitsandbytes that holds a quantised weight, else None."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    weight: Any = getattr(module, "weight", None)
    if "bitsandbytes.nn.modules.Linear4bit" in names:
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        return None if state is None else str(state.quant_type)
    held = isinstance(weight, Tensor) and weight.dtype == torch.int8
    return "int8" if held and "bitsandbytes.nn.modules.Linear8bitLt" in names else None


def dequantized_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer as [out, in] in float32: of a quantised one what its numbers stand for.

    Args:
        module: a layer for which `quantized_kind` is not None.
    """
    layer: Any = module
    if quantized_kind(module) == "int8":
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        return layer.weight.data.float() * (scales.float()[:, None] / 127)
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(getattr(layer.weight, "quant_state", None) or layer.quant_state)
    state.dtype = torch.float32  # that of the result
    return dequantize_4bit(layer.weight.data.reshape(-1, 1), state)


def dequantized_dtype(module: nn.Module, model: nn.Module) -> torch.dtype:
    """Return the dtype a quantised layer's weight had: what bitsandbytes noted, else that of the model around it.

    Args:
        module: a layer for which `quantized_kind` is not None.
        model: the model it is in.
    """
    layer: Any = module
    if quantized_kind(module) != "int8":
        return (getattr(layer.weight, "quant_state", None) or layer.quant_state).dtype
    if layer.bias is not None:
        return layer.bias.dtype
    bare = (p for _, place in named_places(model) for p in bare_module(place)._parameters.values() if p is not None)
    return next((p.dtype for p in bare if p.is_floating_point()), torch.float32)


def quantization_state(module: nn.Module) -> list[Tensor]:
    """Return what a quantised layer keeps beside its weight, scales and tables; empty for any other module."""
    layer: Any = module
    kind = quantized_kind(module)
    if kind is None:
        return []
    if kind == "int8":
        return [part for part in (layer.state.SCB, layer.weight.SCB) if part is not None]
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    inner = state.state2
    parts = [state.absmax, state.code, state.offset, *((inner.absmax, inner.code) if inner is not None else ())]
    return [part for part in parts if isinstance(part, Tensor)]


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of a quantised layer's weight and of what it keeps beside it."""
    layer: Any = module
    return layer.weight.nbytes + sum(part.nbytes for part in quantization_state(module))


def as_linear(module: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """Return a plain frozen `nn.Linear` for a quantised layer, with another weight and the very bias.

    Args:
        module: a layer for which `quantized_kind` is not None.
        weight: [out, in].
        dtype: of the new layer; a bias of another one is copied.
    """
    layer: Any = module
    bias = layer.bias
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        same = bias.dtype == dtype
        plain.bias = bias if same else nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
    return plain.train(layer.training)


def has_hooks(module: nn.Module) -> bool:
    """Return whether code of others runs around a module's forward pass: torch's hooks, or accelerate's."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return hasattr(module, "_hf_hook") or "forward" in module.__dict__ or any(getattr(module, kind) for kind in kinds)


def keep_unpacked(model: nn.Module) -> list[str]:
    """Keep bitsandbytes from packing 4-bit weights anew, and return the names of the layers for which it was allowed.

    On CPUs with AVX512-BF16 it packs them for inference at the first call in eval mode without gradient: the scales are
    rounded to bfloat16 and the kernel has no derivative, so training after an evaluation would go wrong in silence.

    Args:
        model: a model with or without 4-bit layers.

    Raises:
        ValueError: the weights are packed already.
    """
    found: dict[str, Any] = {
        place: bare_module(module)
        for place, module in named_places(model)
        if getattr(bare_module(module), _PACKS, False) and quantized_kind(bare_module(module)) is not None
    }
    for place, layer in found.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{place} was run in eval mode, and bitsandbytes has packed its weight for inference on this CPU, with "
                "rounding and without a derivative: load or quantise the model anew, and attach before running it"
            )
    for layer in found.values():
        setattr(layer, _PACKS, False)
    return list(found)


def allow_packing(model: nn.Module, names: Iterable[str]) -> None:
    """Undo `keep_unpacked`."""
    places = dict(named_places(model))
    for name in names:
        layer = bare_module(places.get(name, nn.Identity()))
        if hasattr(layer, _PACKS):
            setattr(layer, _PACKS, True)


def forget_quantization(model: Any) -> None:
    """Take out of a Hugging Face model that it is quantised, where no layer of it is any more."""
    if any(quantized_kind(module) is not None for module in model.modules()) or not hasattr(model, "hf_quantizer"):
        return
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in model.__dict__:
            delattr(model, name)
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _check_quantizable(model: nn.Module, wanted: dict[str, nn.Module]) -> None:
    if not wanted:
        raise ValueError(f"this {type(model).__name__} has no linear layer to quantise")
    homes: dict[int, list[str]] = defaultdict(list)
    for place, module in named_places(model):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                homes[parameter.untyped_storage().data_ptr() or id(parameter)].append(f"{place}.{local}")
    for place, module in wanted.items():
        weight: Any = module.weight
        if weight.is_meta:
            raise ValueError(f"{place} is on the meta device: load the model first")
        if not weight.is_floating_point():
            raise ValueError(f"{place} has a weight of {weight.dtype}: only floating ones can be quantised")
        shared = homes[weight.untyped_storage().data_ptr()]
        if len(shared) > 1:
            raise ValueError(f"{' and '.join(shared)} are one tied weight: exclude {place}")


def _quantized(module: nn.Module, kind: str) -> nn.Module:
    """A layer of bitsandbytes with the same function as a linear layer or Conv1D, up to rounding."""
    try:
        from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    except ImportError as error:
        raise ImportError('quantize needs bitsandbytes: pip install "llmtune[quant]"') from error
    source: Any = module
    weight: Any = source.weight.detach().T if is_conv1d(module) else source.weight.detach()
    out, size = weight.shape
    bias = source.bias is not None
    new: Any
    if kind == "nf4":
        new = Linear4bit(size, out, bias=bias, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        held: Any = Params4bit(weight.contiguous().clone(), quant_type="nf4", module=new)
        new.support_avx512bf16_for_cpu = False  # see keep_unpacked
    else:
        new = Linear8bitLt(size, out, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta")
        held = Int8Params(weight.cpu(), requires_grad=False)
    new.weight = held.to(weight.device)  # which quantises
    if bias:
        new.bias = source.bias
    return new.train(module.training)
