"""MeZO: exact slopes on a quadratic, the gradient in the mean, weights that come back, and runs made again."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from llmtune.errors import NonFiniteError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.optim import MeZO, move_along, parameter_groups
from llmtune.testing.models import tiny_gpt2

DRAW = torch.Generator().manual_seed(0)
HALF = torch.randn(7, 7, dtype=torch.float64, generator=DRAW)
CURVATURE, TARGET = HALF @ HALF.T / 7, torch.randn(7, dtype=torch.float64, generator=DRAW)
START = torch.randn(7, dtype=torch.float64, generator=DRAW)


def parts(dtype=torch.float64):
    w = START.to(dtype, copy=True)
    return [nn.Parameter(w[:4].view(2, 2)), nn.Parameter(w[4:])]


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def loss_of(parameters):
    off = torch.cat([p.flatten() for p in parameters]).double() - TARGET
    return off @ CURVATURE @ off / 2


def direction(step, *, seed=0, dtype=torch.float64):
    zeros = [torch.zeros(2, 2, dtype=dtype), torch.zeros(3, dtype=dtype)]
    move_along(zeros, 1.0, seed=seed, step=step)
    return flat(zeros)


@pytest.mark.parametrize("exact", [False, True])
def test_a_step_goes_down_the_slope_along_z(exact):
    parameters = parts()
    optimizer = MeZO(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.03, "weight_decay": 0.5}],
        learning_rate=0.01, seed=5, exact=exact,
    )  # fmt: skip
    rates, decay = torch.tensor([[0.01] * 4 + [0.03] * 3, [0.0] * 4 + [0.5] * 3], dtype=torch.float64)
    for step in range(3):
        w, z = flat(parameters), direction(step, seed=5)
        slope = float(CURVATURE @ (w - TARGET) @ z)  # exact: on a quadratic the middle difference is the derivative
        found = optimizer.step(lambda: loss_of(parameters))
        assert optimizer.slope == pytest.approx(slope, rel=1e-8)
        mean = loss_of([w]) + 1e-6 * (z @ CURVATURE @ z) / 2
        assert found == pytest.approx(float(mean), rel=1e-12)
        torch.testing.assert_close(flat(parameters), w - rates * (slope * z + decay * w), rtol=1e-9, atol=1e-12)


def test_in_the_mean_over_seeds_it_is_the_gradient():
    gradient, count = CURVATURE @ (START - TARGET), 2000
    total = torch.zeros(7, dtype=torch.float64)
    for seed in range(count):
        parameters = parts()
        MeZO(parameters, learning_rate=1.0, seed=seed, exact=True).step(lambda p=parameters: loss_of(p))
        total += START - flat(parameters)
    error = ((gradient.square() + gradient.square().sum()) / count).sqrt()  # of the mean of (z . g) z, z Gaussian
    assert bool(((total / count - gradient).abs() < 5 * error).all())
    assert bool((gradient.abs() > 5 * error).any()), "and the test could fail"


def test_directions_are_gaussian_and_depend_on_seed_and_step_alone():
    one = torch.zeros(20011)
    move_along([one], 1.0, seed=3, step=7)
    assert abs(float(one.mean())) < 5 / math.sqrt(20011)
    assert abs(float(one.var()) - 1) < 5 * math.sqrt(2 / 20011)
    torch.manual_seed(11)
    torch.randn(5)
    again, other, next_step = (torch.zeros(20011) for _ in range(3))
    move_along([again], 1.0, seed=3, step=7)
    move_along([other], 1.0, seed=4, step=7)
    move_along([next_step], 1.0, seed=3, step=8)
    assert torch.equal(one, again)
    for drawn in (other, next_step):
        assert abs(float(drawn @ one)) < 5 * math.sqrt(20011)


def states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def test_the_global_random_state_goes_on_as_after_one_pass():
    parameters, drawn = parts(), []

    def closure():
        drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
        return loss_of(parameters)

    closure()
    after = states()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    MeZO(parameters, learning_rate=0.01).step(closure)
    assert drawn[0] == drawn[1] == drawn[2]
    assert torch.equal(states()[0], after[0])
    assert states()[1:] == after[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_weights_come_back_to_the_bit_or_to_within_rounding_and_stay_in_their_place(exact, dtype):
    parameters = parts(dtype)
    before, places, seen = flat(parameters), [p.data_ptr() for p in parameters], []

    def closure():
        seen.append(flat(parameters))
        return loss_of(parameters)

    MeZO(parameters, learning_rate=0.0, epsilon=1e-2, exact=exact).step(closure)
    assert [p.data_ptr() for p in parameters] == places
    assert all(p.grad is None for p in parameters)
    z = direction(0, dtype=torch.float32)
    rounding = torch.finfo(dtype).eps * before.abs().max()
    for sign, found in zip((1, -1), seen, strict=True):
        wanted = before.float() + sign * 1e-2 * z
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=float(3 * rounding))
        if exact:
            assert torch.equal(found, wanted.to(dtype)) or dtype == torch.float32
    assert torch.equal(flat(parameters), before) or not exact
    torch.testing.assert_close(flat(parameters), before, rtol=0, atol=float(4 * rounding))


def test_z_is_drawn_in_float32_for_weights_of_less():
    assert torch.equal(direction(3, dtype=torch.float32).bfloat16(), direction(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("at", [1, 2])
def test_weights_come_back_where_the_closure_fails(exact, at):
    parameters, calls = parts(), []

    def closure():
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("seeded")
        return loss_of(parameters)

    optimizer = MeZO(parameters, learning_rate=0.1, exact=exact)
    with pytest.raises(RuntimeError, match="seeded"):
        optimizer.step(closure)
    torch.testing.assert_close(flat(parameters), START, rtol=0, atol=0 if exact else 1e-14)
    assert optimizer.steps == 0


def test_a_loss_that_is_not_finite_changes_nothing():
    parameters = parts()
    optimizer = MeZO(parameters, learning_rate=0.1, exact=True)
    with pytest.raises(NonFiniteError, match="the losses on both sides are nan and nan; the weights are back"):
        optimizer.step(lambda: math.nan)
    assert torch.equal(flat(parameters), START)
    assert optimizer.steps == 0


def test_batches_add_up_in_the_closure():
    ids, slopes = torch.arange(3, 51).view(6, 8), []
    for cut in (6, 2):
        model = tiny_gpt2().double()

        def closure(model=model, cut=cut):
            parts = [{"input_ids": x, "labels": x} for x in ids.split(cut)]
            return sum(causal_lm_loss(model, part) * len(part["labels"]) for part in parts) / len(ids)

        optimizer = MeZO(model.parameters(), learning_rate=1e-3, seed=2)
        optimizer.step(closure)
        slopes.append(optimizer.slope)
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-8)


def run(optimizer, schedule, parameters, steps):
    record = []
    for _ in range(steps):
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.step(lambda: loss_of(parameters))
        record.append((rates, optimizer.slope))
        schedule.step()
    return record


def test_a_run_is_made_again_from_its_slopes_and_resumed_from_its_state():
    def made():
        parameters = parts(torch.float32)
        optimizer = MeZO(parameters, learning_rate=0.02, seed=9, exact=True, weight_decay=0.1)
        return parameters, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    whole, optimizer, schedule = made()
    record = run(optimizer, schedule, whole, 3)
    state, weights, scheduled = json.loads(json.dumps(optimizer.state_dict())), flat(whole), schedule.state_dict()
    record += run(optimizer, schedule, whole, 4)

    again, optimizer, _ = made()
    for rates, slope in record:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.update(slope)
    assert torch.equal(flat(again), flat(whole))
    assert optimizer.steps == 7

    resumed = parts(torch.float32)
    for p, value in zip(resumed, weights.split([4, 3]), strict=True):
        p.data.copy_(value.view_as(p))
    optimizer = MeZO(resumed, learning_rate=9.0, exact=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.load_state_dict(state)
    schedule.load_state_dict(scheduled)
    assert (optimizer.seed, optimizer.steps) == (9, 3)
    assert run(optimizer, schedule, resumed, 4) == record[3:]
    assert torch.equal(flat(resumed), flat(whole))


def test_takes_parameter_groups_and_leaves_frozen_weights_alone():
    model = tiny_gpt2()
    model.transformer.wte.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MeZO(parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, layer_decay=0.5), 1.0)
    ids = torch.tensor([[5, 7, 11]])
    optimizer.step(lambda: model(ids, labels=ids).loss)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a number of at least 0; got -1.0"),
        ({"epsilon": 0}, "epsilon must be a number above 0; got 0"),
        ({"weight_decay": math.inf}, "weight_decay must be a number of at least 0; got inf"),
        ({"parameters": [{"params": parts(), "lr": -0.1}]}, "lr must be a number of at least 0; got -0.1"),
        (
            {"parameters": [{"params": parts(), "weight_decay": math.nan}]},
            "weight_decay must be a number of at least 0",
        ),
        ({"seed": 0.5}, "seed must be a whole number; got 0.5"),
        ({"parameters": [torch.zeros(3)]}, "MeZO trains what requires a gradient, though it takes none, and no param"),
    ],
)
def test_refusals(options, message):
    given = {"parameters": parts(), "learning_rate": 0.1} | options
    with pytest.raises(ValueError, match=message):
        MeZO(**given)


def test_refuses_a_step_without_a_closure():
    with pytest.raises(TypeError, match="MeZO needs two losses a step"):
        MeZO(parts(), learning_rate=0.1).step(None)
