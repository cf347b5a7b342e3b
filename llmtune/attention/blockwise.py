"""Attention a block of queries at a time, forward and backward, in memory that is linear in the length.

Each block of queries meets all its keys at once, so its softmax is an ordinary one, and nothing of the size of the
scores outlives the block: the backward pass makes the weights anew. With `kept` for dropout's mask over 1 - p,

    P = softmax(scores),  O = (P * kept) V,  dP = (dO V^T) * kept,  dS = P * (dP - rowsum(P * dP) + dLSE)

Dao et al., "FlashAttention" (2022), appendix B, without its splitting of rows: a few rows fit into the cache whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtune.attention.blocks import SCORES, Group, Plan
from llmtune.attention.mask_base import Mask
from llmtune.attention.tiles import diagonals, sum_diagonals


@dataclass(frozen=True, eq=False)
class Job:
    """What a call asks for, beside its tensors.

    Args:
        plan: the blocks; together they hold every query that sees a key exactly once.
        mask: asked for the tables of those blocks that say so.
        factor: what the products are multiplied by.
        softcap: bound of the scores, or None.
        dropout_p: probability that a weight is dropped.
        seed: of the dropout.
        by_distance: whether the bias is [H, T + S - 1], one value for each s - t from 1 - T to S - 1, instead of
            [B | 1, H | 1, T | 1, S | 1].
        want_lse: whether the log-sum-exp is computed.
    """

    plan: Plan
    mask: Mask | None = None
    factor: float = 1.0
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int = 0
    by_distance: bool = False
    want_lse: bool = False


class _Call:
    """The tensors of one pass, seen as [B, K, R, length, size], and room for the scores of a block."""

    def __init__(
        self, job: Job, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, tables: int
    ) -> None:
        self.job, self.bias = job, bias
        (self.B, self.H, self.T, self.D), (_, self.K, self.S, self.Dv) = query.shape, value.shape
        self.R = self.H // self.K
        self.query, self.key, self.value = self.split(query), key[:, :, None], value[:, :, None]
        self.factor = job.factor / (job.softcap or 1.0)
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        most = max((len(g.at) * len(range(self.K)[h]) * self.R * g.t * g.s for g, h in self.steps()), default=0)
        self.room = [torch.empty(most, dtype=self.dtype, device=query.device) for _ in range(tables)]
        self.generator = None
        if 0.0 < job.dropout_p < 1.0:  # both passes visit the blocks in one order, so they draw the same
            self.generator = torch.Generator(query.device).manual_seed(job.seed)

    def split(self, x: Tensor) -> Tensor:
        """[B, H, T, size] -> [B, K, R, T, size]."""
        return x.unflatten(1, (self.K, self.R))

    def steps(self) -> Iterator[tuple[Group, slice]]:
        """Yield the groups, one of a single large block for a few heads at a time."""
        for group in self.job.plan.groups:
            most = self.K if len(group.at) > 1 else max(1, 4 * SCORES // (self.R * group.t * group.s))
            for first in range(0, self.K, most):
                yield group, slice(first, min(first + most, self.K))

    def table(self, number: int, group: Group, heads: slice) -> Tensor:
        """Return room for the scores of a group, [n * k, R * t, s]."""
        rows = len(group.at) * len(range(self.K)[heads])
        return self.room[number][: rows * self.R * group.t * group.s].view(rows, self.R * group.t, group.s)

    def load(self, group: Group, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return a group's queries [n * k, R * t, D], keys [n * k, s, D] and values [n * k, s, Dv]."""
        return (
            group.queries.load(self.query, heads, self.dtype),
            group.keys.load(self.key, heads, self.dtype),
            group.keys.load(self.value, heads, self.dtype),
        )

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b times the factor that scales the scores."""
        made = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
        return torch.baddbmm(made, a, b, beta=0.0, alpha=self.factor, out=made)

    def scores(self, group: Group, heads: slice, q: Tensor, k: Tensor, capped: Tensor | None = None) -> Tensor:
        """Return the scores of a group, [n * k, R * t, s], masked; the tanh of soft-capping goes to `capped`."""
        scores = self.table(0, group, heads)
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0.0, alpha=self.factor, out=scores)
        if self.job.softcap is not None:
            scores.tanh_()
            if capped is not None:
                capped.copy_(scores)
            scores.mul_(self.job.softcap)
        spread = scores.view(-1, self.R, group.t, group.s)
        if self.bias is not None:
            spread.add_(self._bias(group, heads))
        if group.tabled:
            spread.masked_fill_(~self._table(group, heads), float("-inf"))
        else:
            for columns, hidden in group.corners(self.dtype, scores.device):
                spread[..., columns].add_(hidden)
        return scores

    def weights(self, group: Group, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Turn scores into weights in place; return them and, where it is wanted, the LSE [n * k, R * t, 1]."""
        unsure = group.tabled or self.bias is not None  # a band has a key for every query
        top = scores.amax(-1, keepdim=True) if unsure or self.job.want_lse else None
        empty = top == float("-inf") if unsure and top is not None else None
        if empty is not None:
            scores.masked_fill_(empty, 0.0)
        torch.softmax(scores, -1, out=scores)
        lse = None
        if self.job.want_lse:
            assert top is not None
            lse = top - scores.amax(-1, keepdim=True).log_()  # the largest weight is exp(top - LSE)
        if empty is not None:
            scores.masked_fill_(empty, 0.0)
        return scores, lse

    def kept(self, like: Tensor, number: int) -> Tensor | None:
        """Return dropout's mask over 1 - p in the shape of `like`, or None without dropout."""
        p = self.job.dropout_p
        if p == 0.0:
            return None
        room = self.room[number][: like.numel()].view_as(like)
        if self.generator is None:  # everything is dropped
            return room.zero_()
        return room.bernoulli_(1.0 - p, generator=self.generator).mul_(1.0 / (1.0 - p))

    def _bias(self, group: Group, heads: slice) -> Tensor:
        """Return the bias of a single block, [k | 1, R | 1, t | 1, s | 1]."""
        assert self.bias is not None
        (_, q0, k0), t, s = group.at[0], group.t, group.s
        if self.job.by_distance:
            first = k0 - q0 - (t - 1) + self.T - 1
            values = self.bias.unflatten(0, (self.K, self.R))[heads, :, first : first + t + s - 1]
            return diagonals(values.flatten(0, 1), t, s).unflatten(0, (-1, self.R))
        return self.bias_part(self.bias, group, heads)

    def bias_part(self, x: Tensor, group: Group, heads: slice) -> Tensor:
        """Return the group's part of x [B | 1, H | 1, T | 1, S | 1], a view [k | 1, R | 1, t | 1, s | 1]."""
        row, q0, k0 = group.at[0]
        x = x[row if x.shape[0] > 1 else 0]
        x = x.unflatten(0, (self.K, self.R))[heads] if x.shape[0] > 1 else x[None]
        x = x[:, :, q0 : q0 + group.t] if x.shape[2] > 1 else x
        return x[..., k0 : k0 + group.s] if x.shape[3] > 1 else x

    def _table(self, group: Group, heads: slice) -> Tensor:
        """Return the mask of a single block, bool [k | 1, R | 1, t, s]."""
        assert self.job.mask is not None
        row, q0, k0 = group.at[0]
        queries, keys = range(q0, q0 + group.t), range(k0, k0 + group.s)
        table = self.job.mask.tile(queries, keys, self.T, self.S, device=self.query.device)
        if table.ndim == 2:
            return table
        table = table[row if table.shape[0] > 1 else 0]
        return table.unflatten(0, (self.K, self.R))[heads] if table.shape[0] > 1 else table[None]


def forward_pass(job: Job, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out [B, H, T, Dv] in the query's dtype and the LSE [B, H, T], empty where it is not wanted."""
    call = _Call(job, query, key, value, bias, tables=2 if job.dropout_p else 1)
    make = torch.empty if job.plan.covers else torch.zeros
    out = make(call.B, call.T, call.H, call.Dv, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.full(
        (call.B, call.H, call.T if job.want_lse else 0), float("-inf"), dtype=call.dtype, device=out.device
    )
    for group, heads in call.steps():
        q, k, v = call.load(group, heads)
        scores = call.scores(group, heads, q, k)
        weights, found = call.weights(group, scores)
        kept = call.kept(weights, 1)
        if kept is not None:
            weights.mul_(kept)
        group.queries.store(call.split(out), heads, torch.bmm(weights, v), add=False)
        if found is not None:
            group.queries.store(call.split(lse[..., None]), heads, found, add=False)
    return out, lse


def backward_pass(
    job: Job,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and bias, those that are wanted; shapes as the inputs."""
    by_query, by_key, by_value, by_bias = wanted
    by_scores = by_query or by_key or by_bias
    call = _Call(job, query, key, value, bias, tables=2 + (job.softcap is not None) + (job.dropout_p > 0.0))
    if d_out is None:
        d_out = query.new_zeros(()).expand(call.B, call.H, call.T, call.Dv)
    d_out = call.split(d_out)
    slopes = None if d_lse is None else call.split(d_lse[..., None])
    d_query = (torch.empty_like if job.plan.covers else torch.zeros_like)(query) if by_query else None
    d_key = torch.zeros_like(key, dtype=call.dtype) if by_key else None
    d_value = torch.zeros_like(value, dtype=call.dtype) if by_value else None
    d_bias = torch.zeros_like(bias, dtype=call.dtype) if by_bias and bias is not None else None
    for group, heads in call.steps():
        q, k, v = call.load(group, heads)
        capped = None if job.softcap is None else call.table(2, group, heads)
        weights, _ = call.weights(group, call.scores(group, heads, q, k, capped))
        kept = call.kept(weights, len(call.room) - 1)
        upstream = group.queries.load(d_out, heads, call.dtype)
        if d_value is not None:
            dropped = weights if kept is None else torch.mul(weights, kept, out=call.table(1, group, heads))
            group.keys.store(d_value[:, :, None], heads, torch.bmm(dropped.transpose(1, 2), upstream), add=True)
        if not by_scores:
            continue
        d_scores = torch.bmm(upstream, v.transpose(1, 2), out=call.table(1, group, heads))
        if kept is not None:
            d_scores.mul_(kept)
        torch._softmax_backward_data(d_scores, weights, -1, call.dtype, grad_input=d_scores)
        if slopes is not None:
            d_scores.addcmul_(weights, group.queries.load(slopes, heads, call.dtype))
        if d_bias is not None:
            _add_bias_gradient(call, d_bias, group, heads, d_scores)
        if capped is not None and job.softcap is not None:  # d tanh = 1 - tanh^2
            d_scores.addcmul_(d_scores, capped.square_(), value=-1.0).mul_(job.softcap)
        if d_query is not None:
            group.queries.store(call.split(d_query), heads, call.product(d_scores, k), add=False)
        if d_key is not None:
            group.keys.store(d_key[:, :, None], heads, call.product(d_scores.transpose(1, 2), q), add=True)
    grads = (d_query, d_key, d_value, d_bias)
    inputs = (query, key, value, bias)
    return tuple(
        None if gradient is None or x is None else gradient.to(x.dtype)
        for gradient, x in zip(grads, inputs, strict=True)
    )


def _add_bias_gradient(call: _Call, d_bias: Tensor, group: Group, heads: slice, d_scores: Tensor) -> None:
    """Add the gradient of a single block's scores [k, R * t, s] to the bias's, summed where the bias repeats."""
    found = d_scores.view(-1, call.R, group.t, group.s)
    if call.job.by_distance:
        (_, q0, k0), t = group.at[0], group.t
        first = k0 - q0 - (t - 1) + call.T - 1
        sums = sum_diagonals(found.flatten(0, 1)).unflatten(0, (-1, call.R))
        d_bias.unflatten(0, (call.K, call.R))[heads, :, first : first + t + group.s - 1].add_(sums)
        return
    part = call.bias_part(d_bias, group, heads)
    part.add_(found.sum_to_size(part.shape))
