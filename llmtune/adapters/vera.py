"""VeRA: LoRA with two random matrices that all layers share and nobody trains, and two trained vectors a layer.

    y = x W^T + b + lambda_b * ((lambda_d * (drop(x) A[:, :in]^T)) B[:out]^T)

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (2023), section 3.1. As in PEFT, one A and one B as wide
as the widest layer serve layers of all sizes, each by a part of them; the paper has a pair for each size. Computed as
LoRA with A and lambda_b B lambda_d, which keeps nothing [N, r] or [N, out] for the backward pass of N tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.fused import lora_added, lora_linear
from llmtune.adapters.layer import PREFIX, AdapterLayer, bare_module, plain_linear
from llmtune.adapters.record import check_probability, check_whole
from llmtune.adapters.targets import is_conv1d, linear_sizes

FILE_A, FILE_B = "base_model.vera_A", "base_model.vera_B"  # in PEFT's files: the model's own, so without ".model"


def draw_projections(rank: int, columns: int, rows: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return A [rank, columns] and B [rows, rank], the numbers that PEFT draws from the same seed.

    A ~ uniform(-s, s) with s = sqrt(6 / columns), then B likewise with sqrt(6 / rank): Kaiming's start.

    Args:
        rank: r.
        columns: the largest input of the layers that are to share them.
        rows: the largest output.
        seed: of a generator of their own, on the CPU.

    Returns:
        Both in float32, on the CPU.

    >>> from llmtune.adapters import draw_projections
    >>> a, b = draw_projections(2, 5, 3, seed=7)
    >>> a.shape, b.shape
    (torch.Size([2, 5]), torch.Size([3, 2]))
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = []
    for shape in ((rank, columns), (rows, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
        drawn.append(matrix.uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


def vera_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    projection_a: Tensor,
    projection_b: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Return x W^T + bias + lambda_b * ((lambda_d * (drop(x) A^T)) B^T), keeping one [out, r] for the backward pass.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out], or None.
        projection_a: A, [r, in].
        projection_b: B, [out, r].
        lambda_d: [r].
        lambda_b: [out].
        dropout_p, seed: as in `lora_linear`, which does the rest.

    Returns:
        [..., out], in x's dtype (in autocast's, under autocast).

    Raises:
        ValueError: as `lora_linear`.

    >>> import torch
    >>> from llmtune.adapters import vera_linear
    >>> x, weight, a, b = torch.ones(2, 5), torch.ones(3, 5), torch.ones(1, 5), torch.ones(3, 1)
    >>> vera_linear(x, weight, None, a, b, torch.tensor([0.1]), torch.tensor([0.0, 2.0, 4.0]))
    tensor([[5., 6., 7.],
            [5., 6., 7.]])
    """
    b = _scaled(projection_b, lambda_d, lambda_b)
    return lora_linear(x, weight, bias, projection_a, b, scaling=1.0, dropout_p=dropout_p, seed=seed)


def _scaled(projection_b: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """lambda_b B lambda_d, [out, r]; the vectors are multiplied first, so that autograd keeps them and B alone."""
    return projection_b * (lambda_b[:, None] * lambda_d)


class SharedProjections(nn.Module):
    """A and B of one adapter: a module that every one of its layers holds, so that they are in memory once.

    They are buffers, so `to`, `deepcopy` and FSDP treat them as they should, and they are no part of the `state_dict`,
    where every layer would name them again: their numbers come from the seed, or from the file that the adapter was
    loaded from. `to_empty` leaves them whole, and from the meta device they come back drawn.

    Args:
        rank: r.
        columns: the largest input of the layers.
        rows: the largest output.
        seed: as in `draw_projections`.
        dtype, device: of both.

    Attributes:
        a: A, [r, columns].
        b: B, [rows, r].
    """

    a: Tensor
    b: Tensor

    def __init__(
        self, rank: int, columns: int, rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.seed = seed
        a, b = draw_projections(rank, columns, rows, seed=seed)
        self.register_buffer("a", a.to(device, dtype), persistent=False)
        self.register_buffer("b", b.to(device, dtype), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> SharedProjections:
        """Go where `fn` says and take its dtype, with the numbers of before; called once for every layer there is."""
        a, b = self.a, self.b
        super()._apply(fn, recurse)
        if not self.a.is_meta:
            if a.is_meta:
                a, b = draw_projections(a.shape[0], a.shape[1], b.shape[0], seed=self.seed)
            self.a, self.b = a.to(self.a), b.to(self.b)
        return self

    def drawn_from(self, seed: int) -> bool:
        """Return whether A and B are what the seed gives."""
        a, b = draw_projections(self.a.shape[0], self.a.shape[1], self.b.shape[0], seed=seed)
        here = self.a.device
        return torch.equal(a.to(here, self.a.dtype), self.a) and torch.equal(b.to(here, self.b.dtype), self.b)


class VeRALinear(AdapterLayer):
    """A linear layer with VeRA's change beside it: see the top of this file.

    Works over `nn.Linear`, GPT-2's `Conv1D` and any module that maps [..., in] to [..., out] and has `in_features` and
    `out_features`. lambda_b starts at 0, so the output is the base's to the bit. r is not bound by the layer's sizes:
    it costs r trained numbers, and an [out, r] that is kept from the forward to the backward pass.

    Args:
        base: the layer to adapt; its parameters are left alone.
        rank: r.
        dropout: probability with which an entry of x is dropped on the way to A, in training mode.
        d_initial: what lambda_d starts at.
        projections: A and B, at least as large as the layer; left out, it draws its own.
        seed: of its own A and B.
        dtype: of all of them.
        adapter_name: the adapter the layer belongs to.

    Attributes:
        lambda_d: [r].
        lambda_b: [out].
        projections: the `SharedProjections`.

    Raises:
        TypeError: the base does not say its sizes.
        ValueError: the rank or dropout is out of range, or the projections do not fit.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = VeRALinear(base, rank=7)
        >>> x = torch.randn(7, 5)
        >>> torch.equal(layer(x), base(x)), sum(p.numel() for p in (layer.lambda_d, layer.lambda_b))
        (True, 10)
    """

    def __init__(
        self, base: nn.Module, *, rank: int, dropout: float = 0.0, d_initial: float = 0.1,
        projections: SharedProjections | None = None, seed: int = 0, dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        sizes = linear_sizes(base)
        if sizes is None:
            raise TypeError(
                f"VeRALinear needs a module with in_features and out_features; got {type(bare_module(base)).__name__}"
            )
        check_whole("rank", rank)
        check_probability("dropout", dropout)
        super().__init__(base, adapter_name=adapter_name)
        self.in_features, self.out_features = sizes
        device = next((p.device for p in bare_module(base).parameters()), torch.device("cpu"))
        if projections is None:
            projections = SharedProjections(rank, *sizes, seed=seed, dtype=dtype, device=device)
        a, b = projections.a, projections.b
        if a.shape[0] != rank or b.shape[1] != rank or a.shape[1] < sizes[0] or b.shape[0] < sizes[1]:
            raise ValueError(
                f"the projections must be [{rank}, {sizes[0]} or more] and [{sizes[1]} or more, {rank}]; "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        self.projections = projections
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lambda_d = nn.Parameter(torch.full((rank,), float(d_initial), dtype=dtype, device=device))
        self.lambda_b = nn.Parameter(torch.zeros(sizes[1], dtype=dtype, device=device))
        self.train(base.training)

    @property
    def weight(self) -> Any:
        """The bare module's weight."""
        return bare_module(self).weight

    @property
    def bias(self) -> Any:
        """The bare module's bias, or None."""
        return getattr(bare_module(self), "bias", None)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return this layer's parts of A and B, [r, in] and [out, r], where lambda_d is and in its dtype."""
        a, b = self.projections.a, self.projections.b
        return a[:, : self.in_features].to(self.lambda_d), b[: self.out_features].to(self.lambda_d)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in the dtype of the base's output, for x [..., in]."""
        if not self.takes_part:
            return self.base(x)
        plain = plain_linear(self.base)
        p = self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0
        a, b = self.parts()
        if plain is not None:
            return vera_linear(x, plain.weight, plain.bias, a, b, self.lambda_d, self.lambda_b, dropout_p=p)
        return lora_added(self.base(x), x, a, _scaled(b, self.lambda_d, self.lambda_b), scaling=1.0, dropout_p=p)

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """Return (left [rows, r], right [r, columns], 1): the weight's change is left @ right; see `AdapterLayer`. Of
        the two, what is made of B carries gradient."""
        a, b = self.parts()
        b = _scaled(b, self.lambda_d, self.lambda_b)
        return (a.T, b.T, 1.0) if is_conv1d(self) else (b, a, 1.0)

    def deltas(self) -> dict[str, Tensor]:
        """Return the change of the bare weight; see `AdapterLayer`."""
        left, right, _ = self.low_rank()
        wide = torch.promote_types(left.dtype, torch.float32)
        return {"weight": left.to(wide) @ right.to(wide)}

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names and the tensors, A and B by the names all layers have for them; see `AdapterLayer`."""
        start = f"{PREFIX}{place}.vera_lambda_"
        own: dict[str, Tensor] = {f"{start}b": self.lambda_b, f"{start}d": self.lambda_d}
        return own | {FILE_A: self.projections.a, FILE_B: self.projections.b}

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"adapter={self.adapter_name}, rank={len(self.lambda_d)}, active={self.active}"
