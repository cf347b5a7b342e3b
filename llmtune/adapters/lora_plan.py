"""Which layers a LoRA or DoRA record means on a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llmtune.adapters.dora import DoRAConv1D, DoRALinear
from llmtune.adapters.initialise import check_orthogonal_rank, reads_weight
from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.adapters.lora import LoRAConv1D, LoRALinear, LowRankLayer, lora_scaling
from llmtune.adapters.lora_embedding import LoRAEmbedding
from llmtune.adapters.parameter_plan import matching_parameters, named_locals
from llmtune.adapters.parameters import LoRAParameter, check_parameter, sizes_of
from llmtune.adapters.plan import Build, Plan, check_free, plan_targets
from llmtune.adapters.targets import check_called, check_patterns_used, is_conv1d, linear_sizes, pattern_value
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
    if config.target_parameters:
        _add_parameters(model, config, name, plan)
    adapted = [*plan.adapted, *plan.parameters]
    check_patterns_used(config.rank_pattern, adapted, what="rank_pattern")
    check_patterns_used(config.alpha_pattern, adapted, what="alpha_pattern")
    return plan


def _add_parameters(model: nn.Module, config: LoRA, name: str, plan: Plan) -> None:
    """Add a layer for each parameter that target_parameters names; those of one module nest in its own order, the first
    innermost, whatever order they are named in: PEFT's files mean that order."""
    if config.initialise not in ("kaiming", "gaussian"):
        raise ValueError(f'initialise="{config.initialise}" is for linear layers, and target_parameters names others')
    places = dict(named_places(model))
    every = named_locals(places)
    found = matching_parameters(config.target_parameters, every)
    wanted = {parameter for some in found.values() for parameter in some}
    plan.parameters = [parameter for parameter in every if parameter in wanted]
    plan.experts = [parameter for parameter in plan.experts if parameter not in wanted]
    owners = [every[parameter][0] for parameter in plan.parameters]
    plan.heads = [place for place in plan.heads if place not in owners]
    for index, parameter in enumerate(plan.parameters):
        place, local = every[parameter]
        if not place:
            raise ValueError(
                f"the model itself, a {type(model).__name__}, owns {parameter}: put it into a module (nn.Sequential), "
                "or use LoRAParameter directly"
            )
        check_parameter(places[place], local, parameter)
        rank = pattern_value(parameter, config.rank_pattern, config.rank)
        largest = min(sizes_of(places[place], local)[1:])
        if rank > largest and not config.any_rank:
            raise ValueError(_too_large(rank, parameter, largest))
        build = partial(
            LoRAParameter, parameter=local, rank=rank,
            alpha=pattern_value(parameter, config.alpha_pattern, config.alpha), rslora=config.rslora,
            initialise=config.initialise, dtype=config.dtype, adapter_name=name,
            outside=owners[index + 1 :].count(place),
        )  # fmt: skip
        plan.builders.append((place, build))
    check_free(places, plan)


def _too_large(rank: int, name: str, largest: int) -> str:
    return f"the rank {rank} is larger than {name} allows: the smaller of its two sizes is {largest}"


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
            if layer.adapter_name != name or not isinstance(layer, LowRankLayer | LoRAParameter):
                continue
            what = f"{place}.{layer.parameter}" if isinstance(layer, LoRAParameter) else place
            rank = pattern_value(what, config.rank_pattern, config.rank)
            alpha = pattern_value(what, config.alpha_pattern, config.alpha)
            wanted = lora_scaling(alpha, rank, config.rslora)
            if rank == layer.rank and wanted != layer.scaling:
                raise ValueError(
                    f'the adapter in {source} scales {what} by {wanted:g}, the attached "{name}" by '
                    f"{layer.scaling:g}: detach it first, and loading attaches what the file describes"
                )


def _kind(module: nn.Module) -> type[LoRALinear] | type[LoRAEmbedding] | None:
    bare: Any = bare_module(module)
    if is_conv1d(bare):
        return LoRAConv1D
    if isinstance(bare, nn.Embedding):
        return LoRAEmbedding
    return None if linear_sizes(bare) is None else LoRALinear


def _builder(place: str, module: nn.Module, *, config: LoRA, name: str) -> Build:
    kind = _kind(module)
    if kind is None:
        raise TypeError(
            f"{place} is a {type(bare_module(module)).__name__}: LoRA goes to linear layers, Conv1D and embeddings. "
            "Name it in train_modules to train it whole, or narrow the targets"
        )
    check_called(place, module)
    if config.decomposes:
        if kind is LoRAEmbedding:
            raise TypeError(f"{place} is an embedding: DoRA goes to linear layers and Conv1D. Narrow the targets")
        kind = DoRAConv1D if kind is LoRAConv1D else DoRALinear
    if config.lora_bias and kind is LoRAEmbedding:
        raise ValueError(f"lora_bias has no meaning for {place}, an embedding: leave it out of the targets")
    rank = pattern_value(place, config.rank_pattern, config.rank)
    alpha = pattern_value(place, config.alpha_pattern, config.alpha)
    bare: Any = bare_module(module)
    largest = min(linear_sizes(bare) or bare.weight.shape)
    if rank > largest and not config.any_rank:
        raise ValueError(_too_large(rank, place, largest))
    if kind is LoRAEmbedding and config.initialise not in ("kaiming", "gaussian"):
        raise ValueError(f'initialise="{config.initialise}" is for linear layers, and {place} is an embedding')
    if config.initialise == "orthogonal":
        check_orthogonal_rank(rank)
    if reads_weight(config.initialise):
        weight = getattr(bare_module(module), "weight", None)
        if weight is None or not weight.is_floating_point():
            raise TypeError(f'initialise="{config.initialise}" is taken from a floating weight, and {place} has none')

    def build(base: nn.Module) -> AdapterLayer:
        return kind(
            base, rank=rank, alpha=alpha, dropout=0.0 if kind is LoRAEmbedding else config.dropout,
            rslora=config.rslora, lora_bias=config.lora_bias, initialise=config.initialise, dtype=config.dtype,
            adapter_name=name,
        )  # fmt: skip

    return build
