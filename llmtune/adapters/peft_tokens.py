"""The entry "trainable_token_indices" of PEFT's LoRA, written from `train_tokens` and read back into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from llmtune.adapters.layer import adapter_chain, named_places
from llmtune.adapters.token_plan import check_tied_together, token_groups
from llmtune.adapters.token_rows import TokenRows

Tokens = Sequence[int] | Mapping[str, Sequence[int]]


def written_tokens(model: nn.Module, tokens: Tokens, name: str) -> Any:
    """Return the entry: ids of the input embedding, or by the full names of the places that hold rows.

    Args:
        model: the model.
        tokens: the record's train_tokens.
        name: the adapter's name.
    """
    if not isinstance(tokens, Mapping):
        return list(tokens) or None
    return {
        place: list(layer.tokens)
        for place, module in named_places(model)
        for layer in adapter_chain(module)
        if isinstance(layer, TokenRows) and layer.adapter_name == name and layer.origin is layer
    }


def read_train_tokens(model: nn.Module, value: Any) -> Tokens:
    """Return train_tokens; PEFT takes any end of a name, "norm" being an end of "layernorm" too.

    Args:
        model: the model the file is for.
        value: the entry.

    Raises:
        ValueError: rows are to be trained at some places of a tied weight only.
    """
    if not isinstance(value, Mapping):
        return tuple(value or ())
    names = [place for place, _ in named_places(model) if place]
    named = {end: [name for name in names if name.endswith(end)] or [end] for end in value}
    found: dict[str, Sequence[int]] = {name: tuple(value[end]) for end, some in named.items() for name in some}
    check_tied_together(model, token_groups(model, found), list(found))
    return found
