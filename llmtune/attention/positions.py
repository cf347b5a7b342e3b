"""Where a token stands: rotary positions for queries and keys, sinusoidal and learned ones for embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtune.attention.rotary_scaling import RotaryScaling, rotary_frequencies


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair of dimensions of queries and keys by the angle of its position.

    out_i = x_i cos_i - x_{i+R/2} sin_i,   out_{i+R/2} = x_{i+R/2} cos_{i+R/2} + x_i sin_{i+R/2},   i < R/2

    A pair is dimension i and dimension i + R/2, as in Llama, GPT-NeoX and all of Hugging Face's models; the paper pairs
    neighbours, 2i and 2i + 1. Where R is smaller than D the first R dimensions turn and the rest stays. Narrow inputs
    are turned in the dtype of cos and rounded once (transformers rounds cos and sin to the inputs' dtype first).

    Args:
        query: [B, H, T, D].
        key: [B, K, T, D].
        cos, sin: [B | 1, T, R], R <= D and even, from `RotaryEmbedding`.

    Returns:
        (query, key), the same shapes and dtypes.

    Raises:
        ValueError: the shapes do not belong together.

    >>> import torch
    >>> from llmtune.attention.positions import RotaryEmbedding, apply_rotary
    >>> query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8)
    >>> cos, sin = RotaryEmbedding(8)(torch.arange(5)[None])
    >>> query, key = apply_rotary(query, key, cos, sin)

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.2.
    """
    if cos.shape != sin.shape or cos.ndim != 3 or cos.shape[-1] % 2:
        raise ValueError(
            f"cos and sin must both be [B, T, R] with R even, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for name, x in (("query", query), ("key", key)):
        fits = x.ndim == 4 and cos.shape[0] in (1, x.shape[0]) and cos.shape[1] == x.shape[2]
        if not fits or cos.shape[2] > x.shape[3]:
            raise ValueError(
                f"the {name} must be [B, heads, T, D] with B, T and D >= R of cos, [B or 1, T, R]; "
                f"got {tuple(x.shape)} and cos {tuple(cos.shape)}"
            )
    cos, sin = cos[:, None], sin[:, None]
    return _turn(query, cos, sin), _turn(key, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D], cos and sin [B | 1, 1, T, R] -> [B, heads, T, D]"""
    R = cos.shape[-1]
    first, second, rest = x.split([R // 2, R // 2, x.shape[-1] - R], dim=-1)
    (cos_1, cos_2), (sin_1, sin_2) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    turned = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)


class RotaryEmbedding(nn.Module):
    """The cos and sin by which `apply_rotary` turns queries and keys: one instance serves all layers.

    Nothing is trained and nothing is saved. `frequencies`, [dim / 2], stay float32 when the module is cast to another
    dtype, and are made anew when it moves, so that a module built on the meta device is right after `to_empty`.

    With `DynamicNTKScaling` the frequencies follow from the largest position of this call alone, over all its rows.
    Transformers keeps those of the longest call so far until one comes that is shorter than the original length, so the
    two differ after a longer call.

    Args:
        dim: the rotated dimensions of a head, even: the head size, or less for partial rotary.
        base: > 1, `rope_theta` in a Hugging Face config.
        scaling: a record of `rotary_scaling.py`, or None; `scaling_from_config` reads one from a config.

    Raises:
        ValueError: dim is not even and positive, or base is not above 1.
        TypeError: the scaling is none.

    >>> import torch
    >>> from llmtune.attention.positions import RotaryEmbedding
    >>> cos, sin = RotaryEmbedding(4)(torch.tensor([[0, 1, 2]]))
    >>> cos.shape
    torch.Size([1, 3, 4])

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.2.
    """

    frequencies: Tensor

    def __init__(self, dim: int, base: float = 10000.0, scaling: RotaryScaling | None = None) -> None:
        super().__init__()
        if scaling is not None and not isinstance(scaling, RotaryScaling):
            raise TypeError(
                f"scaling must be a record such as LinearScaling(2.0), got {type(scaling).__name__}; "
                "scaling_from_config reads a config's dict"
            )
        self.dim, self.base, self.scaling = dim, base, scaling
        self.register_buffer("frequencies", self._fixed_frequencies(torch.get_default_device()), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the angles at these positions.

        Args:
            position_ids: [B, T] or [1, T], integers from 0.

        Returns:
            (cos, sin): [B | 1, T, dim] each, float32; both halves of the last dimension are the same.

        Raises:
            ValueError: the positions are no integers [B, T].
        """
        _check_positions(position_ids)
        frequencies, amplitude = self.frequencies, 1.0
        if self.scaling is not None:
            amplitude = self.scaling.amplitude
            if self.scaling.needs_length and position_ids.numel() > 0:
                frequencies = self.scaling.frequencies(self.dim, self.base, length=position_ids.max() + 1)
        angles = position_ids[..., None].float() * frequencies
        cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    def _fixed_frequencies(self, device: torch.device) -> Tensor:
        with torch.device("cpu"):  # made in one place, so that they are the same bits wherever they are used
            if self.scaling is None:
                return rotary_frequencies(self.dim, self.base).to(device)
            return self.scaling.frequencies(self.dim, self.base).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        # Only where fn has put them counts: what it made of their dtype and values is dropped.
        self.frequencies = self._fixed_frequencies(self.frequencies.device)
        return self

    def extra_repr(self) -> str:
        """Return the arguments, for `print(module)`."""
        return f"dim={self.dim}, base={self.base}" + (f", scaling={self.scaling}" if self.scaling else "")


def sinusoidal_positions(length: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the fixed position embeddings of the first Transformer, for positions 0 ... length - 1.

    PE[p, 2i] = sin(p / 10000 ** (2i / width)),   PE[p, 2i+1] = cos(p / 10000 ** (2i / width))

    Sines and cosines alternate, as in the paper (and in DistilBERT and XLM). Elsewhere all sines come first and all
    cosines after them (tensor2tensor, fairseq, Marian, Pegasus): `table[:, 0::2]` and `table[:, 1::2]`, joined. The
    first two also divide by width / 2 - 1 where the paper divides by width / 2.

    Args:
        length: number of positions.
        width: of an embedding, even.
        device: where to make them.

    Returns:
        [length, width], float32, computed in float64.

    Raises:
        ValueError: the width is not even and positive, or the length is negative.

    >>> from llmtune.attention.positions import sinusoidal_positions
    >>> sinusoidal_positions(2, 2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])

    Vaswani et al., "Attention Is All You Need" (2017), section 3.5.
    """
    _check_width(width)
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    return _sinusoids(torch.arange(length, device=device), width)


def _sinusoids(positions: Tensor, width: int) -> Tensor:
    """[..., T] -> [..., T, width]. In float64 until the end: float32 angles of thousands of radians are off by 1e-4."""
    powers = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions[..., None].double() / 10000.0**powers
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).float()


class SinusoidalPositions(nn.Module):
    """`sinusoidal_positions` for any position ids, as a module without parameters.

    Args:
        width: of an embedding, even.

    Raises:
        ValueError: the width is not even and positive.

    Vaswani et al., "Attention Is All You Need" (2017), section 3.5.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        _check_width(width)
        self.width = width

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the embeddings of these positions.

        Args:
            position_ids: [B, T] or [1, T], integers.

        Returns:
            [B | 1, T, width], float32.

        Raises:
            ValueError: the positions are no integers [B, T].
        """
        _check_positions(position_ids)
        return _sinusoids(position_ids, self.width)

    def extra_repr(self) -> str:
        """Return the arguments, for `print(module)`."""
        return f"width={self.width}"


class LearnedPositions(nn.Module):
    """A trained vector for each position, as in GPT-2 and BERT.

    OPT and RoBERTa have the same table but begin at row 2: add 2 to the positions and to the length.

    Args:
        length: number of positions.
        width: of an embedding.

    Raises:
        ValueError: the length or the width is not positive.

    Attributes:
        weight: [length, width], drawn from a normal distribution of deviation 0.02.

    Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), section 3.1.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        if length < 1 or width < 1:
            raise ValueError(f"length and width must be positive, got {length} and {width}")
        self.weight = nn.Parameter(torch.empty(length, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the embeddings of these positions.

        Args:
            position_ids: [B, T] or [1, T], integers from 0 to length - 1. (Their range is not read inside
                `torch.compile`.)

        Returns:
            [B | 1, T, width], in the weight's dtype.

        Raises:
            ValueError: the positions are no integers [B, T], or one is out of range.
        """
        _check_positions(position_ids)
        length = self.weight.shape[0]
        if not (torch.compiler.is_compiling() or position_ids.is_meta or position_ids.numel() == 0):
            low, high = (int(end) for end in position_ids.aminmax())
            if low < 0 or high >= length:
                raise ValueError(
                    f"position_ids must be between 0 and {length - 1}, for there are {length} learned positions, "
                    f"got {low if low < 0 else high}: shorten the input or make the table longer"
                )
        return F.embedding(position_ids, self.weight)

    def extra_repr(self) -> str:
        """Return the arguments, for `print(module)`."""
        return f"length={self.weight.shape[0]}, width={self.weight.shape[1]}"


def _check_positions(position_ids: Any) -> None:
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.dtype not in (
        torch.int64, torch.int32
    ):  # fmt: skip
        got = type(position_ids).__name__
        if isinstance(position_ids, Tensor):
            got = f"{position_ids.dtype} of shape {tuple(position_ids.shape)}"
        raise ValueError(f"position_ids must be integers [B, T] or [1, T], got {got}")


def _check_width(width: int) -> None:
    if width < 2 or width % 2:
        raise ValueError(f"width must be even and positive, for sines and cosines alternate, got {width}")
