"""What penalties hold: how much, in which dtype, and where."""

import copy

import pytest
import torch
from torch import nn

from llmtune.adapters.attach import attach
from llmtune.adapters.config import DoRA, LoRA
from llmtune.adapters.effective import anchor_of
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.memory import penalty_memory
from llmtune.forgetting.online_ewc import OnlineEWC
from llmtune.forgetting.synaptic import SynapticIntelligence
from llmtune.regularizers.l2sp import L2SP
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_llama
from llmtune.testing.small import SmallModel, moved


def adapted(config, make=tiny_llama):
    model = make()
    attach(model, config)
    return moved(model, seed=4)


def rising(model):
    return {
        name: torch.linspace(0.5, 2.0, value.numel()).reshape(value.shape) for name, value in anchor_of(model).items()
    }


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


MODELS = {
    "full": tiny_llama,
    "bfloat16": lambda: tiny_llama().bfloat16(),
    "lora": lambda: adapted(LoRA(rank=3, alpha=5)),
    "lora, biases and a copy": lambda: adapted(
        LoRA(rank=3, alpha=5, targets=["head"], dtype=torch.float64, train_bias="all", train_modules=["norm"]),
        SmallModel,
    ),
    "dora": lambda: adapted(DoRA(rank=3, alpha=5, targets=["q_proj"])),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_memory_is_what_is_held(kind, dtype):
    """Against the tensors in the penalty's own state."""
    model = MODELS[kind]()
    expected = penalty_memory(model, dtype=dtype)
    penalty = OnlineEWC(1.0, dtype=dtype)
    penalty.finish_task(model, fisher=rising(model))
    held = tensors_of(penalty.state_dict())
    assert sum(tensor.numel() * tensor.itemsize for tensor in held) == expected > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_synaptic_intelligence_holds_its_path_besides(kind):
    model = MODELS[kind]()
    expected = penalty_memory(model, path=True)
    penalty = SynapticIntelligence(1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    penalty.attach(model, optimizer)
    penalty.start_step()
    ids = torch.tensor([[5, 7, 11]])
    model(input_ids=ids, labels=ids).loss.backward()
    penalty.task_gradients()
    optimizer.step()
    penalty.finish_task(model)
    held = tensors_of(penalty.state_dict())
    assert sum(tensor.numel() * tensor.itemsize for tensor in held) == expected


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_l2sp_holds_the_anchor_alone(kind, dtype):
    model = MODELS[kind]()
    penalty = L2SP(model, 1.0, dtype=dtype)
    held = tensors_of({name: anchor.state() for name, anchor in penalty.anchors.items()})
    expected = penalty_memory(model, dtype=dtype, importance=False)
    assert sum(tensor.numel() * tensor.itemsize for tensor in held) == expected > 0


def test_memory_of_a_choice_and_bad_choices():
    layer = nn.Linear(7, 5)
    assert penalty_memory(layer, parameters=["bias"]) == 2 * 5 * 4
    with pytest.raises(ValueError, match='no parameter "bais"'):
        penalty_memory(layer, parameters=["bais"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_half_precision_holds_half_and_computes_in_float32(kind, dtype):
    """The value is, to float32's precision, that of the plain formula with the rounded tensors."""
    model = MODELS[kind]()
    fisher, anchor = rising(model), anchor_of(model)
    penalty = EWC(fisher, model, 3.0, dtype=dtype)
    whole = EWC(fisher, model, 3.0)
    assert {value.dtype for value in penalty.fisher.values()} == {dtype}
    moved(model)
    now = anchor_of(model, list(fisher))
    rounded = anchor if kind == "lora" else {n: value.to(dtype) for n, value in anchor.items()}  # W is its own anchor
    expected = sum(
        1.5 * (f.to(dtype).double() * (now[n].double() - rounded[n].double()).square()).sum() for n, f in fisher.items()
    )
    value = penalty(model)
    assert value.dtype == torch.float32
    assert_close(value.detach(), expected, rtol=1e-5)
    assert value.item() == pytest.approx(whole(model).item(), rel=0.01)
    value.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)


def test_a_frozen_weight_in_half_precision_is_its_own_exact_anchor():
    model = MODELS["lora"]()
    penalty = EWC(rising(model), model, 1.0, dtype=torch.bfloat16)
    assert penalty(model).item() == 0.0
    full = MODELS["full"]()
    assert EWC(rising(full), full, 1.0, dtype=torch.bfloat16)(full).item() > 0  # rounded, and it says so


def test_sums_over_tasks_are_made_in_float32():
    model, penalty = nn.Linear(2, 1, bias=False), OnlineEWC(1.0, dtype=torch.bfloat16)
    penalty.finish_task(model, fisher={"weight": torch.tensor([[1.0, 2.0]])})
    penalty.finish_task(model, fisher={"weight": torch.tensor([[0.0117, 0.0117]])})
    assert penalty.importance["weight"].tolist() == torch.tensor([[1.0117, 2.0117]]).bfloat16().tolist()


def test_what_half_precision_would_lose_is_refused():
    model = nn.Linear(2, 1, bias=False)
    for value in (1e-9, 1e6):
        fisher = {"weight": torch.full((1, 2), value)}
        message = r"the Fisher information of weight, up to .*, overflows or rounds to 0 in torch.float16: use torch.bf"
        with pytest.raises(ValueError, match=message):
            EWC(fisher, model, 1.0, dtype=torch.float16)
        with pytest.raises(ValueError, match=message):
            OnlineEWC(1.0, dtype=torch.float16).finish_task(model, fisher=fisher)
        EWC(fisher, model, 1.0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float16, .*, or None; got torch.int8"):
        EWC(fisher, model, 1.0, dtype=torch.int8)


def test_an_anchor_that_overflows_is_refused():
    model, fisher = nn.Linear(2, 1, bias=False), {"weight": torch.ones(1, 2)}
    with torch.no_grad():
        model.weight.fill_(1e5)
    message = r"the anchor of weight overflows in torch.float16: use torch.bfloat16"
    for anchor in (model, {"weight": model.weight}):
        with pytest.raises(ValueError, match=message):
            EWC(fisher, anchor, 1.0, dtype=torch.float16)
    penalty = OnlineEWC(1.0, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        penalty.finish_task(model, fisher=fisher)
    assert (penalty.tasks, penalty.importance, penalty.anchors) == (0, {}, {})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_device_of_their_own_changes_no_bit(kind):
    model = MODELS[kind]()
    fisher, anchor = rising(model), anchor_of(model)
    penalties = [EWC(fisher, anchor, 3.0, device=device) for device in (None, "cpu")]
    twin = copy.deepcopy(model)
    moved(model), moved(twin)
    values = [penalty(each) for penalty, each in zip(penalties, (model, twin), strict=True)]
    assert torch.equal(*values)
    for value in values:
        value.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_offloaded_they_stay_where_they_are_told_to(kind, dtype):
    model = MODELS[kind]().cuda()
    fisher = {name: value.cuda() for name, value in rising(model).items()}
    there, here = (EWC(fisher, model, 3.0, dtype=dtype, device=device) for device in (None, "cpu"))
    online = OnlineEWC(3.0, dtype=dtype, device="cpu")
    online.finish_task(model, fisher=fisher)
    moved(model)
    values = [penalty(model) for penalty in (there, here, online)]
    assert all(value.device.type == "cuda" for value in values)
    assert_close(values[1].detach(), values[0].detach(), rtol=1e-6)
    assert_close(values[2].detach(), values[0].detach(), rtol=1e-6)
    gradients = []
    for value in values:
        model.zero_grad()
        value.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, two in zip(gradients[0], gradients[1], strict=True):
        assert_close(two, one, rtol=1e-5)
    assert {value.device.type for value in here.fisher.values()} == {"cpu"}
    assert {tensor.device.type for tensor in tensors_of(online.state_dict()["importance"])} == {"cpu"}
    copies = [a.base for a in here.anchors.values() if isinstance(a.base, torch.Tensor)]
    assert {copy.device.type for copy in copies} <= {"cpu"}
    online.finish_task(model, fisher=fisher)
    assert online(model).item() == 0.0 or (kind == "full" and dtype is not None)
