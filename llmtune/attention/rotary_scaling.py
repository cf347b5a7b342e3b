"""The frequencies of rotary positions, and the ways to stretch them beyond the length a model was trained on.

A scaling is a small frozen record. All of them act on the frequencies alone; YaRN also has an `amplitude`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


def rotary_frequencies(dim: int, base: float = 10000.0, *, device: torch.device | str | None = None) -> Tensor:
    """Return by how many radians each pair of dimensions turns from one position to the next.

    frequency_i = base ** (-2 i / dim),   i = 0 ... dim/2 - 1

    Computed in float32, as the models in use were trained: at position 10000 its rounding moves an angle by up to
    about 0.001, so a more exact formula would be another one.

    Args:
        dim: the rotated dimensions of a head, even.
        base: > 1; called theta elsewhere.
        device: where to make them.

    Returns:
        [dim / 2], float32.

    Raises:
        ValueError: dim is not even and positive, or base is not above 1.

    >>> from llmtune.attention.rotary_scaling import rotary_frequencies
    >>> rotary_frequencies(4, base=100.0)
    tensor([1.0000, 0.1000])

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.2.
    """
    if not isinstance(dim, int) or dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive, for dimensions turn in pairs, got {dim}")
    if not 1 < base < math.inf:
        raise ValueError(f"base must be above 1 and finite, got {base}")
    return 1.0 / (base ** _exponents(dim, device))


def _exponents(dim: int, device: torch.device | str | None = None) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are changed. One of your own needs `frequencies`.

    `needs_length` is True where the frequencies depend on how long the sequence is; they are then made in every call.
    """

    needs_length: ClassVar[bool] = False

    def frequencies(self, dim: int, base: float, *, length: Tensor | None = None) -> Tensor:
        """Return the changed frequencies.

        Args:
            dim: the rotated dimensions of a head, even.
            base: as in `rotary_frequencies`.
            length: scalar, the largest position plus 1; read only where `needs_length`.

        Returns:
            [dim / 2], float32.
        """
        raise NotImplementedError(f"{type(self).__name__} has no frequencies(dim, base)")

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by: 1 for all but YaRN."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation: every frequency, and so every position, is divided by `factor`.

    Args:
        factor: >= 1, how much longer than in training sequences may be.

    Raises:
        ValueError: the factor is below 1.

    Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (2023), section 2.3.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self)

    def frequencies(self, dim: int, base: float, *, length: Tensor | None = None) -> Tensor:
        """Return the frequencies over `factor`, [dim / 2]. See `RotaryScaling.frequencies`."""
        return rotary_frequencies(dim, base) / self.factor


@dataclass(frozen=True)
class DynamicNTKScaling(RotaryScaling):
    """Beyond `original_length` the base grows with the sequence, so that low frequencies stretch and high ones do not.

    base' = base * (factor * length / original_length - (factor - 1)) ** (dim / (dim - 2))

    Up to `original_length` nothing changes. Keys that a cache holds keep the frequencies they were made with.

    Args:
        factor: >= 1, how strongly the base grows.
        original_length: the tokens of a sequence in training (`max_position_embeddings` of a Hugging Face config).

    Raises:
        ValueError: the factor is below 1, or the length no positive integer.

    bloc97, "Dynamically Scaled RoPE" (2023); Peng et al., "YaRN" (2023), section 3.3.
    """

    factor: float
    original_length: int
    needs_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_factor(self)
        _check_length(self)

    def frequencies(self, dim: int, base: float, *, length: Tensor | None = None) -> Tensor:
        """Return the frequencies at `length`, [dim / 2]; without a length, those up to `original_length`.

        Raises:
            ValueError: dim is 2; the exponent dim / (dim - 2) needs at least 4.
        """
        if dim == 2:
            raise ValueError("DynamicNTKScaling needs at least 4 rotated dimensions (dim), got 2")
        if length is None:
            return rotary_frequencies(dim, base)
        plain = rotary_frequencies(dim, base, device=length.device)
        stretch = self.factor * length.clamp(min=self.original_length) / self.original_length - (self.factor - 1)
        stretched = 1.0 / (base * stretch ** (dim / (dim - 2))) ** _exponents(dim, length.device)
        return torch.where(length > self.original_length, stretched, plain)  # no value is read: nothing waits


@dataclass(frozen=True)
class YaRNScaling(RotaryScaling):
    """Low frequencies are divided by `factor`, high ones stay, those between are blended; attention gets sharper.

    A pair that turns more than `beta_fast` times within `original_length` stays as it is, one that turns less than
    `beta_slow` times is divided by `factor`. Cos and sin are multiplied by the attention factor: the one that is given,
    else (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1) where both are given, else
    0.1 ln(factor) + 1.

    Args:
        factor: >= 1, how much longer than in training sequences may be.
        original_length: the tokens of a sequence in training.
        beta_fast, beta_slow: turns within `original_length` between which frequencies are blended.
        attention_factor: > 0, instead of the formula.
        mscale, mscale_all_dim: > 0, both or neither (DeepSeek's way to write the attention factor).
        truncate: whether the blend begins and ends at whole pairs.

    Raises:
        ValueError: a number is out of its range, or two that exclude each other are given.

    Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023), sections 3.2 and 3.4.
    """

    factor: float
    original_length: int
    beta_fast: float = 32
    beta_slow: float = 1
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self)
        _check_length(self)
        if not self.beta_fast >= self.beta_slow > 0:
            raise ValueError(f"beta_fast must be at least beta_slow, got {self.beta_fast} and {self.beta_slow}")
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(f"attention_factor must be positive, got {self.attention_factor}")
        scales = (self.mscale, self.mscale_all_dim)
        if scales == (None, None):
            return
        if self.attention_factor is not None:
            raise ValueError("attention_factor leaves mscale and mscale_all_dim without effect: give one or the others")
        if not all(scale is not None and scale > 0 for scale in scales):
            raise ValueError(
                f"mscale and mscale_all_dim must both be positive or both be left out, got {scales[0]} and {scales[1]}"
            )

    def frequencies(self, dim: int, base: float, *, length: Tensor | None = None) -> Tensor:
        """Return the blended frequencies, [dim / 2]. See `RotaryScaling.frequencies`."""
        plain = rotary_frequencies(dim, base)
        low, high = (self._pair_that_turns(times, dim, base) for times in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001  # as the paper's code has it: a step instead of a ramp
        interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        kept = 1 - interpolated
        return 1.0 / (self.factor * base ** _exponents(dim)) * (1 - kept) + plain * kept

    def _pair_that_turns(self, times: float, dim: int, base: float) -> float:
        """The pair of dimensions, as a real number, that turns so many times within the original length."""
        return dim * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(base))

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by: the attention factor."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return 0.1 * math.log(self.factor) + 1.0
        return (0.1 * self.mscale * math.log(self.factor) + 1.0) / (
            0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0
        )


@dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Llama 3.1's: low frequencies are divided by `factor`, high ones stay, those between are blended by wavelength.

    A pair stays where its wavelength is below original_length / high_frequency_factor, and is divided where it is above
    original_length / low_frequency_factor.

    Args:
        factor: >= 1, how much longer than in training sequences may be (8 in Llama 3.1).
        low_frequency_factor: > 0 (1 there).
        high_frequency_factor: larger than that (4 there).
        original_length: the tokens of a sequence in training (8192 there).

    Raises:
        ValueError: a number is out of its range.

    Llama Team, "The Llama 3 Herd of Models" (2024), section 3.4.2, and its published code.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check_factor(self)
        _check_length(self)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high:
            raise ValueError(f"high_frequency_factor must be larger than low_frequency_factor, got {high} and {low}")

    def frequencies(self, dim: int, base: float, *, length: Tensor | None = None) -> Tensor:
        """Return the blended frequencies, [dim / 2]. See `RotaryScaling.frequencies`."""
        plain = rotary_frequencies(dim, base)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        turns = self.original_length / (2 * math.pi / plain)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


def _check_factor(scaling: LinearScaling | DynamicNTKScaling | YaRNScaling | Llama3Scaling) -> None:
    factor = scaling.factor
    if not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise ValueError(f"{type(scaling).__name__} needs a factor of at least 1, got {factor}")


def _check_length(scaling: DynamicNTKScaling | YaRNScaling | Llama3Scaling) -> None:
    length = scaling.original_length
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"{type(scaling).__name__} needs original_length as a positive integer, got {length}")
