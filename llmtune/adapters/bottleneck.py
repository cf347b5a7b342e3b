"""Bottleneck adapters: a small network after, or beside, the sub-layers of a transformer.

    h + s * up(act(down(h)))           after a sub-layer, h its output before the residual sum
    F(x) + s * up(act(down(x)))        beside the feed-forward F ("parallel")

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (2019), section 2: after attention and feed-forward.
Pfeiffer et al., "AdapterFusion" (2020), section 3.2 and figure 3: after the feed-forward alone. He et al., "Towards a
Unified View of Parameter-Efficient Transfer Learning" (2021), section 3: parallel, and the scaling s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.adapters.around import OutputLayer, first_input
from llmtune.adapters.layer import bare_module
from llmtune.adapters.record import check_dtype, check_positive, check_probability, check_whole
from llmtune.adapters.targets import linear_sizes
from llmtune.errors import did_you_mean

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def bottleneck_change(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    activation: str = "relu",
    scaling: float = 1.0,
) -> Tensor:
    """Return scaling * up(act(down(x))): what a bottleneck adapter adds.

    Args:
        x: [..., in].
        down_weight: [size, in].
        down_bias: [size].
        up_weight: [out, size].
        up_bias: [out].
        activation: "relu", "gelu", "silu" or "tanh".
        scaling: s.

    Returns:
        [..., out], in the dtype of `down_weight` (in autocast's, under autocast).

    >>> import torch
    >>> from llmtune.adapters import bottleneck_change
    >>> x, down, up = torch.tensor([[1.0, -2.0]]), torch.eye(2), torch.ones(3, 2)
    >>> bottleneck_change(x, down, torch.zeros(2), up, torch.zeros(3), scaling=4.0)
    tensor([[4., 4., 4.]])

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (2019), section 2.1.
    """
    inner = ACTIVATIONS[activation](F.linear(x.to(down_weight.dtype), down_weight, down_bias))
    return F.linear(inner, up_weight, up_bias) * scaling


def check_activation(value: Any) -> None:
    """Raise ValueError where `value` is none of the activations by name."""
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}; got {value!r}.{did_you_mean(str(value), ACTIVATIONS)}"
        )


class BottleneckLayer(OutputLayer):
    """A bottleneck adapter after a module: h + scaling * drop(up(act(down(h)))), h being what the module returns.

    `up` starts at zero, weight and bias, so the output is the base's to the bit; the paper starts near zero. `down`
    starts as `nn.Linear` does, without a bias. The sum is made in the adapter's dtype and rounded once.

    Args:
        base: any module that returns [..., E], or a tuple that begins with it.
        size: the width between `down` and `up`.
        width: E; left out, the base must tell it by `out_features`.
        activation: "relu", "gelu", "silu" or "tanh".
        scaling: s.
        dropout: probability with which an entry of what is added is dropped, in training mode.
        dtype: of the adapter's parameters.
        adapter_name: the adapter the layer belongs to.

    Raises:
        ValueError: a value is out of its range, or the width is not told; the output is of another width.
        TypeError: the base returns no tensor.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = BottleneckLayer(base, size=2)
        >>> x = torch.randn(7, 5)
        >>> torch.equal(layer(x), base(x))
        True
    """

    def __init__(
        self, base: nn.Module, *, size: int, width: int | None = None, activation: str = "relu", scaling: float = 1.0,
        dropout: float = 0.0, dtype: torch.dtype = torch.float32, adapter_name: str = "default",
    ) -> None:  # fmt: skip
        super().__init__(base, adapter_name=adapter_name)
        check_whole("size", size)
        check_positive("scaling", scaling)
        check_probability("dropout", dropout)
        check_dtype(dtype)
        check_activation(activation)
        self.size, self.activation, self.scaling = size, activation, scaling
        reads, gives = self.widths(base, width)
        device = next((p.device for p in bare_module(base).parameters()), torch.device("cpu"))
        self.dropout = nn.Dropout(dropout)
        self.down_weight = nn.Parameter(torch.empty(size, reads, dtype=dtype, device=device))
        self.down_bias = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        self.up_weight = nn.Parameter(torch.zeros(gives, size, dtype=dtype, device=device))
        self.up_bias = nn.Parameter(torch.zeros(gives, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        self.training = base.training
        self.dropout.train(base.training)

    def widths(self, base: nn.Module, width: int | None) -> tuple[int, int]:
        """Return how wide what `down` reads is, and what `up` gives.

        Raises:
            ValueError: the width is not given and the base does not tell it.
        """
        sizes = linear_sizes(base)
        if width is None and sizes is None:
            raise ValueError(f"a {type(bare_module(base)).__name__} does not tell the width of its output: give width")
        found = width if width is not None else sizes[1] if sizes is not None else 0
        return found, found

    def change(self, x: Tensor) -> Tensor:
        """Return what is added, [..., E], for what `down` reads, [..., E].

        Raises:
            ValueError: x is of another width than the adapter was made for.
        """
        if x.shape[-1] != self.down_weight.shape[1]:
            raise ValueError(
                f'adapter "{self.adapter_name}" was made for a width of {self.down_weight.shape[1]}, and '
                f"{type(bare_module(self)).__name__} has {x.shape[-1]} here: name other modules in attention_modules "
                "and feed_forward_modules"
            )
        added = bottleneck_change(
            x, self.down_weight, self.down_bias, self.up_weight, self.up_bias, activation=self.activation,
            scaling=self.scaling,
        )  # fmt: skip
        return self.dropout(added)

    def changed(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return [..., E] in the dtype of `hidden`; see `OutputLayer.changed`."""
        return (hidden + self.change(hidden)).to(hidden.dtype)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"adapter={self.adapter_name}, size={self.size}, scaling={self.scaling:g}, active={self.active}"


class ParallelBottleneckLayer(BottleneckLayer):
    """A bottleneck adapter beside a module: F(x) + scaling * drop(up(act(down(x)))), x being the module's first input.

    Args:
        base: any module of [..., in] that returns [..., out], or a tuple that begins with it.
        size, activation, scaling, dropout, dtype, adapter_name: as for `BottleneckLayer`.
        width: in and out, both; left out, the base must tell them by `in_features` and `out_features`.

    Attributes:
        handed: None; or, where the layer stands around the last part of a feed-forward that is no module of its own
            (BERT's, OPT's), what a `FeedForwardInput` around its first part puts the input into.

    Raises:
        ValueError, TypeError: as `BottleneckLayer`.
    """

    reads_output = False
    handed: Handed | None = None

    def widths(self, base: nn.Module, width: int | None) -> tuple[int, int]:
        """Return how wide what `down` reads is, and what `up` gives; see `BottleneckLayer.widths`."""
        sizes = linear_sizes(base)
        return sizes if width is None and sizes is not None else super().widths(base, width)

    def changed(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return [..., out] in the dtype of `hidden`; see `OutputLayer.changed`."""
        x = first_input(args, kwargs) if self.handed is None else self.handed.take()
        return (hidden + self.change(x)).to(hidden.dtype)


class Handed:
    """What passes from the first part of a feed-forward to the last within one call; a copy of it is empty."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """Return what was put in, [..., E], and keep it no longer."""
        value, self.value = self.value, None
        assert value is not None, "the first part of a feed-forward runs before its last"
        return value

    def __reduce__(self) -> tuple[type[Handed], tuple[()]]:
        return Handed, ()


class FeedForwardInput(OutputLayer):
    """Stands around the first part of a feed-forward and hands what that reads to the adapter around the last part."""

    reads_output = False

    def __init__(self, base: nn.Module, *, handed: Handed, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        self.handed = handed

    def applies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Hand the input on, and return False: the output stays as it is."""
        self.handed.value = first_input(args, kwargs)
        return False
