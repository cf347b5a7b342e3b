"""LoRA: a frozen weight W and a trained change of low rank, y = x W^T + scaling * (x A^T) B^T.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1. rsLoRA's scaling alpha / sqrt(r):
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.formula import lora_change
from llmtune.adapters.fused import lora_added, lora_linear
from llmtune.adapters.initialise import INITIALISATIONS, drawn_start, known_start, reads_weight, weight_start
from llmtune.adapters.layer import PREFIX, bare_module, plain_linear
from llmtune.adapters.record import check_dtype, check_flag, check_positive, check_probability, check_whole
from llmtune.adapters.scaled import ScaledLayer


def lora_scaling(alpha: float, rank: int, rslora: bool) -> float:
    """Return alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class LowRankLayer(ScaledLayer):
    """What every LoRA layer shares: A [r, columns], B [rows, r], their start, and how they change the base's weight.

    The weight that A and B change is B A times the scaling, or its transpose where the base keeps its weight [in, out].
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    start_a: Tensor | None  # [r, columns] and [rows, r]: what a start taken from the weight began with
    start_b: Tensor | None
    transposed = False

    def __init__(
        self, base: nn.Module, columns: int, rows: int, *, rank: int, alpha: float, dropout: float, rslora: bool,
        lora_bias: bool, initialise: str, dtype: torch.dtype, adapter_name: str,
    ) -> None:  # fmt: skip
        super().__init__(base, adapter_name=adapter_name)
        check_whole("the rank", rank)
        check_positive("alpha", alpha)
        check_probability("dropout", dropout)
        check_flag("rslora", rslora)
        check_flag("lora_bias", lora_bias)
        check_dtype(dtype)
        if not known_start(initialise):
            raise ValueError(f"initialise must be one of {', '.join(INITIALISATIONS)}; got {initialise!r}")
        device = next((p.device for p in bare_module(base).parameters()), torch.device("cpu"))
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = lora_scaling(alpha, rank, rslora)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_a = nn.Parameter(torch.empty(rank, columns, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(rows, rank, dtype=dtype, device=device))
        self.lora_bias = nn.Parameter(torch.zeros(rows, dtype=dtype, device=device)) if lora_bias else None
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)
        self.start(initialise)
        self.train(base.training)

    def start(self, initialise: str) -> None:
        """Set A and B so that the layer's output is the base's: see `initialise.py`."""
        if not reads_weight(initialise):
            drawn_start(self.lora_a, self.lora_b, initialise)
            return
        weight = getattr(bare_module(self), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
            kind = type(bare_module(self)).__name__
            raise TypeError(f'initialise="{initialise}" is taken from a floating weight [out, in]; {kind} has none')
        matrix = weight.T if self.transposed else weight
        start_a, start_b = weight_start(matrix, self.rank, self.scaling, initialise)
        with torch.no_grad():
            self.lora_a.copy_(start_a)
            self.lora_b.copy_(start_b)
        self.start_a, self.start_b = self.lora_a.detach().clone(), self.lora_b.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r]; with what takes their start off below and beside them, where it is not 0."""
        if self.start_a is None or self.start_b is None:
            return self.lora_a, self.lora_b
        return torch.cat([self.lora_a, self.start_a]), torch.cat([self.lora_b, -self.start_b], dim=1)

    def drop_p(self) -> float:
        """Return the probability with which an entry is dropped at the moment: 0 in eval mode."""
        return self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0

    @property
    def weight(self) -> Any:
        """The bare module's weight."""
        return bare_module(self).weight

    @property
    def bias(self) -> Any:
        """The bare module's bias, or None."""
        return getattr(bare_module(self), "bias", None)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """Return (left, right, scaling): the weight's change is scaling * left @ right; see `AdapterLayer`."""
        a, b = self.factors()
        return (a.T, b.T, self.scaling) if self.transposed else (b, a, self.scaling)

    def deltas(self) -> dict[str, Tensor]:
        """Return the change of the bare weight, and of the bias where there is `lora_bias`; see `AdapterLayer`."""
        left, right, scaling = self.low_rank()
        wide = torch.promote_types(left.dtype, torch.float32)
        found = {"weight": scaling * (left.to(wide) @ right.to(wide))}
        if self.lora_bias is not None:
            found["bias"] = scaling * self.lora_bias.to(wide)
        return found

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names and the tensors; see `AdapterLayer`."""
        found: dict[str, Tensor] = {
            f"{PREFIX}{place}.lora_A.weight": self.factors()[0],
            f"{PREFIX}{place}.lora_B.weight": self.factors()[1],
        }
        if self.lora_bias is not None:
            found[f"{PREFIX}{place}.lora_B.bias"] = self.lora_bias
        return found

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"adapter={self.adapter_name}, rank={self.rank}, scaling={self.scaling:g}, active={self.active}"


class LoRALinear(LowRankLayer):
    """A linear layer with a change of low rank beside it: base(x) + scaling * (dropout(x) A^T) B^T.

    Works over `nn.Linear` and over any module that maps [..., in] to [..., out] and has `in_features` and
    `out_features`. At the start B = 0, so the output is the base's to the bit. A and B are float32 whatever the base
    is; the sum is made in float32 and rounded once to the base's dtype.

    Args:
        base: the layer to adapt; its parameters are left alone.
        rank: r, at least 1; more than the smaller of in and out adds nothing.
        alpha: the change is scaled by alpha / r.
        dropout: probability with which an entry of x is dropped on the way to A, in training mode.
        rslora: scale by alpha / sqrt(r) instead.
        lora_bias: train a bias [out] beside B.
        initialise: how A and B start: "kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4" (any number) or
            "olora"; see `drawn_start` and `weight_start`. With the last three the start agrees to rounding.
        dtype: of A and B.
        adapter_name: the adapter the layer belongs to.

    Raises:
        TypeError: the base has no `in_features` and `out_features`.
        ValueError: the rank or `initialise` is out of range.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = LoRALinear(base, rank=2, alpha=4)
        >>> x = torch.randn(7, 5)
        >>> torch.equal(layer(x), base(x))
        True
    """

    def __init__(
        self, base: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        lora_bias: bool = False, initialise: str = "kaiming", dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        bare: Any = bare_module(base)
        if not isinstance(getattr(bare, "in_features", None), int) or not isinstance(
            getattr(bare, "out_features", None), int
        ):
            raise TypeError(
                f"LoRALinear needs a module with in_features and out_features; got {type(bare).__name__}. One that "
                "maps [..., in] to [..., out] works once it has these two attributes"
            )
        super().__init__(
            base, bare.in_features, bare.out_features, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora,
            lora_bias=lora_bias, initialise=initialise, dtype=dtype, adapter_name=adapter_name,
        )  # fmt: skip

    @property
    def in_features(self) -> int:
        """The size of the input."""
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        """The size of the output."""
        return self.lora_b.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in the dtype of the base's output, for x [..., in]."""
        if not self.takes_part:
            return self.base(x)
        plain, p, scaling = plain_linear(self.base), self.drop_p(), self.factor()
        a, b = self.factors()
        if self.lora_bias is not None:
            result = self.base(x)
            change = lora_change(self.dropout(x), a, b, scaling)
            return (result + (change + scaling * self.lora_bias)).to(result.dtype)
        if plain is not None:
            return lora_linear(x, plain.weight, plain.bias, a, b, scaling=scaling, dropout_p=p)
        return lora_added(self.base(x), x, a, b, scaling=scaling, dropout_p=p)


class LoRAConv1D(LoRALinear):
    """`LoRALinear` over GPT-2's `Conv1D`, a linear layer that keeps its weight as [in, out].

    Args:
        base: a `transformers.pytorch_utils.Conv1D`.
        rank, alpha, dropout, rslora, lora_bias, initialise, dtype, adapter_name: as for `LoRALinear`.

    Raises:
        ValueError: the rank or `initialise` is out of range.
    """

    transposed = True

    def __init__(
        self, base: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        lora_bias: bool = False, initialise: str = "kaiming", dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        bare: Any = bare_module(base)
        columns, rows = bare.weight.shape
        LowRankLayer.__init__(
            self, base, columns, rows, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, lora_bias=lora_bias,
            initialise=initialise, dtype=dtype, adapter_name=adapter_name,
        )  # fmt: skip

    @property
    def nf(self) -> int:
        """The size of the output, by the name `Conv1D` has for it."""
        return self.out_features
