"""Which layers a LoRA or DoRA record means on a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmtune.adapters.dora import DoRAConv1D, DoRALinear
from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.adapters.lora import LoRAConv1D, LoRAEmbedding, LoRALinear, LowRankLayer, lora_scaling
from llmtune.adapters.plan import Build, Plan, plan_targets
from llmtune.adapters.targets import check_patterns_used, is_conv1d, pattern_value
from llmtune.adapters.token_plan import check_same_tokens, places_of_tokens, token_builders, token_groups, token_places

if TYPE_CHECKING:
    from llmtune.adapters.config import LoRA


def plan_lora(model: nn.Module, config: LoRA, name: str) -> Plan:
    """Work out which layers a LoRA record means on this model.

    Args:
        model: the root, with or without adapters.
        config: the record.
        name: the adapter's name.

    Raises:
        ValueError: a pattern matches nothing, a rank is too large for its layer, the root is a target, or a module
            would be adapted twice; a token of train_tokens is out of range or trained already.
        TypeError: a target is of a kind that cannot be adapted, or train_tokens names one of which rows cannot be.
    """
    groups = token_groups(model, places_of_tokens(model, config.train_tokens))
    plan = plan_targets(
        model, config, name, adaptable=lambda module: _kind(module) is not None,
        build=partial(_builder, config=config, name=name), train_bias=config.train_bias, tokens=token_places(groups),
    )  # fmt: skip
    plan.builders += token_builders(
        model, groups, name, dtype=config.dtype, file_name="token_adapter.trainable_tokens_delta", in_every_place=False
    )
    check_patterns_used(config.rank_pattern, plan.adapted, what="rank_pattern")
    check_patterns_used(config.alpha_pattern, plan.adapted, what="alpha_pattern")
    return plan


def check_same_meaning(model: nn.Module, config: LoRA, name: str, *, source: Path) -> None:
    """Raise where the file's tensors would be scaled otherwise than they were trained, or rows be other tokens';
    another rank shows in shapes.

    Args:
        model: the model.
        config: the record read from the file.
        name: the attached adapter's name.
        source: the file's folder.

    Raises:
        ValueError: a layer scales by another factor, or trains the rows of other tokens.
    """
    groups = token_groups(model, places_of_tokens(model, config.train_tokens))
    check_same_tokens(model, groups, name, source=source)
    for place, module in named_places(model):
        for layer in adapter_chain(module):
            if layer.adapter_name != name or not isinstance(layer, LowRankLayer):
                continue
            rank = pattern_value(place, config.rank_pattern, config.rank)
            alpha = pattern_value(place, config.alpha_pattern, config.alpha)
            wanted = lora_scaling(alpha, rank, config.rslora)
            if rank == layer.rank and wanted != layer.scaling:
                raise ValueError(
                    f'the adapter in {source} scales {place} by {wanted:g}, the attached "{name}" by '
                    f"{layer.scaling:g}: detach it first, and loading attaches what the file describes"
                )


def _kind(module: nn.Module) -> type[LoRALinear] | type[LoRAEmbedding] | None:
    bare: Any = bare_module(module)
    if is_conv1d(bare):
        return LoRAConv1D
    if isinstance(bare, nn.Embedding):
        return LoRAEmbedding
    sizes = (getattr(bare, "in_features", None), getattr(bare, "out_features", None))
    return LoRALinear if all(isinstance(size, int) for size in sizes) else None


def _builder(place: str, module: nn.Module, *, config: LoRA, name: str) -> Build:
    kind = _kind(module)
    if kind is None:
        raise TypeError(
            f"{place} is a {type(bare_module(module)).__name__}: LoRA goes to linear layers, Conv1D and embeddings. "
            "Name it in train_modules to train it whole, or narrow the targets"
        )
    if isinstance(bare_module(module), NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{place} belongs to nn.MultiheadAttention, which takes its weight without calling it, so an adapter there "
            "would do nothing: exclude it"
        )
    if config.decomposes:
        if kind is LoRAEmbedding:
            raise TypeError(f"{place} is an embedding: DoRA goes to linear layers and Conv1D. Narrow the targets")
        kind = DoRAConv1D if kind is LoRAConv1D else DoRALinear
    if config.lora_bias and kind is LoRAEmbedding:
        raise ValueError(f"lora_bias has no meaning for {place}, an embedding: leave it out of the targets")
    rank = pattern_value(place, config.rank_pattern, config.rank)
    alpha = pattern_value(place, config.alpha_pattern, config.alpha)
    largest = min(_sizes(bare_module(module)))
    if rank > largest:
        raise ValueError(f"the rank {rank} is larger than {place} allows: the smaller of its two sizes is {largest}")

    def build(base: nn.Module) -> AdapterLayer:
        return kind(
            base, rank=rank, alpha=alpha, dropout=0.0 if kind is LoRAEmbedding else config.dropout,
            rslora=config.rslora, lora_bias=config.lora_bias, initialise=config.initialise, dtype=config.dtype,
            adapter_name=name,
        )  # fmt: skip

    return build


def _sizes(bare: Any) -> tuple[int, int]:
    if isinstance(getattr(bare, "in_features", None), int):
        return bare.in_features, bare.out_features
    return tuple(bare.weight.shape)
