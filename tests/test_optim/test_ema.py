"""The average of weights: its closed form, what bfloat16 loses, and that the trained weights come back."""

import copy
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from llmtune.adapters import LoRA, attach, combine
from llmtune.optim import EMA
from llmtune.optim.ema import newest_weight, update_averages
from llmtune.testing.models import tiny_llama
from llmtune.testing.small import SmallModel, moved, trainable


def closed_form(values, decay):
    """sum_k decay^(n-k) theta_k / sum_k decay^(n-k) in float64."""
    weights = [(1.0 if decay is None else decay) ** age for age in reversed(range(len(values)))]
    return sum(w * value.double() for w, value in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("decay", [None, 0.3, 0.9, 0.999])
def test_the_average_is_its_closed_form(decay):
    model = SmallModel()
    ema, seen = EMA(model, decay=decay), []
    for step in range(23):
        moved(model, seed=step)
        ema.update()
        seen.append({name: p.detach().clone() for name, p in trainable(model).items()})
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, closed_form([row[name] for row in seen], decay), rtol=1e-12, atol=1e-12)


def test_the_weight_of_the_newest_stays_exact_where_decay_is_near_1():
    assert newest_weight(1, 0.999) == pytest.approx(1.0, abs=1e-12)
    assert newest_weight(7, 1 - 1e-12) == pytest.approx(1 / 7, rel=1e-9)
    assert newest_weight(10**6, 0.999) == pytest.approx(0.001, rel=1e-12)


@pytest.mark.parametrize("decay", [0.051, 0.3, 0.9, 0.999, None])
def test_the_first_value_replaces_what_stood_there(decay):
    """Also where (1 - decay) / (1 - decay^1) is rounded to less than 1, and where what stood there is no number."""
    for start in (1e20, math.inf):
        average = {"w": torch.full((3,), start, dtype=torch.float64)}
        update_averages(average, {"w": torch.full((3,), 0.7, dtype=torch.float64)}, updates=1, decay=decay)
        assert average["w"].tolist() == [0.7] * 3


def test_an_average_stays_on_its_device_where_the_model_has_moved():
    average = {"w": torch.zeros(3, device="meta")}
    update_averages(average, {"w": torch.ones(3)}, updates=2, decay=None)
    assert average["w"].device.type == "meta"


def test_the_start_is_not_remembered_for_good():
    """torch's averaged model gives the first weights decay^(n-1): 0.37 after 1000 updates of 0.999."""
    weight = nn.Parameter(torch.ones(3))
    ours, theirs = EMA([weight], decay=0.999), torch.optim.swa_utils.AveragedModel(
        nn.ParameterList([weight]), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )  # fmt: skip
    for step in range(1000):
        with torch.no_grad():
            weight.fill_(1.0 if step == 0 else 0.0)
        ours.update()
        theirs.update_parameters(nn.ParameterList([weight]))
    assert theirs.module[0][0].item() == pytest.approx(0.999**999, rel=1e-3)  # 0.368
    assert ours.averages["0"][0].item() == pytest.approx(0.999**999 * 0.001 / (1 - 0.999**1000), rel=1e-3)  # 0.0006


def test_a_bfloat16_average_would_stand_still_and_ours_does_not():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ours = EMA([weight], decay=0.999)
    theirs = torch.optim.swa_utils.AveragedModel(
        nn.ParameterList([weight]), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    theirs.update_parameters(nn.ParameterList([weight]))
    for _ in range(2000):
        ours.update()
    with torch.no_grad():
        weight.fill_(1.5)
    for _ in range(1000):
        ours.update()
        theirs.update_parameters(nn.ParameterList([weight]))
    ages = torch.arange(3000, dtype=torch.float64)
    wanted = (0.999**ages * torch.where(ages < 1000, 1.5, 1.0)).sum() / (0.999**ages).sum()
    assert theirs.module[0].tolist() == [1.0] * 3  # 0.001 * 0.5 is less than half a unit in the last place of 1
    assert ours.averages["0"].dtype == torch.float32
    torch.testing.assert_close(ours.averages["0"].double(), wanted.expand(3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_trained_weights_come_back_bit_for_bit(dtype):
    model = tiny_llama().to(dtype)
    ema = EMA(model, decay=0.9)
    for step in range(3):
        moved(model, seed=step)
        ema.update()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with ema.averaged():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, ema.averages[name].to(dtype))
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    with pytest.raises(ZeroDivisionError), ema.averaged():
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    ema.apply()
    assert torch.equal(model.lm_head.weight, ema.averages["lm_head.weight"].to(dtype))


def test_frozen_parameters_have_no_average_and_tied_ones_have_one():
    assert set(EMA(SmallModel()).averages) == {
        "first.weight", "first.bias", "second.bias", "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]))
    ema = EMA(model)
    assert len(ema.averages) == 4
    assert all("lora_" in name for name in ema.averages)


def test_the_state_is_tensors_and_goes_on_bit_for_bit():
    def after(model, ema, steps):
        for step in steps:
            moved(model, seed=step)
            ema.update()

    straight, cut = SmallModel(), SmallModel()
    one, other = EMA(straight, decay=0.97), EMA(cut, decay=0.97)
    after(straight, one, range(7))
    after(cut, other, range(3))
    state = other.state_dict()
    saved = load(save({"updates": state["updates"], **state["averages"]}))
    again = EMA(cut, decay=0.97)
    again.load_state_dict({"updates": saved.pop("updates"), "averages": saved})
    after(cut, again, range(3, 7))
    assert again.updates == 7
    assert all(torch.equal(again.averages[name], value) for name, value in one.averages.items())


def test_a_copy_of_the_state_is_not_written_to():
    model = SmallModel()
    ema = EMA(model)
    ema.update()
    other = EMA(copy.deepcopy(model))
    state = ema.state_dict()
    other.load_state_dict(state)
    before = state["averages"]["head.weight"].clone()
    moved(model)
    other.averages["head.weight"].zero_()
    assert torch.equal(state["averages"]["head.weight"], before)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"decay must be above 0 and below 1, or None for equal weights; got 1.0"):
        EMA(SmallModel(), decay=1.0)
    with pytest.raises(ValueError, match="decay must be above 0 and below 1, or None for equal weights; got True"):
        EMA(SmallModel(), decay=True)
    with pytest.raises(TypeError, match="a model or its parameters are expected; got a str"):
        EMA("weights")
    with pytest.raises(TypeError, match="got a tuple among them"):
        EMA(SmallModel().named_parameters())
    with pytest.raises(ValueError, match="no parameter requires a gradient, so none changes: average what is trained"):
        EMA(SmallModel().requires_grad_(False))
    ema = EMA(SmallModel())
    with pytest.raises(RuntimeError, match=r"there is no average before the first update\(\)"), ema.averaged():
        pass
    ema.update()
    with ema.averaged():
        with pytest.raises(RuntimeError, match=r"leave the block of averaged\(\) before update\(\)"):
            ema.update()
        with pytest.raises(RuntimeError, match=r"averaged\(\) cannot be nested"), ema.averaged():
            pass
    state = ema.state_dict()
    less = {name: value for name, value in state["averages"].items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"head.bias is in the model only: load it for the parameters it was made of"):
        ema.load_state_dict({"updates": 1, "averages": less})
    other = {**state["averages"], "head.bias": torch.zeros(3)}
    with pytest.raises(
        ValueError, match=r"the average of head.bias must be \(3,\) in torch.float64; it is \(3,\) in t"
    ):
        ema.load_state_dict({"updates": 1, "averages": other})


def test_averaging_a_and_b_is_not_averaging_the_change_and_combine_is():
    """Snapshots of an adapter beside it, and their mean of rank k r: exactly the mean of the changes s B A."""
    model, k = tiny_llama(), 3
    attach(model, LoRA(rank=2, alpha=4, targets=["q_proj"]))
    ema, changes = EMA(model, decay=None), []
    layer = model.model.layers[0].self_attn.q_proj

    def change(of):
        return of.deltas()["weight"].double()

    for step in range(k):
        moved(model, seed=step, scale=1.0)
        ema.update()
        changes.append(change(layer))
        combine(model, ["default"], [1.0], new_name=f"snapshot{step}")
    wanted = sum(changes) / k
    with ema.averaged():
        apart = change(layer)
    names = [f"snapshot{step}" for step in range(k)]
    report = combine(model, names, [1 / k] * k, new_name="mean")
    assert set(report.ranks.values()) == {2 * k}
    mean = next(
        module for module in model.model.layers[0].self_attn.modules() if getattr(module, "adapter_name", "") == "mean"
    )
    torch.testing.assert_close(change(mean), wanted, rtol=1e-5, atol=1e-5)
    a, b = (ema.averages[f"model.layers.0.self_attn.q_proj.lora_{letter}"].double() for letter in "ab")
    torch.testing.assert_close(apart, 2.0 * b @ a, rtol=1e-5, atol=1e-5)
    assert (apart - wanted).norm() > 0.1 * wanted.norm()  # by the covariance of B and A
