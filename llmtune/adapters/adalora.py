"""AdaLoRA: a change of low rank in the form of a singular value decomposition, so that it can be cut where it matters
least.

    y = x W^T + s ((drop(x) A^T) * E) B^T        A [r, in], E [r], B [out, r]

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (2023), section 3.1 (where A, E
and B are Q, Lambda and P). `RankBudget` cuts, `AdaLoRAOrthogonality` keeps A and B near orthogonal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtune.adapters.fused import lora_added, lora_linear
from llmtune.adapters.layer import PREFIX, plain_linear
from llmtune.adapters.lora import LoRAConv1D, LoRALinear


class AdaLoRALinear(LoRALinear):
    """A linear layer with a change of low rank beside it: base(x) + s ((dropout(x) A^T) * E) B^T.

    At the start E = 0, so the output is the base's to the bit, and A and B are normal draws of deviation 0.02, as in
    PEFT. The scaling s is PEFT's as well, alpha / (initial_rank + 1e-5), and stays when triplets are cut; the paper
    divides by nothing. The sum is rounded once to the base's dtype.

    Args:
        base: the layer to adapt; its parameters are left alone.
        rank: r, from 1 to the smaller of in and out.
        alpha: see above.
        initial_rank: the rank at the start of the training, where `rank` is what has been left of it.
        dropout: probability with which an entry of x is dropped on the way to A, in training mode.
        dtype: of A, E and B.
        adapter_name: the adapter the layer belongs to.

    Raises:
        TypeError: the base has no `in_features` and `out_features`.
        ValueError: the rank or `dropout` is out of range.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = AdaLoRALinear(base, rank=2, alpha=4)
        >>> x = torch.randn(7, 5)
        >>> torch.equal(layer(x), base(x))
        True
    """

    def __init__(
        self, base: nn.Module, *, rank: int, alpha: float, initial_rank: int | None = None, dropout: float = 0.0,
        dtype: torch.dtype = torch.float32, adapter_name: str = "default",
    ) -> None:  # fmt: skip
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, dtype=dtype, adapter_name=adapter_name)
        self.initial_rank = rank if initial_rank is None else initial_rank
        self.scaling = adalora_scaling(alpha, self.initial_rank)
        self.lora_e = nn.Parameter(torch.zeros(rank, dtype=dtype, device=self.lora_a.device))

    def start(self, initialise: str) -> None:
        """Draw A and B; it is E that is zero."""
        nn.init.normal_(self.lora_a, std=0.02)
        nn.init.normal_(self.lora_b, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in the dtype of the base's output, for x [..., in]."""
        if not self.takes_part:
            return self.base(x)
        plain, scaled = plain_linear(self.base), self.lora_a * self.lora_e[:, None]
        if plain is not None:
            return lora_linear(
                x, plain.weight, plain.bias, scaled, self.lora_b, scaling=self.factor(), dropout_p=self.drop_p()
            )
        return lora_added(self.base(x), x, scaled, self.lora_b, scaling=self.factor(), dropout_p=self.drop_p())

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """Return (B, E A, s), or both transposed; the one with E is no view. See `AdapterLayer.low_rank`.

        The first is [rows, r], the second [r, columns].
        """
        scaled = self.lora_a * self.lora_e[:, None]
        return (scaled.T, self.lora_b.T, self.scaling) if self.transposed else (self.lora_b, scaled, self.scaling)

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names and the tensors, E as [r, 1]; see `AdapterLayer.file_tensors`."""
        start = f"{PREFIX}{place}.lora_"
        return {f"{start}A": self.lora_a, f"{start}B": self.lora_b, f"{start}E": self.lora_e[:, None]}


class AdaLoRAConv1D(AdaLoRALinear, LoRAConv1D):
    """`AdaLoRALinear` over GPT-2's `Conv1D`, a linear layer that keeps its weight as [in, out].

    Args:
        base: a `transformers.pytorch_utils.Conv1D`.
        rank, alpha, initial_rank, dropout, dtype, adapter_name: as for `AdaLoRALinear`.

    Raises:
        ValueError: the rank or `dropout` is out of range.
    """


def adalora_scaling(alpha: float, initial_rank: int) -> float:
    """Return alpha / (initial_rank + 1e-5), as PEFT has it."""
    return alpha / (initial_rank + 1e-5)
