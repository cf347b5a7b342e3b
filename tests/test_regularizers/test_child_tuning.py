import json

import pytest
import torch
from torch import nn

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.errors import CheckpointError
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.regularizers.child_mask import child_mask
from llmtune.regularizers.child_tuning import ChildTuning
from llmtune.regularizers.decoupled_l2sp import DecoupledL2SP
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_llama
from llmtune.testing.small import SmallModel, moved
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


def rising(model, names=None):
    """Return a made-up Fisher information without ties: seeded, a function of names and shapes."""
    generator = torch.Generator().manual_seed(3)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: torch.rand(p.shape, generator=generator) for n, p in named.items() if names is None or n in names}


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def give_gradients(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


# --- the child network ----------------------------------------------------------------------------------------------


def test_the_mask_by_hand():
    fisher = {"a": torch.tensor([[1.0, 5.0, 2.0], [0.0, 7.0, 0.5]]), "b": torch.tensor([3.0, 6.0, 0.1, 4.0])}
    mask = child_mask(fisher, 0.3)
    assert mask["a"].tolist() == [[False, True, False], [False, True, False]]
    assert mask["b"].tolist() == [False, True, False, False]


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.97])
def test_the_mask_is_of_the_largest_over_all_tensors(p):
    fisher = rising(tiny_llama())
    mask = child_mask(fisher, p)
    flat = torch.cat([f.flatten() for f in fisher.values()])
    chosen = torch.cat([mask[name].flatten() for name in fisher])
    keep = round(p * len(flat))
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[flat.argsort(descending=True)[:keep]] = True
    assert torch.equal(chosen, expected)
    assert [m.shape for m in mask.values()] == [f.shape for f in fisher.values()]


def test_of_equal_ones_the_first_are_chosen():
    fisher = {"a": torch.tensor([0.0, 1.0, 0.0]), "b": torch.zeros(2, 2), "c": torch.tensor([2.0])}
    mask = child_mask(fisher, 0.625)  # 5 of 8: 1.0, 2.0, and three of the zeros
    assert mask["a"].tolist() == [True, True, True]
    assert mask["b"].tolist() == [[True, False], [False, False]]
    assert mask["c"].tolist() == [True]


@pytest.mark.parametrize(
    ("fisher", "p", "error", "message"),
    [
        ({"a": torch.ones(3)}, 0.0, ValueError, "must be above 0 and below 1; got 0.0"),
        ({"a": torch.ones(3)}, 1.0, ValueError, "must be above 0 and below 1; got 1.0"),
        ({"a": torch.ones(3)}, float("nan"), ValueError, "must be above 0 and below 1; got nan"),
        ({"a": torch.ones(3)}, 0.1, ValueError, "p=0.1 of 3 entries is none of them"),
        ({"a": torch.ones(3)}, 0.9, ValueError, "p=0.9 of 3 entries is all of them"),
        ({}, 0.5, ValueError, "fisher names no parameter"),
        ({"a": torch.tensor([1.0, -1.0])}, 0.5, ValueError, "of a must be finite, 0 or more"),
        ({"a": torch.tensor([1.0, float("nan")])}, 0.5, ValueError, "of a must be finite, 0 or more"),
        ({"a": torch.ones(3, dtype=torch.long)}, 0.5, TypeError, "of a must be a tensor of floats"),
    ],
)
def test_bad_arguments(fisher, p, error, message):
    for make in (lambda: child_mask(fisher, p), lambda: ChildTuning(p, fisher=fisher)):
        with pytest.raises(error, match=message):
            make()


# --- D: one child network -------------------------------------------------------------------------------------------


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_outside_the_child_no_bit_changes(make):
    """Nor through weight decay, nor through momentum that was there before; inside it is the optimizer's own step."""
    model, twin = SmallModel(), SmallModel()
    optimizer, plain = (make([p for p in m.parameters() if p.requires_grad]) for m in (model, twin))
    for module, one in ((model, optimizer), (twin, plain)):
        give_gradients(module, seed=1)
        one.step()  # momentum, of every entry
    child = ChildTuning(0.3, fisher=rising(model))
    child.attach(model, optimizer)
    before = values(model)
    for step in range(3):
        for module in (model, twin):
            give_gradients(module, seed=2 + step)
        child.mask_gradients()
        optimizer.step()
        plain.step()
    for name, p in model.named_parameters():
        if name not in child.child:
            assert torch.equal(p, before[name])  # frozen
            continue
        mask = child.child[name]
        assert torch.equal(p[~mask], before[name][~mask])
        assert torch.equal(p[mask], twin.get_parameter(name)[mask])
        assert not p.grad[~mask].any()
        assert (p[mask] != before[name][mask]).all()
    child.detach()
    optimizer.step()
    assert any((p != before[name]).all() for name, p in model.named_parameters())


@pytest.mark.parametrize("child_first", [True, False])
def test_outside_the_child_nothing_is_pulled_back_either(child_first):
    model = SmallModel()
    child = ChildTuning(0.4, fisher=rising(model))
    pull = DecoupledL2SP({name: torch.zeros_like(p) for name, p in model.named_parameters()}, 2.0)
    before = values(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for part in (child, pull) if child_first else (pull, child):
        part.attach(model, optimizer)
    give_gradients(model)
    child.mask_gradients()
    optimizer.step()
    for name, mask in child.child.items():
        now = model.get_parameter(name).detach()
        assert torch.equal(now[~mask], before[name][~mask])
        assert (now[mask] != before[name][mask]).all()


def test_d_in_the_loop_with_the_fisher_of_single_examples():
    from llmtune.data.collate import collate_padded

    model = tiny_llama()
    fisher = diagonal_fisher(model, [collate_padded(uneven_rows(4))], kind="empirical")
    child = ChildTuning(0.2, fisher=fisher)
    before = values(model)
    settings = LoopSettings(
        max_steps=3, rows_per_step=4, rows_per_micro_batch=2, learning_rate=1e-2, weight_decay=0.1, progress=False
    )
    TrainingLoop(model, uneven_rows(8), settings=settings, callbacks=[child]).fit()
    changed = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    assert not any((changed[name] & ~mask).any() for name, mask in child.child.items())
    assert sum(int(c.sum()) for c in changed.values()) > 0.9 * 0.2 * sum(c.numel() for c in changed.values())


def test_the_norm_that_is_clipped_is_the_childs():
    model = tiny_llama()
    child = ChildTuning(0.2, fisher=rising(model))
    settings = LoopSettings(max_steps=1, rows_per_step=4, progress=False)
    loop = TrainingLoop(model, uneven_rows(8), settings=settings, callbacks=[child])
    loop.accumulate_gradients(loop.micro_batches(0))
    squares = sum((p.grad[child.child[n]]).double().square().sum() for n, p in model.named_parameters())
    history = loop.fit()
    assert history[0]["grad_norm"] == pytest.approx(float(squares.sqrt()), rel=1e-5)


def test_what_fisher_does_not_name_is_trained_whole():
    model = tiny_bert(labels=3)
    names = [name for name, _ in model.named_parameters() if "classifier" not in name]
    child = ChildTuning(0.3, fisher=rising(model, names))
    optimizer = sgd(model.parameters())
    child.attach(model, optimizer)
    before = values(model)
    give_gradients(model)
    child.mask_gradients()
    optimizer.step()
    assert (model.classifier.weight != before["classifier.weight"]).all()


# --- F: a child network a step --------------------------------------------------------------------------------------


def test_f_by_sgd_is_the_papers_step_either_way():
    """theta - lr g m / p, m the draws of the global random state."""
    results = []
    for of in ("update", "gradient"):
        model = SmallModel()
        parameters = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        child = ChildTuning(0.25, of=of)
        child.attach(model, optimizer)
        give_gradients(model)
        gradients = [p.grad.clone() for p in parameters]
        torch.manual_seed(11)
        child.mask_gradients()
        optimizer.step()
        torch.manual_seed(11)
        for p, start, g in zip(parameters, before, gradients, strict=True):
            m = torch.empty(p.shape).bernoulli_(0.25)
            assert_close(p.detach(), start - 0.1 * g * m / 0.25, rtol=1e-12)
            assert torch.equal(p[m == 0], start[m == 0])
        results.append(parameters)


def test_f_draws_anew_with_the_right_share():
    model = nn.Linear(101, 103, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    child = ChildTuning(0.3)
    child.attach(model, optimizer)
    masks = []
    for _ in range(2):
        before = model.weight.detach().clone()
        give_gradients(model)
        optimizer.step()
        masks.append(model.weight != before)
    n = 101 * 103
    for mask in masks:
        assert abs(int(mask.sum()) - 0.3 * n) < 5 * (n * 0.3 * 0.7) ** 0.5
    both = int((masks[0] & masks[1]).sum())
    assert abs(both - 0.09 * n) < 5 * (n * 0.09 * 0.91) ** 0.5


@pytest.mark.parametrize(("of", "expected"), [("update", 1.0), ("gradient", 0.25**0.5)])
def test_under_adam_masking_the_gradient_shrinks_a_steady_update_to_sqrt_p(of, expected):
    """The mean of m g / p is g, of its square g^2 / p: Adam divides by the root of the latter."""
    model = nn.Linear(401, 1, bias=False).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    child = ChildTuning(0.25, of=of)
    child.attach(model, optimizer)
    for step in range(700):
        if step == 300:
            before = model.weight.detach().clone()
        model.weight.grad = torch.ones_like(model.weight)
        child.mask_gradients()
        optimizer.step()
    moved_by = float((before - model.weight.detach()).mean()) / (400 * 1e-3)
    assert moved_by == pytest.approx(expected, rel=0.05)


def test_f_of_the_gradient_lets_momentum_and_decay_move_what_is_left_out():
    """The paper's way, where it differs: nothing is held back."""
    model = SmallModel()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    child = ChildTuning(0.25, of="gradient")
    child.attach(model, optimizer)
    before = values(model)
    give_gradients(model)
    child.mask_gradients()
    assert any((p.grad == 0).any() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    assert (model.head.weight != before["head.weight"]).all()


@pytest.mark.parametrize("of", ["update", "gradient"])
@pytest.mark.parametrize("make", [tiny_llama, lambda: attached(tiny_llama())])
def test_f_in_the_loop_draws_once_a_step_whatever_the_micro_batches(make, of):
    results = []
    for rows in (4, 1):
        torch.manual_seed(5)
        model = make()
        settings = LoopSettings(
            max_steps=3, rows_per_step=4, rows_per_micro_batch=rows, learning_rate=1e-3, progress=False, clip_norm=None
        )
        TrainingLoop(model, uneven_rows(8), settings=settings, callbacks=[ChildTuning(0.5, of=of)]).fit()
        results.append(values(model))
    for name, value in results[0].items():
        assert float((value - results[1][name]).abs().max()) < 2e-4, name


def attached(model):
    attach(model, LoRA(rank=2, alpha=3))
    return model


class Stop(Callback):
    """Ends a run after two steps, as Ctrl-C does."""

    def on_step_start(self, loop):
        if loop.step == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(folder, *others, resume=False):
        model = tiny_llama()
        settings = LoopSettings(max_steps=4, rows_per_step=4, folder=folder, save_every=2, progress=False)
        callbacks = [ChildTuning(0.5), *others]
        TrainingLoop(model, uneven_rows(8), settings=settings, callbacks=callbacks).fit(resume=resume)
        return values(model)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Stop())
    parts = run(tmp_path / "parts", resume=True)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


# --- refusals and state ---------------------------------------------------------------------------------------------


def test_bad_knobs():
    with pytest.raises(ValueError, match='of must be "update" or "gradient"; got \'step\''):
        ChildTuning(0.5, of="step")
    with pytest.raises(ValueError, match='of="gradient" is for masks drawn at every step'):
        ChildTuning(0.5, fisher={"a": torch.ones(4)}, of="gradient")
    with pytest.raises(ValueError, match="must be above 0 and below 1; got 1"):
        ChildTuning(1)


def test_what_does_not_fit_raises():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    child = ChildTuning(0.5, fisher=rising(model))
    with pytest.raises(ValueError, match="not attached to a model and its optimizer: attach it first"):
        child.mask_gradients()
    child.attach(model, optimizer)
    with pytest.raises(ValueError, match="this ChildTuning is attached already"):
        child.attach(model, optimizer)
    child.detach()
    with pytest.raises(
        ValueError, match=r'fisher names "lm_heat.weight", which the model has not. Did you mean "lm_head'
    ):
        ChildTuning(0.5, fisher={"lm_heat.weight": torch.ones(97, 28)}).attach(model, optimizer)
    with pytest.raises(ValueError, match=r"lm_head.weight is \[97, 28\] in the model and \[28, 97\] in fisher"):
        ChildTuning(0.5, fisher={"lm_head.weight": torch.ones(28, 97)}).attach(model, optimizer)
    attach(model, LoRA(rank=2, alpha=3))
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight is frozen: a child network is of weights that are trained"
    ):
        child.attach(model, optimizer)
    child = ChildTuning(0.5, fisher={"model.layers.0.self_attn.q_proj.weight": torch.rand(56, 28)})
    with pytest.raises(ValueError, match=r'q_proj.weight is changed by adapter "default": a child network is of'):
        child.attach(model, optimizer)


def test_state_tells_one_from_another_and_survives_json():
    model = SmallModel()
    fisher = rising(model)
    state = json.loads(json.dumps(ChildTuning(0.5, fisher=fisher).state_dict()))
    ChildTuning(0.5, fisher=fisher).load_state_dict(state)
    ChildTuning(0.5).load_state_dict(ChildTuning(0.5).state_dict())
    with pytest.raises(CheckpointError, match=r"the saved ChildTuning had p=0.5; this one has 0.4"):
        ChildTuning(0.4, fisher=fisher).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"the saved ChildTuning had p=None; this one has 0.5"):
        ChildTuning(0.5).load_state_dict({})
    with pytest.raises(CheckpointError, match="had of='update'; this one has 'gradient'"):
        ChildTuning(0.5, of="gradient").load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"the saved ChildTuning had another child network in first.weight"):
        ChildTuning(0.5, fisher=rising(moved(model)) | {"first.weight": torch.ones(5, 5)}).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"the saved ChildTuning had another child network in first.weight"):
        ChildTuning(0.5).load_state_dict(state)
