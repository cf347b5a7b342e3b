"""Which layers train the rows of single tokens: every place of a weight together, ties found by the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from llmtune.adapters.layer import adapter_chain, bare_module, named_places
from llmtune.adapters.plan import Build
from llmtune.adapters.record import Targets
from llmtune.adapters.targets import matching
from llmtune.adapters.token_rows import NewTokensEmbedding, NewTokensHead, TokenRows, check_base

TokensTo = Sequence[int] | Mapping[str, Sequence[int]]  # ids for the input embedding, or for modules by name


@dataclass(frozen=True)
class TokenGroup:
    """One weight of which rows are trained.

    Attributes:
        owner: the place that holds the trained rows: the model's input embedding where it is one of the places.
        tied: the other places of the weight.
        tokens: the rows.
    """

    owner: str
    tied: tuple[str, ...]
    tokens: tuple[int, ...]


def places_of_tokens(model: nn.Module, tokens: TokensTo) -> dict[str, Sequence[int]]:
    """Return the ids by the full names of the modules that are meant.

    Args:
        model: the root, with or without adapters.
        tokens: ids for the model's input embedding; or by the ends of modules' names; none for no module.

    Raises:
        ValueError: the model has no input embedding, or a name matches nothing.
    """
    if isinstance(tokens, Mapping):
        named = {end: named_holders(model, [end], what="train_tokens") for end in tokens}
        return {place: tokens[end] for end, some in named.items() for place in some}
    first = input_place(model)
    if tokens and first is None:
        raise ValueError(
            f"this {type(model).__name__} has no get_input_embeddings() that tells its input embedding: name the "
            "module whose rows are to be trained"
        )
    return {first: tokens} if tokens and first is not None else {}


def token_groups(model: nn.Module, chosen: Mapping[str, Sequence[int]]) -> list[TokenGroup]:
    """Return the weights of which rows are meant, each with all its places.

    Args:
        model: the root, with or without adapters.
        chosen: ids by the full names of modules.

    Raises:
        ValueError: two places of one weight are to have different tokens.
    """
    places = dict(named_places(model))
    first = input_place(model)
    groups: dict[int, TokenGroup] = {}
    for place, ids in chosen.items():
        bare = bare_module(places[place])
        weight = bare._parameters.get("weight")
        together = [
            p for p, m in places.items() if weight is not None and bare_module(m)._parameters.get("weight") is weight
        ]
        owner = first if first is not None and first in together else place
        group = TokenGroup(owner, tuple(p for p in together if p != owner), tuple(ids))
        known = groups.setdefault(id(bare if weight is None else weight), group)
        if known.tokens != group.tokens:
            raise ValueError(f"{place} and {known.owner} are one weight: the same tokens must be trained in both")
    return list(groups.values())


def token_places(groups: Sequence[TokenGroup]) -> list[str]:
    """Return every place of the weights."""
    return [place for group in groups for place in (group.owner, *group.tied)]


def input_place(model: nn.Module) -> str | None:
    """Return the bare name of the model's input embedding, or None where it does not tell."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # what transformers' models without one say
        found = None
    if not isinstance(found, nn.Module):
        return None
    return next((p for p, m in named_places(model) if p and bare_module(m) is bare_module(found)), None)


def token_builders(
    model: nn.Module, groups: Sequence[TokenGroup], name: str, *, dtype: torch.dtype,
    file_name: str = "trainable_tokens_delta", in_every_place: bool = True,
) -> list[tuple[str, Build]]:  # fmt: skip
    """Return the builders of the layers that train rows of single tokens, an owner's before those that read from it.

    Args:
        model: the root.
        groups: from `token_groups`.
        name: the adapter's name.
        dtype: of the rows.
        file_name, in_every_place: as for `NewTokensEmbedding`.

    Raises:
        ValueError: a token is out of range, or trained by another adapter.
        TypeError: a place is neither an embedding nor a linear head.
    """
    places = dict(named_places(model))
    made: dict[str, TokenRows] = {}

    def build(place: str, group: TokenGroup, base: nn.Module) -> TokenRows:
        kind = NewTokensEmbedding if isinstance(bare_module(base), nn.Embedding) else NewTokensHead
        owner = None if place == group.owner else made[group.owner]
        made[place] = kind(
            base, tokens=group.tokens, dtype=dtype, owner=owner, file_name=file_name, in_every_place=in_every_place,
            adapter_name=name,
        )  # fmt: skip
        return made[place]

    found: list[tuple[str, Build]] = []
    for group in groups:
        for place in (group.owner, *group.tied):
            check_base(places[place], group.tokens, place)
            found.append((place, partial(build, place, group)))
    return found


def check_tied_together(model: nn.Module, groups: Sequence[TokenGroup], named: Sequence[str]) -> None:
    """Raise where PEFT trained rows at some places of a tied weight only: it follows ties from the input embedding.

    Args:
        model: the model.
        groups: from `token_groups`.
        named: the places that PEFT's configuration names.

    Raises:
        ValueError: a tied weight is named without the input embedding.
    """
    for group in groups:
        if group.tied and input_place(model) not in named:
            apart = sorted({group.owner, *group.tied}.intersection(named))
            raise ValueError(
                f"the rows of {', '.join(apart)} were trained apart from the weight tied to them, which is not offered "
                "here: name the model's input embedding, whose ties are followed"
            )


def check_same_tokens(model: nn.Module, groups: Sequence[TokenGroup], name: str, *, source: Path) -> None:
    """Raise where a file's rows are of other tokens than the attached adapter's.

    Args:
        model: the model.
        groups: what the file describes.
        name: the attached adapter's name.
        source: the file's folder.

    Raises:
        ValueError: they are; or the places are others.
    """
    wanted = {group.owner: group.tokens for group in groups}
    found = {
        place: layer.tokens
        for place, module in named_places(model)
        for layer in adapter_chain(module)
        if isinstance(layer, TokenRows) and layer.adapter_name == name and layer.origin is layer
    }
    if wanted != found:
        raise ValueError(
            f'the adapter in {source} trains tokens {_told(wanted)}, the attached "{name}" {_told(found)}: detach it '
            "first, and loading attaches what the file describes"
        )


def named_holders(model: nn.Module, targets: Targets, *, what: str = "targets") -> list[str]:
    """Return the places that targets name; an expression may match containers as well, which are left out."""
    places = dict(named_places(model))
    found = matching(targets, [place for place in places if place], what=what)
    named = list(dict.fromkeys(place for some in found.values() for place in some))
    kinds = [place for place in named if isinstance(bare_module(places[place]), nn.Embedding | nn.Linear)]
    return kinds if kinds and isinstance(targets, str) else named


def _told(tokens: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{', '.join(map(str, ids))} of {place}" for place, ids in tokens.items()) or "of no module"
