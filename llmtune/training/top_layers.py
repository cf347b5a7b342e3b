"""Before a run: freeze the first layers for good, or begin anew with the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmtune.adapters.attach import adapter_names
from llmtune.errors import did_you_mean
from llmtune.modules import check_module, unwrap
from llmtune.optim.depth import is_layer, steps_below_top
from llmtune.training.part_trains import check_whole


def freeze_first_layers(model: nn.Module, layers: int) -> list[str]:
    """Freeze the embeddings and the first `layers` layers of each stack; the rest stays as it is.

    Lee et al., "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning" (2019): a quarter of the layers has
    to train for nine tenths of the quality. Call it before the loop is made. A head that is tied to the embeddings is
    frozen with them.

    Args:
        model: any module whose layers have numbers in their names; under adapters those of these layers are frozen.
        layers: k, at least 1 and at most the layers of the smallest stack.

    Returns:
        The names of the parameters that have been frozen by this.

    Raises:
        TypeError: `model` is no module.
        ValueError: `layers` is out of its range, the model has no layers by name, or nothing trained would be left.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> len(freeze_first_layers(model, 1)), model.model.layers[0].mlp.up_proj.weight.requires_grad
        (10, False)
    """
    check_module(model)
    model = unwrap(model)
    places, depths = _checked(model, layers)

    def low(place: str, below: int) -> bool:
        return place.endswith("embeddings") if not is_layer(place) else depths[_stack(place)] - below < layers

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = [name for name in trained if low(*places[name])]
    if len(chosen) == len(trained):
        raise ValueError(f"nothing that is trained lies above the first {layers} layers: freeze fewer")
    for name in chosen:
        trained[name].requires_grad_(False)
    return chosen


@torch.no_grad()
def reinitialise_top_layers(model: nn.Module, layers: int, *, also: Sequence[str] = ()) -> list[str]:
    """Draw the weights of the last `layers` layers of each stack anew, as the model's own class does at its making.

    Zhang et al., "Revisiting Few-sample BERT Fine-tuning" (2021), section 5: the last layers are too close to the
    pre-training task; with the pooler (`also=["bert.pooler"]`) one to six of them are drawn anew. Transformers 5 marks
    every loaded tensor, and its initialisers pass over what is marked: `layer.apply(model._init_weights)`, which most
    recipes consist of, then changes nothing and says nothing. Here the marks are taken off first.

    Call it before adapters are attached and before the loop is made. Draws from torch's global random state.

    Args:
        model: a Hugging Face model whose layers have numbers in their names.
        layers: how many, at least 1 and at most those of the smallest stack.
        also: names of more modules, in full.

    Returns:
        The names of the parameters drawn anew.

    Raises:
        TypeError: `model` is no module, or not one that can initialise its modules.
        ValueError: `layers` is out of its range; the model has no layers by name, or no module of a name in `also`; it
            has adapters; or one of the parameters is frozen, and would stay at random, or is shared with what stays.

    Example:
        >>> from llmtune.testing.models import tiny_bert
        >>> names = reinitialise_top_layers(tiny_bert(labels=2), 1, also=["bert.pooler"])
        >>> names[0], names[-1]
        ('bert.encoder.layer.1.attention.self.query.weight', 'bert.pooler.dense.bias')
    """
    check_module(model)
    model = unwrap(model)
    if not hasattr(model, "_init_weights"):
        raise TypeError(f"a Hugging Face model, which initialises its modules, is expected; got {type(model).__name__}")
    places, _ = _checked(model, layers)
    tops = {place for place, below in places.values() if is_layer(place) and below <= layers}
    known = dict(model.named_modules())
    for name in also:
        if name not in known or not name:
            raise ValueError(f"{type(model).__name__} has no module {name!r}.{did_you_mean(name, known)}")
    chosen = [known[name] for name in (*sorted(tops), *also)]
    named = _checked_parameters(model, chosen)
    for module in chosen:
        for inner in module.modules():
            for holder in (inner, *inner._parameters.values(), *inner._buffers.values()):
                if hasattr(holder, "_is_hf_initialized"):
                    del holder._is_hf_initialized
        module.apply(model._init_weights)  # children first, as transformers goes
    return named


def _checked(model: nn.Module, layers: int) -> tuple[dict[str, tuple[str, int]], dict[str, int]]:
    """Return `steps_below_top`, and how many layers each stack has."""
    check_whole("layers", layers)
    places = steps_below_top(model)
    depths: dict[str, int] = {}
    for place, below in places.values():
        if is_layer(place):
            depths[_stack(place)] = max(depths.get(_stack(place), 0), below)
    smallest = min(depths, key=lambda stack: depths[stack])
    if layers > depths[smallest]:
        raise ValueError(f"layers={layers}, and {smallest} has {depths[smallest]}: give at most as many")
    return places, depths


def _stack(place: str) -> str:
    return place.rpartition(".")[0]


def _checked_parameters(model: Any, chosen: Sequence[nn.Module]) -> list[str]:
    """Return the names of the chosen modules' parameters, each of which is trained and stands nowhere else."""
    if adapter_names(model):
        raise ValueError("the model has adapters, which would stand on weights drawn at random: draw anew, then attach")
    inside = {id(p): p for module in chosen for p in module.parameters()}
    within = {module for top in chosen for module in top.modules()}
    outside = {id(p) for module in model.modules() if module not in within for p in module._parameters.values()}
    names = {name: p for name, p in model.named_parameters() if id(p) in inside}
    for name, parameter in names.items():
        if id(parameter) in outside:
            raise ValueError(f"{name} is shared with a module that stays as it is: it cannot be drawn anew")
        if not parameter.requires_grad:
            raise ValueError(f"{name} is frozen, and would stay at random: let it require a gradient first")
    return list(names)
