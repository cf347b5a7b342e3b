import copy

import pytest
import torch
from penalty_runs import fitted, through_a_file
from torch import nn

from llmtune.adapters.attach import adapter_layers, attach
from llmtune.adapters.config import DoRA, LoRA
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError
from llmtune.forgetting.synaptic import SynapticIntelligence, path_importance
from llmtune.integrations.transformers_trainer import with_loss
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.optim.update_projection import UpdateProjection
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_t5
from llmtune.testing.small import SmallModel, moved
from llmtune.training.lisa import LISA
from llmtune.training.loop import TrainingLoop
from llmtune.training.part_trains import PartTrains
from llmtune.training.settings import LoopSettings
from llmtune.training.sharpness import SharpnessAware

ROWS = uneven_rows(4)
CLASSES = [{**row, "labels": index % 3} for index, row in enumerate(ROWS)]
H = torch.tensor([[1.0, 3.0, 0.5], [2.0, 0.1, 5.0]], dtype=torch.float64)
GOAL = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.7, -0.2]], dtype=torch.float64)


def quadratic(model):
    """Return 1/2 sum h (w - goal)^2, whose gradient is h (w - goal)."""
    return 0.5 * (H * (model.weight - GOAL).square()).sum()


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2, bias=False).double()


def trained(model, penalty, optimizer, loss, steps, *, clip=None):
    """A plain loop, as the class describes it."""
    for _ in range(steps):
        optimizer.zero_grad()
        penalty.start_step()
        loss(model).backward()
        penalty.task_gradients()
        penalty(model).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def test_path_importance_by_hand():
    found = path_importance(torch.tensor([0.5, -0.5, 0.2]), torch.tensor([1.0, 1.0, 0.0]), damping=0.25)
    assert_close(found, torch.tensor([0.4, 0.0, 0.8]), rtol=1e-6)


def test_on_a_quadratic_with_sgd_the_path_is_known_and_sums_to_the_fall_of_the_loss():
    """w_t - goal = (1 - lr h)^t (w_0 - goal), and a step adds lr h^2 (w_t - goal)^2."""
    model, penalty, rate, steps = plain(), SynapticIntelligence(2.0, damping=0.01), 1e-4, 50
    start, before = model.weight.detach().clone(), quadratic(model).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    penalty.attach(model, optimizer)
    trained(model, penalty, optimizer, quadratic, steps)
    away = [(1 - rate * H) ** step * (start - GOAL) for step in range(steps + 1)]
    omega = sum(rate * H.square() * gap.square() for gap in away[:-1])
    assert_close(penalty.path["weight"], omega, rtol=1e-9)
    assert penalty.path["weight"].sum().item() == pytest.approx(before - quadratic(model).item(), rel=1e-3)

    penalty.finish_task(model)
    change = away[-1] - away[0]
    assert_close(penalty.importance["weight"], omega / (change.square() + 0.01), rtol=1e-9)
    end = model.weight.detach().clone()
    moved(model)
    expected = 2.0 / 2 * (omega / (change.square() + 0.01) * (model.weight - end).square()).sum()
    assert_close(penalty(model).detach(), expected.detach(), rtol=1e-9)


def adamw(weight, gradients, *, rate, decay):
    """Return by the formulas (weights after each step, the steps' changes without decay)."""
    m, v, weights, changes = torch.zeros_like(weight), torch.zeros_like(weight), [], []
    for step in range(1, len(gradients) + 1):
        g = gradients[step - 1](weight)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        change = -rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        changes.append(change)
        weight = weight - rate * decay * weight + change
        weights.append(weight)
    return weights, changes


def test_the_gradient_is_the_tasks_alone_and_the_change_is_without_decoupled_decay():
    """A second task by AdamW, with the first's penalty and clipping: neither is in g; decay is not in the change."""
    model, penalty = plain(), SynapticIntelligence(40.0, damping=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    penalty.attach(model, optimizer)
    trained(model, penalty, optimizer, quadratic, 3)
    penalty.finish_task(model)
    penalty.detach()
    start, importance = model.weight.detach().clone(), penalty.importance["weight"].clone()

    def second(model):
        return quadratic(model) + model.weight.sum()

    def task(weight):
        return H * (weight - GOAL) + 1.0

    def clipped(weight):
        whole = task(weight) + 40.0 * importance * (weight - start)
        return whole * min(1.0, 0.5 / (whole.norm().item() + 1e-6))

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.8)
    penalty.attach(model, optimizer)
    trained(model, penalty, optimizer, second, 5, clip=0.5)
    weights, changes = adamw(start, [clipped] * 5, rate=0.02, decay=0.8)
    assert_close(model.weight.detach(), weights[-1], rtol=1e-9)
    omega = sum(-task(w) * c for w, c in zip([start, *weights[:-1]], changes, strict=True))
    assert_close(penalty.path["weight"], omega, rtol=1e-8)
    assert (omega < 0).any()
    penalty.finish_task(model)
    change = weights[-1] - start
    expected = importance + omega.clamp(min=0) / (change.square() + 0.1)
    assert_close(penalty.importance["weight"], expected, rtol=1e-8)


def test_a_negative_path_holds_nothing():
    model, penalty = plain(), SynapticIntelligence(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)  # every step raises the loss
    penalty.attach(model, optimizer)
    trained(model, penalty, optimizer, quadratic, 2)
    assert (penalty.path["weight"] < 0).all()
    penalty.finish_task(model)
    assert not penalty.importance["weight"].any()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_under_lora_it_is_that_of_the_effective_weight(kind):
    """Against W + s B A written out: its gradient by autograd, its change as it is, decay undone by hand."""
    model = SmallModel()
    attach(model, LoRA(rank=2, alpha=5, targets=["head"], dtype=torch.float64))
    moved(model, seed=3)
    (layer,) = adapter_layers(model)
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3
    optimizer = kind(layer.parameters(recurse=False), lr=0.01, weight_decay=0.0 if kind is torch.optim.SGD else 3.0)
    penalty = SynapticIntelligence(2.0, parameters=["head.weight"], damping=0.01)
    penalty.attach(model, optimizer)
    model.eval()
    start, omega = layer.deltas()["weight"].detach(), torch.zeros(3, 5, dtype=torch.float64)
    losses = []
    for step in range(4):
        twin = copy.deepcopy(model)
        weight = twin.head.base.weight.requires_grad_(True)
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(twin(x), y), weight)
        a, b = layer.lora_a.detach().clone(), layer.lora_b.detach().clone()
        optimizer.zero_grad()
        penalty.start_step()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        penalty.task_gradients()
        assert not layer.base.weight.requires_grad
        assert layer.base.weight.grad is None
        optimizer.step()
        rate = 0.0 if kind is torch.optim.SGD else 0.01 * 3.0
        ends = (layer.lora_b + rate * b) @ (layer.lora_a + rate * a)
        omega -= g * (2.5 * (ends - b @ a)).detach()
        assert penalty.steps == step + 1
    assert_close(penalty.path["head.weight"], omega, rtol=1e-8)
    if kind is torch.optim.SGD:
        losses.append(nn.functional.cross_entropy(model(x), y).item())
        assert omega.sum().item() == pytest.approx(losses[0] - losses[-1], rel=0.1)
    weights = [layer.lora_a.detach().clone(), layer.lora_b.detach().clone()]
    penalty.finish_task(model)
    assert torch.equal(layer.lora_a, weights[0])
    assert torch.equal(layer.lora_b, weights[1])
    end = layer.deltas()["weight"].detach()
    importance = omega.clamp(min=0) / ((end - start).square() + 0.01)
    assert_close(penalty.importance["head.weight"], importance, rtol=1e-6)
    assert penalty(model).item() == 0.0
    moved(model)
    expected = (importance * (layer.deltas()["weight"].detach() - end).square()).sum()
    assert_close(penalty(model).detach(), expected, rtol=1e-6)


def lora(model, targets):
    attach(model, LoRA(rank=2, alpha=4, targets=targets))
    return moved(model, seed=2)


@pytest.mark.parametrize("targets", [None, ["c_attn"]])
def test_watching_changes_no_run(targets):
    """With strength 0 weights, gradient norms and flags are those of a run without it, to the bit."""
    runs = []
    for penalty in (SynapticIntelligence(0.0), lambda model: 0.0 * sum(p.sum() for p in model.parameters())):
        torch.manual_seed(1)
        model = tiny_gpt2()
        model = lora(model, targets) if targets else model
        flags = [p.requires_grad for p in model.parameters()]
        loop = fitted(model, penalty, ROWS, causal_lm_loss, weight_decay=0.1)
        assert [p.requires_grad for p in model.parameters()] == flags
        runs.append(loop)
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [row["grad_norm"] for row in runs[0].history] == [row["grad_norm"] for row in runs[1].history]


@pytest.mark.parametrize("adapted", [False, True])
def test_watching_changes_no_run_of_which_only_a_part_trains_in_each_step(adapted):
    runs = []
    for penalty in ([], [SynapticIntelligence(0.0)]):
        torch.manual_seed(1)
        model = lora(tiny_gpt2(), ["c_attn"]) if adapted else tiny_gpt2()
        if adapted:
            model.transformer.ln_f.requires_grad_(True)
        flags = [p.requires_grad for p in model.parameters()]
        settings = LoopSettings(max_steps=3, rows_per_step=2, learning_rate=1e-2, progress=False)
        part = AdaptersLast() if adapted else LISA(1, every=1)
        TrainingLoop(model, ROWS, settings=settings, collate=collate_padded, penalties=penalty, callbacks=[part]).fit()
        assert [p.requires_grad for p in model.parameters()] == flags
        runs.append(model)
    assert all(torch.equal(p, q) for p, q in zip(runs[0].parameters(), runs[1].parameters(), strict=True))
    assert any(bool(path.any()) for path in penalty[0].path.values())


class AdaptersLast(PartTrains):
    """Lets the last norm train alone at first, and the adapters beside it from the second step on."""

    def awake(self, loop):
        return {name for name in self.trained if "ln_f" in name or loop.step}


def test_micro_batches_change_nothing():
    paths = []
    for rows in (1, 4):
        torch.manual_seed(1)
        penalty = SynapticIntelligence(1.0)
        fitted(tiny_gpt2(), penalty, ROWS, causal_lm_loss, rows_per_step=4, rows_per_micro_batch=rows, steps=2)
        paths.append(penalty.path)
    largest = max(float(value.abs().max()) for value in paths[0].values())
    for name, value in paths[0].items():
        assert float((value - paths[1][name]).abs().max()) <= 1e-3 * largest, name


@pytest.mark.parametrize("adapted", [False, True])
def test_in_a_sharpness_aware_loop_it_follows_the_gradient_at_the_weights(adapted):
    """And watching changes no run: a frozen weight that has a gradient for the penalty's sake is not moved uphill."""
    torch.manual_seed(0)
    model, penalty = tiny_gpt2(), SynapticIntelligence(0.0)
    model = lora(model, ["c_attn"]) if adapted else model
    settings = LoopSettings(max_steps=2, rows_per_step=2, learning_rate=0.01, progress=False)
    histories = []
    for penalties in ([], [penalty]):
        twin = copy.deepcopy(model)
        loop = SharpnessAware(twin, ROWS, settings=settings, collate=collate_padded, penalties=penalties)
        loop.rho = 0.5
        seen = []
        if penalties:
            follow = penalty.task_gradients
            penalty.task_gradients = lambda: (follow(), seen.append({**penalty._gradients}))  # noqa: B023
        histories.append([(row["loss"], row["sharpness"], row["grad_norm"]) for row in loop.fit()])
    assert histories[0] == histories[1]
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    causal_lm_loss(plain, collate_padded([ROWS[at] for at in loop.row_indices(0)])).backward()
    wanted = dict(plain.named_parameters())
    for name, gradient in seen[0].items():
        where = name if name in wanted else name.replace("c_attn", "c_attn.base")
        torch.testing.assert_close(gradient, wanted[where].grad, rtol=1e-4, atol=1e-6)


def test_under_fp16_a_frozen_weights_gradient_is_unscaled_too():
    """It is none of the optimizer's, so `GradScaler.unscale_` does not know it; nor does it see that it overflowed."""
    model, paths = lora(tiny_gpt2(), ["c_attn"]), {}
    for precision in ("float32", "fp16"):
        penalty = SynapticIntelligence(1.0)
        fitted(copy.deepcopy(model), penalty, ROWS, causal_lm_loss, precision=precision, steps=2)
        paths[precision] = torch.stack([path.sum() for path in penalty.path.values()])
    assert_close(paths["fp16"], paths["float32"], rtol=0.02)

    penalty, factors = SynapticIntelligence(1.0), [torch.inf]
    frozen = next(p for p in model.parameters() if not p.requires_grad and p.ndim == 2 and p.shape[1] == 3 * p.shape[0])
    frozen.requires_grad_(True).register_hook(lambda gradient: gradient * (factors.pop() if factors else 1.0))
    frozen.requires_grad_(False)
    loop = fitted(model, penalty, ROWS, causal_lm_loss, precision="fp16", steps=3)
    assert [row["overflow"] for row in loop.history] == [1, 0, 0]
    assert penalty.steps == 2
    assert all(bool(path.isfinite().all()) for path in penalty.path.values())


CASES = {
    "bert": (lambda: tiny_bert(labels=3), CLASSES, classification_loss, ["query"]),
    "gpt2": (tiny_gpt2, ROWS, causal_lm_loss, ["c_attn"]),
    "t5": (tiny_t5, ROWS, sequence_to_sequence_loss, ["q"]),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_within_the_second_task_goes_on_bit_for_bit(tmp_path, case, adapted):
    make, rows, loss, targets = CASES[case]
    torch.manual_seed(1)
    model, penalty = make(), SynapticIntelligence(1000.0, damping=1e-3)
    model = lora(model, targets) if adapted else model
    fitted(model, penalty, rows, loss, weight_decay=0.1)
    penalty.finish_task(model)
    between = through_a_file(penalty.state_dict(), tmp_path)
    assert penalty(model).item() == 0.0

    def second(folder=None, stop=None):
        twin, its = copy.deepcopy(model), SynapticIntelligence(1000.0, damping=1e-3)
        its.load_state_dict(between)
        return fitted(twin, its, rows, loss, folder, stop=stop, weight_decay=0.1), its

    whole, one = second()
    assert whole.history[-1]["penalty"] > 0
    second(tmp_path / "run", stop=2)
    resumed, other = second(tmp_path / "run")
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(torch.equal(value, other.path[name]) for name, value in one.path.items())
    assert other.steps == one.steps == 3
    one.finish_task(whole.model)
    other.finish_task(resumed.model)
    assert one.tasks == 2
    assert all(torch.equal(value, other.importance[name]) for name, value in one.importance.items())


def test_a_step_that_is_passed_over_counts_nothing():
    model, penalty = plain(), SynapticIntelligence(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    penalty.attach(model, optimizer)
    penalty.start_step()
    quadratic(model).backward()
    penalty.task_gradients()
    optimizer.found_inf = torch.tensor(1.0)  # what a GradScaler tells a fused optimizer
    penalty._before_step(optimizer)
    penalty._after_step(optimizer)
    assert penalty.steps == 0
    assert not penalty.path["weight"].any()


@pytest.mark.parametrize("first", ["penalty", "projection"])
def test_the_step_that_counts_is_the_projected_one(first):
    model, penalty = plain(), SynapticIntelligence(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    basis = torch.tensor([[0.6], [0.8], [0.0]], dtype=torch.float64)
    if first == "penalty":
        penalty.attach(model, optimizer)
    UpdateProjection(optimizer, {model.weight: basis})
    if first == "projection":
        penalty.attach(model, optimizer)
    before = model.weight.detach().clone()
    trained(model, penalty, optimizer, quadratic, 1)
    change = model.weight.detach() - before
    assert float((change @ basis).abs().max()) < 1e-12
    assert_close(penalty.path["weight"], -(H * (before - GOAL)) * change, rtol=1e-12)


def test_an_error_leaves_flags_and_optimizer_as_they_were():
    model = lora(tiny_gpt2(), ["c_attn"])
    penalty = SynapticIntelligence(1.0)

    class Failing(type(causal_lm_loss)):
        def __call__(self, model, batch):
            super().__call__(model, batch)
            raise RuntimeError("the power goes")

    loop = fitted(model, penalty, ROWS, Failing(), stop=7)
    assert not model.transformer.h[0].attn.c_attn.base.weight.requires_grad
    assert not loop.optimizer._optimizer_step_pre_hooks
    penalty.attach(model, loop.optimizer)


def test_bad_arguments():
    for options, message in (
        ({"strength": -1.0}, "strength must be a finite number, 0 or more; got -1.0"),
        ({"strength": 1.0, "damping": 0.0}, "damping must be a finite number above 0; got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SynapticIntelligence(**options)
    model, penalty = plain(), SynapticIntelligence(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has followed no step of this task: attach it before training"):
        penalty.finish_task(model)
    penalty.attach(model, optimizer)
    with pytest.raises(ValueError, match="is attached already: detach it first"):
        penalty.attach(model, optimizer)
    quadratic(model).backward()
    with pytest.raises(ValueError, match="has no gradient of this step's task: call task_gradients"):
        optimizer.step()
    with pytest.raises(CheckpointError, match=r"had damping 0\.1; this one has 0\.2"):
        SynapticIntelligence(1.0, damping=0.2).load_state_dict(penalty.state_dict())
    with pytest.raises(ValueError, match="SynapticIntelligence acts in on_fit_start, which the Trainer does not call"):
        with_loss(type("Any", (), {"get_batch_samples": None}), causal_lm_loss, penalties=[penalty])


def test_frozen_since_another_model_and_adapters_that_do_more_than_add():
    model, penalty = nn.Linear(3, 2).double(), SynapticIntelligence(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.attach(model, optimizer)
    trained(model, penalty, optimizer, quadratic, 1)
    penalty.detach()
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="weight was trained when this task began and is frozen now: unfreeze it, or"):
        penalty.attach(model, optimizer)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the model's 2 parameters is chosen: none requires a gradient"):
        penalty.attach(model, optimizer)
    with pytest.raises(ValueError, match=r"follows no parameter that is trained: all 1 are frozen \(the first: bias"):
        SynapticIntelligence(1.0, parameters=["bias"]).attach(model, optimizer)
    for other in (nn.Linear(3, 5), nn.Linear(7, 2)):
        with pytest.raises(ValueError, match=r"weight is .* in the model and \[2, 3\] in the path: another model's"):
            penalty.attach(other, optimizer)
        with pytest.raises(ValueError, match=r"weight is .* in the model and \[2, 3\] in the path: another model's"):
            penalty.finish_task(other)
    model = SmallModel()
    attach(model, DoRA(rank=2, alpha=4, targets=["head"], dtype=torch.float64))
    with pytest.raises(ValueError, match=r'head.weight is changed by adapter "default", which does more than add to'):
        SynapticIntelligence(1.0).attach(model, optimizer)
    model = SmallModel()
    attach(model, LoRA(rank=2, alpha=4, targets=["head"], dtype=torch.float64))
    penalty = SynapticIntelligence(1.0)
    penalty.attach(model, optimizer)
    with pytest.raises(ValueError, match=r"head.weight is under an adapter and got no gradient: call start_step"):
        penalty.task_gradients()
