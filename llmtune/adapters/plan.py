"""What attaching would do, worked out before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.adapters.parameter_plan import frozen_experts
from llmtune.adapters.record import Targets
from llmtune.adapters.targets import ALL_LINEAR, inside, linear_places, matching, task_heads
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy, adds_bias_last

Build = Callable[[nn.Module], AdapterLayer]


class Targeted(Protocol):
    """A record that names the modules it goes to, and others to train whole."""

    @property
    def targets(self) -> Targets:
        """Suffixes, one regular expression, or "all-linear"."""
        ...

    @property
    def exclude(self) -> Targets:
        """Suffixes, or one regular expression, of modules to leave out."""
        ...

    @property
    def train_modules(self) -> Sequence[str]:
        """Suffixes of modules to train whole."""
        ...


@dataclass
class Plan:
    """The layers to make and why.

    Attributes:
        counts: how many modules each target pattern matches.
        adapted: the names of the modules that get a layer of the method.
        copied: those trained whole, as copies.
        biases: those whose bias is trained.
        tokens: those of which rows of single tokens are trained.
        heads: heads outside a Hugging Face model's body that are neither; a new one starts at random.
        parameters: the names of the parameters that get a layer of the method by themselves.
        experts: those of experts that "all-linear" leaves out, since no linear layer owns them.
        builders: (place, function from the module there to the layer), in the order in which they are put on.
    """

    counts: dict[str, int] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    builders: list[tuple[str, Build]] = field(default_factory=list)


def plan_targets(
    model: nn.Module,
    config: Targeted,
    name: str,
    *,
    adaptable: Callable[[nn.Module], bool],
    build: Callable[[str, nn.Module], Build],
    train_bias: str = "none",
    tokens: Sequence[str] = (),
) -> Plan:
    """Work out the layers of a method that goes to named modules, one layer each.

    Args:
        model: the root, with or without adapters.
        config: the record, of which targets, exclude and train_modules are read.
        name: the adapter's name.
        adaptable: whether a bare module is of a kind that the method goes to.
        build: given a place and the module there, adapters around it included, checks them and returns the function
            that makes the layer.
        train_bias: "none", "lora_only" (of adapted modules) or "all".
        tokens: places of which rows of single tokens are to be trained as well.

    Raises:
        ValueError: a pattern matches nothing, the root is a target, or a module would be adapted twice.
        TypeError: a bias cannot be trained; and what `build` raises.
    """
    places = dict(named_places(model))
    plan = Plan(tokens=list(tokens))
    plan.copied = copied_places(config.train_modules, places)
    plan.adapted = _adapted(model, config, places, plan, adaptable)
    plan.experts = frozen_experts(places, plan.copied) if config.targets == ALL_LINEAR else []
    _check_ties(places, plan.adapted)
    if train_bias == "lora_only":
        plan.biases = [place for place in plan.adapted if adds_bias_last(bare_module(places[place]))]
    elif train_bias == "all":
        plan.biases = every_bias(places, plan.copied, who='train_bias="all"', instead='use train_bias="lora_only"')
    builders = [(place, build(place, places[place])) for place in plan.adapted]
    finish(model, plan, name)
    plan.builders += builders
    return plan


def copied_places(train_modules: Sequence[str], places: Mapping[str, nn.Module]) -> list[str]:
    """Return the places that train_modules names, each once."""
    names = [place for place in places if place]
    found = matching(list(train_modules), names, what="train_modules") if train_modules else {}
    return list(dict.fromkeys(place for some in found.values() for place in some))


def every_bias(places: Mapping[str, nn.Module], copied: Sequence[str], *, who: str, instead: str) -> list[str]:
    """Return the places of every bias that `TrainedBias` can train, a tied one once.

    Args:
        places: the model's modules by bare name.
        copied: places trained whole, which are left out with all that is inside them.
        who: what asks for every bias, for the sentence.
        instead: what else the caller may do, for the sentence.

    Raises:
        TypeError: a bias is of a module that may not add it last; names it.
    """
    covered: dict[int, str] = {}
    for place, module in places.items():
        if place and adds_bias_last(bare_module(module)) and not inside(place, copied):
            covered.setdefault(id(bare_module(module).bias), place)
    for place, module in places.items():
        for local, parameter in bare_module(module)._parameters.items():
            known = parameter is None or "bias" not in local or id(parameter) in covered
            if not known and not inside(place, copied):
                raise TypeError(
                    f"{who} cannot train {place}.{local} of a {type(bare_module(module)).__name__}: "
                    f"name the module in train_modules, or {instead}"
                )
    return list(covered.values())


def finish(model: nn.Module, plan: Plan, name: str) -> None:
    """Check that no module is adapted twice, find the heads left out, and make the builders of biases and copies.

    Args:
        model: the root.
        plan: with adapted, copied and biases filled in.
        name: the adapter's name.

    Raises:
        ValueError: a module is taken, or named twice.
    """
    places = dict(named_places(model))
    check_free(places, plan)
    heads = {id(bare_module(head)) for head in task_heads(model)}
    plan.heads = [
        place
        for place, module in places.items()
        if id(bare_module(module)) in heads and place not in plan.adapted and not inside(place, plan.copied)
    ]
    plan.builders = [
        *((place, lambda base: TrainedBias(base, adapter_name=name)) for place in plan.biases),
        *((place, lambda base: TrainedCopy(base, adapter_name=name)) for place in plan.copied),
    ]


def _adapted(
    model: nn.Module,
    config: Targeted,
    places: Mapping[str, nn.Module],
    plan: Plan,
    adaptable: Callable[[nn.Module], bool],
) -> list[str]:
    names = [place for place in places if place]
    if config.targets == ALL_LINEAR:
        found = {ALL_LINEAR: [place for place in linear_places(model, places) if not inside(place, plan.copied)]}
        if not found[ALL_LINEAR]:
            if bare_module(model) is not model or adaptable(model):
                raise ValueError(
                    f"the model itself, a {type(model).__name__}, would be the target: put it into a module "
                    "(nn.Sequential), or use the layer directly"
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
        kinds = [place for place in wanted if adaptable(bare_module(places[place]))]
        wanted = kinds or wanted
    return wanted


def check_free(places: Mapping[str, nn.Module], plan: Plan) -> None:
    """Check that no module is adapted twice: one trained whole runs instead of the base and of all that is inside it,
    so what stands at it or inside it can be nothing but other adapters' copies of that same module.

    Args:
        places: the modules by bare name.
        plan: with adapted, copied, biases, tokens and parameters filled in.

    Raises:
        ValueError: a module is taken, or named twice.
    """
    owners = [name.rpartition(".")[0] for name in plan.parameters]
    carrying = {place: chain for place, module in places.items() if (chain := adapter_chain(module))}
    whole = [place for place, chain in carrying.items() if any(isinstance(layer, TrainedCopy) for layer in chain)]
    for place in (*plan.adapted, *plan.tokens, *plan.biases, *plan.copied, *owners):
        taken = [other for other in whole if inside(place, [other])]
        if place in plan.copied:
            taken += [other for other in carrying if inside(other, [place])]
            if all(type(layer) is TrainedCopy for layer in carrying.get(place, [])):  # a copy for every task
                taken = [other for other in taken if other != place]
        if taken:
            owner = carrying[taken[0]][0].adapter_name
            also = "" if taken[0] == place else f" ({taken[0]})"
            raise ValueError(
                f'{place} already belongs to adapter "{owner}"{also} and cannot be trained whole by one as well'
            )
    for place in plan.adapted:
        if inside(place, plan.copied):
            raise ValueError(f"{place} is named both in targets and in train_modules: exclude it from one of them")
    for name, place in zip(plan.parameters, owners, strict=True):
        if inside(place, plan.copied):
            raise ValueError(f"{name} is named in target_parameters and its module in train_modules: leave one out")
        if place in plan.adapted:
            raise ValueError(f"{name} is named in target_parameters and its module in targets: leave one out")
    for place in plan.tokens:
        if place in plan.adapted or inside(place, plan.copied):
            what = "targets" if place in plan.adapted else "train_modules"
            raise ValueError(
                f"rows of single tokens are trained in {place}, which {what} names too: leave it out there"
            )
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
