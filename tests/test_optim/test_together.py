"""Several optimizers as one: each takes its step, one schedule and one state serve all."""

import copy

import pytest
import torch
from torch import nn

from llmtune.optim import Together


def made(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.AdamW([{"params": [model[1].weight]}, {"params": [model[1].bias], "lr": 0.03}], lr=0.01)
    return model, (first, second)


def walk(model, step, count=3):
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        model.zero_grad()
        model(torch.randn(7, 3, generator=draw)).square().mean().backward()
        step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_each_takes_the_step_it_would_take_alone():
    alone, parts = made()
    walk(alone, lambda: [part.step() for part in parts])
    model, parts = made()
    walk(model, Together(*parts).step)
    assert torch.equal(flat(model), flat(alone))


def test_a_closure_is_called_once_with_gradients():
    model, parts = made()
    optimizer, calls = Together(*parts), []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    before = flat(model)
    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert bool((flat(model) != before).all())


def test_one_schedule_keeps_the_ratios_and_a_state_goes_on_bit_for_bit():
    model, parts = made()
    optimizer = Together(*parts)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(optimizer=optimizer, schedule=schedule):
        optimizer.step()
        schedule.step()

    walk(model, step)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.0025, 0.0075])
    assert parts[1].param_groups[1] is optimizer.param_groups[2]
    state = copy.deepcopy(optimizer.state_dict())
    assert [set(entry) for _, entry in sorted(state["state"].items())] == [
        {"momentum_buffer"}, {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}, {"step", "exp_avg", "exp_avg_sq"}
    ]  # fmt: skip
    other, other_parts = made(seed=3)
    other.load_state_dict(model.state_dict())
    resumed = Together(*other_parts)
    again = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1 / (1 + step))
    again.load_state_dict(schedule.state_dict())
    resumed.load_state_dict(state)
    assert all(
        a is b for a, b in zip(resumed.param_groups, [g for o in other_parts for g in o.param_groups], strict=True)
    )
    walk(model, step)

    def step_again():
        resumed.step()
        again.step()

    walk(other, step_again)
    assert torch.equal(flat(model), flat(other))
    assert [group["lr"] for group in resumed.param_groups] == pytest.approx([0.1 / 7, 0.01 / 7, 0.03 / 7])


def test_a_grad_scaler_passes_over_all_of_them_together():
    model, parts = made()
    optimizer, before = Together(*parts), flat(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(2, 3)).square().mean()).backward()
    model[1].bias.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), before)
    assert scaler.get_scale() == 4.0


def test_what_is_taken_out_of_the_state_is_gone():
    model, parts = made()
    optimizer = Together(*parts)
    assert len(optimizer.state) == 0
    walk(model, optimizer.step)
    first, last = model[0].weight, model[1].bias
    assert list(optimizer.state) == list(model.parameters())
    assert optimizer.state[last] is parts[1].state[last]
    taken = optimizer.state.pop(first)
    assert first not in optimizer.state
    assert first not in parts[0].state
    assert optimizer.state.pop(first, None) is None
    with pytest.raises(KeyError):
        optimizer.state[first]
    optimizer.state[first] = taken
    assert parts[0].state[first] is taken
    optimizer.state.clear()
    assert [len(part.state) for part in parts] == [0, 0]


def test_copies_are_of_copies():
    model, parts = made()
    optimizer = Together(*parts)
    walk(model, optimizer.step)
    before = flat(model)
    copied_model, copied = copy.deepcopy((model, optimizer))
    walk(copied_model, copied.step)
    assert torch.equal(flat(model), before)
    walk(model, optimizer.step)
    assert torch.equal(flat(model), flat(copied_model))


def test_refusals():
    model, parts = made()
    with pytest.raises(ValueError, match="Together makes one optimizer of two or more; got 1"):
        Together(parts[0])
    with pytest.raises(TypeError, match="Together takes torch optimizers that have been made; got <class"):
        Together(parts[0], torch.optim.SGD)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        Together(parts[0], torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer = Together(*parts)
    with pytest.raises(ValueError, match="a further group must say whose it is"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters; here they have \[2, 1, 1\]"):
        optimizer.load_state_dict(parts[0].state_dict())
