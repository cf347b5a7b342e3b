"""Cutting the numbers of a token into heads, and joining them again."""

from __future__ import annotations

from torch import Tensor


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """Return what a projection gives as one row of numbers for each head.

    Args:
        projected: [B, T, H * D], the numbers of head 0 first.
        heads: H.

    Returns:
        [B, H, T, D], a view.

    Raises:
        ValueError: the last dimension cannot be cut into `heads` equal parts.

    >>> import torch
    >>> from llmtune.layers import split_heads
    >>> split_heads(torch.arange(6).view(1, 1, 6), 2)[0, :, 0]
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    if projected.ndim != 3 or heads < 1 or projected.shape[-1] % heads:
        raise ValueError(
            f"to be split, a projection must be [B, T, width] with a width that is a multiple of the {heads} heads, "
            f"got shape {tuple(projected.shape)}"
        )
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(separate: Tensor) -> Tensor:
    """Return the heads' results side by side: what `split_heads` has cut, joined again.

    Args:
        separate: [B, H, T, D].

    Returns:
        [B, T, H * D].

    Raises:
        ValueError: there are not 4 dimensions.
    """
    if separate.ndim != 4:
        raise ValueError(f"heads to be merged must be [B, H, T, D], got shape {tuple(separate.shape)}")
    return separate.transpose(1, 2).flatten(-2)
