"""Sharpness-aware minimization: the closed form on a quadratic, every bit back, and one step whatever is around it."""

import copy
import math

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, adapter_parameters, attach
from llmtune.errors import NonFiniteError
from llmtune.optim import SAM, perturbed
from llmtune.testing.models import tiny_llama

RHO, ETA = 0.3, 0.02


class Bowl(nn.Module):
    """1/2 w^T H w over a matrix and a vector, with a frozen vector beside them."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        half = torch.randn(11, 11, dtype=torch.float64, generator=draw)
        self.curvature = (half @ half.T / 11).to(dtype)
        start = torch.randn(11, dtype=torch.float64, generator=draw).to(dtype)
        self.matrix, self.vector = nn.Parameter(start[:6].view(2, 3).clone()), nn.Parameter(start[6:].clone())
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def flat(self):
        return torch.cat([self.matrix.flatten(), self.vector])

    def forward(self):
        w = self.flat()
        return w @ self.curvature.to(w.dtype) @ w / 2


def started(dtype=torch.float64):
    model = Bowl(dtype)
    model().backward()
    return model, model.flat().detach().clone()


def uphill(model, w, *, adaptive=False):
    g = model.curvature @ w
    stretch = w.abs() + ETA if adaptive else torch.ones_like(w)
    return w + RHO * stretch**2 * g / (stretch * g).norm(), (stretch * g).norm()


def bits(model):
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}


def same_bits(model, before):
    return all(torch.equal(value, before[name]) for name, value in bits(model).items())


@pytest.mark.parametrize("adaptive", [False, True])
def test_moves_along_the_gradient_of_all_parameters_together(adaptive):
    model, w = started()
    wanted, norm = uphill(model, w, adaptive=adaptive)
    with perturbed(model, RHO, adaptive=adaptive, **({"eta": ETA} if adaptive else {})) as found:
        torch.testing.assert_close(model.flat().detach(), wanted, rtol=1e-12, atol=1e-14)
        assert found == pytest.approx(float(norm), rel=1e-12)
        if not adaptive:
            assert float((model.flat().detach() - w).norm()) == pytest.approx(RHO, rel=1e-12)
        assert torch.equal(model.frozen, torch.ones(3, dtype=torch.float64))
    assert torch.equal(model.flat(), w)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_applies_the_gradient_from_uphill_where_the_weights_were(adaptive):
    model, w = started()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO, adaptive, **({"eta": ETA} if adaptive else {}))

    def closure():
        loss = model()
        loss.backward()
        return loss

    for _ in range(3):
        found = optimizer.step(closure)
        assert float(found.detach()) == pytest.approx(float(w @ model.curvature @ w / 2), rel=1e-12)
        w = w - 0.1 * model.curvature @ uphill(model, w, adaptive=adaptive)[0]
        torch.testing.assert_close(model.flat().detach(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_every_weight_comes_back_bit_for_bit_and_gradients_stay(dtype, fails):
    model, _ = started(dtype)
    with torch.no_grad():
        model.vector[0] = -0.0
    before, places = bits(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    try:
        with perturbed(model, 0.7):
            assert not same_bits(model, before)
            assert all(torch.equal(p.grad, given[name]) for name, p in model.named_parameters() if name in given)
            model.zero_grad()  # as the second pass does
            if fails:
                raise RuntimeError("seeded")
            model.matrix.sum().backward()  # and it need not reach everything that moved
    except RuntimeError:
        assert fails
    assert same_bits(model, before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert model.vector.grad is None
    assert (model.matrix.grad is None) == fails


@pytest.mark.parametrize("spoil", [0.0, math.inf, math.nan])
def test_a_gradient_without_a_direction_moves_nothing(spoil):
    model, _ = started()
    model.matrix.grad.zero_()
    model.vector.grad.zero_()
    model.vector.grad[1] = spoil
    before = bits(model)
    with perturbed(model, RHO) as norm:
        assert same_bits(model, before)
        assert math.isnan(norm) if math.isnan(spoil) else norm == spoil
    assert same_bits(model, before)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_scaled_gradient_moves_as_far(adaptive):
    found = []
    for scale in (1.0, 65536.0):
        model, _ = started()
        for p in (model.matrix, model.vector):
            p.grad *= scale
        with perturbed(model, RHO, adaptive=adaptive):
            found.append(model.flat().detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-14, atol=1e-15)


def test_the_norm_is_taken_in_float32_where_the_gradient_has_less():
    p = nn.Linear(257, 1, bias=False)
    model = p.to(torch.float16)
    model.weight.grad = torch.full_like(
        model.weight, 200.0
    )  # its square is no float16, nor is the sum in bfloat16 exact
    with perturbed(model, 1.0) as norm:
        assert norm == pytest.approx(200 * math.sqrt(257), rel=1e-6)


def test_two_passes_draw_the_same_masks_and_the_random_state_goes_on_as_after_one():
    model, masks = nn.Sequential(nn.Linear(7, 13), nn.Dropout(0.5), nn.Linear(13, 1)), []
    model[1].register_forward_hook(lambda module, given, made: masks.append(made == 0))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(5, 7)

    def closure():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    torch.manual_seed(3)
    closure()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(masks[1], masks[2])
    optimizer.step(closure)
    assert not torch.equal(masks[3], masks[2])


def test_accumulation_in_the_closure_gives_the_step_of_the_whole():
    x, y = torch.randn(2, 11, 3, dtype=torch.float64)
    ends = []
    for cut in ([11], [2, 5, 4]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = SAM(torch.optim.Adam(model.parameters(), lr=0.1), 0.5)

        def closure(model=model, cut=cut):
            total = 0.0
            for a, b in zip(x.split(cut), y.split(cut), strict=True):
                loss = (model(a) - b).square().sum() / 33
                loss.backward()
                total += float(loss.detach())
            return total

        for _ in range(3):
            optimizer.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


def test_clipping_sees_the_second_gradient_once_a_step():
    model, w = started()
    seen = []

    def clip():
        seen.append(nn.utils.clip_grad_norm_([model.matrix, model.vector], 0.25))

    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO, before_step=clip)
    optimizer.step(lambda: model().backward())
    wanted = model.curvature @ uphill(model, w)[0]
    assert float(seen[0]) == pytest.approx(float(wanted.norm()), rel=1e-12)
    assert len(seen) == 1
    torch.testing.assert_close(model.flat().detach(), w - 0.1 * 0.25 * wanted / wanted.norm(), rtol=1e-5, atol=0)


def with_scaler(model, scaler, seen, spoil=()):
    inner = torch.optim.SGD([model.matrix, model.vector], lr=0.1)
    optimizer = SAM(inner, RHO, before_step=lambda: seen.append(model.vector.grad.clone()))
    for step in range(3):

        def closure(step=step):
            loss = model()
            (loss if scaler is None else scaler.scale(loss)).backward()
            if step in spoil:
                model.vector.grad[0] = math.inf
            return loss

        optimizer.step(closure, scaler=scaler)
        if scaler is not None:
            scaler.update()


def test_under_a_grad_scaler_steps_are_the_same_and_an_overflow_is_passed_over():
    plain, _ = started(torch.float32)
    scaled, _ = started(torch.float32)
    seen = [], []
    with_scaler(plain, None, seen[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with_scaler(scaled, scaler, seen[1])
    torch.testing.assert_close(plain.flat(), scaled.flat(), rtol=1e-6, atol=0)
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    over, _ = started(torch.float32)
    with_scaler(over, scaler := torch.amp.GradScaler("cpu", init_scale=1024.0), [], spoil=(0, 1, 2))
    assert torch.equal(over.flat(), started(torch.float32)[1])
    assert scaler.get_scale() == 128.0


def test_without_a_scaler_a_gradient_that_is_not_finite_changes_nothing():
    model, _ = started()
    before = bits(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(NonFiniteError, match="the norm of the gradient is nan; no weight has been changed"):
        optimizer.step(lambda: (model() * math.nan).backward())
    assert same_bits(model, before)


def test_the_state_is_the_optimizers_and_nothing_else():
    model, _ = started()
    optimizer = SAM(torch.optim.AdamW([model.matrix], lr=0.1, weight_decay=0.0))
    optimizer.add_param_group({"params": [model.vector], "lr": 0.2})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, 0.5)
    closure = lambda: model().backward()
    for _ in range(2):
        optimizer.step(closure)
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.05])
    state = copy.deepcopy(optimizer.state_dict())
    assert {name for entry in state["state"].values() for name in entry} == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state is optimizer.optimizer.state
    other, _ = started()
    with torch.no_grad():
        other.matrix.copy_(model.matrix)
        other.vector.copy_(model.vector)
    resumed = SAM(torch.optim.AdamW([{"params": [other.matrix]}, {"params": [other.vector]}], lr=9.0))
    resumed.load_state_dict(state)
    optimizer.step(closure)
    resumed.step(lambda: other().backward())
    assert torch.equal(model.flat(), other.flat())
    resumed.zero_grad()
    assert other.matrix.grad is None


def test_under_lora_a_and_b_move_and_the_base_does_not():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=6, targets=["q_proj"]))
    adapted = adapter_parameters(model)
    with torch.no_grad():
        for name, p in adapted.items():
            if name.endswith("lora_b"):
                p.add_(0.1)
    model(input_ids=torch.tensor([[5, 7, 11]])).logits.square().mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    squares = 0.0
    with perturbed(model, RHO):
        for name, p in model.named_parameters():
            moved = p.detach() - before[name]
            assert bool(moved.any()) == (name.endswith(("lora_a", "lora_b"))), name
            squares += float(moved.double().square().sum())
    assert math.sqrt(squares) == pytest.approx(RHO, rel=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_uphill_changes_nothing():
    """At w the gradient is finite: uphill is where a loss explodes first."""
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer, factors = SAM(torch.optim.SGD([weight], lr=0.1), RHO), iter([1.0, math.nan])

    def closure():
        loss = next(factors) * weight.sum()
        loss.backward()
        return loss

    with pytest.raises(NonFiniteError, match="the norm of the gradient uphill is nan; no weight has been changed by"):
        optimizer.step(closure)
    assert weight.tolist() == [3.0, -2.0]


@pytest.mark.parametrize("rho", [0, -1.0, math.inf, math.nan, True, "a"])
def test_refuses_a_rho_that_moves_nothing_or_anywhere(rho):
    model, _ = started()
    with pytest.raises(ValueError, match=f"rho must be a number above 0; got {rho!r}"), perturbed(model, rho):
        pass
    with pytest.raises(ValueError, match=f"rho must be a number above 0; got {rho!r}"):
        SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho)


def test_other_refusals():
    model, _ = started()
    with pytest.raises(ValueError, match="eta must be a number of at least 0; got -1"), perturbed(model, 1, eta=-1):
        pass
    with pytest.raises(ValueError, match=r"eta=0.5 has no effect without adaptive=True"), perturbed(model, 1, eta=0.5):
        pass
    with pytest.raises(ValueError, match=r"eta=0.5 has no effect without adaptive=True: it is ASAM's"):
        SAM(torch.optim.SGD(model.parameters(), lr=0.1), eta=0.5)
    model.zero_grad()
    with pytest.raises(ValueError, match="no trainable parameter has a gradient to move along"), perturbed(model, 1.0):
        pass
    with pytest.raises(TypeError, match="a model, that is a torch module, is expected"), perturbed([1], 1.0):
        pass
    with pytest.raises(TypeError, match="SAM takes a torch optimizer that has been made; got <class"):
        SAM(torch.optim.SGD)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"call step\(closure\) with a function"):
        optimizer.step(None)
    with pytest.raises(ValueError, match="no trainable parameter has a gradient to move along"):
        optimizer.step(lambda: None)
