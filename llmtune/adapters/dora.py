"""DoRA: a weight taken apart into lengths and directions, of which LoRA changes the directions.

    W' = g * (W + s B A) by rows,   g = m / ||W + s B A||,   m [out] trained, at the start ||W||

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), section 4. As there (section 4.3), no gradient goes
through the norm. Unlike PEFT's, dropout acts on the way to A alone and not on the way to W, and the norm is computed
without the product B A, let alone with a product by the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.autocast import no_autocast
from llmtune.adapters.formula import lora_change
from llmtune.adapters.fused import lora_linear
from llmtune.adapters.layer import PREFIX, adapter_chain, bare_module, plain_linear
from llmtune.adapters.lora import LoRAConv1D, LoRALinear
from llmtune.adapters.quantized import dequantized_weight, quantized_kind
from llmtune.adapters.trained_copy import check_first


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> Tensor:
    """Return the length of each row of W + scaling * B A, from products no larger than [out, r].

    ||w + s b A||^2 = ||w||^2 + 2 s <w A^T, b> + s^2 <b (A A^T), b>   for a row w of W and b of B

    Args:
        weight: [out, in], floating.
        lora_a: [r, in].
        lora_b: [out, r].
        scaling: s, a number or a scalar tensor.

    Returns:
        [out], in at least float32, at least the smallest positive number; differentiable.

    >>> import torch
    >>> from llmtune.adapters.dora import row_norms
    >>> row_norms(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]]), 2.0)
    tensor([5.])
    """
    wide = torch.promote_types(weight.dtype, torch.promote_types(lora_a.dtype, torch.float32))
    weight, a, b = weight.to(wide), lora_a.to(wide), lora_b.to(wide)
    squares = weight.square().sum(1)
    cross = ((weight @ a.T) * b).sum(1)
    own = ((b @ (a @ a.T)) * b).sum(1)
    return (squares + 2 * scaling * cross + scaling**2 * own).clamp(min=torch.finfo(wide).tiny).sqrt()


def check_dora_start(initialise: str) -> None:
    """Raise ValueError where a start is not drawn with B = 0: the lengths m are those of W itself."""
    if initialise not in ("kaiming", "gaussian"):
        raise ValueError(f'DoRA starts with "kaiming" or "gaussian", which leave its rows alone; got {initialise!r}')


class DoRALinear(LoRALinear):
    """A linear layer whose rows keep trained lengths while LoRA turns them: see the top of this file.

    At the start the output is the base's to the bit. The norm is computed in every forward pass: it costs 2 r / N of
    the layer's own product for N tokens, and a remembered one would be wrong wherever weights are written without
    autograd's noticing.

    Args:
        base: the layer to adapt, with a weight [out, in], floating or quantised (QDoRA); a `TrainedBias` around it may
            have come before.
        rank, alpha, dropout, rslora, initialise, dtype, adapter_name: as for `LoRALinear`; dropout acts before A.
        lora_bias: must be False: the base's bias is outside of the decomposition.

    Attributes:
        magnitude: m, [out], in at least float32 whatever `dtype` is, so that the start is exact.

    Raises:
        TypeError: the base has no such weight, or another adapter already stands there.
        ValueError: the rank or `initialise` is out of range, or `lora_bias` is asked for.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = DoRALinear(base, rank=2, alpha=4)
        >>> x = torch.randn(7, 5)
        >>> torch.equal(layer(x), base(x))
        True
    """

    reads_weight = True

    def __init__(
        self, base: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        lora_bias: bool = False, initialise: str = "kaiming", dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        if lora_bias:
            raise ValueError("lora_bias has no place in DoRA, whose bias is outside of the decomposition: leave it out")
        check_first(base, "DoRA")
        check_dora_start(initialise)
        bare: Any = bare_module(base)
        weight = getattr(bare, "weight", None)
        if quantized_kind(bare) is None and not (isinstance(weight, Tensor) and weight.is_floating_point()):
            raise TypeError(
                "DoRA needs a base with a floating weight, or one that bitsandbytes has quantised; "
                f"{type(bare).__name__} has neither"
            )
        super().__init__(
            base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, initialise=initialise, dtype=dtype,
            adapter_name=adapter_name,
        )  # fmt: skip
        self.magnitude = nn.Parameter(self.norms())

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the lengths of the rows of W + s B A, [out], in at least float32."""
        with no_autocast(self.lora_a.device):
            return row_norms(self.matrix(), self.lora_a, self.lora_b, self.factor())

    def matrix(self) -> Tensor:
        """Return the bare weight as [out, in]; of a quantised layer what its numbers stand for, in float32."""
        if quantized_kind(bare_module(self)) is not None:
            return dequantized_weight(bare_module(self))
        return self.weight.T if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in the dtype of the base's output, for x [..., in]."""
        if not self.takes_part:
            return self.base(x)
        plain, norm = plain_linear(self.base), self.norms()
        if plain is not None:
            return lora_linear(
                x, plain.weight, plain.bias, self.lora_a, self.lora_b, scaling=self.factor(), dropout_p=self.drop_p(),
                magnitude=self.magnitude, norm=norm,
            )  # fmt: skip
        result, ratio = self.base(x), self.magnitude / norm
        turned = result if self.bias is None else result - self._bias()
        change = lora_change(self.dropout(x), self.lora_a, self.lora_b, self.factor())
        return (result + ((ratio - 1) * turned + ratio * change)).to(result.dtype)

    def _bias(self) -> Tensor:
        """The bias [out] that the base adds: its own, and what trained biases before this layer make of it."""
        trained = [layer for layer in adapter_chain(self.base) if layer.takes_part]
        return self.bias + sum(layer.deltas()["bias"] for layer in trained)

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names and the tensors; see `AdapterLayer`."""
        return super().file_tensors(place) | {f"{PREFIX}{place}.lora_magnitude_vector": self.magnitude}

    def low_rank(self) -> None:  # type: ignore[override]
        """Return None: the change is of full rank; see `AdapterLayer`."""

    def deltas(self) -> dict[str, Tensor]:
        """Return W' - W as [out, in], or [in, out] where the base keeps it so; see `AdapterLayer`.

        Raises:
            ValueError: the layer is merged: W stands no longer there.
        """
        if self.merged:
            raise ValueError(f'adapter "{self.adapter_name}" is merged: what DoRA changes is known again after unmerge')
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        weight, a, b = self.matrix().to(wide), self.lora_a.to(wide), self.lora_b.to(wide)
        ratio = self.magnitude.to(wide) / row_norms(weight, a, b, self.scaling)
        change = ratio[:, None] * (weight + self.scaling * (b @ a)) - weight
        return {"weight": change.T if self.transposed else change}


class DoRAConv1D(DoRALinear, LoRAConv1D):
    """`DoRALinear` over GPT-2's `Conv1D`, a linear layer that keeps its weight as [in, out].

    Args:
        base: a `transformers.pytorch_utils.Conv1D`.
        rank, alpha, dropout, rslora, lora_bias, initialise, dtype, adapter_name: as for `DoRALinear`.

    Raises:
        TypeError, ValueError: as `DoRALinear`.
    """
