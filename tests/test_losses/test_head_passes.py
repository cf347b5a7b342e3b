"""The second pass over a head's rows: its gradient a block of tokens at a time, in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.losses import chunked, head_passes
from llmtune.losses.cross_entropy import CrossEntropy, linear_cross_entropy
from llmtune.losses.divergence import Divergence
from llmtune.losses.head_passes import HeadRows
from llmtune.testing.close import assert_close

N, E, V = 67, 13, 331  # six blocks of tokens, the last a part of one
ALL = {"label_smoothing": 0.3, "z_loss": 0.02, "softcap": 3.0, "logit_scale": 0.7}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=[4096, 29, 7], ids=lambda rows: f"{rows} rows at once")
def second_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send heads of any size through the second pass, in blocks of 64 tokens."""
    monkeypatch.setattr(head_passes, "SUM_BYTES", {"cpu": 0})
    monkeypatch.setattr(head_passes, "BLOCK_BYTES", {"cpu": 1})
    monkeypatch.setattr(head_passes, "ROWS_AT_ONCE", request.param)
    monkeypatch.setattr(head_passes, "FLOAT16_ROWS_AT_ONCE", request.param)
    monkeypatch.setattr(head_passes, "CACHE_BYTES", 5 * 64 * 4)  # five rows of a block


def inputs(dtype: torch.dtype) -> Inputs:
    """Small whole numbers and eighths: their logits are exact in half precision."""
    draw = torch.Generator().manual_seed(11)
    hidden = torch.randint(-2, 3, (N, E), generator=draw).to(dtype).requires_grad_()
    weight = (torch.randint(-2, 3, (V, E), generator=draw) / 8).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=draw).requires_grad_()
    targets = torch.randint(V, (N,), generator=draw)
    targets[::6] = -100
    return hidden, weight, bias, targets


def plain_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (the head's logits, as a leaf, the losses of all rows), in float64."""
    z = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()).detach().requires_grad_()
    finished = z * logit_scale if softcap is None else softcap * torch.tanh(z * logit_scale / softcap)
    losses = F.cross_entropy(finished, targets, label_smoothing=label_smoothing, reduction="none")
    return z, losses + torch.where(targets == -100, 0.0, z_loss * finished.logsumexp(-1).square())


def rounded_once(given: Inputs, dtype: torch.dtype, at_once: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return by the losses' sum, in float64: the gradients of head and bias, and how far the head's may be off.

    The logits' gradients are rounded to the type, as they must be before they are multiplied; two of them may go the
    other way. Each product of `at_once` rows is rounded, and where there are several their sum.
    """
    hidden, weight, bias, targets = given
    z, losses = plain_losses(hidden, weight, bias, targets, **options)
    (by_logits,) = torch.autograd.grad(losses.sum(), z)
    g, h = by_logits.to(dtype).double()[targets != -100], hidden.detach().double()[targets != -100]
    parts = [a.T @ b for a, b in zip(g.split(at_once), h.split(at_once), strict=True)]
    rounded = sum(part.abs() for part in parts) if len(parts) > 1 else 0.0
    other_way = (g[:, :, None] * h[:, None, :]).abs().amax(0)
    return g.T @ h, by_logits.sum(0), 2.0**-8 * ((g.T @ h).abs() + rounded + 2 * other_way)


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("chunk_rows", [5, 31])
def test_the_heads_gradient_is_rounded_once(second_pass: None, chunk_rows: int, options: dict[str, Any]) -> None:
    """Sums over groups of rows are in float32; where one product takes all rows, nothing is rounded but its result."""
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="sum", chunk_rows=chunk_rows, **options)
    d_hidden, d_weight, d_bias = torch.autograd.grad(loss, (hidden, weight, bias))
    want, want_bias, room = rounded_once(
        (hidden, weight, bias, targets), torch.bfloat16, head_passes.ROWS_AT_ONCE, **options
    )
    assert ((d_weight.double() - want).abs() <= room).all()
    assert_close(d_bias.double(), want_bias, rtol=1e-5)
    z, losses = plain_losses(hidden, weight, bias, targets, **options)
    assert_close(loss.double(), losses.sum(), rtol=1e-6)
    (by_logits,) = torch.autograd.grad(losses.sum(), z)
    assert_close(d_hidden.double(), by_logits @ weight.double(), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_many_rows_add_is_not_lost(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in half precision stands still once what is added is less than half a step of it."""
    monkeypatch.setattr(head_passes, "SUM_BYTES", {"cpu": 0})
    monkeypatch.setattr(head_passes, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(head_passes, "FLOAT16_ROWS_AT_ONCE", 1)
    rows = 5003
    hidden, targets = torch.ones(rows, 2, dtype=dtype), torch.zeros(rows, dtype=torch.long)
    weight = torch.zeros(3, 2, dtype=dtype).requires_grad_()
    linear_cross_entropy(hidden, weight, targets, chunk_rows=512).backward()
    assert weight.grad is not None
    assert_close(weight.grad.double(), torch.tensor([[-2.0], [1.0], [1.0]]).double().expand(3, 2) / 3, rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["hidden weight bias", "weight", "weight bias", "hidden weight"])
def test_it_gives_the_gradients_of_the_float32_sum(
    second_pass: None, trained: str, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all options and whatever is trained, also in a second backward pass, and beside second derivatives."""
    named = dict(zip(("hidden", "weight", "bias"), inputs(dtype)[:3], strict=True))
    targets = inputs(dtype)[3]
    for name, tensor in named.items():
        tensor.requires_grad_(name in trained)
    asked = [tensor for tensor in named.values() if tensor.requires_grad]
    factors = torch.linspace(-1, 2, N) if reduction == "none" else torch.tensor(8.0)

    def gradients(times: int) -> list[list[Tensor]]:
        loss = linear_cross_entropy(targets=targets, reduction=reduction, chunk_rows=13, **ALL, **named)
        total = (loss * factors).sum()
        return [list(torch.autograd.grad(total, asked, retain_graph=True)) for _ in range(times)]

    found, again = gradients(2)
    monkeypatch.setattr(head_passes, "SUM_BYTES", {"cpu": 2**30})
    (wanted,) = gradients(1)
    for got, once_more, want, tensor in zip(found, again, wanted, asked, strict=True):
        assert got.dtype == tensor.dtype
        assert torch.equal(got, once_more)
        assert (got.double() - want.double()).norm() < 5e-3 * want.double().norm()


def test_a_weight_that_lies_across_memory(second_pass: None) -> None:
    hidden, weight, _, targets = inputs(torch.bfloat16)
    across = weight.detach().T.contiguous().T.requires_grad_()
    grads = [
        torch.autograd.grad(linear_cross_entropy(hidden, w, targets, chunk_rows=23), w)[0] for w in (weight, across)
    ]
    assert (grads[0].double() - grads[1].double()).norm() < 1e-2 * grads[0].double().norm()


def test_second_derivatives_pass_it_by(second_pass: None) -> None:
    hidden, weight, _, targets = inputs(torch.bfloat16)
    seconds = []
    for loss in (linear_cross_entropy, lambda h, w, t, **_: F.cross_entropy(F.linear(h, w).float(), t)):
        (first,) = torch.autograd.grad(loss(hidden, weight, targets, chunk_rows=13), weight, create_graph=True)
        seconds.append(torch.autograd.grad(first.float().pow(2).sum(), weight)[0].float())
    assert (seconds[0] - seconds[1]).norm() < 2e-2 * seconds[1].norm()


class Recorder(TorchDispatchMode):
    """Records how large a float32 tensor gets."""

    def __init__(self) -> None:
        super().__init__()
        self.widest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.widest = max(self.widest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_float32_tensor_is_of_the_heads_size(second_pass: None, reduction: str, dtype: torch.dtype) -> None:
    hidden, weight, _, targets = inputs(dtype)
    with Recorder() as seen:
        linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_rows=11).sum().backward()
    assert seen.widest < V * E
    assert weight.grad is not None
    assert weight.grad.dtype == dtype


def test_one_chunk_needs_neither_sum_nor_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_passes, "head_gradient", None)
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    with Recorder() as seen:
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="sum", chunk_rows=N)
        (d_weight,) = torch.autograd.grad(loss, weight)
    want, _, room = rounded_once((hidden, weight, bias, targets), torch.bfloat16, N)
    assert ((d_weight.double() - want).abs() <= room).all()
    assert seen.widest < V * N


def test_logits_whose_gradient_is_held_are_not_made_again(second_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    multiply = head_passes.logits_into

    def counted(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        made.append(out.numel())
        return multiply(out, hidden, weight)

    monkeypatch.setattr(head_passes, "logits_into", counted)
    hidden, weight, _, targets = inputs(torch.bfloat16)
    labelled = int((targets != -100).sum())
    linear_cross_entropy(hidden, weight, targets, chunk_rows=23)
    assert sum(made) == V * (labelled + labelled - 23 - E)
    made.clear()
    linear_cross_entropy(hidden, weight, targets, chunk_rows=labelled - E)
    assert sum(made) == V * labelled


def test_which_heads_take_it() -> None:
    def takes(dtype: torch.dtype, n: int, classes: int, width: int, loss: Any) -> bool:
        hidden, weight = torch.empty(n, width, dtype=dtype), torch.empty(classes, width, dtype=dtype, device="cpu")
        return HeadRows(hidden, weight, None, loss, (), chunked._own_chunk_rows(weight, loss), 1.0).by_columns

    assert takes(torch.bfloat16, 1024, 49152, 576, CrossEntropy())
    assert takes(torch.float16, 1024, 49152, 576, CrossEntropy())
    assert not takes(torch.float32, 1024, 49152, 576, CrossEntropy())
    assert not takes(torch.bfloat16, 256, 49152, 576, CrossEntropy())  # one chunk
    assert not takes(torch.bfloat16, 4096, 32000, 128, CrossEntropy())  # 16 MB in float32
    assert not takes(torch.bfloat16, 1024, 49152, 576, Divergence())  # needs more of a row than its log sum exp
