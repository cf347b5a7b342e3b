"""GaLore: its formula in float64, where it is AdamW, what a new basis does to the moments, and its state."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from llmtune.optim import GaLore
from llmtune.optim.galore import gradient_basis, rotate_moments
from llmtune.testing.loop import check_loop, uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training import LoopSettings, TrainingLoop
from llmtune.training.checkpoint_state import split_tensors
from llmtune.training.run_state import _optimizer_state

LR, EPS, DECAY = 0.05, 1e-8, 0.1


def gradients(steps, rows, columns, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]


def run(optimizer, weight, found):
    for gradient in found:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def reference(start, found, *, rank, every, scale, rotate):
    """The formula in numpy, always on the left: signs of singular vectors are numpy's own."""
    weight = start.numpy().copy()
    tall = weight.shape[0] > weight.shape[1]
    weight = weight.T if tall else weight
    basis = m = v = None
    for step, gradient in enumerate(found):
        g = gradient.numpy().T if tall else gradient.numpy()
        if step % every == 0:
            signs = (-1.0) ** (np.arange(rank) * (1 + step // every))  # any will do, and other ones each time
            new = np.linalg.svd(g, full_matrices=False)[0][:, :rank] * signs
            if basis is not None and rotate:
                c = new.T @ basis
                m, v = c @ m, c**2 @ v
            basis = new
        r = basis.T @ g
        m = 0.1 * r if m is None else 0.9 * m + 0.1 * r
        v = 0.001 * r**2 if v is None else 0.999 * v + 0.001 * r**2
        direction = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + EPS)
        weight = weight * (1 - LR * DECAY) - LR * scale * (basis @ direction)
    return torch.from_numpy(weight.T if tall else weight)


@pytest.mark.parametrize(("rows", "columns"), [(7, 11), (11, 7), (7, 7)])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_the_formula_whatever_signs_the_decomposition_takes(rows, columns, every):
    start, found = gradients(1, rows, columns)[0], gradients(10, rows, columns)
    weight = nn.Parameter(start.clone())
    optimizer = GaLore([weight], LR, rank=3, update_every=every, scale=0.3, weight_decay=DECAY)
    wanted = reference(start, found, rank=3, every=every, scale=0.3, rotate=True)
    torch.testing.assert_close(run(optimizer, weight, found), wanted, rtol=1e-9, atol=1e-9)
    assert optimizer.state[weight]["basis"].shape == (7, 3)
    assert optimizer.state[weight]["exp_avg"].shape == (3, max(rows, columns))


def test_moments_that_are_kept_depend_on_signs_nobody_chose():
    start, found = gradients(1, 7, 11)[0], gradients(10, 7, 11)
    options = {"rank": 3, "update_every": 2, "scale": 0.3, "weight_decay": DECAY}
    kept = run(GaLore([weight := nn.Parameter(start.clone())], LR, **options, rotate=False), weight, found)
    other = reference(start, found, rank=3, every=2, scale=0.3, rotate=False)  # the same, with other signs
    assert (kept - other).abs().max() > 0.01
    options["update_every"] = 100  # one basis only: nothing to keep or take along
    weight = nn.Parameter(start.clone())
    kept = run(GaLore([weight], LR, **options, rotate=False), weight, found)
    wanted = reference(start, found, rank=3, every=100, scale=0.3, rotate=False)
    torch.testing.assert_close(kept, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("every", [1, 2, 100])
def test_it_is_adamw_where_singular_vectors_are_axes(tall, every):
    """Adam is the same under signs and another order of rows; gradients of r orthogonal rows have such bases."""
    rows, columns, rank = 7, 11, 3
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    found = []
    for _ in range(9):  # the order of the rows' lengths changes from step to step
        gradient = torch.zeros(rows, columns, dtype=torch.float64)
        for row, direction in zip((1, 4, 5), directions, strict=False):
            gradient[row] = torch.randn((), generator=generator, dtype=torch.float64) * direction
        found.append(gradient.T.contiguous() if tall else gradient)
    start = torch.randn(found[0].shape, generator=generator, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"weight_decay": DECAY, "eps": EPS}
    got = run(GaLore([ours], LR, rank=rank, update_every=every, scale=1.0, **options), ours, found)
    wanted = run(torch.optim.AdamW([theirs], LR, **options), theirs, found)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [7, 100, None])
def test_what_is_not_projected_is_adamw_without_the_scale(rank):
    starts = [gradients(1, 7, 11)[0], gradients(1, 3, 2)[0].flatten(), gradients(1, 30, 2)[0].view(3, 4, 5)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    options = {"lr": LR, "weight_decay": DECAY, "betas": (0.8, 0.95), "eps": 1e-6}
    one, other = GaLore(ours, rank=rank, scale=0.25, **options), torch.optim.AdamW(theirs, **options)
    for step in range(5):
        for mine, his, start in zip(ours, theirs, starts, strict=True):
            mine.grad = start * (step - 1.5)
            his.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-12, atol=1e-12)


def test_with_a_large_eps_it_is_the_projected_gradient():
    """M / eps is linear, so P P^T comes out; and a gradient of rank 2 is its own projection at rank 2."""
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (7, 11))
    weight = nn.Parameter(torch.zeros(7, 11, dtype=torch.float64))
    optimizer = GaLore([weight], 1e9, rank=2, scale=1.0, eps=1e9)
    torch.testing.assert_close(run(optimizer, weight, [left @ right.T]), -left @ right.T, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        weight.zero_()
    full = gradients(1, 7, 11)[0]
    basis = optimizer.state[weight]["basis"]
    optimizer.state[weight]["exp_avg"].zero_()
    got = run(optimizer, weight, [full])
    torch.testing.assert_close(got, -basis @ basis.T @ full * 0.1 / (1 - 0.9**2), rtol=1e-6, atol=1e-6)


def test_rotation_is_exact_for_signs_and_orders():
    old = torch.linalg.qr(gradients(1, 7, 3)[0])[0]
    order, signs = torch.tensor([2, 0, 1]), torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    first, second = gradients(2, 3, 11)
    moved_first, moved_second = rotate_moments(first, second**2, old, old[:, order] * signs)
    torch.testing.assert_close(moved_first, first[order] * signs[:, None])
    torch.testing.assert_close(moved_second, second[order] ** 2)


def test_the_basis_is_orthonormal_float32_and_on_the_shorter_side():
    for rows, columns in ((7, 11), (11, 7)):
        basis = gradient_basis(gradients(1, rows, columns, dtype=torch.bfloat16)[0], 3)
        assert (basis.dtype, basis.shape) == (torch.float32, (7, 3))
        torch.testing.assert_close(basis.T @ basis, torch.eye(3), rtol=0, atol=1e-6)


def test_moments_are_float32_under_bfloat16_and_the_weight_is_rounded_once():
    start, found = gradients(1, 7, 11)[0].to(torch.bfloat16), gradients(1, 7, 11, dtype=torch.bfloat16)
    weight = nn.Parameter(start.clone())
    optimizer = GaLore([weight], LR, rank=3, scale=0.3, weight_decay=DECAY)
    got = run(optimizer, weight, found)
    wide = [gradient.double() for gradient in found]
    wanted = reference(start.double(), wide, rank=3, every=9, scale=0.3, rotate=True)
    assert torch.equal(got, wanted.to(torch.bfloat16))
    assert {optimizer.state[weight][name].dtype for name in ("basis", "exp_avg", "exp_avg_sq")} == {torch.float32}


def test_a_gradient_of_zeros_gives_no_basis():
    weight = nn.Parameter(torch.ones(7, 11))
    optimizer = GaLore([weight], LR, rank=3, weight_decay=DECAY, update_every=2)
    run(optimizer, weight, [torch.zeros(7, 11)])
    torch.testing.assert_close(weight.detach(), torch.full((7, 11), 1 - LR * DECAY))
    assert not optimizer.state[weight]
    run(optimizer, weight, gradients(2, 7, 11, dtype=torch.float32))
    basis = optimizer.state[weight]["basis"]
    run(optimizer, weight, [torch.zeros(7, 11)])  # a new one is due
    assert optimizer.state[weight]["basis"] is basis
    wanted = gradient_basis(gradients(1, 7, 11, dtype=torch.float32)[0], 3)
    assert torch.equal(basis, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_state_is_tensors_and_goes_on_bit_for_bit(tmp_path, dtype):
    found = gradients(7, 7, 11, dtype=dtype)

    def made():
        weight, vector = nn.Parameter(found[0].clone()), nn.Parameter(torch.ones(5, dtype=dtype))
        vector.grad = torch.arange(5).to(dtype)
        return weight, vector, GaLore([{"params": [weight]}, {"params": [vector], "rank": None}], LR, rank=3,
                                      update_every=2)  # fmt: skip

    weight, vector, straight = made()
    run(straight, weight, found)
    other, vector_2, cut = made()
    run(cut, other, found[:3])
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    values, tensors = split_tensors(_optimizer_state(cut))
    assert load(save(tensors)).keys() == tensors.keys()
    json.dumps(values)
    again, vector_3, resumed = made()
    with torch.no_grad():
        again.copy_(other)
        vector_3.copy_(vector_2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, again, found[3:])
    assert torch.equal(again, weight)
    assert torch.equal(vector_3, vector)
    for name, value in straight.state[weight].items():
        assert torch.equal(resumed.state[again][name], value)
        assert resumed.state[again][name].dtype == value.dtype


class GaLoreLoop(TrainingLoop):
    def configure_optimizer(self):
        optimizer = GaLore(self.model.parameters(), self.settings.learning_rate, rank=5, update_every=2)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def test_in_a_loop_it_keeps_the_loops_laws(tmp_path):
    def make(model, rows, size):
        run = LoopSettings(max_steps=4, rows_per_step=8, rows_per_micro_batch=size, learning_rate=0.01,
                           progress=False, folder=tmp_path)  # fmt: skip
        return GaLoreLoop(model, rows, settings=run)

    check_loop(make)


def test_it_trains():
    settings = LoopSettings(max_steps=30, rows_per_step=8, learning_rate=0.03, progress=False)
    losses = GaLoreLoop(tiny_llama(), uneven_rows(), settings=settings).fit().column("loss")
    assert losses[-1] < 0.5 * losses[0]


def test_a_closure_is_called_with_gradients_on():
    weight = nn.Parameter(torch.ones(7, 11))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert GaLore([weight], LR, rank=3).step(closure).item() == 77


def test_what_is_refused():
    weight = nn.Parameter(torch.ones(7, 11))
    for options, sentence in (
        ({"rank": 0}, "rank must be a whole number of at least 1, or None for plain AdamW; got 0"),
        ({"rank": 2, "update_every": 0}, "update_every must be a whole number of at least 1; got 0"),
        ({"rank": 2, "scale": 0.0}, "scale must be a number above 0; got 0.0"),
        ({"rank": 2, "lr": -1.0}, "lr must be a number of at least 0; got -1.0"),
        ({"rank": 2, "weight_decay": float("nan")}, "weight_decay must be a number of at least 0; got nan"),
        ({"rank": 2, "betas": (0.9, 1.0)}, r"betas must be two numbers, at least 0 and below 1; got \(0.9, 1.0\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            GaLore([weight], **options)
    with pytest.raises(ValueError, match="rank must be a whole number"):
        GaLore([{"params": [weight], "rank": 2.0}], rank=2)
    spread = copy.copy(weight)
    spread.device_mesh = "some"
    with pytest.raises(TypeError, match="GaLore needs whole gradients, and a parameter is spread over processes"):
        GaLore([spread], rank=2)
    optimizer = GaLore([weight], rank=2)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="a gradient is not finite, so it has no basis: look at the loss before"):
        run(optimizer, weight, [torch.full((7, 11), float("nan"))])
    assert torch.equal(weight, before)
    with pytest.raises(
        TypeError, match=r"GaLore trains real numbers; a parameter is torch.complex64: train it by AdamW"
    ):
        GaLore([weight, nn.Parameter(torch.ones(3, dtype=torch.complex64))], rank=2)


def test_a_gradient_that_is_not_finite_leaves_the_parameters_before_it_alone():
    weights = [nn.Parameter(torch.ones(7, 11)) for _ in range(2)]
    optimizer = GaLore(weights, rank=2, update_every=2)
    weights[0].grad, weights[1].grad = torch.randn(7, 11), torch.full((7, 11), float("inf"))
    with pytest.raises(ValueError, match="a gradient is not finite, so it has no basis"):
        optimizer.step()
    assert all(torch.equal(weight, torch.ones(7, 11)) for weight in weights)
    assert not any(optimizer.state.values())
