"""OGD: orthonormal gradients of logits over all parameters, and logits that stay under Adam."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.data.collate import collate_padded
from llmtune.forgetting import OrthogonalGradientDescent, gradient_directions
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings

ROWS = uneven_rows(4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def examples(count=4, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=draw), torch.randint(0, 3, (count,), generator=draw)


def matrix(directions):
    """Return [k, P], the directions as whole vectors."""
    return torch.cat([value.double().flatten(1) for value in directions.values()], 1)


def by_autograd(model, scores):
    rows = []
    for score in scores:
        given = torch.autograd.grad(score, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.double().flatten() for g in given]))
    return torch.stack(rows)


@pytest.mark.parametrize("logits", ["label", "all"])
def test_they_are_an_orthonormal_basis_of_the_logits_gradients(logits):
    model, (x, y) = network(), examples()
    found = gradient_directions(model, [(x[:3], y[:3]), (x[3:], y[3:])], most=50, logits=logits)
    out = model(x)
    wanted = by_autograd(model, out.flatten() if logits == "all" else out.gather(1, y[:, None]).flatten())
    q = matrix(found)
    assert len(q) == (12 if logits == "all" else 4)
    torch.testing.assert_close(q @ q.T, torch.eye(len(q), dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(wanted @ q.T @ q, wanted, atol=1e-4, rtol=1e-4)
    first = wanted[0] / wanted[0].norm()
    torch.testing.assert_close(q[0], first, atol=1e-5, rtol=0)


def test_dependent_gradients_are_passed_by_and_no_more_than_asked_for_are_taken():
    model, (x, y) = network(), examples()
    twice = (torch.cat([x, x]), torch.cat([y, y]))
    assert len(matrix(gradient_directions(model, [twice], most=50))) == 4
    few = gradient_directions(model, [(x, y)], most=2)
    assert torch.equal(matrix(few), matrix(gradient_directions(model, [(x, y)], most=50))[:2])


def test_extending_keeps_the_old_and_goes_through_safetensors(tmp_path):
    model, old, new = network(), examples(), examples(seed=2)
    first = gradient_directions(model, [old], most=3)
    save_file(first, tmp_path / "directions.safetensors")
    both = gradient_directions(model, [new], most=9, extend=load_file(tmp_path / "directions.safetensors"))
    q = matrix(both)
    assert len(q) == 7
    assert torch.equal(q[:3], matrix(first))
    torch.testing.assert_close(q @ q.T, torch.eye(7, dtype=torch.float64), atol=1e-5, rtol=0)
    same = gradient_directions(model, [old], most=1, extend=gradient_directions(model, [old], most=4))
    assert len(matrix(same)) == 4


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5, "classifier", "lora"])
def test_it_works_for_language_models_classifiers_and_under_lora(make):
    rows = ROWS
    if make == "classifier":
        model = tiny_bert(labels=3)
        rows = [{**row, "labels": index % 3} for index, row in enumerate(rows)]
    elif make == "lora":
        model = tiny_llama()
        attach(model, LoRA(rank=2, alpha=2))
    else:
        model = make()
    model.train()
    found = gradient_directions(model, [collate_padded(rows)], most=8)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    q = matrix(found)
    assert q.shape[0] == 4
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64), atol=1e-4, rtol=0)


def moved(rate, *, protect):
    """Return how far the protected logits move in five steps of AdamW at a rate."""
    model, (x, y) = network().double(), examples()
    x = x.double()
    memory = OrthogonalGradientDescent(most=4)
    memory.finish_task(model, [(x, y)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    if protect:
        memory.attach(model, optimizer)
    before = model(x).gather(1, y[:, None]).detach()
    draw = torch.Generator().manual_seed(5)
    new, target = torch.randn(9, 7, generator=draw).double(), torch.randint(0, 3, (9,), generator=draw)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(new), target).backward()
        optimizer.step()
    return float((model(x).gather(1, y[:, None]).detach() - before).abs().max())


def test_to_first_order_the_logits_stay_under_adamw():
    assert 9 < moved(1e-3, protect=False) / moved(1e-4, protect=False) < 11
    assert 80 < moved(1e-3, protect=True) / moved(1e-4, protect=True) < 120


def run(memory, folder, stop=None):
    chosen = LoopSettings(max_steps=4, rows_per_step=4, learning_rate=1e-2, progress=False, folder=folder, save_every=2)
    loop = TrainingLoop(tiny_gpt2(dropout=0.1), uneven_rows(8, seed=3), settings=chosen, callbacks=[memory])
    training_step = loop.training_step

    def step(batches):
        if loop.step == stop:
            raise KeyboardInterrupt
        return training_step(batches)

    loop.training_step = step
    return loop


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    def finished():
        memory = OrthogonalGradientDescent(most=3)
        memory.finish_task(tiny_gpt2(), [collate_padded(ROWS)])
        return memory

    whole = run(finished(), tmp_path / "whole")
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        run(finished(), tmp_path / "cut", stop=3).fit()
    again = run(OrthogonalGradientDescent(most=3), tmp_path / "cut")
    again.fit(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_bad_input():
    model, (x, y) = network(), examples()
    first = gradient_directions(model, [(x, y)], most=2)
    odd = {**first, "0.weight": first["0.weight"].mT}
    cases = [
        (lambda: gradient_directions(model, [(x, y)], most=0), ValueError, "most must be a whole number"),
        (lambda: OrthogonalGradientDescent(most=True), ValueError, "most must be a whole number"),
        (lambda: gradient_directions(model, [(x, y)], most=2, logits="mean"), ValueError, 'must be "label" or "all"'),
        (lambda: gradient_directions(model, {"x": x}, most=2), TypeError, "got a single one"),
        (lambda: gradient_directions(model, [], most=2), ValueError, "the examples give no direction"),
        (lambda: gradient_directions(model, [(x, y - y - 100)], most=2), ValueError, "the examples give no direction"),
        (lambda: gradient_directions(model, [(x / 0, y)], most=2), ValueError, "not finite"),
        (lambda: gradient_directions(model, [(x, y)], most=2, parameters=["0.weigt"]), ValueError, '"0.weigt".*mean'),
        (
            lambda: gradient_directions(model, [(x, y)], most=2, extend={"0.weight": first["0.weight"]}),
            ValueError,
            'differ in "0.bias"',
        ),
        (
            lambda: gradient_directions(model, [(x, y)], most=2, extend=odd),
            ValueError,
            r"directions of 0.weight \[5, 7\] must be \[k, \*shape\]; got \[2, 7, 5\]",
        ),
        (
            lambda: gradient_directions(tiny_llama(), [collate_padded(ROWS)], most=2, logits="all"),
            ValueError,
            r'logits="all" is for labels of classes',
        ),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    memory = OrthogonalGradientDescent(most=2)
    memory.finish_task(model, [(x, y)])
    other = copy.deepcopy(model)
    other[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0.weight has directions and is not trained"):
        memory.attach(other, torch.optim.SGD(other.parameters(), lr=0.1))
