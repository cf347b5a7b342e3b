"""How many floating-point operations a forward and backward pass take, counted while they run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def count_flops(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return the floating-point operations of a forward pass and of the backward pass to `parameters`.

    Counted by `torch.utils.flop_counter.FlopCounterMode`: matrix products, convolutions and torch's own attention (a
    causal one in full, though kernels leave half of it out). Recomputed activations count again. It does not see:
    elementwise work, norms and softmax; kernels of other libraries (flash-attn, bitsandbytes, Triton), unless they
    have registered a formula; what runs inside a compiled function, so that the model is run uncompiled here; the
    optimizer. No gradient is left in `.grad`.

    Args:
        loss: computes a scalar that carries a gradient.
        parameters: what is trained, any shapes; those that require no gradient are passed over.

    Example:
        >>> weight = torch.ones(5, 3, requires_grad=True)
        >>> count_flops(lambda: (torch.ones(7, 3) @ weight.T).sum(), [weight])  # two products of 2 * 7 * 3 * 5
        420
    """
    from torch.utils.flop_counter import FlopCounterMode

    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    whole: Any = _Whole()  # torch's own tracker hooks gradients, and fails where a leaf enters a module
    counter.mod_tracker = whole
    compiled = "torch._dynamo" in sys.modules  # else nothing is, and loading it takes a second
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), counter:
        torch.autograd.grad(loss(), wanted, allow_unused=True)
    torch.clear_autocast_cache()  # casts that belong to a graph which is gone
    return counter.get_total_flops()


class _Whole:
    """Stands where the counter keeps track of the module it is in: everything is counted as one."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return formulas, of shapes, for what torch's table leaves out: products in place, and oneDNN's on the CPU."""

    def product(_: Any, one: Any, other: Any, *__: Any, **___: Any) -> int:
        return 2 * math.prod(one) * other[-1]

    def linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, size = query
        return 2 * batch * heads * length * key[2] * (size + value[3])

    def attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        batch, heads, length, size = query  # scores anew, and the gradients of scores, query, key and value
        return 2 * batch * heads * length * key[2] * (3 * size + 2 * value[3])

    aten, found = torch.ops.aten, {}
    for place, name, formula in (
        (aten, "addmm_", product),
        (aten, "baddbmm_", product),
        (torch.ops.mkldnn, "_linear_pointwise", linear),
        (aten, "_scaled_dot_product_flash_attention_for_cpu", attention),
        (aten, "_scaled_dot_product_flash_attention_for_cpu_backward", attention_backward),
    ):
        if hasattr(place, name):  # not every build of torch has them all
            found[getattr(place, name)] = formula
    return found
