"""The laws of attention and of masks, for our backends and for yours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtune.attention.documents import Documents
from llmtune.attention.mask_base import Mask
from llmtune.attention.masks import Causal, Dense, Padding
from llmtune.errors import LawBroken
from llmtune.testing.attention_cases import Case, cases, draw
from llmtune.testing.close import assert_close

Attention = Callable[..., Tensor]


def check_attention(
    fn: Attention,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
    takes: Callable[[Mask], bool] | None = None,
) -> None:
    """Check that a function is attention: the formula, its gradients, and what follows from it at the edges.

    The laws: shape and dtype, inputs left alone; no future token is seen (exactly); grouped heads equal repeated heads;
    a query without keys gives 0 and no gradient; any strides; permuting the batch permutes the result; packed, padded
    and single documents agree; a single query equals the last of many; equal to the formula written out row by row
    (float64: 1e-10; float32: outputs 2e-6, gradients 1e-5, of the largest entry), under every kind of mask, with odd
    sizes; in bfloat16 at most twice the error of torch's own kernel.

    Args:
        fn: called as fn(query, key, value, *, mask=None): [B, H, T, D], [B, K, S, D], [B, K, S, Dv] -> [B, H, T, Dv],
            with H a multiple of K. The mask is a `llmtune.attention.Mask` or None; `mask.dense(T, S)` gives the table.
        dtypes: those the function takes. The laws that do not speak of a dtype are checked in the first.
        takes: says which masks the function takes; left out, every mask. It must take no mask, `Causal`, `Padding` and
            `Documents`, and these joined.

    Raises:
        LawBroken: the message says which law, at which input, by how much.

    >>> from llmtune.attention import scaled_dot_product_attention
    >>> from llmtune.testing.attention import check_attention
    >>> check_attention(scaled_dot_product_attention)
    """
    plain, *masked = (case for case in cases() if takes is None or case.mask is None or takes(case.mask))
    _shape(fn, dtypes[0])
    if dtypes[0] in (torch.float64, torch.float32):
        _formula(fn, dtypes[0], plain)  # before all else, so that a law below does not stumble over mere rounding
    for law in (_causality, _grouped_heads, partial(_empty_rows, takes=takes), _strides, _batch_order, _documents):
        law(fn, dtypes[0])
    _single_query(fn, dtypes[0])
    for dtype in dtypes:
        if dtype in (torch.float64, torch.float32):
            for case in (plain, *masked):
                _formula(fn, dtype, case)
        else:
            _narrow(fn, dtype)


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
    """The formula, for one query at a time over the keys it may see: slow, and nothing to get wrong."""
    (B, H, T, D), (_, K, S, Dv) = query.shape, value.shape
    allowed = torch.ones(T, S, dtype=torch.bool) if mask is None else mask.dense(T, S)
    allowed = allowed.expand(B, H, T, S)
    rows = []
    for b in range(B):
        for h in range(H):
            k, v = key[b, h // (H // K)], value[b, h // (H // K)]
            for t in range(T):
                seen = allowed[b, h, t].nonzero()[:, 0]
                rows.append(torch.softmax(k[seen] @ query[b, h, t] / D**0.5, dim=0) @ v[seen])
    return torch.stack(rows).view(B, H, T, Dv)


def _with_gradients(fn: Attention, inputs: Sequence[Tensor], mask: Mask | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of the inputs under a fixed random weighting of the output."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = fn(*leaves, mask=mask)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    if not out.requires_grad:
        raise LawBroken('attention law "differentiable": the output carries no gradient')
    gradients = torch.autograd.grad(out, leaves, weighting, allow_unused=True)
    names = ("query", "key", "value")
    return out.detach(), {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for name, leaf, gradient in zip(names, leaves, gradients, strict=True)
    }


def _law(name: str, at: object) -> str:
    return f'attention law "{name}" ({at})'


def _formula(fn: Attention, dtype: torch.dtype, case: Case) -> None:
    inputs = draw(case, dtype)
    truth, true_gradients = _with_gradients(
        lambda q, k, v, *, mask: _row_by_row(q, k, v, mask), [tensor.double() for tensor in inputs], case.mask
    )
    out, gradients = _with_gradients(fn, inputs, case.mask)
    law = _law("equal to the formula", f"{case}, {dtype}")
    wide = dtype == torch.float64
    assert_close(out, truth, rtol=1e-10 if wide else 2e-6, what=f"{law}: output")
    for name, gradient in gradients.items():
        assert_close(gradient, true_gradients[name], rtol=1e-10 if wide else 1e-5, what=f"{law}: gradient of {name}")


def _narrow(fn: Attention, dtype: torch.dtype) -> None:
    case = Case("causal", 2, 6, 3, 29, 29, Causal())
    inputs = draw(case, dtype, D=17, Dv=17)
    table = Causal().dense(29, 29)

    def torch_kernel(query: Tensor, key: Tensor, value: Tensor, *, mask: Mask | None) -> Tensor:
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=table)

    def formula(query: Tensor, key: Tensor, value: Tensor, *, mask: Mask | None) -> Tensor:
        return _row_by_row(query, key, value, mask)

    truth, true_gradients = _with_gradients(formula, [tensor.double() for tensor in inputs], case.mask)
    results = [_with_gradients(each, inputs, case.mask) for each in (fn, torch_kernel)]
    for name, true in {"output": truth, **{f"gradient of {n}": t for n, t in true_gradients.items()}}.items():
        ours, torchs = (
            ((out if name == "output" else gradients[name.split()[-1]]).double() - true).norm().item()
            for out, gradients in results
        )
        if not ours <= 2.0 * torchs:
            raise LawBroken(
                f"{_law('as exact as torch in a narrow dtype', f'{case}, {dtype}')}: error of the {name} {ours:.3g}, "
                f"more than twice that of torch's kernel, {torchs:.3g}"
            )


def _shape(fn: Attention, dtype: torch.dtype) -> None:
    case = Case("no mask", 2, 6, 3, 7, 11)
    inputs = draw(case, dtype)
    before = [tensor.clone() for tensor in inputs]
    out = fn(*inputs, mask=None)
    law = _law("shape and dtype, inputs left alone", case)
    if not isinstance(out, Tensor):
        raise LawBroken(f"{law}: expected a tensor, got {type(out).__name__}")
    if tuple(out.shape) != (2, 6, 7, 13) or out.dtype != dtype:
        raise LawBroken(f"{law}: expected (2, 6, 7, 13) {dtype}, got {tuple(out.shape)} {out.dtype}")
    for name, tensor, old in zip(("query", "key", "value"), inputs, before, strict=True):
        if not torch.equal(tensor, old):
            raise LawBroken(f"{law}: the call has written into {name}")


def _causality(fn: Attention, dtype: torch.dtype) -> None:
    case = Case("causal", 2, 6, 3, 11, 11, Causal())
    query, key, value = draw(case, dtype)
    _, other_key, other_value = draw(case, dtype, seed=1)
    out = fn(query, key, value, mask=case.mask)
    for t in range(10):
        later = torch.arange(11)[:, None] > t
        changed = fn(query, torch.where(later, other_key, key), torch.where(later, other_value, value), mask=case.mask)
        if not torch.equal(out[:, :, : t + 1], changed[:, :, : t + 1]):
            off = (out - changed)[:, :, : t + 1].abs().max().item()
            raise LawBroken(
                f"{_law('no future token is seen', case)}: other keys and values after {t} changed the output "
                f"up to {t} by {off:.3g}"
            )


def _grouped_heads(fn: Attention, dtype: torch.dtype) -> None:
    case = Case("causal", 2, 6, 3, 7, 7, Causal())
    query, key, value = draw(case, dtype)
    grouped = fn(query, key, value, mask=case.mask)
    repeated = fn(query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1), mask=case.mask)
    assert_close(grouped, repeated, what=_law("grouped heads equal repeated heads", case))


def _empty_rows(fn: Attention, dtype: torch.dtype, *, takes: Callable[[Mask], bool] | None) -> None:
    table = torch.ones(7, 7, dtype=torch.bool)
    table[3] = False
    for case in (
        Case("one query without keys", 2, 6, 3, 7, 7, Dense(table)),
        Case("a row all padding", 2, 6, 3, 7, 7, Causal() & Padding([7, 0])),
    ):
        assert case.mask is not None
        if takes is not None and not takes(case.mask):
            continue
        out, gradients = _with_gradients(fn, draw(case, dtype), case.mask)
        law = _law("a query without keys gives 0 and no gradient", case)
        empty = ~case.mask.dense(7, 7).any(dim=-1).expand(2, 6, 7)
        for what, tensor in {"output": out, "gradient of query": gradients["query"]}.items():
            if not bool((tensor[empty] == 0).all()):
                raise LawBroken(f"{law}: the {what} there is {tensor[empty].flatten()[0].item()}")
        for name, gradient in gradients.items():
            if not bool(gradient.isfinite().all()):
                raise LawBroken(f"{law}: the gradient of {name} is not finite")


def _strides(fn: Attention, dtype: torch.dtype) -> None:
    case = Case("causal", 2, 6, 3, 7, 7, Causal())
    inputs = draw(case, dtype)
    truth = fn(*inputs, mask=case.mask)
    law = _law("any strides", case)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    assert_close(fn(*turned, mask=case.mask), truth, what=f"{law}: heads inside the sequence")
    inside_out = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in inputs]
    assert_close(fn(*inside_out, mask=case.mask), truth, what=f"{law}: last dimension not contiguous")
    query, key, value = inputs
    shared = (key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1))
    copied = fn(query, *(tensor.contiguous() for tensor in shared), mask=case.mask)
    assert_close(fn(query, *shared, mask=case.mask), copied, what=f"{law}: keys shared by the batch")


def _batch_order(fn: Attention, dtype: torch.dtype) -> None:
    order = [2, 0, 1]
    lengths = [4, 11, 7]
    case = Case("causal and padding", 3, 6, 3, 11, 11, Causal() & Padding(lengths))
    inputs = draw(case, dtype)
    permuted = fn(*(tensor[order] for tensor in inputs), mask=Causal() & Padding([lengths[i] for i in order]))
    truth = fn(*inputs, mask=case.mask)[order]
    assert_close(permuted, truth, what=_law("permuting the batch permutes the result", case))


def _documents(fn: Attention, dtype: torch.dtype) -> None:
    lengths = [5, 1, 7]
    case = Case(f"documents of {lengths}", 1, 6, 3, 13, 13, Causal() & Documents.from_lengths(lengths))
    inputs = draw(case, dtype)
    packed = fn(*inputs, mask=case.mask)
    parts = [tensor.split(lengths, dim=2) for tensor in inputs]
    documents = list(zip(*parts, strict=True))
    right = [torch.cat([F.pad(d[i], (0, 0, 0, 7 - d[i].shape[2]), value=9.0) for d in documents]) for i in range(3)]
    left = [torch.cat([F.pad(d[i], (0, 0, 7 - d[i].shape[2], 0), value=9.0) for d in documents]) for i in range(3)]
    real = torch.arange(7) >= 7 - torch.tensor(lengths)[:, None]
    padded = {
        "right": fn(*right, mask=Causal() & Padding(lengths)),
        "left": fn(*left, mask=Causal() & Padding.from_attention_mask(real)),
    }
    law = _law("packed, padded and single documents agree", case)
    starts = [0, 5, 6]
    for i, (document, start, n) in enumerate(zip(documents, starts, lengths, strict=True)):
        alone = fn(*document, mask=Causal())[0]
        assert_close(packed[0, :, start : start + n], alone, what=f"{law}: document {i}, packed")
        assert_close(padded["right"][i, :, :n], alone, what=f"{law}: document {i}, padded right")
        assert_close(padded["left"][i, :, 7 - n :], alone, what=f"{law}: document {i}, padded left")


def _single_query(fn: Attention, dtype: torch.dtype) -> None:
    case = Case("causal", 2, 6, 3, 11, 11, Causal())
    query, key, value = draw(case, dtype)
    alone = fn(query[:, :, -1:], key, value, mask=Causal())
    assert_close(alone, fn(query, key, value, mask=Causal())[:, :, -1:], what=_law("a single query is the last", case))
