"""Stochastic depth: whole layers left out at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtune.adapters.record import check_probability
from llmtune.optim.depth import LAYER
from llmtune.regularizers.hooked import Hook, hooked

Unit = Literal["row", "batch"]


def drop_residual(
    x: Tensor, y: Tensor, p: float, *, unit: Unit = "row", generator: torch.Generator | None = None
) -> Tensor:
    """Return what a residual block y = x + f(x) gives where f is left out with probability p.

    x + m * (y - x) / (1 - p),    m ~ Bernoulli(1 - p), a draw for every row, or one for the batch

    The mean over draws is y. A row that is left out is x to the bit, and no gradient reaches f from it.

    Args:
        x: [B, ...], what the block was given.
        y: [B, ...], what it made of it.
        p: probability, 0 to below 1; at 0 y itself comes back.
        unit: what shares a draw: "row" or "batch".
        generator: of the draw; left out, torch's global random state.

    Returns:
        [B, ...], in y's dtype.

    Raises:
        ValueError: p or the unit is out of range, or the shapes differ.

    Example:
        >>> x, y = torch.zeros(5, 3), torch.ones(5, 3)
        >>> set(drop_residual(x, y, 0.5).flatten().tolist()) <= {0.0, 2.0}
        True

    Huang et al., "Deep Networks with Stochastic Depth" (2016), section 3, equation 2.
    """
    check_probability("p", p)
    _check_unit(unit)
    if x.shape != y.shape:
        raise ValueError(f"a block must give the shape it was given, {[*x.shape]}, to be left out; got {[*y.shape]}")
    if p == 0:
        return y
    rows = x.shape[0] if unit == "row" else 1
    kept = torch.rand(rows, generator=generator, device=x.device) >= p
    return torch.where(kept.view(-1, *[1] * (x.ndim - 1)), x + (y - x) / (1 - p), x).to(y.dtype)


@contextmanager
def stochastic_depth(
    model: nn.Module, p: float, *, mode: Literal["linear", "uniform"] = "linear", unit: Unit = "row"
) -> Iterator[dict[str, float]]:
    """Leave a Transformer's layers out at random in train mode, while the block runs; see `drop_residual`.

    "linear": layer l of L, counted from 1 at the bottom, is left out with probability p l / L, as in Huang et al.;
    "uniform": every layer with p, as in LayerDrop. Of an encoder-decoder each stack is counted by itself. A layer is
    what stands under a number in the parameters' names (`layers.3`, `h.3`, `block.3`), with attention and feed-forward
    together, and must give hidden states of the shape of its first argument, alone or first in a tuple.

    Every row draws by itself; a packed row is one row. Layers that are left out are computed all the same, so this
    saves no time; keys and values they put into a cache stay there, so sample in eval mode, where nothing is left out.
    Draws come from torch's global random state, so a loop's run that is resumed repeats them, and so does recomputation
    (activation checkpointing). Afterwards no hook is left.

    Args:
        model: any module with numbered layers, with or without adapters or wrappers.
        p: probability for the topmost layer, 0 to below 1.
        mode: how it is spread over the layers.
        unit: "row", or "batch" for one draw a layer and batch.

    Yields:
        {layer's name: its probability}.

    Raises:
        ValueError: p, the mode or the unit is out of range, the model has no numbered layers, or the block is inside
            another of the same model. In a forward pass: a layer gives another shape than it was given.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> with stochastic_depth(tiny_llama(), 0.2) as probabilities:
        ...     print(probabilities)
        {'model.layers.0': 0.1, 'model.layers.1': 0.2}

    Huang et al. (2016), equation 4; Fan, Grave and Joulin, "Reducing Transformer Depth on Demand with Structured
    Dropout" (2019), section 3. Where we differ: the kept layers are scaled up in training, so that eval mode is the
    model as it is (Huang et al. scale down at test time; LayerDrop, also in transformers, does not scale, so the mean
    of what training sees is not what eval mode computes); and rows draw apart, where LayerDrop draws once a batch.
    """
    check_probability("p", p)
    _check_unit(unit)
    if mode not in ("linear", "uniform"):
        raise ValueError(f'mode must be "linear" or "uniform"; got {mode!r}')
    layers = _layers(model)
    chances = {place: p * share if mode == "linear" else p for place, (_, share) in layers.items()}
    on = [module for module, _ in layers.values()]
    if any(isinstance(getattr(h, "__self__", None), _Drop) for module in on for h in module._forward_hooks.values()):
        raise ValueError("stochastic_depth is on this model already: one block at a time")
    hooks: list[Hook] = [(layers[place][0], "after", _Drop(place, q, unit).drop) for place, q in chances.items()]
    with hooked(hooks):
        yield chances


class _Drop:
    """The hook of one layer."""

    def __init__(self, place: str, p: float, unit: Unit) -> None:
        self.place, self.p, self.unit = place, p, unit

    def drop(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not layer.training:
            return None
        x = args[0] if args else kwargs.get("hidden_states")
        y = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
            raise ValueError(
                f"stochastic_depth: the layer {self.place} must give hidden states of the shape of its first argument, "
                "alone or first in a tuple, to be left out"
            )
        y = drop_residual(x, y, self.p, unit=self.unit)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def _layers(model: nn.Module) -> dict[str, tuple[nn.Module, float]]:
    """Return (module, its number from 1 over how many its stack has) of every numbered layer, by name."""
    numbers: dict[str, set[int]] = {}
    for name, _ in model.named_parameters():
        if found := LAYER.match(name):
            numbers.setdefault(found[1], set()).add(int(found[2]))
    if not numbers:
        raise ValueError(
            "stochastic_depth goes by layer numbers in parameters' names, after layers, layer, blocks, block or h, and "
            f"this {type(model).__name__} has none"
        )
    return {
        f"{stack}{n}": (model.get_submodule(f"{stack}{n}"), (n + 1) / (max(of_stack) + 1))
        for stack, of_stack in numbers.items()
        for n in sorted(of_stack)
    }


def _check_unit(unit: str) -> None:
    if unit not in ("row", "batch"):
        raise ValueError(f'unit must be "row" or "batch"; got {unit!r}')
