"""InfLoRA's change is 0 on every protected input, after AdamW's steps too; its A is the top of what is left."""

import json
import math

import pytest
import torch
from torch import nn

from llmtune.adapters import DoRA, LoRA, adapter_parameters, attach, merge
from llmtune.adapters.attach import adapter_layers
from llmtune.adapters.stack import AdapterStack
from llmtune.data.collate import collate_padded
from llmtune.forgetting import designed_rows, extend_basis, inflora_start, input_basis
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5


def inputs(rows=11, size=7, rank=7, *, seed=0):
    """Return [rows, size] float64 vectors that span `rank` directions."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, size, generator=generator, dtype=torch.float64)


def basis(size=7, columns=3, *, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, columns, generator=generator, dtype=torch.float64)).Q


def same_rows(one, other, *, atol=1e-8):
    """Check that the rows are equal up to their signs."""
    signs = (one * other).sum(1, keepdim=True).sign()
    torch.testing.assert_close(one, signs * other, rtol=0, atol=atol)


# --- the directions -------------------------------------------------------------------------------------------------


def test_without_protection_the_rows_are_the_inputs_principal_directions():
    x = inputs()
    expected = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    same_rows(designed_rows(x.T @ x, 3), expected)


def test_with_protection_they_are_the_first_left_singular_vectors_of_what_is_left():
    x, q = inputs(), basis()
    left = (torch.eye(7, dtype=torch.float64) - q @ q.T) @ x.T @ x
    expected = torch.linalg.svd(left).U.T[:3]
    found = designed_rows(x.T @ x, 3, protected=q)
    same_rows(found, expected)
    assert (found @ q).abs().max() < 1e-14


def test_directions_that_only_rounding_leaves_are_rows_of_0():
    """The inputs span five directions, two of them protected: three are left, whatever the rank."""
    x = inputs(rank=5)
    q = torch.linalg.qr(x.T[:, :2]).Q
    found = designed_rows(x.T @ x, 6, protected=q)
    assert [bool(row.any()) for row in found] == [True, True, True, False, False, False]
    assert (found @ q).abs().max() < 1e-14
    torch.testing.assert_close(found[:3] @ found[:3].T, torch.eye(3, dtype=torch.float64))
    all_protected = torch.linalg.qr(x.T[:, :5]).Q
    assert not designed_rows(x.T @ x, 4, protected=all_protected).any()


@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-11])
@pytest.mark.parametrize("protect", ["largest", "any"])
def test_they_are_those_of_the_svd_over_many_orders_of_magnitude(smallest, protect):
    """Squares of the singular values of (I - P) C, on which the eigenvectors rest, are fourth powers of the inputs."""
    u = torch.linalg.qr(torch.randn(23, 23, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    energies = torch.logspace(0, math.log10(smallest), 23, dtype=torch.float64)
    moment = (u * energies) @ u.T
    moment = (moment + moment.T) / 2
    q = u[:, :3].contiguous() if protect == "largest" else basis(23, 3)
    found = designed_rows(moment, 20, protected=q)
    left, values, _ = torch.linalg.svd(moment - q @ (q.T @ moment))
    for row, direction, value in zip(found, left.T, values, strict=False):
        assert abs(float(row @ direction)) == pytest.approx(1, abs=1e-7), float(value)
    assert (found @ q).abs().max() < 1e-14
    torch.testing.assert_close(found @ found.T, torch.eye(20, dtype=torch.float64))


def test_a_basis_rounded_to_float32_leaves_no_direction():
    """(I - P) C is then 6e-8 of C in size: rounding, in which there is no direction to learn in."""
    x = inputs(rank=5)
    q = extend_basis(x.T @ x, energy=1.0)
    assert q.shape == (7, 5)
    assert not designed_rows(x.T @ x, 4, protected=q).any()


def test_the_share_is_one_of_squares():
    """Energies 6, 3 and 1: 85 % needs two directions. Of fourth powers, as in the public code, one would do 78 %."""
    covariance = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
    assert extend_basis(covariance, energy=0.6 - 1e-6).shape == (3, 1)
    assert extend_basis(covariance, energy=0.75).shape == (3, 2)
    assert extend_basis(covariance, energy=1.0).shape == (3, 3)
    assert extend_basis(torch.diag(torch.tensor([6.0, 3.0, 0.0])), energy=1.0).shape == (3, 2)
    held = torch.eye(3)[:, :2]
    assert torch.equal(extend_basis(covariance, held, energy=0.85), held)


# --- on models ------------------------------------------------------------------------------------------------------


def batch_of(make, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if make is tiny_t5:
        batch["labels"] = batch["labels"][:, :5].contiguous()
    return batch


TARGETS = {
    tiny_llama: ["q_proj", "down_proj"],
    tiny_gpt2: ["c_attn", "c_fc"],
    tiny_bert: ["query"],
    tiny_t5: ["k", "wo"],
}


def train(model, batch, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("make", TARGETS)
def test_the_change_never_touches_protected_inputs_after_adamw(make):
    stack, config = AdapterStack(make()), LoRA(rank=4, alpha=8, targets=TARGETS[make])
    first, second = batch_of(make), batch_of(make, seed=1)
    stack.start(config, "first")
    modules = inflora_start(stack.model, "first", [first]).rows
    train(stack.model, first)
    protected = input_basis(stack.model, [first], energy=0.6, modules=modules)
    stack.start(config, "second")
    report = inflora_start(stack.model, "second", [second], protected=protected)
    assert set(report.rows) == set(protected)
    start = {id(layer): layer.lora_a.clone() for layer in adapter_layers(stack.model, "second")}
    train(stack.model, second)
    for place, layer in zip(report.rows, adapter_layers(stack.model, "second"), strict=True):
        assert torch.equal(layer.lora_a, start[id(layer)])
        assert not layer.lora_a.requires_grad
        change = layer.deltas()["weight"].T if layer.transposed else layer.deltas()["weight"]
        assert change.norm() > 1e-3
        assert (change @ protected[place]).norm() < 1e-6 * change.norm()


def test_a_on_a_linear_layer_is_the_closed_form():
    x, q = inputs().float(), basis().float()
    model = nn.Sequential(nn.Linear(7, 5))
    attach(model, LoRA(rank=3, alpha=2), "task")
    report = inflora_start(model, "task", [(x[:4], None), (x[4:], None)], protected={"0": q})
    left = (torch.eye(7) - q @ q.T).double() @ (x.T @ x).double()
    same_rows(model[0].lora_a.detach().double() * 3**0.5, torch.linalg.svd(left).U.T[:3], atol=1e-6)
    assert (report.rows, report.counted) == ({"0": 3}, {"0": 11})


def test_rows_have_the_length_of_loras_usual_start():
    usual = nn.Sequential(nn.Linear(4096, 3))
    attach(usual, LoRA(rank=3, alpha=2), "task")
    assert float(usual[0].lora_a.detach().norm(dim=1).mean()) == pytest.approx(1 / 3**0.5, rel=0.03)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_t5])
def test_padding_is_no_input(make):
    """Other tokens under the mask, or fewer of them, give the same A."""
    found = []
    for change in (None, "tokens", "width"):
        model, batch = make(), batch_of(make)
        ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
        if change == "tokens":
            batch["input_ids"] = torch.where(mask == 0, 96 - ids, ids)
        if change == "width":
            wider = {"input_ids": 5, "attention_mask": 0, "labels": -100}
            batch = {k: nn.functional.pad(v, (0, 3), value=wider[k]) for k, v in batch.items()}
        attach(model, LoRA(rank=4, alpha=8, targets=TARGETS[make]), "task")
        report = inflora_start(model, "task", [batch])
        tokens, targets = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
        assert set(report.counted.values()) <= {tokens, targets}
        if make is not tiny_t5:
            assert set(report.counted.values()) == {tokens}
        found.append([layer.lora_a.detach().double() for layer in adapter_layers(model, "task")])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one.T @ one, two.T @ two, rtol=0, atol=2e-4)


def test_modes_random_state_and_weights_are_as_they_were():
    model = tiny_bert(labels=3, dropout=0.1)
    attach(model, LoRA(rank=2, alpha=3, targets=["query"]), "task")
    model.train()
    before, drawn = {n: p.clone() for n, p in model.named_parameters() if "lora_a" not in n}, torch.get_rng_state()
    inflora_start(model, "task", [{k: v for k, v in batch_of(tiny_bert).items() if k != "labels"}])
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_frozen_is_saved_with_the_stack(tmp_path):
    stack = AdapterStack(tiny_llama())
    stack.start(LoRA(rank=2, alpha=3, targets=["q_proj"], train_bias="none"), "first")
    inflora_start(stack.model, "first", [batch_of(tiny_llama)])
    stack.save(tmp_path)
    again = AdapterStack.load(tiny_llama(), tmp_path)
    assert again.trained == ["first"]
    for one, other in zip(adapter_layers(stack.model), adapter_layers(again.model), strict=True):
        assert torch.equal(one.lora_a, other.lora_a)
        assert (other.lora_a.requires_grad, other.lora_b.requires_grad) == (False, True)
    path = tmp_path / "adapter_stack.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key != "frozen"}))  # as older files are
    older = AdapterStack.load(tiny_llama(), tmp_path)
    assert all(layer.lora_a.requires_grad for layer in adapter_layers(older.model))
    path.write_text(json.dumps(state | {"frozen": {"first": ["gone"]}}))
    with pytest.raises(ValueError, match='"frozen" names gone, which adapter "first" has not'):
        AdapterStack.load(tiny_llama(), tmp_path)


# --- bad input ------------------------------------------------------------------------------------------------------


def attached(kind):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    config = DoRA(rank=2, alpha=2) if kind == "dora" else LoRA(rank=2, alpha=2, targets=["0"])
    if kind == "pissa":
        config = LoRA(rank=2, alpha=2, initialise="pissa")
    if kind == "experts":
        config = LoRA(rank=2, alpha=2, targets=(), target_parameters=["0.weight"])
    if kind == "whole":
        config = LoRA(rank=2, alpha=2, targets=(), train_modules=["0"])
    attach(model, config, "task")
    if kind == "trained":
        nn.init.ones_(model[0].lora_b)
    if kind == "older":
        attach(model, LoRA(rank=2, alpha=2), "newer")
    if kind == "merged":
        merge(model, "task")
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dora", 'adapter "task" is DoRA: InfLoRA designs the A of a plain LoRA'),
        ("pissa", 'adapter "task" has a B that is not 0 at 0: InfLoRA sets A before the task\'s training'),
        ("trained", 'adapter "task" has a B that is not 0 at 0'),
        ("older", 'adapter "task" is not the newest: InfLoRA sets A before'),
        ("merged", 'adapter "task" is merged into the weights: InfLoRA sets A before'),
        ("experts", 'adapter "task" has target_parameters, whose inputs InfLoRA does not see'),
        ("whole", 'adapter "task" adapts no module by LoRA: there is no A to design'),
    ],
)
def test_adapters_it_does_not_go_to(kind, message):
    with pytest.raises(ValueError, match=message):
        inflora_start(attached(kind), "task", [(inputs().float(), None)])


@pytest.mark.parametrize(
    ("protected", "message"),
    [
        ({}, r'protected has no basis for "0", which the adapter goes to, .* give an empty one, \[7, 0\]'),
        ({"0": torch.eye(5)[:, :2]}, r"the protected basis of 0 .* must be \[7, k\]; got \[5, 2\]"),
        ({"0": torch.ones(7, 2)}, "the columns of the protected basis of 0 .* must be orthonormal"),
        ({"0": torch.eye(7)}, "the protected inputs of 0 leave none of the new task's directions free"),
        ({"0": torch.eye(7)[:, :2], "9": torch.eye(7)}, 'protected names "9", which the model has not'),
    ],
)
def test_bases_that_do_not_fit_change_nothing(protected, message):
    model = attached("plain")
    before = model[0].lora_a.clone()
    with pytest.raises(ValueError, match=message):
        inflora_start(model, "task", [(inputs().float(), None)], protected=protected)
    assert torch.equal(model[0].lora_a, before)
    assert model[0].lora_a.requires_grad


def test_batches_that_hold_nothing():
    model = attached("plain")
    with pytest.raises(ValueError, match="0 has had no input: there are no batches, or the model does not call it"):
        inflora_start(model, "task", [])
    with pytest.raises(TypeError, match="batches must be a list, or another iterable, of batches; got a single one"):
        inflora_start(model, "task", {"input_ids": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="0: the inputs are not finite"):
        inflora_start(model, "task", [(inputs().float() * float("nan"), None)])
    with pytest.raises(ValueError, match="all inputs of 0 are 0: leave it out of the targets"):
        inflora_start(model, "task", [(inputs().float() * 0, None)])
    with pytest.raises(ValueError, match='the model has no adapter "maths"'):
        inflora_start(model, "maths", [])
    bert = tiny_bert()
    attach(bert, LoRA(rank=2, alpha=3, targets=["word_embeddings"]), "task")
    with pytest.raises(ValueError, match="word_embeddings is an embedding, which has no input vectors"):
        inflora_start(bert, "task", [])
    with pytest.raises(ValueError, match=r"the second moment of inputs is square, \[in, in\]; got \[2, 3\]"):
        designed_rows(torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match="the rank must be a whole number from 1 to 3, the inputs' size; got 4"):
        designed_rows(torch.eye(3), 4)


def test_rows_of_a_loops_collator_go_in_as_they_are():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), "task")
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    assert set(inflora_start(model, "task", [collate_padded(rows)]).counted.values()) == {5}
    assert all(p.requires_grad == ("lora_b" in n) for n, p in adapter_parameters(model, "task").items())
