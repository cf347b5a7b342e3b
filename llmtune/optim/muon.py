"""What Muon may train: the matrices inside a Transformer's layers; the rest is for AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from llmtune.modules import check_module
from llmtune.optim.depth import EMBEDDING, LAYER, embedding_places
from llmtune.optim.groups import BIAS


def muon_groups(
    model: nn.Module, groups: Sequence[dict[str, Any]], *, ratio: float = 1.0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Part the groups of `parameter_groups` into those for `torch.optim.Muon` and those for AdamW.

    Muon replaces a matrix's momentum by the nearest matrix with orthogonal rows or columns. That is for matrices that
    map one hidden state to another: those of two dimensions in layers. Embeddings, heads, whatever else lies outside of
    layers, vectors, biases (T5's table of relative positions among them) and the stacked weights of experts, which have
    three dimensions and torch's Muon refuses, go to AdamW. Each group keeps its rate and decay on both sides.

    With `adjust_lr_fn="match_rms_adamw"` Muon's steps are as large as AdamW's, and one rate serves both. Without, they
    are much larger or smaller by shape, and a rate of its own is needed: that is what `ratio` is for. LoRA's A and B
    are matrices in layers and go to Muon, each made orthogonal by itself, which is not the step of their product.

    Where we differ: parting by dimension alone, as the example in torch's documentation does, gives embeddings and the
    head to Muon.

    Args:
        model: the module whose parameters are in the groups.
        groups: dicts with "params" and "lr", of `parameter_groups(model, ...)`.
        ratio: how many times a group's rate Muon has, above 0.

    Returns:
        (groups for Muon, groups for AdamW), none of them empty.

    Raises:
        TypeError: `model` is no module.
        ValueError: ratio is out of its range; the names of the model's parameters have no layer number; none of the
            groups' parameters is for Muon.

    Example:
        >>> import torch
        >>> from llmtune.optim import Together, parameter_groups
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
        >>> hidden, rest = muon_groups(model, groups)
        >>> [len(group["params"]) for group in hidden], [len(group["params"]) for group in rest]
        ([14], [2, 5])
        >>> muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")
        >>> optimizer = Together(muon, torch.optim.AdamW(rest))

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Liu et al., "Muon is Scalable for
    LLM Training" (2025), section 2.2, for the step's size.
    """
    check_module(model)
    if not 0 < ratio < float("inf"):
        raise ValueError(f"ratio must be a number above 0; got {ratio!r}")
    named = list(model.named_parameters())
    if not any(LAYER.match(name) for name, _ in named):
        raise ValueError(
            "muon_groups goes by layer numbers in parameters' names, after layers, layer, blocks, block or h, and this "
            f"{type(model).__name__} has none (a name: {named[0][0] if named else 'no parameter'}): part the groups by "
            "hand"
        )
    embeddings = embedding_places(model)
    hidden = {
        id(p)
        for name, p in named
        if p.ndim == 2
        and LAYER.match(name)
        and not (BIAS.search(name) or EMBEDDING.search(name) or name.startswith(embeddings))
    }
    for_muon, for_adamw = [], []
    for group in groups:
        inside = [p for p in group["params"] if id(p) in hidden]
        outside = [p for p in group["params"] if id(p) not in hidden]
        if inside:
            for_muon.append(group | {"params": inside, "lr": group["lr"] * ratio})
        if outside:
            for_adamw.append(group | {"params": outside})
    if not for_muon:
        raise ValueError("none of the groups' parameters is a matrix in a layer: there is nothing for Muon to train")
    return for_muon, for_adamw
