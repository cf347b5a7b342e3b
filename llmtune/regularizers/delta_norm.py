"""The delta norm: how far a low-rank adapter has moved the weights, whatever A and B are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import check_strength
from llmtune.adapters.attach import adapter_layers, record_of
from llmtune.adapters.autocast import no_autocast
from llmtune.adapters.layer import AdapterLayer
from llmtune.adapters.lora import LowRankLayer
from llmtune.adapters.parameters import LoRAParameter, expert_factors
from llmtune.adapters.token_rows import TokenRows
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy
from llmtune.modules import unwrap
from llmtune.regularizers.products import difference, product_norms
from llmtune.weights.quadratic import Factors

BESIDE = (TokenRows, TrainedBias, TrainedCopy)  # what a LoRA may train beside its low-rank changes


@dataclass(frozen=True)
class DeltaNorm:
    """A penalty on how far an adapter moves the weights: strength / 2 * sum over its layers of ||scaling * B A||_F^2.

    It is L2-SP towards the frozen weights, on what they amount to under the adapter: W + scaling * B A is pulled to W.
    (An L2 penalty on A and B is another one: it depends on how the product is split between the two, and pulls A, which
    starts at random, to zero while there is no change yet.) The products are never built, and layers of equal shapes
    are done at once.

    It counts every low-rank change of the adapter: LoRA and rsLoRA of any ranks, on linear layers, GPT-2's Conv1D,
    embeddings and experts; AdaLoRA; VeRA. From a start taken from the weights (PiSSA, OLoRA) it counts the change since
    that start. What a LoRA may train beside these (biases, whole modules, rows of new tokens) is not counted; `L2SP`
    holds biases and modules.

    Attributes:
        strength: 0 or more.
        name: the adapter's name.

    Raises:
        ValueError: `strength` is negative or not finite.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> model = nn.Sequential(nn.Linear(3, 5, bias=False))
        >>> _ = attach(model, LoRA(rank=1, alpha=2))  # the scaling is 2
        >>> DeltaNorm(strength=1.0)(model).item()
        0.0
        >>> with torch.no_grad():
        ...     _ = model[0].lora_a.fill_(1.0), model[0].lora_b.fill_(1.0)  # the change is 2 in each of 15 entries
        >>> DeltaNorm(strength=1.0)(model).item()
        30.0

    Reference:
        Li et al. 2018, "Explicit inductive bias for transfer learning with convolutional networks", section 3, for the
        change of Hu et al. 2021, "LoRA", section 4.1.
    """

    strength: float
    name: str = "default"

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar in at least float32 with gradient to the adapter's parameters.

        Args:
            model: with the adapter, with or without wrappers.

        Raises:
            ValueError: there is no such adapter, it changes something in another way than by a product of low rank, or
                it is not trained.
        """
        model = unwrap(model)
        kind = type(record_of(model, self.name).configs[self.name]).__name__
        layers = [layer for layer in adapter_layers(model, self.name) if not isinstance(layer, BESIDE)]
        weights = [_factors(layer, self.name, kind) for layer in layers]
        if not weights:
            raise ValueError(f'adapter "{self.name}" ({kind}) changes no weight by a product of low rank: leave it out')
        with no_autocast(weights[0][0][0].device):
            value = 0.5 * self.strength * product_norms(weights)
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError(f'the delta norm of adapter "{self.name}" reaches no parameter: all of its are frozen')
        return value


def _factors(layer: AdapterLayer, name: str, kind: str) -> list[Factors]:
    """Return the factors of a layer's change, since its start where that was taken from the weight."""
    if isinstance(layer, LoRAParameter):
        return [(*expert_factors(layer.lora_a, layer.lora_b, layer.transposed), layer.scaling)]
    factors = layer.low_rank()
    if factors is None:
        raise ValueError(
            f'adapter "{name}" ({kind}) has a {type(layer).__name__}, whose change is no product of low rank: '
            "DeltaNorm has no norm for it. Use L2SP, which takes any change of a weight"
        )
    if isinstance(layer, LowRankLayer) and layer.start_a is not None and layer.start_b is not None:
        now, then = (layer.lora_b, layer.lora_a), (layer.start_b, layer.start_a)  # or the transpose: the same norm
        return difference([(*now, layer.scaling)], [(*then, layer.scaling)])
    return [factors]
