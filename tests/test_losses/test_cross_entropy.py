from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.losses import head_passes
from llmtune.losses.chunked import default_chunk_rows
from llmtune.losses.cross_entropy import linear_cross_entropy
from llmtune.testing.close import assert_close

N, E, V = 23, 11, 29


def inputs(dtype: torch.dtype = torch.float64, *, ignore: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(N, E, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    if ignore:
        targets[1::3] = -100
    return hidden, weight, bias, targets


class Recorder(TorchDispatchMode):
    """Records the largest tensor any operation makes, and the shapes multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100, None])
def test_all_gradients_equal_those_of_the_plain_formula(reduction: str, chunk_rows: int | None) -> None:
    hidden, weight, bias, targets = inputs()
    factors = torch.linspace(-1, 2, N, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7)
    ours = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, chunk_rows=chunk_rows)
    plain = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction=reduction)
    assert_close(ours, plain)
    grads = torch.autograd.grad((ours * factors).sum(), (hidden, weight, bias))
    expected = torch.autograd.grad((plain * factors).sum(), (hidden, weight, bias))
    for name, grad, want in zip(("hidden", "weight", "bias"), grads, expected, strict=True):
        assert_close(grad, want, what=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_second_derivatives_are_right(reduction: str, smoothing: float) -> None:
    hidden, weight, bias, targets = inputs()

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            h, w, targets[:5], bias=b, reduction=reduction, label_smoothing=smoothing, z_loss=0.1, softcap=2.0
        )

    assert torch.autograd.gradgradcheck(loss, (hidden[:5].detach().requires_grad_(), weight, bias), atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "weight bias", "hidden, no bias", "weight, no bias"])
def test_a_frozen_head_or_a_frozen_body_with_all_options(trained: str, reduction: str) -> None:
    """First and second derivatives, whatever is trained."""
    named = dict(zip(("hidden", "weight", "bias"), inputs()[:3], strict=True))
    targets = inputs()[3]
    if "no bias" in trained:
        named.pop("bias")
    for name, tensor in named.items():
        tensor.requires_grad_(name in trained)
    asked = [tensor for tensor in named.values() if tensor.requires_grad]

    def ours() -> Tensor:
        return linear_cross_entropy(
            targets=targets, bias=named.get("bias"), label_smoothing=0.3, z_loss=0.2, softcap=1.3, logit_scale=0.7,
            reduction=reduction, chunk_rows=5, **{name: named[name] for name in ("hidden", "weight")},
        )  # fmt: skip

    def plain() -> Tensor:
        z = 1.3 * torch.tanh(0.7 * F.linear(named["hidden"], named["weight"], named.get("bias")) / 1.3)
        rows = F.cross_entropy(z, targets, label_smoothing=0.3, reduction="none")
        rows = rows + torch.where(targets == -100, 0.0, 0.2 * z.logsumexp(-1).square())
        return rows if reduction == "none" else rows.sum() / (targets != -100).sum()

    factors = torch.linspace(-1, 2, N, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7)
    results = []
    for loss in (ours(), plain()):
        grads = torch.autograd.grad((loss * factors).sum(), asked, create_graph=True)
        second = torch.autograd.grad(torch.stack([grad.pow(3).sum() for grad in grads]).sum(), asked)
        results.append([loss, *grads, *second])
    once = torch.autograd.grad((ours() * factors).sum(), asked)  # in place, not through the plain formula
    for got, want in zip((*results[0], *once), (*results[1], *results[1][1 : 1 + len(once)]), strict=True):
        assert_close(got, want)


def test_works_under_torch_func() -> None:
    hidden, weight, bias, targets = (x.detach() for x in inputs())
    grad = torch.func.grad(lambda w: linear_cross_entropy(hidden, w, targets, bias=bias))(weight)
    expected = torch.func.grad(lambda w: F.cross_entropy(F.linear(hidden, w, bias), targets))(weight)
    assert_close(grad, expected)


def test_never_holds_all_logits_and_computes_only_labelled_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(101, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(499, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(499, (101,), generator=generator)
    targets[: 101 - 47] = -100
    with Recorder() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk_rows=13).backward()
    assert seen.largest <= 499 * 13
    forward = [rows for rows, columns in seen.products if columns == 499]
    assert forward == [13, 13, 13, 8]  # 47 labelled rows, each multiplied by the head once
    assert (499, 7) not in seen.products  # the head is frozen: its gradient is not computed


def test_no_gradient_is_computed_without_need() -> None:
    hidden, weight, bias, targets = inputs()
    with torch.no_grad(), Recorder() as seen:
        linear_cross_entropy(hidden, weight, targets, bias=bias)
    assert len(seen.products) == 1


def test_default_chunks_keep_within_their_memory() -> None:
    for V_, buffers, dtype in ((49152, 1, torch.float32), (151936, 1, torch.float32), (49152, 2, torch.bfloat16)):
        rows = default_chunk_rows(torch.empty(V_, 1, dtype=dtype, device="cpu"), buffers)
        size = rows * V_ * (4 * buffers + (2 if dtype == torch.bfloat16 else 0))
        assert 60e6 < size <= 64 * 2**20
    assert default_chunk_rows(torch.empty(10**6, 1), 1) == 64


def test_bfloat16_is_at_least_as_exact_as_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, chunk in ((101, 17), (257, 300), (509, 64)):
        h = torch.randn(rows, 67, generator=generator).bfloat16()
        w = (torch.randn(211, 67, generator=generator) / 8).bfloat16()
        t = torch.randint(211, (rows,), generator=generator)
        t[::3] = -100

        def run(fn: object, *x: Tensor) -> list[Tensor]:
            x = [part.detach().clone().requires_grad_() for part in x]
            loss = fn(*x)
            return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, x))]

        exact = run(lambda h, w: F.cross_entropy(h @ w.T, t), h.double(), w.double())  # noqa: B023
        ours = run(lambda h, w: linear_cross_entropy(h, w, t, chunk_rows=chunk), h, w)  # noqa: B023
        torchs = run(lambda h, w: F.cross_entropy(F.linear(h, w), t), h, w)  # noqa: B023
        for mine, theirs, want in zip(ours, torchs, exact, strict=True):
            assert (mine - want).norm() <= (theirs - want).norm()


def test_types() -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 3
    mixed = linear_cross_entropy(hidden, weight.float(), targets, bias=bias.float())
    assert_close(mixed, F.cross_entropy(F.linear(hidden.float(), weight.float(), bias.float()), targets))


def test_autocast_multiplies_in_its_type() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
        torchs = F.cross_entropy(F.linear(hidden, weight), targets)
    assert ours.dtype == torch.float32
    assert_close(ours, torchs.float(), rtol=1e-3)
    assert ours != linear_cross_entropy(hidden, weight, targets)
    for grad, want in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(torchs, (hidden, weight)), strict=True
    ):
        assert grad.dtype == torch.float32
        assert_close(grad, want, rtol=2e-2)


def test_nan_in_ignored_rows_changes_nothing() -> None:
    hidden, weight, _, targets = inputs()
    spoilt = hidden.detach().clone()
    spoilt[targets == -100] = float("nan")
    spoilt.requires_grad_()
    loss, other = (linear_cross_entropy(h, weight, targets) for h in (hidden, spoilt))
    assert torch.equal(loss, other)
    (grad,), (other_grad,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(other, spoilt)
    assert torch.equal(grad, other_grad)


def test_targets_of_any_integer_type() -> None:
    hidden, weight, _, targets = inputs()
    assert torch.equal(
        linear_cross_entropy(hidden, weight, targets.int()), linear_cross_entropy(hidden, weight, targets)
    )


def test_another_ignore_index() -> None:
    hidden, weight, _, targets = inputs()
    renamed = targets.masked_fill(targets == -100, -1)
    assert torch.equal(
        linear_cross_entropy(hidden, weight, renamed, ignore_index=-1), linear_cross_entropy(hidden, weight, targets)
    )


def test_without_any_target() -> None:
    hidden, weight, bias, _ = inputs()
    nothing = torch.full((N,), -100)
    with pytest.raises(ValueError, match=r"all 23 are ignored \(labels all -100\)"):
        linear_cross_entropy(hidden, weight, nothing)
    loss = linear_cross_entropy(hidden, weight, nothing, bias=bias, reduction="sum")
    assert loss == 0
    for grad in torch.autograd.grad(loss, (hidden, weight, bias)):
        assert not grad.any()
    assert linear_cross_entropy(hidden, weight, nothing, reduction="none").tolist() == [0] * N


def test_bad_input_is_named() -> None:
    hidden, weight, bias, targets = inputs()
    high = targets.clone()
    high[5] = V
    with pytest.raises(ValueError, match=r"targets must be in 0 \.\.\. 28 or ignore_index=-100; target 5 is 29"):
        linear_cross_entropy(hidden, weight, high)
    high[5] = -1
    with pytest.raises(ValueError, match="target 5 is -1"):
        linear_cross_entropy(hidden, weight, high)
    with pytest.raises(TypeError, match=r"targets must be integers; got torch\.float64"):
        linear_cross_entropy(hidden, weight, targets.double())
    with pytest.raises(
        ValueError, match=r"expected hidden \[N, E\] and weight \[V, E\]; got \(23, 11\) and \(11, 29\)"
    ):
        linear_cross_entropy(hidden, weight.T, targets)
    with pytest.raises(ValueError, match=r"expected targets \[23\], one for each row of hidden; got \(22,\)"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match=r"expected bias \[29\]; got \(28,\)"):
        linear_cross_entropy(hidden, weight, targets, bias=bias[1:])
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(hidden, weight, targets, reduction="max")
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 1; got 1\.5"):
        linear_cross_entropy(hidden, weight, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match="z_loss must be a finite number, 0 or more; got -1"):
        linear_cross_entropy(hidden, weight, targets, z_loss=-1)
    with pytest.raises(ValueError, match="softcap must be finite and larger than 0, or None; got 0"):
        linear_cross_entropy(hidden, weight, targets, softcap=0)
    for softcap in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="softcap must be finite and larger than 0, or None"):
            linear_cross_entropy(hidden, weight, targets, softcap=softcap)
    for scale in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="logit_scale must be a finite number other than 0"):
            linear_cross_entropy(hidden, weight, targets, logit_scale=scale)
    with pytest.raises(ValueError, match="chunk_rows must be 1 or more; got 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_rows=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factor", [1.0, -0.7])
def test_a_second_backward_pass_gives_the_same_gradients(reduction: str, factor: float) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = (hidden, weight, bias)
    plain = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction=reduction).sum()
    expected = torch.autograd.grad(factor * plain, leaves)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=2, reduction=reduction).sum() * factor
    for _ in range(3):
        got = torch.autograd.grad(loss, leaves, retain_graph=True)
        for gradient, wanted in zip(got, expected, strict=True):
            assert_close(gradient, wanted, rtol=1e-9)
            gradient.fill_(7)  # it is the caller's: the next one does not come from it


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head_tied_to_the_embedding_has_each_gradient_once(reduction: str) -> None:
    """The hidden states come from the weight: what reaches it through them is not the head's gradient as well."""
    _, weight, bias, targets = inputs()
    ids = torch.arange(N) % V
    results = []
    for loss in (linear_cross_entropy, lambda h, w, t, **knobs: F.cross_entropy(F.linear(h, w, bias), t, **knobs)):
        knobs = {"bias": bias} if loss is linear_cross_entropy else {}
        value = loss(torch.tanh(weight[ids]), weight, targets, reduction=reduction, **knobs).sum()
        first = torch.autograd.grad(value, weight, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(3).sum(), weight, retain_graph=True)[0]
        results.append([first, second, torch.autograd.grad(value, weight)[0]])
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("ignored", [-100, 200])
def test_targets_in_a_narrow_type_do_not_wrap_around(ignored: int) -> None:
    """In uint8, -100 is 156, and in int8 a vocabulary of 256 is 0."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(rows, E, generator=generator, dtype=torch.float64) for rows in (5, 256))
    for targets in (torch.tensor([156, 3, 200, 255, 0], dtype=torch.uint8), torch.tensor([1, 3, 127, 5, 0]).char()):
        ours = linear_cross_entropy(hidden, weight, targets, ignore_index=ignored, reduction="none")
        expected = F.cross_entropy(hidden @ weight.T, targets.long(), ignore_index=ignored, reduction="none")
        assert_close(ours, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sum_bytes", [0, 2**30])
def test_a_loss_scaler_keeps_small_float16_gradients(
    reduction: str, sum_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the scale they are below what float16 holds, as they are where a model is already sure."""
    monkeypatch.setattr(head_passes, "SUM_BYTES", {"cpu": sum_bytes})
    generator = torch.Generator().manual_seed(0)
    rows = 1021
    targets = torch.randint(53, (rows,), generator=generator)
    hidden = (torch.randn(rows, 59, generator=generator) / 64).half()
    weight = torch.randn(53, 59, generator=generator).half()
    bias = torch.zeros(53)
    hidden += torch.linalg.pinv(weight.float())[:, targets].T.half() * 12  # the target's logit is 12, the others' 0
    scale = 2.0**14 if reduction == "mean" else 2.0**14 / rows

    def gradients(loss: Tensor, leaves: list[Tensor], factor: float) -> list[Tensor]:
        return [grad.double() / factor for grad in torch.autograd.grad(loss.sum() * factor, leaves)]

    half = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    ours = linear_cross_entropy(*half, targets, bias=bias, reduction=reduction, chunk_rows=101)
    wanted = gradients(F.cross_entropy(exact[0] @ exact[1].T, targets, reduction=reduction), exact, 1.0)
    for got, want in zip(gradients(ours, half, scale), wanted, strict=True):
        assert (got - want).norm() < 5e-3 * want.norm()


@pytest.mark.parametrize("sum_bytes", [0, 2**30])
def test_a_float16_head_takes_a_large_sum(sum_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum's own gradient is beyond float16; times 1 / N, as it comes from outside, it is not."""
    monkeypatch.setattr(head_passes, "SUM_BYTES", {"cpu": sum_bytes})
    rows = 4001
    hidden = torch.full((rows, 2), 40.0).half()
    weight = torch.zeros(3, 2).half().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.zeros(rows).long(), reduction="sum", chunk_rows=512)
    (grad,) = torch.autograd.grad(loss / rows, weight)
    assert_close(grad.double(), torch.tensor([[-2.0], [1.0], [1.0]]).double().expand(3, 2) * 40 / 3, rtol=1e-3)


@pytest.mark.parametrize("sum_bytes", [0, 2**30])
def test_a_float16_head_takes_large_factors_of_rows(sum_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss scaler's 4096 on every row is within float16, and must not be made larger on the way."""
    monkeypatch.setattr(head_passes, "SUM_BYTES", {"cpu": sum_bytes})
    hidden, weight, _, targets = inputs(torch.float16)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none", chunk_rows=5)
    grads = torch.autograd.grad((loss * 4096).sum(), (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum"), exact)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad.double() / 4096, want, rtol=5e-3)
