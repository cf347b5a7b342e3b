from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.divergence import kl_divergence, linear_kl_divergence
from llmtune.testing.close import assert_close

N, E, E2, V = 19, 7, 5, 23


def heads() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((N, E), (V, E), (V,), (N, E2), (V, E2), (V,))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)


def plain(student: Tensor, teacher: Tensor, temperature: float, direction: str) -> Tensor:
    s, t = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    p, q = (t, s) if direction == "forward" else (s, t)
    return temperature**2 * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_equals_the_plain_formula(direction: str, reduction: str) -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = heads()
    mask = torch.arange(N) % 3 != 0
    factors = torch.linspace(1, 2, N, dtype=torch.float64) if reduction == "none" else torch.tensor(0.3)
    ours = linear_kl_divergence(
        hidden, weight, teacher_hidden, teacher_weight, temperature=1.7, direction=direction, mask=mask, bias=bias,
        teacher_bias=teacher_bias, softcap=2.5, logit_scale=0.6, reduction=reduction, chunk_rows=5,
    )  # fmt: skip

    def capped(x: Tensor) -> Tensor:
        return 2.5 * torch.tanh(0.6 * x / 2.5)

    rows = plain(
        capped(F.linear(hidden, weight, bias)),
        capped(F.linear(teacher_hidden, teacher_weight, teacher_bias)),
        1.7,
        direction,
    )
    rows = torch.where(mask, rows, 0.0)
    expected = {"mean": rows.sum() / mask.sum(), "sum": rows.sum(), "none": rows}[reduction]
    assert_close(ours, expected)
    grads = torch.autograd.grad((ours * factors).sum(), (hidden, weight, bias))
    wanted = torch.autograd.grad((expected * factors).sum(), (hidden, weight, bias))
    for name, grad, want in zip(("hidden", "weight", "bias"), grads, wanted, strict=True):
        assert_close(grad, want, what=name)


def test_the_teacher_gets_no_gradient_from_the_linear_form() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _ = heads()
    linear_kl_divergence(hidden, weight, teacher_hidden, teacher_weight).backward()
    assert hidden.grad is not None
    assert teacher_hidden.grad is None
    assert teacher_weight.grad is None


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_zero_with_zero_gradient_at_equality(direction: str) -> None:
    hidden, weight, *_ = heads()
    loss = linear_kl_divergence(hidden, weight, hidden, weight, temperature=3.0, direction=direction)
    assert abs(loss.item()) < 1e-14
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.abs().max() < 1e-14


def test_second_derivatives_are_right() -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight, _ = heads()
    args = (hidden[:3].detach().requires_grad_(), weight, bias)
    assert torch.autograd.gradgradcheck(
        lambda h, w, b: linear_kl_divergence(h, w, teacher_hidden[:3], teacher_weight, bias=b, chunk_rows=2), args
    )


def test_forward_agrees_with_torch_and_temperature_keeps_the_gradients_size() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    ours = kl_divergence(student, teacher)
    assert_close(
        ours, F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum") / 15
    )
    student.requires_grad_()
    sizes = []
    for temperature in (50.0, 100.0):
        (grad,) = torch.autograd.grad(kl_divergence(student, teacher, temperature=temperature), student)
        sizes.append(grad.norm().item())
    assert abs(sizes[0] / sizes[1] - 1) < 0.05


def test_masked_rows_change_nothing_even_by_nan() -> None:
    student, teacher = torch.randn(2, 4, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[True, False, True]] * 4)
    spoilt = student.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    rows = plain(student, teacher, 1.0, "forward")
    loss = kl_divergence(spoilt, teacher, mask=mask)
    assert_close(loss, rows[mask].mean())
    (grad,) = torch.autograd.grad(loss, spoilt)
    assert not grad[~mask].any()
    per_row = kl_divergence(student, teacher, mask=mask, reduction="none")
    assert per_row.shape == (4, 3)
    assert_close(per_row, torch.where(mask, rows, 0.0))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_logit_of_minus_infinity_in_both_is_no_term(direction: str) -> None:
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = [
        torch.cat([x, torch.full((5, 1), -torch.inf, dtype=x.dtype)], 1).requires_grad_() for x in (student, teacher)
    ]
    loss = kl_divergence(*wide, direction=direction)
    assert_close(loss, plain(student, teacher, 1.0, direction).mean())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, wide))


def test_bfloat16_is_computed_in_float32() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _ = (x.detach().bfloat16() for x in heads())
    hidden.requires_grad_()
    loss = linear_kl_divergence(hidden, weight, teacher_hidden, teacher_weight)
    assert loss.dtype == torch.float32
    want = plain((hidden @ weight.T).double(), (teacher_hidden @ teacher_weight.T).double(), 1.0, "forward").mean()
    assert_close(loss, want, rtol=1e-5)


def test_bad_input_is_named() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _ = heads()
    with pytest.raises(ValueError, match=r"one shape \[\.\.\., V\]; got \[19, 7\] and \[23, 7\]"):
        kl_divergence(hidden, weight)
    with pytest.raises(ValueError, match="temperature must be a finite number larger than 0; got 0"):
        kl_divergence(hidden, hidden, temperature=0)
    with pytest.raises(ValueError, match='"forward", "reverse", "symmetric", "jensen-shannon"; got \'backward\''):
        kl_divergence(hidden, hidden, direction="backward")
    with pytest.raises(ValueError, match="reduction must be"):
        kl_divergence(hidden, hidden, reduction="batchmean")
    with pytest.raises(ValueError, match=r"mask must be booleans \[19\], one a row; got torch.int64 \[19\]"):
        kl_divergence(hidden, hidden, mask=torch.ones(N, dtype=torch.long))
    with pytest.raises(ValueError, match="the mask leaves none of 19"):
        kl_divergence(hidden, hidden, mask=torch.zeros(N, dtype=torch.bool))
    with pytest.raises(ValueError, match="the same rows and the same vocabulary"):
        linear_kl_divergence(hidden, weight, teacher_hidden, teacher_weight[1:])
    with pytest.raises(ValueError, match=r"expected hidden \[N, E\] and weight \[V, E\]"):
        linear_kl_divergence(hidden, weight, teacher_hidden, weight)
