import re

import pytest
import torch

from llmtune.data.collate import collate_padded
from llmtune.regularizers.flooding import Flooding, flood
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.sharpness import SharpnessAware

ROWS = uneven_rows(8)


def test_closed_form():
    for level, value, slope in ((1.0, 1.75, -1.0), (0.1, 0.25, 1.0)):
        loss = torch.tensor(0.25, requires_grad=True)
        flooded = flood(loss, level)
        flooded.backward()
        assert flooded.item() == pytest.approx(value)
        assert loss.grad.item() == slope


def loop_of(size, level, penalties=(), max_steps=1, kind=TrainingLoop):
    settings = LoopSettings(
        max_steps=max_steps,
        rows_per_step=8,
        rows_per_micro_batch=size,
        learning_rate=1e-2,
        schedule="constant",
        progress=False,
    )
    return kind(
        tiny_gpt2().double().eval(), ROWS, settings=settings, collate=collate_padded, penalties=penalties,
        callbacks=[Flooding(level)] if level else [],
    )  # fmt: skip


def gradient_of(loop):
    loop.accumulate_gradients(loop.micro_batches(0))
    return torch.cat([p.grad.flatten() for p in loop.model.parameters()])


@pytest.mark.parametrize("above", [0.1, -0.1])
def test_the_gradient_is_that_of_the_whole_steps_flooded_loss(above):
    """Single rows lie on both sides of the level; the step's mean decides, however the step is cut."""
    loop = loop_of(8, None)
    (batch,) = loop.micro_batches(0)
    mean = loop.compute_loss(loop.model, batch)
    level = mean.item() + above
    alone = [loop.compute_loss(loop.model, collate_padded([row])).item() for row in ROWS]
    assert min(alone) < level < max(alone)
    flood(mean, level).backward()
    expected = torch.cat([p.grad.flatten() for p in loop.model.parameters()])
    for size in (8, 4, 1):
        assert_close(gradient_of(loop_of(size, level)), expected, rtol=1e-9)


def test_a_penaltys_gradient_is_not_turned_round():
    penalty = lambda model: 3.0 * model.transformer.wte.weight.square().sum()
    below, above = (gradient_of(loop_of(4, level, [penalty])) for level in (100.0, 1e-3))
    loop = loop_of(4, None)
    task = gradient_of(loop)
    assert_close(below + task, above - task, rtol=1e-9)
    assert_close(above - below, 2 * task, rtol=1e-9)


@pytest.mark.parametrize(("level", "flooded"), [(1e-3, 0), (None, 1), (100.0, 1)])
def test_a_sharpness_aware_step_is_that_of_the_flooded_loss(level, flooded):
    """By hand: up the flooded gradient, and there the flooded gradient; the second level is a little above the loss."""
    loop = loop_of(8, None)
    (batch,) = loop.micro_batches(0)
    model, weights = loop.model, list(loop.model.parameters())
    value = lambda: loop.compute_loss(model, batch)
    level = level or value().item() + 1e-3
    up = torch.autograd.grad(flood(value(), level), weights)
    size = torch.cat([g.flatten() for g in up]).norm()
    with torch.no_grad():
        for weight, g in zip(weights, up, strict=True):
            weight += 0.5 * g / size
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(flood(value(), level), weights)])
    for micro in (8, 4):
        sharp = loop_of(micro, level, kind=SharpnessAware)
        sharp.rho = 0.5
        assert_close(gradient_of(sharp), expected, rtol=1e-7)
        assert sharp.callbacks[0]._flooded == flooded


def test_the_history_says_so():
    history = loop_of(4, 100.0).fit()
    assert history[0]["flooded"] == 1
    assert loop_of(4, 1e-3).fit()[0]["flooded"] == 0


def test_the_loss_comes_to_float_at_the_level():
    """Plain training on eight rows goes far below; flooded training stays about the level."""
    plain, flooded = ([row["loss"] for row in loop_of(8, level, max_steps=120).fit()][-30:] for level in (None, 3.0))
    assert max(plain) < 1.0
    assert 2.5 < sum(flooded) / len(flooded) < 3.5


def test_bad_levels():
    for level in (0.0, -1.0, float("nan"), float("inf")):
        message = re.escape(f"level must be a finite number larger than 0; got {level}")
        with pytest.raises(ValueError, match=message):
            Flooding(level)
        with pytest.raises(ValueError, match=message):
            flood(torch.tensor(1.0), level)
    with pytest.raises(ValueError, match=re.escape("a loss of shape [3]")):
        flood(torch.zeros(3), 1.0)
