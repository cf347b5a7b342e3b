"""What a layer keeps of its input for the backward pass: nothing of its own, where autograd holds the makings anyway.

The input of a gated feed-forward's last layer is a product, silu(gate) * up, whose two factors autograd keeps for the
product's own gradient. To keep them instead of the product costs no memory, and one multiplication later.
"""

from __future__ import annotations

import torch
from torch import Tensor


def makings(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what to keep so that `made` gives x again bit for bit: x and None, or two factors that are kept anyway.

    Where hooks on saved tensors are in force (activation checkpointing, offloading) x itself is kept: asking for
    another operation's tensors would set them off.

    Args:
        x: [...], an input that may have been made by a product of two tensors of its shape.
    """
    node = x.grad_fn
    if node is None or node.name() != "MulBackward0" or x._is_view() or _hooks_in_force():
        return x, None
    try:
        left, right = node._saved_self, node._saved_other  # type: ignore[attr-defined]
    except RuntimeError:  # they are gone since a backward pass, or have been changed in place
        return x, None
    for factor in (left, right):
        if not isinstance(factor, Tensor) or factor.shape != x.shape or factor.dtype != x.dtype:
            return x, None
    return left, right


def made(left: Tensor, right: Tensor | None) -> Tensor:
    """Return the input that `makings` was given, of the same shape."""
    return left if right is None else left * right


def _hooks_in_force() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
