"""Bases of layers' inputs (GPM), the parameters they protect, and a sequence of tasks that keeps to them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.adapters import IA3, DoRA, LoRA, attach
from llmtune.adapters.attach import adapter_layers, detach
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.errors import CheckpointError
from llmtune.forgetting import (
    GradientProjectionMemory,
    extend_basis,
    input_basis,
    project_lora_a,
    protected_parameters,
)
from llmtune.optim import UpdateProjection
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings

ROWS = uneven_rows(5)


def pair(rows=7, width=11, rank=3, seed=0):
    """Return inputs [rows, width] of a rank, and targets."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, generator=draw) @ torch.randn(rank, width, generator=draw)
    return x, torch.zeros(rows, dtype=torch.long)


def orthonormal(basis):
    return torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 2))


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95, 0.999, 1.0])
def test_the_first_basis_is_that_of_the_inputs_svd(energy):
    x = torch.randn(23, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * torch.arange(1.0, 12)
    basis = extend_basis(x.T @ x, energy=energy)
    _, values, right = torch.linalg.svd(x)
    covered = values.square().cumsum(0) / values.square().sum()
    count = int((covered < energy - 1e-12).sum()) + 1
    assert basis.shape == (11, count)
    wanted = right[:count].T @ right[:count]
    torch.testing.assert_close((basis @ basis.T).double(), wanted, atol=1e-5, rtol=0)
    assert orthonormal(basis)


@pytest.mark.parametrize("energy", [0.6, 0.9, 0.99, 1.0])
def test_extending_takes_what_is_new_until_the_energy_is_there(energy):
    draw = torch.Generator().manual_seed(4)
    old = torch.linalg.qr(torch.randn(11, 3, generator=draw)).Q
    x = torch.randn(23, 11, dtype=torch.float64, generator=draw) * torch.arange(1.0, 12)
    basis = extend_basis(x.T @ x, old, energy=energy)
    assert torch.equal(basis[:, :3], old)
    assert orthonormal(basis)
    kept = x @ old.double()
    rest = x - kept @ old.double().T
    values = torch.linalg.svdvals(rest).square()
    covered = (kept.square().sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])) / x.square().sum()
    new = 8 if energy == 1.0 else int((covered < energy).sum())  # the least that reaches it
    assert basis.shape == (11, 3 + new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_and_what_is_there_already(dtype):
    x, _ = pair(rank=3)
    moment = x.to(dtype).T @ x.to(dtype)
    assert extend_basis(moment, rank=2).shape == (11, 2)
    whole = extend_basis(moment, rank=9)  # the inputs span no more
    assert whole.shape == (11, 3)
    assert torch.equal(extend_basis(moment, whole, energy=1.0), whole)
    torch.testing.assert_close(x @ whole @ whole.T, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"energy": 0.0}, "energy must be above 0 and at most 1; got 0.0"),
        ({"energy": 1.5}, "energy must be above 0 and at most 1; got 1.5"),
        ({"energy": float("nan")}, "energy must be above 0"),
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"energy": 0.9, "rank": 2}, "give energy or rank, not both"),
        ({"moment": torch.zeros(5, 5)}, "all inputs are 0"),
        ({"moment": torch.full((5, 5), torch.nan)}, "the inputs are not finite"),
        ({"basis": torch.ones(5, 2)}, "the columns of the basis to extend.*must be orthonormal"),
        ({"basis": torch.eye(7)[:, :2]}, r"the basis to extend .* must be \[5, k\]; got \[7, 2\]"),
    ],
)
def test_bad_extents(knobs, text):
    with pytest.raises(ValueError, match=text):
        extend_basis(knobs.pop("moment", torch.eye(5)), **knobs)


def test_inputs_of_each_layer_of_a_plain_network():
    model, (x, y) = network(), pair()
    bases = input_basis(model, [(x[:4], y[:4]), (x[4:], y[4:])], energy=1.0)
    assert {name: basis.shape[0] for name, basis in bases.items()} == {"0": 11, "2": 7}
    hidden = model[1](model[0](x)).detach()
    for name, inputs in (("0", x), ("2", hidden)):
        basis = bases[name]
        torch.testing.assert_close(inputs @ basis @ basis.T, inputs, atol=1e-4, rtol=1e-4)
        assert orthonormal(basis)
    assert bases["0"].shape[1] == 3


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5])
def test_batch_size_order_and_padding_change_nothing(make):
    model = make().train()
    together = input_basis(model, [collate_padded(ROWS)], rank=2)
    assert model.training
    alone = input_basis(model, [collate_padded([row]) for row in reversed(ROWS)], rank=2)
    assert together.keys() == alone.keys()
    assert len(together) > 4
    for name, basis in together.items():
        torch.testing.assert_close(basis @ basis.T, alone[name] @ alone[name].T, atol=1e-3, rtol=0)
    if make is tiny_llama:
        packed = input_basis(model, [collate_packed(ROWS)], rank=2)
        for name, basis in together.items():
            torch.testing.assert_close(basis @ basis.T, packed[name] @ packed[name].T, atol=1e-3, rtol=0)


def test_a_tied_head_is_left_out_unless_named():
    model = tiny_llama(tied=True)
    batch = [collate_padded(ROWS)]
    assert "lm_head" not in input_basis(model, batch, rank=1)
    assert list(input_basis(model, batch, rank=1, modules=["lm_head"])) == ["lm_head"]
    assert len(input_basis(model, batch, rank=1, modules=lambda name: name.endswith("q_proj"))) == 2


def test_bases_go_through_safetensors_and_are_extended(tmp_path):
    model, (x, y) = network(), pair()
    bases = input_basis(model, [(x, y)], energy=1.0)
    save_file(bases, tmp_path / "bases.safetensors")
    again = load_file(tmp_path / "bases.safetensors")
    assert all(torch.equal(again[name], basis) for name, basis in bases.items())
    more = input_basis(model, [pair(seed=1)], energy=1.0, extend=again, modules=["0"])
    assert torch.equal(more["0"][:, :3], bases["0"])
    assert more["0"].shape == (11, 6)
    assert torch.equal(more["2"], bases["2"])  # not chosen: handed on


def test_bad_models_and_batches():
    model, (x, y) = network(), pair()
    cases = [
        (lambda: input_basis(model, (x, y)[0]), TypeError, "got a single one"),
        (lambda: input_basis(model, []), ValueError, "0 has had no input: there are no batches"),
        (lambda: input_basis(model, [x]), TypeError, "a batch must be a dict of tensors or a pair"),
        (lambda: input_basis(model, [(x, y)], modules=["1"]), ValueError, 'no linear layer "1"'),
        (lambda: input_basis(model, [(x, y)], modules="0"), TypeError, "the one string '0'"),
        (lambda: input_basis(model, [(x, y)], modules=lambda name: False), ValueError, "nothing matches"),
        (lambda: input_basis(model, [(x / 0, y)]), ValueError, "0: the inputs are not finite"),
        (lambda: input_basis(model, [(0 * x, y)]), ValueError, "0: all inputs are 0"),
        (lambda: input_basis(model, [(x, y)], extend={"0": torch.eye(7)}), ValueError, r"the basis of 0 .*\[11, k\]"),
        (lambda: protected_parameters(model, {}), ValueError, "with at least one"),
        (lambda: protected_parameters(model, {"3": torch.eye(7)}), ValueError, 'a basis of "3", which is no linear'),
        (lambda: protected_parameters(model, {"2": torch.eye(11)}), ValueError, r"the basis of 2 .*\[7, k\]"),
        (lambda: project_lora_a(model, {"0": torch.eye(11)[:, :1]}), ValueError, "has a trained LoRA: attach it first"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none is trained"):
        input_basis(model, [(x, y)])
    with pytest.raises(ValueError, match="nothing is trained in the 1 layers"):
        protected_parameters(model, {"0": torch.eye(11)[:, :1]})


def steps(model, optimizer, count=30, width=11):
    draw = torch.Generator().manual_seed(9)
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(13, width, generator=draw)
        (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()


def test_the_whole_network_s_old_outputs_stay_while_it_learns():
    model, old = network(), pair()
    memory = GradientProjectionMemory(energy=1.0)
    memory.finish_task(model, [old])
    before, weights = model(old[0]).detach(), [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    memory.attach(model, optimizer)
    steps(model, optimizer)
    torch.testing.assert_close(model(old[0]), before, atol=2e-5, rtol=0)
    assert not torch.equal(weights[0], model[0].weight)
    memory.detach()
    steps(model, optimizer, count=3)
    assert float((model(old[0]) - before).detach().abs().max()) > 1e-3


def with_lora(make, bases, *, fresh=True, **options):
    model = make()
    attach(model, LoRA(rank=3, alpha=6, **options))
    if fresh:
        project_lora_a(model, bases)
    return model


def outputs_on(layer, basis):
    """Return what a LoRA layer adds on the span: s B A U."""
    return layer.scaling * layer.lora_b.detach() @ (layer.lora_a.detach() @ basis)


def trained_by(model, found, count=8, rate=0.02):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)
    UpdateProjection(optimizer, found)
    batch = collate_padded(ROWS)
    for _ in range(count):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_new_lora_that_adds_nothing_on_old_inputs(make):
    bases = input_basis(make(), [collate_padded(ROWS[:2])], rank=5, modules=lambda name: "head" not in name)
    model = with_lora(make, bases)
    base = make()
    batch = collate_padded(ROWS)
    assert torch.equal(model(**batch).logits, base(**batch).logits)  # B is 0: nothing has changed
    found = protected_parameters(model, bases)
    layers = {id(layer.lora_b): layer for layer in adapter_layers(model)}
    assert not any(id(p) in layers for p in found)  # B is free
    trained_by(model, found)
    for (name, basis), layer in zip(bases.items(), adapter_layers(model), strict=True):
        size = float((layer.lora_b.norm() * layer.lora_a.norm() * layer.scaling).detach())
        assert float(outputs_on(layer, basis).norm()) < 1e-5 * size, name
        assert float(layer.lora_b.detach().norm()) > 0


def test_a_weight_that_two_layers_share_keeps_to_both_of_their_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7, bias=False), nn.Tanh(), nn.Linear(7, 7, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(2, 7)
    bases = input_basis(model, [(x, torch.tensor([0, 0]))], energy=1.0)
    (directions,) = protected_parameters(model, bases).values()
    assert directions.basis.shape == (7, 4)
    old = model(x).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    UpdateProjection(optimizer, protected_parameters(model, bases))
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.randn(5, 7)) - 1.0).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model(x), old, rtol=0, atol=1e-5)


def test_a_trained_lora_keeps_what_it_adds_on_old_inputs():
    bases = input_basis(tiny_llama(), [collate_padded(ROWS[:2])], rank=2, modules=lambda name: "q_proj" in name)
    model = tiny_llama()
    attach(model, LoRA(rank=5, alpha=6, targets=["q_proj"]))
    torch.manual_seed(1)
    for layer in adapter_layers(model):
        nn.init.normal_(layer.lora_b)
    with pytest.raises(ValueError, match='adapter "default" has been trained, or begins with B other than 0'):
        project_lora_a(model, bases)
    before = [outputs_on(layer, basis) for layer, basis in zip(adapter_layers(model), bases.values(), strict=True)]
    starts = [(layer.lora_a.detach().clone(), layer.lora_b.detach().clone()) for layer in adapter_layers(model)]
    found = protected_parameters(model, bases)
    assert sorted(directions.basis.shape[1] for directions in found.values()) == [2, 2, 2, 2]
    trained_by(model, found)
    for layer, (a, b), old, basis in zip(adapter_layers(model), starts, before, bases.values(), strict=True):
        torch.testing.assert_close(outputs_on(layer, basis), old, atol=1e-4, rtol=1e-4)
        assert not torch.equal(layer.lora_a, a)
        assert not torch.equal(layer.lora_b, b)


def test_with_a_frozen_b_alone_is_projected():
    model = tiny_llama()
    attach(model, LoRA(rank=5, alpha=6, targets=["q_proj"]))
    bases = input_basis(model, [collate_padded(ROWS)], rank=2)
    assert list(bases) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    layers = list(adapter_layers(model))
    for layer in layers:
        layer.lora_a.requires_grad_(False)
    found = protected_parameters(model, bases)
    assert set(found) == {layer.lora_b for layer in layers}
    trained_by(model, found)
    for layer, basis in zip(layers, bases.values(), strict=True):
        size = float((layer.lora_b.norm() * layer.lora_a.norm() * layer.scaling).detach())
        assert float(outputs_on(layer, basis).norm()) < 1e-5 * size


def test_what_cannot_be_protected_says_so():
    bases = {"0": torch.eye(11)[:, :4]}
    for config, name in ((DoRA(rank=2, alpha=2), "DoRA"), (IA3(targets=["0"], feedforward=[]), "IA3")):
        model = network()
        attach(model, config)
        with pytest.raises(ValueError, match=f'0 carries adapter "default", a {name}.*only LoRA can be projected'):
            protected_parameters(model, bases)
    model = network()
    attach(model, LoRA(rank=2, alpha=2, lora_bias=True))
    with pytest.raises(ValueError, match=r"all of B of the new adapter .* call project_lora_a\(model, bases\) first"):
        protected_parameters(model, bases)
    with pytest.raises(ValueError, match="a basis of all 11 inputs leaves nothing of A"):
        project_lora_a(model, {"0": torch.eye(11)})
    project_lora_a(model, bases)
    assert protected_parameters(model, bases)[model[0].lora_bias] is None


def run(memory, folder=None, *, steps=4, stop=None, model=None, **more):
    chosen = LoopSettings(
        max_steps=steps, rows_per_step=4, learning_rate=1e-2, weight_decay=0.1, progress=False, folder=folder,
        save_every=None if folder is None else 2, **more,
    )  # fmt: skip
    loop = TrainingLoop(model or tiny_gpt2(dropout=0.1), uneven_rows(8, seed=3), settings=chosen, callbacks=[memory])
    if stop is not None:
        training_step = loop.training_step
        loop.training_step = lambda batches: stop_at(loop, stop) or training_step(batches)
    return loop


def stop_at(loop, step):
    if loop.step == step:
        raise KeyboardInterrupt


def finished(memory=None, rows=ROWS):
    memory = memory or GradientProjectionMemory(energy=0.9)
    memory.finish_task(tiny_gpt2(), [collate_padded(rows)])
    return memory


@pytest.mark.parametrize("more", [{}, {"precision": "fp16", "rows_per_micro_batch": 2}, {"precision": "bf16"}])
def test_the_loop_keeps_to_it_and_a_resumed_run_is_the_same_bit_for_bit(more, tmp_path):
    memory = finished()
    loop = run(memory, tmp_path / "whole", **more)
    before = copy.deepcopy(loop.model)
    loop.fit()
    for name, basis in memory.kept.items():
        new, old = loop.model.get_submodule(name), before.get_submodule(name)
        if type(new).__name__ == "Conv1D":
            change = (new.weight - old.weight).detach().T
            assert torch.equal(new.bias, old.bias)
        else:
            change = (new.weight - old.weight).detach()
        assert float((change @ basis).norm()) <= 1e-5 * float(change.norm()), name
    with pytest.raises(KeyboardInterrupt):
        run(finished(), tmp_path / "cut", stop=3, **more).fit()
    resumed = GradientProjectionMemory(energy=0.9)  # what it protects comes with the checkpoint
    again = run(resumed, tmp_path / "cut", **more)
    again.fit(resume=True)
    for name, value in loop.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_its_state_is_tensors_and_a_second_task_adds_to_it():
    memory = finished()
    state = memory.state_dict()
    json.dumps({key: sorted(value) for key, value in state.items()})
    other = GradientProjectionMemory(energy=0.9)
    other.load_state_dict(copy.deepcopy(state))
    for each in (memory, other):
        finished(each, uneven_rows(5, seed=11))
    assert all(torch.equal(value, other.kept[name]) for name, value in memory.kept.items())
    assert any(value.shape != state["kept"][name].shape for name, value in memory.kept.items())
    assert all(torch.equal(memory.kept[name][:, : v.shape[1]], v) for name, v in state["kept"].items())
    with pytest.raises(CheckpointError, match="holds tensors under 'kept'"):
        other.load_state_dict({"bases": {}})
    model = tiny_gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other.attach(model, optimizer)
    with pytest.raises(ValueError, match="attached already"):
        other.attach(model, optimizer)
    with pytest.raises(ValueError, match="is attached: detach it"):
        other.load_state_dict(state)


def test_before_the_first_task_nothing_is_protected():
    one, other = tiny_gpt2(), tiny_gpt2()
    run(GradientProjectionMemory(), model=one, steps=2).fit()
    loop = run(GradientProjectionMemory(), model=other, steps=2)
    loop.callbacks.clear()
    loop.fit()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_one_adapter_for_all_tasks_goes_on_bit_for_bit(tmp_path):
    """What B keeps to is made of A as it was when the task began, which by the middle has moved in its last bits."""

    def adapted():
        model = tiny_gpt2()
        torch.manual_seed(3)
        attach(model, LoRA(rank=3, alpha=4, targets=["c_attn"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        memory = GradientProjectionMemory(rank=1)
        memory.finish_task(model, [collate_padded(ROWS)])
        return {"model": model, "memory": memory}

    whole = run(**adapted(), folder=tmp_path / "whole")
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        run(**adapted(), folder=tmp_path / "cut", stop=3).fit()
    again = run(**adapted(), folder=tmp_path / "cut")
    again.fit(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_what_one_adapter_kept_to_is_not_taken_for_the_next_ones():
    """The state of a checkpoint inside a task, loaded for the task after it."""
    model, batch = tiny_gpt2(), collate_padded(ROWS)
    attach(model, LoRA(rank=3, alpha=4, targets=["c_attn"]), "one")
    memory = GradientProjectionMemory(rank=2, modules=lambda name: name.endswith("c_attn"))
    memory.finish_task(model, [batch])
    project_lora_a(model, memory.kept)
    memory.attach(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    inside = GradientProjectionMemory(rank=2, modules=memory.modules)
    inside.load_state_dict(memory.state_dict())
    detach(model, "one")
    attach(model, LoRA(rank=3, alpha=4, targets=["c_attn"]), "one")  # of the same name, and not projected
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "LoRAConv1D"}
    before = {n: outputs_on(m, inside.kept[n]) for n, m in layers.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    inside.attach(model, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for name, layer in layers.items():
        torch.testing.assert_close(outputs_on(layer, inside.kept[name]), before[name], atol=1e-5, rtol=0)


def test_a_head_that_an_adapter_copies_cannot_be_protected():
    model = tiny_bert(labels=3)
    attach(model, LoRA(rank=3, alpha=4, targets=["query"], train_modules=["classifier"]))
    batch = {"input_ids": torch.tensor([[5, 7, 11]]), "labels": torch.tensor([1])}
    with pytest.raises(ValueError, match=r'classifier carries adapter "default", a \w+: only LoRA can be projected'):
        GradientProjectionMemory().finish_task(model, [batch])
    GradientProjectionMemory(modules=lambda name: "query" in name).finish_task(model, [batch])
    with pytest.raises(CheckpointError, match="holds tensors by name; got 3"):
        GradientProjectionMemory().load_state_dict({"kept": {}, "of_b": 3})
