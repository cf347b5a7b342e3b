"""Mixout: each weight is, at random, the trained or the pretrained one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmtune.adapters.record import check_probability
from llmtune.adapters.targets import is_conv1d


def mixout(weight: Tensor, target: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Return the weight with entries put back to the target's at random, so scaled that the mean is the weight.

    (m * weight + (1 - m) * target - p * target) / (1 - p) = target + m * (weight - target) / (1 - p),

    m ~ Bernoulli(1 - p), one draw for every single entry. The mean over draws is `weight`; the gradient with respect to
    it is m / (1 - p); where weight and target are equal the result is, to the bit, the target. Dropout of weights is
    the case target = 0. Autograd keeps the mask alone, one byte an entry.

    Where we differ: the paper's own code draws a mask for one row and repeats it over all rows (so it mixes the
    connections of whole input neurons), and its backward pass leaves out the factor 1 / (1 - p).

    Args:
        weight: any shape, floating.
        target: of the same shape, what to mix with: the pretrained weight.
        p: probability of taking the target, 0 to below 1; at 0 the weight itself comes back.
        generator: of the draw; left out, torch's global random state.

    Returns:
        A tensor of the weight's shape and dtype.

    Raises:
        ValueError: p is out of range, or the shapes differ.

    Example:
        >>> weight, target = torch.ones(2, 3), torch.zeros(2, 3)
        >>> set(mixout(weight, target, 0.75).flatten().tolist()) <= {0.0, 4.0}
        True

    Lee, Cho and Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models" (2020),
    section 3.
    """
    check_probability("p", p)
    if weight.shape != target.shape:
        raise ValueError(f"the target must be of the weight's shape {[*weight.shape]}; got {[*target.shape]}")
    if p == 0:
        return weight
    kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device).bernoulli_(1 - p, generator=generator)
    return target + torch.where(kept, (weight - target) / (1 - p), 0)


class Mixout(nn.Module):
    """A linear layer whose weight is mixed with its pretrained one in train mode: y = x mixout(W, target, p)^T + bias.

    In eval mode it is the layer itself. The bias is not mixed. The target is a buffer in the state dict, so it moves
    with `.to()`, and a resumed run mixes with the same weights as the first; it takes as many bytes as the weight. For
    a whole model, whose names then stay as they are, see `mixout_model`.

    Args:
        base: an `nn.Linear`, or GPT-2's `Conv1D`; its weight stays the parameter that is trained.
        p: probability of taking the target, 0 to below 1.
        target: [out, in], of the weight's shape, what to mix with; None for a copy of the present weight.

    Raises:
        TypeError: the base is no such layer.
        ValueError: p is out of range, or the target is not of the weight's shape.

    Example:
        >>> layer = Mixout(nn.Linear(5, 3), 0.7)
        >>> sorted(layer.state_dict())
        ['base.bias', 'base.weight', 'target']
    """

    target: Tensor

    def __init__(self, base: nn.Module, p: float, *, target: Tensor | None = None) -> None:
        super().__init__()
        if not is_mixable(base):
            raise TypeError(f"mixout goes over an nn.Linear or a Conv1D; got a {type(base).__name__}")
        check_probability("p", p)
        weight: Any = base.weight
        wanted = weight if target is None else target
        if wanted.shape != weight.shape:
            raise ValueError(f"the target must be of the weight's shape {[*weight.shape]}; got {[*wanted.shape]}")
        self.base, self.p = base, p
        self.register_buffer("target", wanted.detach().to(weight, copy=True))
        self.train(base.training)

    @property
    def weight(self) -> Any:
        """The base's weight, unmixed."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's bias, or None."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]."""
        if not self.training:
            return self.base(x)
        return linear_with(self.base, x, mixout(self.weight, self.target, self.p))

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"p={self.p}"


def is_mixable(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or Conv1D that runs as its class says and has a plain floating weight.

    One whose forward pass was replaced (quantised layers, accelerate's) is not: it reads its weight in its own way. Nor
    is the one of nn.MultiheadAttention, which takes its weight without calling it.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not (plain or is_conv1d(module)) or "forward" in vars(module):
        return False
    weight: Any = module.weight
    return type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.is_floating_point()


def linear_with(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a linear layer or Conv1D makes of x [..., in] with another weight, of the shape of its own."""
    return F.linear(x, weight.T if is_conv1d(module) else weight, module.bias)
