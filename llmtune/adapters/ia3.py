"""(IA)^3: a trained scale for each output of a layer, or for each of its inputs.

    y = l * (x W^T + b)        of the outputs: keys, values
    y = (l * x) W^T + b        of the inputs: a feed-forward part's second layer, whose inputs are its activations

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (2022), section
3.3. As in PEFT the scale of outputs takes the bias along, which the paper's models do not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import PREFIX, AdapterLayer, bare_module, wide
from llmtune.adapters.targets import is_conv1d, linear_sizes
from llmtune.adapters.trained_copy import check_first


def ia3_scale(x: Tensor, scale: Tensor) -> Tensor:
    """Return scale * x, made in the wider of the two dtypes and rounded once to that of x; at scale 1 it is x.

    Args:
        x: [..., n], floating.
        scale: [n].

    Returns:
        [..., n], in the dtype of x.

    >>> import torch
    >>> from llmtune.adapters import ia3_scale
    >>> ia3_scale(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 0.5]))
    tensor([[10.,  1.],
            [30.,  2.]])
    """
    return (x * scale).to(x.dtype)


class IA3Linear(AdapterLayer):
    """A linear layer with a trained scale for each of its outputs, or inputs: see the top of this file.

    Works over `nn.Linear`, GPT-2's `Conv1D` and any module that maps [..., in] to [..., out] and has `in_features` and
    `out_features`, a quantised one too. The scale starts at 1, so the output is the base's to the bit.

    Args:
        base: the layer to adapt; its parameters are left alone.
        feedforward: scale the inputs instead of the outputs.
        dtype: of the scale.
        adapter_name: the adapter the layer belongs to.

    Attributes:
        scale: l, [out], or [in] with `feedforward`.

    Raises:
        TypeError: the base does not say its sizes, or another adapter already stands there. What it adds is for the
            bare weight, so those that come later stand around it.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = IA3Linear(base)
        >>> x = torch.randn(7, 5)
        >>> torch.equal(layer(x), base(x))
        True
    """

    reads_weight = True

    def __init__(
        self, base: nn.Module, *, feedforward: bool = False, dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        sizes = linear_sizes(base)
        if sizes is None:
            raise TypeError(
                f"IA3Linear needs a module with in_features and out_features; got {type(bare_module(base)).__name__}"
            )
        check_first(base, "IA3", and_bias=not feedforward)
        super().__init__(base, adapter_name=adapter_name)
        self.in_features, self.out_features = sizes
        self.feedforward = feedforward
        self.reads_bias = not feedforward
        device = next((p.device for p in bare_module(base).parameters()), torch.device("cpu"))
        self.scale = nn.Parameter(torch.ones(sizes[0] if feedforward else sizes[1], dtype=dtype, device=device))
        self.train(base.training)

    @property
    def weight(self) -> Any:
        """The bare module's weight."""
        return bare_module(self).weight

    @property
    def bias(self) -> Any:
        """The bare module's bias, or None."""
        return getattr(bare_module(self), "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in the dtype of the base's output, for x [..., in]."""
        if not self.takes_part:
            return self.base(x)
        return self.base(ia3_scale(x, self.scale)) if self.feedforward else ia3_scale(self.base(x), self.scale)

    def deltas(self) -> dict[str, Tensor]:
        """Return W * (l - 1), and b * (l - 1) where outputs are scaled and there is a bias; see `AdapterLayer`.

        Raises:
            ValueError: the layer is merged, so that W stands no longer there; or it has no floating weight of its own
                sizes (a quantised one).
        """
        return self._of_parameters(self.scale - 1)

    def replacements(self) -> dict[str, Tensor]:
        """Return W * l, and b * l, which are exact where the sum of W and its change would round twice."""
        return self._of_parameters(self.scale)

    def _of_parameters(self, factor: Tensor) -> dict[str, Tensor]:
        """Return the weight, and where outputs are scaled the bias, times a factor [n] for each output or input."""
        if self.merged:
            raise ValueError(f'adapter "{self.adapter_name}" is merged: what IA3 changes is known again after unmerge')
        transposed = is_conv1d(self)
        weight, sizes = getattr(bare_module(self), "weight", None), (self.out_features, self.in_features)
        shape = sizes[::-1] if transposed else sizes
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or tuple(weight.shape) != shape:
            raise ValueError(
                f"what IA3 changes is known for a floating weight {list(shape)}, and this "
                f"{type(bare_module(self)).__name__} has none: de-quantise it first"
            )
        columns = self.feedforward != transposed  # whether an input is a column of the weight as it is kept
        found = {"weight": wide(weight) * (factor if columns else factor[:, None])}
        if self.bias is not None and not self.feedforward:
            found["bias"] = wide(self.bias) * factor
        return found

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's name and a view of the scale, [out, 1], or [1, in] with `feedforward`; see `AdapterLayer`."""
        return {f"{PREFIX}{place}.ia3_l": self.scale[None] if self.feedforward else self.scale[:, None]}

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        what = "inputs" if self.feedforward else "outputs"
        return f"adapter={self.adapter_name}, scales={what}, active={self.active}"
