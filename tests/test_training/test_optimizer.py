"""The optimizer and its schedules: every name runs and is resumed, and options that do not fit are told at once."""

import math

import pytest
import torch
from torch import nn

from llmtune.data.collate import collate_padded
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.optimizer import adamw_with_schedule, check_schedule, steps_in_all
from llmtune.training.settings import SCHEDULES, LoopSettings
from llmtune.types import Callback

PEAK, WARM, STEPS = 1e-2, 2, 7


def cosine(progress, least=0.0):
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))


# The factor of the learning rate at a step after the warm-up, written out; options as a user would give them.
WRITTEN_OUT = {
    "linear": ({}, lambda s: (STEPS - s) / (STEPS - WARM)),
    "cosine": ({}, lambda s: cosine((s - WARM) / (STEPS - WARM))),
    "cosine_with_restarts": ({"num_cycles": 2}, lambda s: cosine(2 * (s - WARM) / (STEPS - WARM) % 1)),
    "polynomial": (
        {"lr_end": 1e-3, "power": 2.0}, lambda s: ((PEAK - 1e-3) * (1 - (s - WARM) / (STEPS - WARM)) ** 2 + 1e-3) / PEAK
    ),
    "constant": ({}, lambda s: 1.0),
    "constant_with_warmup": ({}, lambda s: 1.0),
    "inverse_sqrt": ({}, lambda s: math.sqrt(WARM / s)),
    "cosine_with_min_lr": ({"min_lr": 1e-3}, lambda s: cosine((s - WARM) / (STEPS - WARM), 0.1)),
    "cosine_warmup_with_min_lr": ({"min_lr_rate": 0.1}, None),
    "warmup_stable_decay": (
        {"num_decay_steps": 3, "decay_type": "linear"}, lambda s: 1.0 if s < STEPS - 3 else (STEPS - s) / 3
    ),
}  # fmt: skip


def settings(name, options=None, **changed):
    base = {"max_steps": STEPS, "rows_per_step": 4, "progress": False, "learning_rate": PEAK, "schedule": name,
            "schedule_options": WRITTEN_OUT[name][0] if options is None else options,
            "warmup_steps": 0 if name == "constant" else WARM}  # fmt: skip
    return LoopSettings(**(base | changed))


def test_every_schedule_is_in_the_table():
    assert set(WRITTEN_OUT) == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_as_written_out_and_is_resumed(tmp_path, name):
    class Stop(Callback):
        def on_step_end(self, loop, metrics):
            if loop.step == 4:
                raise KeyboardInterrupt

    def run(folder, callbacks=()):
        return TrainingLoop(
            tiny_llama(), uneven_rows(), settings=settings(name, folder=folder, save_every=1), callbacks=callbacks,
            collate=collate_padded,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    rates = whole.fit().column("learning_rate")
    factor = WRITTEN_OUT[name][1]
    if factor is not None:
        assert rates[WARM:] == pytest.approx([PEAK * factor(step) for step in range(WARM, STEPS)], rel=1e-6)
    if name not in ("constant", "cosine_warmup_with_min_lr"):
        assert rates[:WARM] == pytest.approx([0.0, PEAK / 2])
    assert max(rates) == pytest.approx(PEAK)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [Stop()]).fit()
    resumed = run(tmp_path / "cut")
    assert resumed.fit(resume=True).column("learning_rate") == rates
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("linear", {"min_lr": 1e-3}, r'the schedule "linear" takes no options; schedule_options has \'min_lr\''),
        ("constant", {"factor": 1}, 'the schedule "constant" takes no options'),
        ("cosine", {"num_cycle": 2}, r"takes num_cycles options; .* has 'num_cycle'. Did you mean \"num_cycles\"\?"),
        ("cosine", {"num_warmup_steps": 2}, "schedule_options has 'num_warmup_steps'"),
        ("cosine_with_min_lr", {}, "cannot be made: One of min_lr or min_lr_rate should be set"),
        ("cosine_with_min_lr", {"min_lr": 1, "min_lr_rate": 1}, "cannot be made: Only one of min_lr or min_lr_rate"),
        ("polynomial", {"lr_end": 1.0}, r"cannot be made: lr_end \(1.0\) must be smaller than initial lr"),
        ("polynomial", {"power": "x"}, "cannot be made: unsupported operand"),
        ("warmup_stable_decay", {}, "cannot be made: .* missing 1 required positional argument: 'num_decay_steps'"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "x"}, "cannot be made: Unknown decay type: x"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 60},
            "of the learning rate, and not at its peak, after its 2 steps",
        ),
        ("polynomial", {"lr_end": -1.0}, "gives .* as factors of the learning rate: check the options"),
    ],
)
def test_options_that_do_not_fit_are_told_before_anything_is_done(tmp_path, name, options, said):
    with pytest.raises(ValueError, match=said):
        TrainingLoop(tiny_llama(), uneven_rows(), settings=settings(name, options, folder=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_constant_rate_has_no_warm_up():
    with pytest.raises(
        ValueError, match='the schedule "constant" has no warm-up: give schedule="constant_with_warmup"'
    ):
        settings("constant", warmup_steps=2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_schedules_too(name, total):
    options = {"num_decay_steps": 1} if name == "warmup_stable_decay" else None
    check_schedule(settings(name, options, max_steps=total, warmup_steps=0), total)
    if name != "constant":
        check_schedule(settings(name, options, max_steps=total, warmup_steps=5), total)


def test_a_rate_of_zero_is_allowed_where_the_schedule_allows_it():
    check_schedule(settings("linear", learning_rate=0.0), STEPS)
    with pytest.raises(ValueError, match=r"cannot be made: .*division by zero"):
        check_schedule(settings("cosine_with_min_lr", learning_rate=0.0), STEPS)


def test_decay_is_for_matrices_alone():
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Embedding(7, 2))
    model[0].bias.requires_grad_(False)
    optimizer, _ = adamw_with_schedule(model, settings("linear", weight_decay=0.1), STEPS)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {tuple(p.shape) for p in decayed["params"]} == {(5, 3), (7, 2)}
    assert {tuple(p.shape) for p in plain["params"]} == {(5,)}
    assert len(plain["params"]) == 2


def test_the_first_step_is_adamw_written_out():
    """m = 0.1 g, v = 0.001 g^2, both divided by 0.1 and 0.001: a step of rate * sign, after the decay."""
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer, _ = adamw_with_schedule(model, settings("linear", weight_decay=0.1, warmup_steps=0), STEPS)
    model.weight.grad = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    optimizer.step()
    wanted = before * (1 - PEAK * 0.1) - PEAK * model.weight.grad.sign()
    torch.testing.assert_close(model.weight.detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "size", "epochs", "wanted"), [(7, 3, 2, 5), (7, 7, 1, 1), (3, 8, 3, 2), (12, 4, 5, 15)]
)
def test_steps_of_some_epochs(rows, size, epochs, wanted):
    assert steps_in_all(LoopSettings(epochs=epochs, rows_per_step=size), range(rows)) == wanted
    assert steps_in_all(LoopSettings(max_steps=11, rows_per_step=size), range(rows)) == 11


@pytest.mark.parametrize(
    ("make", "came"),
    [
        (lambda optimizer: optimizer, "SGD"),
        (lambda optimizer: (optimizer, None), "SGD, NoneType"),
        (
            lambda optimizer: (optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)),
            "SGD, ReduceLROnPlateau",
        ),
    ],
)
def test_what_is_no_optimizer_with_a_schedule_is_told(make, came):
    class Own(TrainingLoop):
        def configure_optimizer(self):
            return make(torch.optim.SGD(self.model.parameters(), lr=0.1))

    loop = Own(tiny_llama(), uneven_rows(), settings=LoopSettings(max_steps=3, progress=False))
    with pytest.raises(TypeError, match=rf"must return \(optimizer, schedule\), .* got {came}\. For a constant"):
        loop.fit()
