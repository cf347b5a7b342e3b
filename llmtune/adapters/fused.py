"""LoRA and DoRA as one autograd function each: the input is saved once, everything else is computed again.

Autograd of the plain formula keeps, beside x, a copy of x in the adapter's dtype, x A^T, dropout's mask and what it
dropped, and adds up the input's gradient in a pass of its own. Here x, the weights and, for DoRA, one output are kept:

    P = drop(x) A^T,   Z = x W^T + s P B^T,   out = g * Z + bias,   g = m / ||W + s B A|| for DoRA, else 1
    G = s (g dO) B,   dx = (g dO) W + drop(G A),   dA = G^T drop(x),   dB = s (g dO)^T P,   dm = sum(dO * Z) / ||.||

The algebra is that of Unsloth's and axolotl's kernels, in plain torch, with bias, dropout and DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.adapters.autocast import autocast_dtype, no_autocast
from llmtune.adapters.formula import Knobs, decomposed, formula, low_rank_change
from llmtune.adapters.products import times
from llmtune.adapters.seeded_dropout import seeded_dropout


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    seed: int | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """Return x W^T + bias + scaling * (drop(x) A^T) B^T, keeping nothing for the backward pass but its arguments.

    With `magnitude` it is DoRA: magnitude / norm * (x W^T + scaling * (drop(x) A^T) B^T) + bias; one output more is
    kept, for the magnitude's gradient. Dropout acts on the way to A alone (PEFT's DoRA drops entries on the way to W
    too).

    The low-rank part is computed in the dtype of `lora_a`, the rest in that of x; the sum is rounded once. Under
    autocast all is computed in its dtype. A second derivative, `torch.func` and `torch.compile` take the plain formula.

    Args:
        x: [..., in].
        weight: [out, in]; gets a gradient where it requires one.
        bias: [out], or None; likewise.
        lora_a: [r, in].
        lora_b: [out, r].
        scaling: alpha / r, or alpha / sqrt(r): a number or a scalar tensor without gradient.
        dropout_p: probability, 0 to below 1, that an entry of x is dropped on the way to A.
        seed: of the dropout; left out, one is drawn from torch's own random state.
        magnitude: [out], DoRA's m.
        norm: [out], the row norms of W + scaling B A; no gradient goes through it (section 4.3 of the paper).

    Returns:
        [..., out], in x's dtype (in autocast's, under autocast).

    Raises:
        ValueError: the sizes do not fit each other, dropout_p or the seed is out of range, or one of magnitude and norm
            is missing; scaling is not finite.
        TypeError: an argument is no tensor where there must be one.

    >>> import torch
    >>> from llmtune.adapters import lora_linear
    >>> x, weight, a, b = torch.ones(2, 5), torch.ones(3, 5), torch.ones(1, 5), torch.ones(3, 1)
    >>> lora_linear(x, weight, None, a, b, scaling=2.0)
    tensor([[15., 15., 15.],
            [15., 15., 15.]])

    Hu et al., "LoRA" (2021), section 4.1; Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), section 4.
    """
    _check(x, weight, bias, lora_a, lora_b, magnitude, norm)
    x, knobs = _prepared(x, lora_a, scaling, dropout_p, seed)
    norm = None if norm is None else norm.detach()
    if _traced():
        return formula(x, weight, bias, lora_a, lora_b, magnitude, norm, knobs)
    with no_autocast(x.device):
        return _LoRALinear.apply(x, weight, bias, lora_a, lora_b, magnitude, norm, knobs)


def lora_added(
    result: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Return result + scaling * (drop(x) A^T) B^T, keeping x, A and B for the backward pass and nothing else.

    For a base whose weight is not at hand as a plain matrix: quantised, sharded, or adapted already.

    Args:
        result: [..., out], what the base made of x.
        x: [..., in].
        lora_a: [r, in].
        lora_b: [out, r].
        scaling, dropout_p, seed: as in `lora_linear`.

    Returns:
        [..., out], in the dtype of `result`: the sum is made in the wider of the two and rounded once.

    Raises:
        ValueError: dropout_p or the seed is out of range.
    """
    x, knobs = _prepared(x, lora_a, scaling, dropout_p, seed)
    if _traced():
        return (result + low_rank_change(x, lora_a, lora_b, knobs)).to(result.dtype)
    with no_autocast(x.device):
        return _LoRAAdded.apply(result, x, lora_a, lora_b, knobs)


def _prepared(x: Tensor, lora_a: Tensor, scaling: float | Tensor, p: float, seed: int | None) -> tuple[Tensor, Knobs]:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be a probability from 0 to below 1, got {p}")
    if not isinstance(scaling, Tensor) and not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    work = lora_a.dtype
    cast = autocast_dtype(x.device)
    if cast is not None and x.dtype != torch.float64:
        work, x = cast, x.to(cast)
    if p > 0.0 and seed is None and not _traced():
        seed = int(torch.randint(2**62, (), device="cpu"))
    return x, Knobs(scaling, p, -1 if seed is None else seed, work)


def _traced() -> bool:
    """Whether somebody looks on who must see operations that are known: a compiler, torch.func, forward derivatives."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, m: Tensor | None,
        norm: Tensor | None, knobs: Knobs,
    ) -> Tensor:  # fmt: skip
        ctx.knobs = knobs
        plain = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        change = F.linear(_pushed(x, a, knobs), b.to(knobs.work)).mul_(knobs.scaling)
        kept = None
        if m is None or norm is None:
            out = plain.add_(change) if plain.dtype == change.dtype else (plain + change).to(x.dtype)
        else:
            out, turned = decomposed(plain, bias, change, m / norm)
            kept = turned if m.requires_grad else None
        ctx.save_for_backward(x, weight, bias, a, b, m, norm, kept)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        saved = ctx.saved_tensors  # read once: checkpointing gives them out a single time
        if torch.is_grad_enabled():
            *inputs, norm, _ = saved
            wanted, knobs = ctx.needs_input_grad, ctx.knobs
            plain = partial(formula, norm=norm, knobs=knobs)
            found = _differentiable(plain, tuple(inputs), d_out, wanted)
            return *found, None, None
        with no_autocast(d_out.device):
            return *_LoRALinear._gradients(saved, d_out, ctx.needs_input_grad, ctx.knobs), None, None

    @staticmethod
    def _gradients(saved: Any, d_out: Tensor, wanted: tuple[bool, ...], knobs: Knobs) -> tuple[Tensor | None, ...]:
        x, weight, bias, a, b, m, norm, kept = saved
        d_bias = _rows(d_out).sum(0).to(bias.dtype) if wanted[2] else None
        d_m = None
        if m is not None and norm is not None:
            if kept is not None:
                d_m = (_rows(d_out.to(m.dtype) * kept).sum(0) / norm).to(m.dtype)
            d_out = (d_out * (m / norm)).to(d_out.dtype)
        d_x = times(d_out, weight.to(d_out.dtype)) if wanted[0] else None
        d_weight = (_rows(d_out).T @ _rows(x)).to(weight.dtype) if wanted[1] else None
        d_x, d_a, d_b = _low_rank_gradients(d_out, d_x, x, a, b, (wanted[0], wanted[3], wanted[4]), knobs)
        return d_x, d_weight, d_bias, d_a, d_b, d_m


class _LoRAAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, knobs: Knobs) -> Tensor:
        ctx.knobs = knobs
        ctx.save_for_backward(x, a, b)
        change = F.linear(_pushed(x, a, knobs), b.to(knobs.work)).mul_(knobs.scaling)
        return (result + change).to(result.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():

            def change(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
                return low_rank_change(x, a, b, ctx.knobs).to(d_out.dtype)

            return d_out, *_differentiable(change, (x, a, b), d_out, wanted), None
        with no_autocast(d_out.device):
            return d_out, *_low_rank_gradients(d_out, None, x, a, b, wanted, ctx.knobs), None


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [N, n]"""
    return x.reshape(-1, x.shape[-1])


def _pushed(x: Tensor, a: Tensor, knobs: Knobs) -> Tensor:
    """drop(x) A^T, [..., r], in the working dtype."""
    return F.linear(seeded_dropout(x.to(knobs.work), knobs.dropout_p, knobs.seed), a.to(knobs.work))


def _low_rank_gradients(
    d_out: Tensor,
    d_x: Tensor | None,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    wanted: tuple[bool, ...],
    knobs: Knobs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (added to `d_x`, where there is one), A and B; `wanted` in this order."""
    work = knobs.work
    upstream = _rows(d_out.to(work))
    pulled = (upstream @ b.to(work)).mul_(knobs.scaling)
    d_a = d_b = None
    if wanted[1] or wanted[2]:
        dropped = _rows(seeded_dropout(x.to(work), knobs.dropout_p, knobs.seed))
        d_a = (pulled.T @ dropped).to(a.dtype) if wanted[1] else None
        d_b = (upstream.T @ (dropped @ a.to(work).T)).mul_(knobs.scaling).to(b.dtype) if wanted[2] else None
    if not wanted[0]:
        return None, d_a, d_b
    if d_x is not None and d_x.dtype == work and d_x.is_contiguous() and knobs.dropout_p == 0.0:
        _rows(d_x).addmm_(pulled, a.to(work))
        return d_x, d_a, d_b
    change = seeded_dropout((pulled @ a.to(work)).view(x.shape), knobs.dropout_p, knobs.seed)
    return (change if d_x is None else d_x + change).to(x.dtype), d_a, d_b


def _differentiable(
    plain: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], d_out: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients through the plain formula, so that they can be differentiated again.

    They are taken by aliases: one input may have been made from another, and that path is not this function's.
    """
    aliases = [x.view_as(x) if x is not None and want else x for x, want in zip(inputs, wanted, strict=False)]
    asked = [x for x, want in zip(aliases, wanted, strict=False) if want and x is not None]
    with no_autocast(d_out.device):
        out = plain(*aliases)
    found = iter(torch.autograd.grad(out, asked, d_out, create_graph=True, allow_unused=True))
    return [next(found) if want and x is not None else None for x, want in zip(inputs, wanted, strict=False)]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    m: Tensor | None,
    norm: Tensor | None,
) -> None:
    for name, value in (("x", x), ("weight", weight), ("lora_a", a), ("lora_b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    for name, other in (("bias", bias), ("magnitude", m), ("norm", norm)):
        if other is not None and not isinstance(other, Tensor):
            raise TypeError(f"{name} must be a tensor or None; got {type(other).__name__}")
    out, size = weight.shape if weight.ndim == 2 else (None, None)
    fits = size is not None and x.ndim > 0 and x.shape[-1] == size and a.ndim == b.ndim == 2
    if not fits or a.shape[1] != size or b.shape[0] != out or a.shape[0] != b.shape[1]:
        raise ValueError(
            "x must be [..., in], weight [out, in], lora_a [r, in] and lora_b [out, r]; got "
            f"{tuple(x.shape)}, {tuple(weight.shape)}, {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if (m is None) != (norm is None):
        raise ValueError("DoRA needs both magnitude and norm; one of them is missing")
    if x.dtype != weight.dtype and autocast_dtype(x.device) is None:
        raise ValueError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    for name, vector in (("bias", bias), ("magnitude", m), ("norm", norm)):
        if vector is not None and tuple(vector.shape) != (out,):
            raise ValueError(f"{name} must be [out] = [{out}], got {tuple(vector.shape)}")
