"""The door from an attention case to the blockwise computation, and its place in autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from llmtune.attention import reference
from llmtune.attention.biases import RelativeBias
from llmtune.attention.blocks import Plan
from llmtune.attention.blockwise import Job, backward_pass, forward_pass
from llmtune.attention.case import AttentionCase
from llmtune.attention.merge import merge_attention
from llmtune.attention.tiles import diagonals


@_disable_dynamo  # torch.compiler.disable, without loading the compiler on import
def attend_blockwise(
    case: AttentionCase, plan: Plan, *, kernel: Callable[..., tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute one attention call block by block, saving only its inputs for the backward pass.

    A second derivative is taken through the plain formula, with its memory.

    Args:
        case: query [B, H, T, D], key [B, K, S, D], value [B, K, S, Dv] and the knobs.
        plan: the blocks; together they hold every query that sees a key exactly once.
        kernel: computes (out, lse) of query, key and value instead; the backward pass stays block by block.

    Returns:
        (out, lse): [B, H, T, Dv] in the query's dtype; [B, H, T] in float32 (float64 for float64 inputs), or None where
        it was not asked for.
    """
    want_lse = case.return_lse or case.sinks is not None
    seed = 0
    if 0.0 < case.dropout_p < 1.0:
        device = "cpu" if case.generator is None else case.generator.device
        seed = int(torch.randint(2**62, (), generator=case.generator, device=device))
    job = Job(
        plan, case.mask, case.factor, case.softcap, case.dropout_p, seed, isinstance(case.bias, RelativeBias), want_lse
    )
    out, lse = _Blockwise.apply(case.query, case.key, case.value, _bias_values(case), job, kernel)
    if case.sinks is not None:
        sinks = case.sinks.to(lse.dtype)[None, :, None].expand_as(lse)
        out, lse = merge_attention(out, lse, torch.zeros_like(out), sinks)
    return out, lse if case.return_lse else None


def _bias_values(case: AttentionCase) -> Tensor | None:
    """Return the bias as `Job` wants it: [B | 1, H | 1, T | 1, S | 1], or by distance [H, T + S - 1]."""
    bias = case.bias
    if isinstance(bias, RelativeBias):
        T, S = case.query.shape[2], case.key.shape[2]
        offset = S - T if bias.offset is None else bias.offset
        wide = torch.promote_types(case.query.dtype, torch.float32)
        distances = offset + T - 1 - torch.arange(max(T + S - 1, 0), device=case.query.device)
        return bias.by_distance(distances).to(wide)
    return bias[None, None] if bias is not None and bias.ndim == 2 else bias


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, job: Job, kernel: Callable | None
    ) -> Any:
        ctx.job = job
        ctx.set_materialize_grads(False)
        # The mask's tensors are read again in the backward pass: saved, so that autograd notices if they are changed.
        masks = () if job.mask is None else job.mask.tensors()
        ctx.save_for_backward(query, key, value, bias, *masks)
        return forward_pass(job, query, key, value, bias) if kernel is None else kernel(query, key, value)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
        inputs, wanted = ctx.saved_tensors[:4], ctx.needs_input_grad[:4]
        d_lse = None if d_lse is None or d_lse.numel() == 0 else d_lse
        if torch.is_grad_enabled():
            return *_differentiable(ctx.job, inputs, d_out, d_lse, wanted), None, None
        query, key, value, bias = inputs
        return *backward_pass(ctx.job, query, key, value, bias, d_out, d_lse, wanted), None, None


def _differentiable(
    job: Job,
    inputs: tuple[Tensor | None, ...],
    d_out: Tensor | None,
    d_lse: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients through the plain formula, so that they can be differentiated again."""
    if job.dropout_p > 0.0:
        raise ValueError(
            f"a second derivative was asked for through attention with dropout_p={job.dropout_p}, which only "
            'backend="reference" can give'
        )
    # By aliases: one input may be another, or made from it, and that path is not this function's.
    inputs = tuple(x.view_as(x) if x is not None and want else x for x, want in zip(inputs, wanted, strict=True))
    query, key, value, bias = inputs
    assert query is not None
    assert key is not None
    assert value is not None
    table = bias
    if bias is not None and job.by_distance:
        table = diagonals(bias, query.shape[2], key.shape[2])[None]
    case = AttentionCase(query, key, value, job.mask, table, job.factor, softcap=job.softcap, return_lse=job.want_lse)
    results = zip(reference.attend(case), (d_out, d_lse), strict=True)
    made = [(out, d) for out, d in results if out is not None and d is not None]
    asked = [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
    outs, upstream = [out for out, _ in made], [d for _, d in made]
    found = iter(torch.autograd.grad(outs, asked, upstream, create_graph=True, allow_unused=True))
    return tuple(next(found) if want and x is not None else None for x, want in zip(inputs, wanted, strict=True))
