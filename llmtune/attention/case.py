"""One attention call, checked: what every backend is handed, so that no backend checks again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtune.attention.biases import RelativeBias
from llmtune.attention.mask_base import Mask


@dataclass(frozen=True, eq=False)
class AttentionCase:
    """The arguments of `scaled_dot_product_attention`, valid together.

    Args:
        query: [B, H, T, D].
        key: [B, K, S, D], H % K == 0.
        value: [B, K, S, Dv].
        mask: fits B, H, T and S.
        bias: a tensor broadcastable to [B, H, T, S], or one that goes by distance.
        scale: what the products are multiplied by; left out, D ** -0.5.
        dropout_p: probability that a weight is dropped, 0 to 1.
        softcap: > 0, or None.
        sinks: [H], or None.
        return_lse: whether the log-sum-exp is wanted.
        generator: where dropout draws from.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: sizes, dtypes or devices do not fit; the sentence has the numbers.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None = None
    bias: Tensor | RelativeBias | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    return_lse: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        _check_inputs(self.query, self.key, self.value)
        B, H, T, _ = self.query.shape
        S = self.key.shape[2]
        _check_numbers(self)
        if self.bias is not None:
            _check_bias(self.bias, self.query, (B, H, T, S))
        if self.sinks is not None:
            _check_sinks(self.sinks, self.query)
        if self.mask is not None:
            if not isinstance(self.mask, Mask):
                raise TypeError(
                    f"mask must be a Mask (Causal(), Padding(...), Documents(...), Dense(...)), got "
                    f"{type(self.mask).__name__}: wrap a boolean tensor in Dense, pass an additive one as bias"
                )
            self.mask.check(B=B, H=H, T=T, S=S, device=self.query.device)

    @property
    def factor(self) -> float:
        """What the products of queries and keys are multiplied by: `scale`, or D ** -0.5 where it was left out."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def scores(self) -> int:
        """How many scores there are: B * H * T * S."""
        return self.query.shape[:3].numel() * self.key.shape[2]

    def bias_tensor(self) -> Tensor | None:
        """Return the bias as a tensor that adds to scores [B, H, T, S]; one that goes by distance becomes a table."""
        if isinstance(self.bias, RelativeBias):
            wide = torch.promote_types(self.query.dtype, torch.float32)
            return self.bias.dense(self.query.shape[2], self.key.shape[2], device=self.query.device, dtype=wide)
        return self.bias

    def bias_is_learned(self) -> bool:
        """Return whether the bias wants a gradient."""
        learned = [self.bias] if isinstance(self.bias, Tensor) else [] if self.bias is None else self.bias.parameters()
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, [batch, heads, length, size], got {tuple(tensor.shape)}")
    if len({query.dtype, key.dtype, value.dtype}) > 1 or not query.is_floating_point():
        raise ValueError(
            f"query, key and value must share one floating dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if len({query.device, key.device, value.device}) > 1:
        raise ValueError(
            f"query, key and value must be on one device, got {query.device}, {key.device} and {value.device}"
        )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            f"query, key and value must have one batch size, got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        )
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            "key and value must have the same heads and length, "
            f"got {tuple(key.shape[1:3])} and {tuple(value.shape[1:3])}"
        )
    if query.shape[3] == 0:
        raise ValueError(f"query and key must have a head size of at least 1, got {tuple(query.shape)}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one head size, got {query.shape[3]} and {key.shape[3]}")
    H, K = query.shape[1], key.shape[1]
    if K == 0 or H == 0 or H % K != 0:
        raise ValueError(f"the number of query heads must be a multiple of the key heads, got {H} and {K}")


def _check_numbers(case: AttentionCase) -> None:
    for name in ("scale", "dropout_p", "softcap"):
        number = getattr(case, name)
        if number is not None and not isinstance(number, int | float):
            raise TypeError(
                f"{name} must be a number, got {type(number).__name__}; multiply the query by a learned scale"
            )
    if case.generator is not None and not isinstance(case.generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(case.generator).__name__}")
    if case.scale is not None and not math.isfinite(case.scale):
        raise ValueError(f"scale must be finite, got {case.scale}")
    if not 0.0 <= case.dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {case.dropout_p}")
    if case.softcap is not None and not 0.0 < case.softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {case.softcap}; leave it out for none")


def _check_bias(bias: Tensor | RelativeBias, query: Tensor, shape: tuple[int, ...]) -> None:
    if isinstance(bias, RelativeBias):
        if bias.heads != shape[1]:
            raise ValueError(f"the bias {type(bias).__name__} has {bias.heads} heads, the query {shape[1]}")
        for parameter in bias.parameters():
            if parameter.device != query.device:
                raise ValueError(f"the bias is on {parameter.device}, the query on {query.device}: move one of them")
        return
    if not isinstance(bias, Tensor):
        raise TypeError(
            "bias must be a tensor to add to the scores, or an ALiBi or RelativePositionBias, "
            f"got {type(bias).__name__}" + ("; a mask goes in as mask" if isinstance(bias, Mask) else "")
        )
    if bias.dtype not in (query.dtype, torch.float32):
        narrow = "" if query.dtype == torch.float32 else ", or torch.float32"
        raise ValueError(
            f"bias must be {query.dtype}, as the query{narrow}, got {bias.dtype}"
            + ("; a boolean table is a mask: Dense(tensor)" if bias.dtype == torch.bool else "")
        )
    if bias.device != query.device:
        raise ValueError(f"bias is on {bias.device}, the query on {query.device}: move one of them")
    fits = bias.ndim in (2, 4) and all(
        have in (1, want) for have, want in zip(bias.shape, shape[-bias.ndim :], strict=True)
    )
    if not fits:
        raise ValueError(
            f"bias must be [T, S] or [B, H, T, S], each size as {shape} or 1, got shape {tuple(bias.shape)}"
        )


def _check_sinks(sinks: Tensor, query: Tensor) -> None:
    H = query.shape[1]
    if not isinstance(sinks, Tensor) or tuple(sinks.shape) != (H,) or not sinks.is_floating_point():
        got = tuple(sinks.shape) if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sinks must be one logit for each of the {H} query heads, [H], got {got}")
    if sinks.device != query.device:
        raise ValueError(f"sinks are on {sinks.device}, the query on {query.device}: move one of them")
