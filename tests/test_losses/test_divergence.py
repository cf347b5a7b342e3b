from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.losses.divergence import Divergence, kl_divergence, linear_kl_divergence
from llmtune.testing.close import assert_close

N, E, E2, V = 19, 7, 5, 23
DIRECTIONS = ["forward", "reverse", "symmetric", "jensen-shannon"]


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


def heads() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((N, E), (V, E), (V,), (N, E2), (V, E2), (V,))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def plain(student: Tensor, teacher: Tensor, temperature: float, direction: str) -> Tensor:
    s, t = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    m = (s + t) / 2
    values = {
        "forward": kl(t, s),
        "reverse": kl(s, t),
        "symmetric": (kl(t, s) + kl(s, t)) / 2,
        "jensen-shannon": (kl(t, m) + kl(s, m)) / 2,
    }
    return temperature**2 * values[direction]


def logits(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher.requires_grad_()


@pytest.mark.parametrize("direction", DIRECTIONS)
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
    loss = linear_kl_divergence(hidden, weight, teacher_hidden, teacher_weight)
    torch.autograd.grad(loss, hidden, create_graph=True)[0].sum().backward()  # nor from the second derivative
    assert teacher_hidden.grad is None
    assert teacher_weight.grad is None


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "head"])
def test_a_frozen_head_or_a_frozen_body(trained: str, with_bias: bool) -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight, _ = heads()
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "head")
    bias.requires_grad_(trained == "head")
    bias = bias if with_bias else None
    asked = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    loss = linear_kl_divergence(
        hidden, weight, teacher_hidden, teacher_weight, bias=bias, direction="symmetric", chunk_rows=5
    )
    wanted = plain(F.linear(hidden, weight, bias), teacher_hidden @ teacher_weight.T, 1.0, "symmetric").mean()
    found, expected = (torch.autograd.grad(x, asked, retain_graph=True) for x in (loss, wanted))
    for grad, want in zip(found, expected, strict=True):
        assert_close(grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_exactly_zero_with_a_gradient_of_exactly_zero_at_equality(direction: str, dtype: torch.dtype) -> None:
    student, _ = (x.detach().to(dtype) for x in logits(3, 5, 211))
    student.requires_grad_()
    teacher = student.detach().clone().requires_grad_()
    loss = kl_divergence(student, teacher, temperature=3.0, direction=direction)
    assert loss == 0
    for create_graph in (True, False):
        for grad in torch.autograd.grad(loss, (student, teacher), create_graph=create_graph):
            assert not grad.any()
    hidden, weight, bias, *_ = (x.detach().to(dtype).requires_grad_() for x in heads())
    loss = linear_kl_divergence(
        hidden, weight, hidden, weight, bias=bias, teacher_bias=bias, temperature=3.0, softcap=2.5, logit_scale=0.6,
        direction=direction, chunk_rows=5,
    )  # fmt: skip
    assert loss == 0
    for grad in torch.autograd.grad(loss, (hidden, weight, bias)):
        assert not grad.any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rows", "width", "classes"), [(199, 577, 1511), (67, 131, 4999)])
def test_equal_heads_of_real_sizes_are_exactly_equal(direction: str, rows: int, width: int, classes: int) -> None:
    """Both sides' logits come from one way of multiplying: another one differs in the last bits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).requires_grad_()
    loss = linear_kl_divergence(hidden, weight, hidden, weight, direction=direction)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_a_bias_of_a_wider_type_is_rounded_on_neither_side() -> None:
    hidden, weight, _, *_ = (x.detach().bfloat16() for x in heads())
    bias = torch.linspace(-1, 1, V) / 3
    hidden.requires_grad_()
    loss = linear_kl_divergence(hidden, weight, hidden, weight, bias=bias, teacher_bias=bias)
    assert loss == 0
    assert not torch.autograd.grad(loss, hidden, create_graph=True)[0].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_never_below_zero_however_near(direction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(499, 211, generator=generator)
    for size in (1e-7, 1e-5, 1e-3):
        teacher = student + size * torch.randn(student.shape, generator=generator)
        assert (kl_divergence(student, teacher, direction=direction, reduction="none") >= 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_hessian_at_equality_is_the_fisher_information(direction: str) -> None:
    """That of KL is diag(p) - p p^T in the logits, either way round; the Jensen-Shannon's is a quarter of it."""
    z = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda s: kl_divergence(s, z, direction=direction), z)
    p = z.softmax(-1)
    assert_close(hessian, (torch.diag(p) - p[:, None] * p) * (0.25 if direction == "jensen-shannon" else 1.0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_second_derivatives_are_right(direction: str) -> None:
    student, teacher = logits(3, 5)
    assert torch.autograd.gradgradcheck(
        lambda s, t: kl_divergence(s, t, temperature=1.3, direction=direction), (student, teacher)
    )
    hidden, weight, bias, teacher_hidden, teacher_weight, _ = heads()

    def linear(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kl_divergence(
            h, w, teacher_hidden[:3], teacher_weight, bias=b, softcap=2.5, direction=direction, chunk_rows=2
        )

    assert torch.autograd.gradgradcheck(linear, (hidden[:3].detach().requires_grad_(), weight, bias))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_both_sides_get_their_gradient(direction: str) -> None:
    student, teacher = logits(3, 5)
    assert torch.autograd.gradcheck(
        lambda s, t: kl_divergence(s, t, temperature=0.7, direction=direction), (student, teacher)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_works_under_torch_func(direction: str) -> None:
    student, teacher = (x.detach() for x in logits(3, 5))
    one = torch.func.grad(lambda s, t: kl_divergence(s, t, direction=direction))
    found = torch.func.vmap(one)(student, teacher)
    assert_close(found, torch.stack([one(s, t) for s, t in zip(student, teacher, strict=True)]))


def test_symmetric_ones_are_and_jensen_shannon_is_bounded() -> None:
    student, teacher = (30 * x.detach() for x in logits(101, 7))
    for direction in ("symmetric", "jensen-shannon"):
        assert_close(
            kl_divergence(student, teacher, direction=direction), kl_divergence(teacher, student, direction=direction)
        )
    rows = kl_divergence(student, teacher, direction="jensen-shannon", reduction="none")
    assert rows.max() <= math.log(2) + 1e-15
    far = kl_divergence(torch.tensor([0.0, 1000.0]), torch.tensor([1000.0, 0.0]), direction="jensen-shannon")
    assert_close(far, torch.tensor(math.log(2)))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_linear_form_never_holds_all_logits(direction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(
        2, 101, 7, generator=generator, dtype=torch.float64
    )  # not multiplied in pieces
    weight, teacher_weight = torch.randn(2, 499, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(101) >= 101 - 47
    with Recorder() as seen:
        linear_kl_divergence(
            hidden.requires_grad_(), weight, teacher_hidden, teacher_weight, mask=mask, direction=direction,
            chunk_rows=13,
        ).backward()  # fmt: skip
    assert seen.largest <= 499 * 13
    forward = [rows for rows, columns in seen.products if columns == 499]
    assert forward == [13] * 6 + [8] * 2  # 47 rows, each multiplied by either head once


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_it_holds_as_many_buffers_as_it_says(direction: str, softcap: float | None) -> None:
    n, wide = 13, 4999
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, wide, generator=generator)
    teacher = torch.randn(n, 7, generator=generator), torch.randn(wide, 7, generator=generator), None
    loss = Divergence(1.5, direction, softcap, 0.7)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.in_place(z, slice(0, n), teacher, True)
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    assert loss.buffers - 1 < 1 + max(held) / (n * wide * 4) <= loss.buffers + 0.1


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


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_logit_of_minus_infinity_in_both_is_no_term(direction: str) -> None:
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = [
        torch.cat([x, torch.full((5, 1), -torch.inf, dtype=x.dtype)], 1).requires_grad_() for x in (student, teacher)
    ]
    loss = kl_divergence(*wide, direction=direction)
    assert_close(loss, plain(student, teacher, 1.0, direction).mean())
    grads = torch.autograd.grad(loss, wide, create_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    second = torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), wide)
    assert all(grad.isfinite().all() for grad in second)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_logit_of_minus_infinity_on_one_side_gives_no_nan(direction: str, side: str) -> None:
    student, teacher = (x.detach() for x in logits(5, 7))
    (student if side == "student" else teacher)[1, 2] = -torch.inf
    student.requires_grad_()
    rows = kl_divergence(student, teacher, direction=direction, reduction="none")
    infinite = {
        "forward": side == "student",
        "reverse": side == "teacher",
        "symmetric": True,
        "jensen-shannon": False,
    }[direction]
    assert (rows[1] == torch.inf) == infinite
    assert rows[torch.arange(5) != 1].isfinite().all()
    (grad,) = torch.autograd.grad(rows.sum(), student)
    assert grad.isfinite().all()
    eye = torch.eye(7, dtype=torch.float64)
    fixed = torch.zeros(7, dtype=torch.float64)
    bias = fixed.masked_fill(torch.arange(7) == 2, -torch.inf)
    both = {"bias": fixed, "teacher_bias": fixed} | {"bias" if side == "student" else "teacher_bias": bias}
    clean, other = logits(5, 7)
    loss = linear_kl_divergence(clean, eye, other, eye, direction=direction, chunk_rows=2, **both)
    assert not loss.isnan()
    assert torch.autograd.grad(loss, clean)[0].isfinite().all()


def test_jensen_shannon_with_an_infinite_logit_on_one_side() -> None:
    """p = (1/2, 1/2), q = (1, 0): m = (3/4, 1/4)."""
    student, teacher = torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0])
    want = (0.5 * math.log(2 / 3) + 0.5 * math.log(2) + math.log(4 / 3)) / 2
    assert abs(kl_divergence(student, teacher, direction="jensen-shannon").item() - want) < 1e-6


def test_other_formulas_that_are_called_kl() -> None:
    """torch's batchmean divides by the batch alone, torchtune's gives a cross-entropy, TRACE's swaps its arguments."""
    student, teacher = (x.detach() for x in logits(3, 5, 7))
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    rows = plain(student, teacher, 1.0, "forward")
    assert_close(kl_divergence(student, teacher, mask=mask), rows[mask].mean())
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    assert_close(F.kl_div(log_s, log_t, log_target=True, reduction="batchmean"), rows.sum() / 3)  # padding, per batch
    torchtune = -(log_t.exp() * log_s).sum(-1)[mask].mean()
    entropy = -(log_t.exp() * log_t).sum(-1)[mask].mean()
    assert_close(torchtune, kl_divergence(student, teacher, mask=mask) + entropy)  # not 0 where both agree
    swapped = F.kl_div(log_t, log_s.exp(), reduction="batchmean")  # TRACE's LwF: kl_div(log_softmax(old), softmax(new))
    assert_close(swapped, 5 * kl_divergence(student, teacher, direction="reverse"))


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
    for scale in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="logit_scale must be a finite number other than 0"):
            linear_kl_divergence(hidden, weight, hidden, weight, logit_scale=scale)
    with pytest.raises(ValueError, match="softcap must be finite and larger than 0, or None; got 0"):
        linear_kl_divergence(hidden, weight, hidden, weight, softcap=0)
