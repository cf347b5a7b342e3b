"""At which depth of a Transformer each parameter stands, told by its name."""

from __future__ import annotations

import re

from torch import nn

LAYER = re.compile(
    r"((?:^|.*?\.)(?:layers|layer|blocks|block|h)\.)(\d+)\."
)  # the first in a name, so T5's block counts
EMBEDDING = re.compile(r"(?:^|[._])(?:embed(?!_out\b)|wte\b|wpe\b|shared\b)")  # GPT-NeoX's embed_out is its head


def is_layer(place: str) -> bool:
    """Return whether a place that `steps_below_top` names is a layer, and neither the top nor embeddings."""
    return place.rpartition(".")[2].isdigit()


def steps_below_top(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Return (where it stands, how many steps that is below the top) for every parameter, by its name.

    Of a stack of L layers, layer n is L - n steps below the top and the embeddings are L + 1. Whatever lies in no layer
    and in no embedding, a last norm, a pooler or a head, is the top. Every stack is counted by itself, an encoder's and
    a decoder's; embeddings outside of all stacks (T5's shared ones) go with the deepest.

    Args:
        model: any module; frozen parameters count for the depth as well.

    Raises:
        ValueError: no parameter's name has a layer number in it.
    """
    names = [name for name, _ in model.named_parameters()]
    stacks: dict[str, int] = {}  # what stands before the layer's number: how many layers
    for name in names:
        if found := LAYER.match(name):
            stacks[found[1]] = max(stacks.get(found[1], 0), int(found[2]) + 1)
    if not stacks:
        raise ValueError(
            "layers are told by numbers in parameters' names, after layers, layer, blocks, block or h, and this "
            f"{type(model).__name__} has none (a name: {names[0] if names else 'no parameter'}): leave out what goes "
            "by layers, such as layer_decay"
        )
    around = {stack: stack[: stack[:-1].rfind(".") + 1] for stack in stacks}  # what the stack lies in
    embeddings = embedding_places(model)
    found_steps = {}
    for name in names:
        found = LAYER.match(name)
        if found:
            found_steps[name] = f"{found[1]}{found[2]}", stacks[found[1]] - int(found[2])
        elif EMBEDDING.search(name) or name.startswith(embeddings):
            inside = max((place for place in around.values() if name.startswith(place)), key=len, default=None)
            depths = [count for stack, count in stacks.items() if inside is None or around[stack] == inside]
            found_steps[name] = f"{inside or ''}embeddings", max(depths) + 1
        else:
            found_steps[name] = "top", 0
    return found_steps


def embedding_places(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of parameters that lie in embeddings begin."""
    return tuple(
        f"{place}."
        for place, module in model.named_modules()
        if isinstance(module, nn.Embedding) or hasattr(module, "num_embeddings")
    )
