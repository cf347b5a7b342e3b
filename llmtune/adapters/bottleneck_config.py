"""The record of bottleneck adapters: which kind, how wide, and after or beside which modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from llmtune.adapters.around import width_of
from llmtune.adapters.bottleneck import (
    BottleneckLayer,
    FeedForwardInput,
    Handed,
    ParallelBottleneckLayer,
    check_activation,
)
from llmtune.adapters.layer import named_places
from llmtune.adapters.plan import Build, Plan, copied_places, finish
from llmtune.adapters.record import (
    AdapterConfig,
    Targets,
    check_dtype,
    check_expressions,
    check_names,
    check_positive,
    check_probability,
    check_whole,
)
from llmtune.adapters.sublayers import FeedForward, find_sublayers
from llmtune.adapters.targets import ALL_LINEAR, linear_sizes, matching
from llmtune.errors import did_you_mean

KINDS = ("houlsby", "pfeiffer", "parallel")


@dataclass(frozen=True, kw_only=True)
class Bottleneck(AdapterConfig):
    """Bottleneck adapters in every block of a transformer; see `BottleneckLayer` for the formula.

    The places are found by the names that the families of transformers have for them (`self_attn` and `mlp`, BERT's
    `attention.output.dense` and `output.dense`, T5's `SelfAttention` and `DenseReluDense` and so on); any others can be
    named. After attention means after each: a decoder's cross-attention has an adapter too. Where a norm stands between
    a sub-layer and the residual sum (Gemma 2), the adapter comes before that.

    Pfeiffer's own adapter reads the sum of output and residual after a norm; this one reads the output, as Houlsby's.
    An adapter of this kind is no change of weights, so `merge` refuses it. PEFT has none: the files are of our own
    format.

    Args:
        size: the width between `down` and `up`; give it or `reduction`.
        reduction: the width is E / reduction, rounded down, at least 1.
        kind: "houlsby" (after attention and feed-forward), "pfeiffer" (after the feed-forward) or "parallel" (beside
            the feed-forward: reads its input, is added to its output).
        activation: "relu", "gelu", "silu" or "tanh".
        scaling: s. He et al. take 4 beside the feed-forward.
        dropout: probability with which an entry of what is added is dropped, in training mode.
        attention_modules: the modules whose output is an attention's, where they are not found or not all are wanted:
            suffixes of names, or one regular expression for whole names.
        feed_forward_modules: the same for the feed-forwards; for "parallel" they must be the whole feed-forwards.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: a value is out of its range; the sentence names it.
        TypeError: a value has a wrong type.

    Example:
        >>> from llmtune.adapters import Bottleneck, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> print(attach(tiny_llama(), Bottleneck(size=5)))
        adapter "default": 4 modules (attention 2, feed-forward 2)
        trainable params: 1,252 || all params: 22,448 || trainable%: 5.5773
    """

    size: int | None = None
    reduction: float | None = None
    kind: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    attention_modules: Targets | None = None
    feed_forward_modules: Targets | None = None
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if (self.size is None) == (self.reduction is None):
            raise ValueError(f"give size or reduction, one of them; got {self.size!r} and {self.reduction!r}")
        if self.size is not None:
            check_whole("size", self.size)
        else:
            check_positive("reduction", self.reduction)
        if self.kind not in KINDS:
            raise ValueError(
                f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}.{did_you_mean(str(self.kind), KINDS)}"
            )
        check_activation(self.activation)
        check_positive("scaling", self.scaling)
        check_probability("dropout", self.dropout)
        check_dtype(self.dtype)
        for name in ("attention_modules", "feed_forward_modules"):
            given = getattr(self, name)
            if given is not None:
                check_expressions(name, given)
            if given is not None and not given:
                raise ValueError(f"{name} names no module: leave it out, and the modules are found by their names")
        check_names(ALL_LINEAR, (), self.train_modules)
        if self.attention_modules is not None and self.kind != "houlsby":
            raise ValueError(
                f'attention_modules has no meaning for kind="{self.kind}", which stands at the feed-forward alone: '
                "leave it out"
            )

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`."""
        places = dict(named_places(model))
        plan = Plan(copied=copied_places(self.train_modules, places))
        attention, feed_forward = self._sublayers(model, places)
        if attention:
            plan.counts["attention"] = len(attention)
        plan.counts["feed-forward"] = len(feed_forward)
        plan.adapted = [*attention, *(pair.last for pair in feed_forward)]
        twice = [place for place in plan.adapted if plan.adapted.count(place) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is named both in attention_modules and in feed_forward_modules")
        builders: list[tuple[str, Build]] = []
        for place in attention:
            builders.append((place, self._build(BottleneckLayer, place, places, name)))
        for pair in feed_forward:
            if self.kind != "parallel":
                builders.append((pair.last, self._build(BottleneckLayer, pair.last, places, name)))
                continue
            handed = None
            if pair.first != pair.last:
                handed = Handed()
                builders.append((pair.first, partial(FeedForwardInput, handed=handed, adapter_name=name)))
            builders.append((pair.last, self._build(ParallelBottleneckLayer, pair.last, places, name, handed)))
        finish(model, plan, name)
        plan.builders += builders
        return plan

    def _sublayers(self, model: nn.Module, places: dict[str, nn.Module]) -> tuple[list[str], list[FeedForward]]:
        """Return the modules whose output is an attention's, and the feed-forwards; named ones, else what is found."""
        names = [place for place in places if place]
        found = find_sublayers(places) if None in (self.attention_modules, self.feed_forward_modules) else None
        attention, feed_forward = (found.attention, found.feed_forward) if found is not None else ([], [])
        if self.kind != "houlsby":
            attention = []
        elif self.attention_modules is not None:
            attention = _matched("attention_modules", self.attention_modules, names)
        elif not attention:
            raise ValueError(_nothing("attention", "attention_modules", model))
        if self.feed_forward_modules is not None:
            chosen = _matched("feed_forward_modules", self.feed_forward_modules, names)
            feed_forward = [FeedForward(place, place) for place in chosen]
        elif not feed_forward:
            raise ValueError(_nothing("feed-forward", "feed_forward_modules", model))
        return attention, feed_forward

    def _build(
        self, kind: type[BottleneckLayer], place: str, places: dict[str, nn.Module], name: str,
        handed: Handed | None = None,
    ) -> Build:  # fmt: skip
        width = width_of(place, places)
        if width is None:
            raise ValueError(
                f"the width of what {place} returns is not to be told: no norm stands beside it, and no linear layer "
                "is in it. Name the linear layer that gives its output"
            )
        size = self.size if self.size is not None else max(1, int(width / (self.reduction or 1)))
        own = linear_sizes(places[place])
        if kind is ParallelBottleneckLayer and handed is None and own is not None and own[0] != own[1]:
            raise ValueError(
                f"{place} is a linear layer of {own[0]} -> {own[1]}: an adapter beside the feed-forward needs the "
                "module that is the whole of it"
            )

        def build(base: nn.Module) -> BottleneckLayer:
            layer = kind(
                base, size=size, width=width, activation=self.activation, scaling=self.scaling, dropout=self.dropout,
                dtype=self.dtype, adapter_name=name,
            )  # fmt: skip
            if isinstance(layer, ParallelBottleneckLayer):
                layer.handed = handed
            return layer

        return build


def _matched(what: str, patterns: Targets, names: list[str]) -> list[str]:
    return list(dict.fromkeys(place for some in matching(patterns, names, what=what).values() for place in some))


def _nothing(part: str, argument: str, model: nn.Module) -> str:
    return (
        f"this {type(model).__name__} has no {part} by a name that is known here: name the modules whose output is the "
        f"{part}'s, such as Bottleneck(..., {argument}=[...])"
    )
