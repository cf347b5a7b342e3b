"""The feed-forward part of a Transformer: out to a larger width, an activation or a gate, and back.

The gates are pure functions of two tensors; `FeedForward` puts linear layers around them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from llmtune.errors import did_you_mean


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, with silu(x) = x * sigmoid(x).

    Args:
        gate: [..., F].
        up: [..., F].

    Returns:
        [..., F].

    Raises:
        ValueError: the shapes differ.

    >>> import torch
    >>> from llmtune.layers import swiglu
    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([3.0, 3.0]))
    tensor([  0., 300.])

    Shazeer, "GLU Variants Improve Transformer" (2020), section 2.
    """
    _check_gate(gate, up)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """Return gelu(gate) * up, with gelu(x) = x * P(X < x) for a standard normal X.

    Args:
        gate: [..., F].
        up: [..., F].
        approximate: "none", or "tanh" for the approximation that T5 v1.1 and Gemma use.

    Returns:
        [..., F].

    Raises:
        ValueError: the shapes differ, or `approximate` is neither.

    >>> import torch
    >>> from llmtune.layers import geglu
    >>> geglu(torch.tensor([0.0, 100.0]), torch.tensor([3.0, 3.0]))
    tensor([  0., 300.])

    Shazeer, "GLU Variants Improve Transformer" (2020), section 2; the tanh form: Hendrycks and Gimpel, "Gaussian Error
    Linear Units" (2016), section 2.
    """
    _check_gate(gate, up)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got "{approximate}"')
    return F.gelu(gate, approximate=approximate) * up


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu_tanh": partial(geglu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, or three with a gate; every position by itself.

    down(act(up(x))), or for the gated ones down(act(gate(x)) * up(x)). Dropout, in training mode, acts before `down`;
    what follows `down` is the block's.

    Args:
        width: E, of what comes in and goes out.
        inner: F, between the layers.
        activation: "gelu", "gelu_tanh" (GPT-2's), "relu" or "silu"; gated: "swiglu" (Llama's), "geglu" or "geglu_tanh"
            (T5 v1.1's, Gemma's).
        bias: whether the linear layers have one.
        dropout: probability, 0 to 1.

    Attributes:
        up: the first linear layer, [F, E].
        gate: the gate's, [F, E], or None.
        down: the last, [E, F].

    Raises:
        ValueError: the activation is unknown, a size is not positive, or dropout is not between 0 and 1.

    >>> import torch
    >>> from llmtune.layers import FeedForward
    >>> FeedForward(6, 14, activation="swiglu", bias=False)(torch.ones(2, 3, 6)).shape
    torch.Size([2, 3, 6])

    Vaswani et al., "Attention Is All You Need" (2017), section 3.3; gates: Shazeer, "GLU Variants Improve Transformer"
    (2020).
    """

    def __init__(
        self, width: int, inner: int, *, activation: str = "gelu", bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        known = (*_PLAIN, *_GATED)
        if activation not in known:
            names = ", ".join(f'"{name}"' for name in known)
            raise ValueError(f'there is no activation "{activation}", only {names}.{did_you_mean(activation, known)}')
        for name, size in (("width", width), ("inner", inner)):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.width, self.inner, self.activation = width, inner, activation
        self.gate = nn.Linear(width, inner, bias=bias) if activation in _GATED else None
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's result at every position.

        Args:
            hidden: [..., E].

        Returns:
            [..., E].

        Raises:
            ValueError: the last dimension is not E.
        """
        if hidden.ndim == 0 or hidden.shape[-1] != self.width:
            raise ValueError(f"hidden must be [..., {self.width}], got shape {tuple(hidden.shape)}")
        if self.gate is None:
            inner = _PLAIN[self.activation](self.up(hidden))
        else:
            inner = _GATED[self.activation](self.gate(hidden), self.up(hidden))
        return self.down(self.dropout(inner))

    def extra_repr(self) -> str:
        """Return the activation, for printing."""
        return f"activation={self.activation!r}"


def _check_gate(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
