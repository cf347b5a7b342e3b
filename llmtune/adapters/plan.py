"""What attaching would do, worked out before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmtune.adapters.config import DoRA, LoRA
from llmtune.adapters.dora import DoRAConv1D, DoRALinear
from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.adapters.lora import LoRAConv1D, LoRAEmbedding, LoRALinear
from llmtune.adapters.targets import (
    ALL_LINEAR,
    check_patterns_used,
    inside,
    is_conv1d,
    linear_places,
    matching,
    pattern_value,
    task_heads,
)
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy, adds_bias_last

Build = Callable[[nn.Module], AdapterLayer]


@dataclass
class Plan:
    """The layers to make and why.

    Attributes:
        counts: how many modules each target pattern matches.
        adapted: the names of the modules that get a low-rank change.
        copied: those trained whole, as copies.
        biases: those whose bias is trained.
        heads: heads outside a Hugging Face model's body that are neither; a new one starts at random.
        builders: (place, function from the module there to the layer), in the order in which they are put on.
    """

    counts: dict[str, int] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    builders: list[tuple[str, Build]] = field(default_factory=list)


def plan_lora(model: nn.Module, config: LoRA, name: str) -> Plan:
    """Work out which layers a LoRA record means on this model.

    Args:
        model: the root, with or without adapters.
        config: the record.
        name: the adapter's name.

    Raises:
        ValueError: a pattern matches nothing, a rank is too large for its layer, the root is a target, or a module
            would be adapted twice.
        TypeError: a target is of a kind that cannot be adapted.
    """
    places = dict(named_places(model))
    names = [place for place in places if place]
    plan = Plan()
    copied = matching(list(config.train_modules), names, what="train_modules") if config.train_modules else {}
    plan.copied = list(dict.fromkeys(place for found in copied.values() for place in found))
    plan.adapted = _adapted(model, config, places, names, plan)
    _check_ties(places, plan.adapted)
    check_patterns_used(config.rank_pattern, plan.adapted, what="rank_pattern")
    check_patterns_used(config.alpha_pattern, plan.adapted, what="alpha_pattern")
    if config.train_bias != "none":
        plan.biases = _bias_places(config, places, plan)
    _check_free(places, plan)
    heads = {id(bare_module(head)) for head in task_heads(model)}
    plan.heads = [place for place, module in places.items() if id(bare_module(module)) in heads]
    plan.heads = [place for place in plan.heads if place not in plan.adapted and not inside(place, plan.copied)]
    plan.builders = [
        *((place, lambda base: TrainedBias(base, adapter_name=name)) for place in plan.biases),
        *((place, lambda base: TrainedCopy(base, adapter_name=name)) for place in plan.copied),
        *((place, _builder(place, places[place], config, name)) for place in plan.adapted),
    ]
    return plan


def _adapted(
    model: nn.Module, config: LoRA, places: Mapping[str, nn.Module], names: list[str], plan: Plan
) -> list[str]:
    if config.targets == ALL_LINEAR:
        found = {ALL_LINEAR: [place for place in linear_places(model, places) if not inside(place, plan.copied)]}
        if not found[ALL_LINEAR]:
            if bare_module(model) is not model or _kind(model) is not None:
                raise ValueError(
                    f"the model itself, a {type(model).__name__}, would be the target: put it into a module "
                    "(nn.Sequential), or use LoRALinear directly"
                )
            raise ValueError(f'targets: "all-linear" finds no linear layer in this {type(model).__name__}')
    else:
        found = matching(config.targets, names, what="targets") if config.targets else {}
    excluded = matching(config.exclude, names, what="exclude") if config.exclude else {}
    named = {place for some in found.values() for place in some}
    for pattern, some in excluded.items():
        if not named.intersection(some):
            raise ValueError(
                f'exclude: "{pattern}" leaves out nothing: it matches {some[0]}, which targets does not name. The name '
                "of a module does not stand for those inside it; an expression does"
            )
    out = {place for some in excluded.values() for place in some}
    plan.counts = {pattern: sum(place not in out for place in some) for pattern, some in found.items()}
    wanted = list(dict.fromkeys(place for some in found.values() for place in some if place not in out))
    if found and not wanted:
        raise ValueError("every module that targets names is left out by exclude: nothing would be adapted")
    if config.targets != ALL_LINEAR and isinstance(config.targets, str):  # an expression may match containers as well
        kinds = [place for place in wanted if _kind(places[place]) is not None]
        wanted = kinds or wanted
    return wanted


def _kind(module: nn.Module) -> type[LoRALinear] | type[LoRAEmbedding] | None:
    bare: Any = bare_module(module)
    if is_conv1d(bare):
        return LoRAConv1D
    if isinstance(bare, nn.Embedding):
        return LoRAEmbedding
    sizes = (getattr(bare, "in_features", None), getattr(bare, "out_features", None))
    return LoRALinear if all(isinstance(size, int) for size in sizes) else None


def _builder(place: str, module: nn.Module, config: LoRA, name: str) -> Build:
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
    if isinstance(config, DoRA):
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


def _bias_places(config: LoRA, places: Mapping[str, nn.Module], plan: Plan) -> list[str]:
    if config.train_bias == "lora_only":
        return [place for place in plan.adapted if adds_bias_last(bare_module(places[place]))]
    covered: dict[int, str] = {}
    for place, module in places.items():
        if place and adds_bias_last(bare_module(module)) and not inside(place, plan.copied):
            covered.setdefault(id(bare_module(module).bias), place)
    for place, module in places.items():
        for local, parameter in bare_module(module)._parameters.items():
            if (
                parameter is not None
                and "bias" in local
                and id(parameter) not in covered
                and not inside(place, plan.copied)
            ):
                raise TypeError(
                    f'train_bias="all" cannot train {place}.{local} of a {type(bare_module(module)).__name__}: '
                    'name the module in train_modules, or use train_bias="lora_only"'
                )
    return list(covered.values())


def _check_free(places: Mapping[str, nn.Module], plan: Plan) -> None:
    """A module trained whole runs instead of the base and all that is inside it, so it belongs to one adapter alone."""
    carrying = {place: chain for place, module in places.items() if (chain := adapter_chain(module))}
    whole = [place for place, chain in carrying.items() if any(isinstance(layer, TrainedCopy) for layer in chain)]
    for place in (*plan.adapted, *plan.biases, *plan.copied):
        taken = [other for other in whole if inside(place, [other])]
        if place in plan.copied:
            taken += [other for other in carrying if inside(other, [place])]
        if taken:
            owner = carrying[taken[0]][0].adapter_name
            also = "" if taken[0] == place else f" ({taken[0]})"
            raise ValueError(
                f'{place} already belongs to adapter "{owner}"{also} and cannot be trained whole by one as well'
            )
    for place in plan.adapted:
        if inside(place, plan.copied):
            raise ValueError(f"{place} is named both in targets and in train_modules: exclude it from one of them")
    for place in plan.copied:
        outer = [other for other in plan.copied if other != place and inside(place, [other])]
        if outer:
            raise ValueError(f"train_modules names {outer[0]} and {place} inside it: the outer one is trained whole")


def _check_ties(places: Mapping[str, nn.Module], adapted: list[str]) -> None:
    """An embedding may hang in a model under several names and be called under one of them only, as T5's does."""
    weights: dict[int, list[str]] = {}
    for place, module in places.items():
        if isinstance(bare_module(module), nn.Embedding):
            weights.setdefault(id(bare_module(module).weight), []).append(place)
    for tied in weights.values():
        named = [place for place in tied if place in adapted]
        if len(tied) > 1 and len(named) == 1:
            raise ValueError(
                f"{named[0]} shares its weight with {', '.join(p for p in tied if p not in named)}, and the model "
                "may call only those: target those too"
            )
