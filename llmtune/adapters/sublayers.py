"""Where the parts of a transformer lie: its blocks, their attention and their feed-forward, by the names in use.

A block is a member of an `nn.ModuleList` (or `nn.Sequential`) that holds an attention and a feed-forward. The names
below are those of the families of transformers, torch's own layers, and this library's `TransformerBlock`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from llmtune.adapters.layer import bare_module
from llmtune.adapters.targets import inside, linear_sizes

ATTENTION = (
    "self_attn", "encoder_attn", "attn", "attention", "self_attention", "crossattention", "cross_attn",
    "cross_attention", "SelfAttention", "EncDecAttention", "LocalSelfAttention", "TransientGlobalSelfAttention",
    "multihead_attn",
)  # fmt: skip
FEED_FORWARD = ("mlp", "ffn", "feed_forward", "DenseReluDense", "block_sparse_moe", "moe")
# Feed-forwards that are no module of their own: what reads the input, and what gives the output.
IN_TWO = (("fc1", "fc2"), ("linear1", "linear2"), ("intermediate.dense", "output.dense"), ("ffn", "ffn_output"))


class FeedForward(NamedTuple):
    """The module that reads a feed-forward's input, and the one whose output is the feed-forward's: often the same."""

    first: str
    last: str


class Sublayers(NamedTuple):
    """What was found, in the model's order.

    Attributes:
        stacks: the blocks of each list of blocks, by the list's name.
        attention: the modules whose output is an attention's, before the residual sum.
        feed_forward: the same for the feed-forwards.
    """

    stacks: dict[str, list[str]]
    attention: list[str]
    feed_forward: list[FeedForward]


def find_sublayers(places: Mapping[str, nn.Module]) -> Sublayers:
    """Return the blocks, attentions and feed-forwards of a model; empty where it goes by names that are not known.

    Some modules add the residual themselves (BERT's outputs, BLOOM's attention): of those the last linear layer is
    meant.

    Args:
        places: the model's modules by bare name, outer ones first.

    Raises:
        ValueError: a module adds the residual itself, and what comes before that is not to be seen.
    """
    attention, feed_forward = _candidates(places)
    stacks = _stacks(places, attention, [pair.last for pair in feed_forward])
    blocks = [block for members in stacks.values() for block in members]
    return Sublayers(
        stacks,
        [_attention_output(place, places) for place in attention if inside(place, blocks)],
        [_feed_forward_ends(pair, places) for pair in feed_forward if inside(pair.last, blocks)],
    )


def _candidates(places: Mapping[str, nn.Module]) -> tuple[list[str], list[FeedForward]]:
    """Return what goes by a known name; nothing that lies inside another."""
    attention: list[str] = []
    feed_forward: list[FeedForward] = []
    for place in places:
        name, taken = place.rpartition(".")[2], [*attention, *(pair.first for pair in feed_forward)]
        if inside(place, taken):
            continue
        for first, last in (_join(place, pair) for pair in IN_TWO):
            if first in places and last in places:
                feed_forward.append(FeedForward(first, last))
        if name in ATTENTION:
            attention.append(place)
        elif name in FEED_FORWARD and f"{place}_output" not in places:
            kept = [pair for pair in feed_forward if not inside(pair.first, [place])]
            feed_forward = [*kept, FeedForward(place, place)]
    return attention, feed_forward


def _join(place: str, pair: tuple[str, str]) -> tuple[str, str]:
    first, last = (f"{place}.{end}" if place else end for end in pair)
    return first, last


def _stacks(places: Mapping[str, nn.Module], attention: list[str], feed_forward: list[str]) -> dict[str, list[str]]:
    members = {
        place: [name for name in places if name.rpartition(".")[0] == place and name]
        for place, module in places.items()
        if isinstance(bare_module(module), nn.ModuleList | nn.Sequential)
    }
    whole = [
        member
        for some in members.values()
        for member in some
        if any(inside(place, [member]) for place in attention) and any(inside(end, [member]) for end in feed_forward)
    ]
    blocks = [place for place in whole if not any(other != place and inside(other, [place]) for other in whole)]
    return {place: some for place, some in members.items() if any(member in blocks for member in some)}


def _attention_output(place: str, places: Mapping[str, nn.Module]) -> str:
    if f"{place}.output.dense" in places:
        return f"{place}.output.dense"
    if not (_takes_residual(places[place]) or f"{place}.LayerNorm" in places):
        return place
    for end in ("dense", "out_proj", "attn"):
        if f"{place}.{end}" in places:
            return f"{place}.{end}"
    raise ValueError(
        f"{place} adds the residual by itself, and its output before that is not to be seen: name the modules that "
        "give it in attention_modules"
    )


def _feed_forward_ends(pair: FeedForward, places: Mapping[str, nn.Module]) -> FeedForward:
    if pair.first != pair.last or not _takes_residual(places[pair.last]):
        return pair
    linear = [name for name, module in places.items() if inside(name, [pair.last]) and linear_sizes(module)]
    if len(linear) < 2:
        raise ValueError(
            f"{pair.last} adds the residual by itself, and its output before that is not to be seen: name the modules "
            "that give it in feed_forward_modules"
        )
    return FeedForward(linear[0], linear[-1])


def _takes_residual(module: nn.Module) -> bool:
    return "residual" in inspect.signature(bare_module(module).forward).parameters
