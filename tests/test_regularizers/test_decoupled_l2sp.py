import json

import pytest
import torch
from torch import nn

from llmtune.adapters.attach import adapter_layers, attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.effective import anchor_of
from llmtune.errors import CheckpointError
from llmtune.regularizers.decoupled_l2sp import DecoupledL2SP, pull_back
from llmtune.regularizers.l2sp import L2SP
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.testing.small import SmallModel, moved
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


def give_gradients(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_pull_back_by_hand():
    theta, other = torch.tensor([[4.0, 1.0]], dtype=torch.float64), torch.ones(3)
    pull_back([theta, other], [torch.tensor([[0.0, 2.0]], dtype=torch.float64), torch.ones(3)], 0.25)
    assert theta.tolist() == [[3.0, 1.25]]
    assert other.tolist() == [1.0, 1.0, 1.0]
    pull_back([theta], [torch.tensor([[7.0, 5.0]], dtype=torch.float64)], 1.0)
    assert theta.tolist() == [[7.0, 5.0]]
    pull_back([], [], 0.5)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"the rate, learning rate \* strength, must be in 0 ... 1; got"):
            pull_back([theta], [theta], rate)


def test_the_learning_rate_is_the_present_one_after_the_optimizer_has_loaded_a_state():
    """torch's optimizers make new groups there."""
    model = nn.Linear(3, 2, bias=False)
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    DecoupledL2SP({"weight": torch.zeros(2, 3)}, 1.0).attach(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert_close(model.weight.detach(), start * 0.75, rtol=1e-6)


def test_by_sgd_it_is_the_coupled_penalty():
    start = SmallModel()
    moved_models = []
    for decoupled in (True, False):
        model = SmallModel()
        held = DecoupledL2SP(model, 3.0) if decoupled else L2SP(model, 3.0)
        moved(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        give_gradients(model)
        if decoupled:
            held.attach(model, optimizer)
        else:
            held(model).backward()
        optimizer.step()
        moved_models.append(values(model))
    for name, value in moved_models[0].items():
        assert_close(value, moved_models[1][name], rtol=1e-12, what=name)
    assert not torch.equal(moved_models[0]["head.weight"], start.head.weight)


def test_beside_adamw_it_is_the_pull_and_then_adam():
    """Each group by its own learning rate, as it is at the time; Adam's moments do not see the pull."""
    model, twin = SmallModel(), SmallModel()
    held = DecoupledL2SP(model, 2.0)
    anchor = values(model)

    def optimizer_of(module):
        head = list(module.head.parameters())
        rest = [p for p in module.parameters() if p.requires_grad and all(p is not q for q in head)]
        return torch.optim.AdamW([{"params": rest, "lr": 0.01}, {"params": head, "lr": 0.1}], weight_decay=0.0)

    optimizer, plain = optimizer_of(model), optimizer_of(twin)
    held.attach(model, optimizer)
    for step in range(3):
        for module in (model, twin):
            give_gradients(module, seed=step)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if p.requires_grad:
                    rate = plain.param_groups["head" in name]["lr"] * 2.0
                    p.copy_(p - rate * (p - anchor[name]))
        for each in (optimizer, plain):
            each.step()
            each.param_groups[1]["lr"] /= 2
    for name, value in values(twin).items():
        assert_close(model.get_parameter(name).detach(), value, rtol=1e-12, what=name)
    for p, q in zip(model.head.parameters(), twin.head.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"])


def test_through_adam_the_coupled_penalty_is_rescaled():
    """Without a gradient of the loss the coupled one moves by a whole learning rate, whatever the strength."""
    steps = []
    for strength in (1.0, 100.0):
        model = nn.Linear(1, 1, bias=False).double()
        held = L2SP({"weight": model.weight.detach() - 0.5}, strength)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        before = model.weight.item()
        held(model).backward()
        optimizer.step()
        steps.append(before - model.weight.item())
    assert steps == pytest.approx([0.01, 0.01], rel=1e-6)


def test_weight_decay_on_a_and_b_is_the_pull_of_a_weight_under_lora():
    """What the refusal tells a user to do: without a gradient, W + s B A goes (1 - lr strength / 2)^2 of the way."""
    lr, strength = 0.1, 0.2
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    moved(model)
    before = {layer: layer.deltas()["weight"].detach() for layer in adapter_layers(model)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(parameters, lr=lr, weight_decay=strength / 2).step()
    for layer, change in before.items():
        assert_close(layer.deltas()["weight"].detach(), (1 - lr * strength / 2) ** 2 * change, rtol=1e-5)


@pytest.mark.parametrize("rows", [8, 2])
def test_in_the_loop_it_pulls_once_a_step_and_lets_go(rows):
    model, twin = tiny_llama(), tiny_llama()
    anchor = anchor_of(model)
    held = DecoupledL2SP(anchor, 3.0)
    settings = LoopSettings(
        max_steps=1, rows_per_step=8, rows_per_micro_batch=rows, learning_rate=0.01, schedule="constant", progress=False
    )
    moved(model), moved(twin)
    loop = TrainingLoop(model, uneven_rows(8), settings=settings, callbacks=[held])
    loop.fit()
    plain = TrainingLoop(twin, uneven_rows(8), settings=settings)
    start = values(twin)
    plain.fit()
    for name, p in model.named_parameters():
        pulled = start[name] - 0.03 * (start[name] - anchor[name])
        assert_close(p.detach(), pulled + (twin.get_parameter(name).detach() - start[name]), rtol=1e-4, what=name)
    after = values(model)
    model.zero_grad()
    loop.optimizer.step()  # without a gradient AdamW does nothing, and nobody else does any more
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())


def test_a_loop_that_fails_lets_go():
    model = tiny_llama()
    held = DecoupledL2SP(model, 3.0)
    settings = LoopSettings(max_steps=2, rows_per_step=2, learning_rate=1.0, schedule="constant", progress=False)
    loop = TrainingLoop(model, uneven_rows(8), settings=settings, callbacks=[held])
    with pytest.raises(ValueError, match=r"must be in 0 ... 1; got 3: it would overshoot"):
        loop.fit()
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_frozen_parameters_are_left_out():
    model = SmallModel()
    held = DecoupledL2SP(dict(model.named_parameters()), 1.0)
    with torch.no_grad():
        model.scale += 1.0
    scale = model.scale.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    held.attach(model, optimizer)
    optimizer.step()
    assert torch.equal(model.scale, scale)


def test_what_cannot_be_pulled_raises():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = DecoupledL2SP(model, 1.0)
    held.attach(model, optimizer)
    with pytest.raises(ValueError, match="this DecoupledL2SP is attached already"):
        held.attach(model, optimizer)
    held.detach()
    held.detach()
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is trained, and not one of the optimizer's param"):
        held.attach(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="DecoupledL2SP reaches no trained parameter: all 21 anchored are frozen"):
        held.attach(model, optimizer)
    attach(model, LoRA(rank=2, alpha=2, targets=["q_proj"]))
    message = r'q_proj.weight is changed by adapter "default", and .* weight_decay = strength / 2, or use L2SP'
    with pytest.raises(ValueError, match=message):
        held.attach(model, optimizer)
    with pytest.raises(ValueError, match='the anchor names "wait", which the model has not'):
        DecoupledL2SP({"wait": torch.zeros(2)}, 1.0).attach(model, optimizer)


def test_state_tells_one_from_another_and_survives_json():
    model = SmallModel()
    state = json.loads(json.dumps(DecoupledL2SP(model, 2.0).state_dict()))
    DecoupledL2SP(model, 2.0).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"the saved DecoupledL2SP had strength 2.0; this one has 1.0"):
        DecoupledL2SP(model, 1.0).load_state_dict(state)
    moved(model)
    with pytest.raises(CheckpointError, match=r"the saved DecoupledL2SP had another anchor of first.weight"):
        DecoupledL2SP(model, 2.0).load_state_dict(state)


class Stop(Callback):
    """Ends a run after two steps, as Ctrl-C does."""

    def on_step_start(self, loop):
        if loop.step == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(folder, *others, resume=False):
        model = tiny_llama()
        settings = LoopSettings(max_steps=4, rows_per_step=4, folder=folder, save_every=2, progress=False)
        callbacks = [DecoupledL2SP(model, 50.0), *others]
        TrainingLoop(model, uneven_rows(8), settings=settings, callbacks=callbacks).fit(resume=resume)
        return values(model)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Stop())
    parts = run(tmp_path / "parts", resume=True)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
