import copy
import json

import pytest
import torch
from torch import nn

from llmtune.adapters.anchor import Pin, fingerprint
from llmtune.adapters.attach import active, attach, detach, disabled
from llmtune.adapters.config import LoRA
from llmtune.adapters.effective import anchor_of, effective_parameters
from llmtune.adapters.merge import merge, unmerge
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama
from llmtune.testing.small import SmallModel, moved
from llmtune.types import Callback, Penalty

ROWS = uneven_rows(3)


def ones(model):
    return {name: torch.ones_like(value, dtype=torch.float32) for name, value in anchor_of(model).items()}


def rising(model):
    """Return a Fisher information whose entries all differ, so that a swapped axis shows."""
    return {
        name: torch.linspace(0.5, 2.0, value.numel()).reshape(value.shape) for name, value in anchor_of(model).items()
    }


def adapted(make=tiny_llama, *, trained=False, **options):
    model = make()
    attach(model, LoRA(rank=3, alpha=5, **options))
    return moved(model, seed=4) if trained else model


def formula(fisher, model, anchor, strength):
    now = anchor_of(model, list(fisher))
    return (
        strength / 2 * sum((f.double() * (now[n].double() - anchor[n].double()) ** 2).sum() for n, f in fisher.items())
    )


def test_by_hand():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    penalty = EWC({"weight": torch.tensor([[3.0, 5.0]])}, {"weight": torch.tensor([[0.0, 4.0]])}, strength=2.0)
    value = penalty(model)
    assert value.item() == 3.0 * 1.0 + 5.0 * 4.0
    value.backward()
    assert model.weight.grad.tolist() == [[2 * 3.0 * 1.0, 2 * 5.0 * -2.0]]
    assert isinstance(penalty, Penalty)
    assert isinstance(penalty, Callback)


CASES = {
    "full": (tiny_llama, {}),
    "lora": (adapted, {}),
    "lora on Conv1D, biases": (lambda: adapted(tiny_gpt2, targets=["c_attn", "c_proj"], train_bias="all"), {}),
    "lora on embeddings": (lambda: adapted(targets=["embed_tokens", "q_proj"]), {}),
    "lora and a copied head": (
        lambda: adapted(lambda: tiny_bert(labels=3), train_modules=["classifier"], targets=["query", "dense"]),
        {},
    ),
    "trained lora": (lambda: adapted(trained=True), {}),
    "bfloat16 base": (lambda: adapted(lambda: tiny_llama().bfloat16()), {}),
}


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_formula_on_effective_weights(case, tensors):
    model = CASES[case][0]()
    anchor, fisher = anchor_of(model), rising(model)
    penalty = EWC(fisher, anchor if tensors else model, 3.0)
    at_anchor = penalty(model)
    assert at_anchor.item() == 0.0
    at_anchor.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    moved(model)
    value = penalty(model)
    assert_close(value.detach(), formula(fisher, model, anchor, 3.0), rtol=1e-5)

    value.backward()
    reference = copy.deepcopy(model)
    reference.zero_grad()
    entries = effective_parameters(reference)
    dense = sum((fisher[n] * (entries[n].value().float() - anchor[n].float()) ** 2).sum() for n in fisher)
    (1.5 * dense).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any(g is not None for g in grads.values())
    for name, p in reference.named_parameters():
        if p.requires_grad:
            rtol = 2e-2 if p.dtype == torch.bfloat16 else 1e-4
            assert (grads[name] is None) == (p.grad is None)
            assert_close(grads[name], p.grad, rtol=rtol, what=name)


def test_holds_the_prediction_of_a_real_fisher():
    """Of two changes of the same size, the one along what mattered costs more."""
    model = adapted()
    fisher = diagonal_fisher(model, [collate_padded(ROWS)], kind="empirical")
    penalty = EWC(fisher, model, 1.0)
    moved(model)
    assert penalty(model).item() > 0


def test_a_frozen_weight_is_not_kept_twice():
    model = adapted()
    penalty = EWC(ones(model), anchor_of(model), 1.0)
    assert not any(isinstance(a.base, Pin) for a in penalty.anchors.values())
    penalty(model)
    assert all(isinstance(a.base, Pin) for a in penalty.anchors.values())
    assert all(isinstance(a.base, Pin) for a in EWC(ones(model), model, 1.0).anchors.values())
    moved(model)
    assert not any(isinstance(a.base, Pin) for a in EWC(ones(model), anchor_of(model), 1.0).anchors.values())
    again = EWC(ones(model), model, 1.0)
    assert all(isinstance(a.base, Pin) and len(a.factors) == 1 for a in again.anchors.values())


def test_a_full_models_anchor_is_copied():
    model = tiny_llama()
    anchor = anchor_of(model)
    penalty = EWC(ones(model), anchor, 1.0)
    for value in anchor.values():
        value.fill_(7.0)
    assert penalty(model).item() == 0.0
    fisher = ones(model)
    penalty = EWC(fisher, model, 1.0)
    moved(model)
    before = penalty(model).item()
    for value in fisher.values():
        value.zero_()
    assert penalty(model).item() == before > 0


def test_a_frozen_weight_that_changes_is_noticed_and_one_that_comes_back_is_followed():
    model = adapted(trained=True)
    penalty = EWC(ones(model), model, 1.0)
    moved(model)
    expected = penalty(model).item()
    merge(model)
    with pytest.raises(
        ValueError, match=r"model.layers.0.self_attn.q_proj.weight was frozen .* has changed since \(merged"
    ):
        penalty(model)
    unmerge(model)
    assert penalty(model).item() == expected
    twin = copy.deepcopy(model)  # other tensors, the same values
    assert penalty(twin).item() == expected
    with torch.no_grad():
        twin.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.down_proj.weight was frozen and stood for its own anchor"
    ):
        penalty(twin)


def test_tensors_hold_a_merged_model_too():
    """What a user does after merging: the same anchor as tensors, now on the merged weights."""
    model = adapted(trained=True)
    fisher, anchor = rising(model), anchor_of(model)
    merge(model, keep_base=False)
    model.requires_grad_(True)
    penalty = EWC(fisher, anchor, 2.0)
    assert penalty(model).item() < 1e-8  # merged within rounding
    moved(model)
    assert_close(penalty(model).detach(), formula(fisher, model, anchor, 2.0), rtol=1e-5)


def test_a_weight_unfrozen_later_gets_an_anchor_of_its_own():
    model = adapted()
    anchor = anchor_of(model)
    penalty = EWC(rising(model), model, 2.0)
    penalty(model)
    weight = model.model.layers[0].self_attn.q_proj.base.weight.requires_grad_(True)
    assert penalty(model).item() == 0.0
    moved(model)
    value = penalty(model)
    value.backward()
    assert_close(value.detach(), formula(rising(model), model, anchor, 2.0), rtol=1e-5)
    assert weight.grad.abs().sum() > 0


def test_only_active_adapters_move_it():
    model = adapted()
    penalty = EWC(ones(model), model, 1.0)
    moved(model)
    assert penalty(model).item() > 0
    with disabled(model), torch.no_grad():
        assert penalty(model).item() == 0.0
    attach(model, LoRA(rank=2, alpha=4, targets=["q_proj"]), name="second")
    moved(model, seed=6)
    with active(model, "second"):
        second = penalty(model).item()
    with active(model, "default"), torch.no_grad():
        first = penalty(model).item()
    both = penalty(model).item()
    assert len({first, second, both}) == 3
    detach(model, "default")
    assert_close(penalty(model).detach(), torch.tensor(second), rtol=1e-6)


def test_with_an_adapter_that_was_there_and_is_gone():
    """The anchor is W + s B A; with the adapter off, what is left is -s B A."""
    model = adapted(trained=True)
    fisher, anchor = rising(model), anchor_of(model)
    penalty = EWC(fisher, model, 2.0)
    with disabled(model), torch.no_grad():
        assert_close(penalty(model), formula(fisher, model, anchor, 2.0), rtol=1e-5)


def test_tied_weights_count_once():
    model = tiny_llama(tied=True)
    fisher = ones(model)
    assert "lm_head.weight" not in fisher
    penalty = EWC(fisher, model, 2.0)
    with torch.no_grad():
        model.lm_head.weight += 1.0
    assert_close(penalty(model).detach(), torch.tensor(97.0 * 28), rtol=1e-6)


def test_wrapped_models_are_the_bare_one():
    model = adapted()
    penalty = EWC(ones(model), nn.DataParallel(model), 1.0)
    moved(model)
    assert penalty(torch.compile(nn.DataParallel(model), backend="eager")).item() == penalty(model).item() > 0


def test_no_autocast_inside():
    model = adapted()
    penalty = EWC(ones(model), model, 1.0)
    moved(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert penalty(model).item() == penalty(model).item()
        inside = penalty(model)
    assert inside.dtype == torch.float32
    assert inside.item() == penalty(model).item()


def test_strength_0_is_allowed_and_scales():
    model = SmallModel()
    penalties = [EWC(ones(model), model, strength) for strength in (0, 1, 5)]
    moved(model)
    values = [penalty(model).item() for penalty in penalties]
    assert values[0] == 0.0
    assert values[2] == pytest.approx(5 * values[1])


def test_state_tells_one_from_another_and_survives_json():
    model = adapted()
    penalty = EWC(rising(model), anchor_of(model), 2.0)
    state = json.loads(json.dumps(penalty.state_dict()))
    penalty(model)  # the copies are gone now
    penalty.load_state_dict(state)
    EWC(rising(model), anchor_of(model), 2.0).load_state_dict(penalty.state_dict())
    with pytest.raises(CheckpointError, match=r"the saved EWC had strength 2.0; this one has 3.0"):
        EWC(rising(model), anchor_of(model), 3.0).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"another Fisher information of model.layers.0.self_attn.q_proj.weight"):
        EWC(ones(model), anchor_of(model), 2.0).load_state_dict(state)
    moved(model)
    with pytest.raises(CheckpointError, match=r"another anchor of model.layers.0.self_attn.q_proj.weight"):
        EWC(rising(model), anchor_of(model), 2.0).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"another anchor of model.layers.0.self_attn.q_proj.weight"):
        EWC(rising(model), model, 2.0).load_state_dict(state)


def test_the_state_is_the_same_after_the_copy_has_gone():
    """Also where the copy was wider than the weight: W + 0 in float32 of a bfloat16 W."""
    model = adapted(lambda: tiny_llama().bfloat16())
    fresh, used = (EWC(rising(model), anchor_of(model), 2.0) for _ in range(2))
    used(model)
    assert all(isinstance(a.base, Pin) for a in used.anchors.values())
    used.load_state_dict(fresh.state_dict())


def test_fingerprints():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor.T) == fingerprint(tensor.T.contiguous())
    for other in (tensor.T, tensor.reshape(4, 3), tensor.double(), tensor.flip(0), tensor + 1e-6, -tensor):
        assert fingerprint(tensor) != fingerprint(other)
    assert fingerprint(torch.zeros(2, dtype=torch.bfloat16)) != fingerprint(torch.tensor([0.0, -0.0]).bfloat16())
    long = torch.rand(2**20 + 7)
    last = long.clone()
    last[-1] += 0.5
    assert fingerprint(long) != fingerprint(last)


F = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
A = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("fisher", "anchor", "strength", "message"),
    [
        (F, A, -1.0, "strength must be a finite number, 0 or more; got -1.0"),
        (F, A, float("nan"), "strength must be a finite number"),
        (F, A, float("inf"), "strength must be a finite number"),
        ({}, A, 1.0, "fisher names no parameter"),
        ({**F, "bias": -torch.ones(3)}, A, 1.0, "the Fisher information of bias is negative, down to -1"),
        ({**F, "bias": torch.tensor([1, float("nan"), 2])}, A, 1.0, "the Fisher information of bias is not finite"),
        ({**F, "bias": torch.ones(3, dtype=torch.long)}, A, 1.0, "of bias must be a tensor of floats"),
        (F, {"weight": A["weight"], "bais": A["bias"]}, 1.0, 'the anchor has no "bias", .* Did you mean "bais"'),
        (F, {**A, "bias": torch.zeros(2)}, 1.0, r"bias is \[3\] in fisher and \[2\] in the anchor"),
        (F, {**A, "bias": torch.full((3,), torch.nan)}, 1.0, "the anchor of bias is not finite"),
        (F, nn.Linear(2, 5), 1.0, r"weight is \[3, 2\] in fisher and \[5, 2\] in the anchor"),
        (F, nn.Linear(2, 3, bias=False), 1.0, 'the bare model has no parameter "bias"'),
    ],
)
def test_bad_arguments(fisher, anchor, strength, message):
    with pytest.raises(ValueError, match=message):
        EWC(fisher, anchor, strength)


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"the anchor of bias must be a tensor of floats; got \[0.0, 0.0, 0.0\]"):
        EWC(F, {**A, "bias": [0.0, 0.0, 0.0]}, 1.0)
    with pytest.raises(TypeError, match="fisher must be a dict of tensors by name, and anchor one too, or the model"):
        EWC([1.0], A, 1.0)


def test_another_model():
    penalty = EWC(F, {**A, "not used": torch.zeros(1)}, 1.0)
    with pytest.raises(ValueError, match='fisher names "bias", which the model has not'):
        penalty(nn.Linear(2, 3, bias=False))
    with pytest.raises(ValueError, match=r"weight is \[5, 2\] in the model and \[3, 2\] in fisher: another model's"):
        penalty(nn.Linear(2, 5))


def test_what_reaches_nothing_that_is_trained_raises():
    model = nn.Linear(2, 3).requires_grad_(False)
    with pytest.raises(ValueError, match=r"EWC reaches no parameter that is trained: all 2 .* \(the first: weight\)"):
        EWC(F, A, 1.0)(model)
    model = tiny_llama()
    fisher = {"lm_head.weight": torch.ones(97, 28)}
    penalty = EWC(fisher, model, 1.0)
    attach(model, LoRA(rank=2, alpha=2))
    with pytest.raises(ValueError, match=r"EWC reaches no parameter that is trained"):
        penalty(model)
    both = EWC({**fisher, **ones(model)}, model, 1.0)
    moved(model)
    assert both(model).item() > 0  # the head is frozen where it was and adds nothing


def test_a_tied_weight_adapted_in_one_place_raises():
    model = tiny_llama(tied=True)
    penalty = EWC(ones(model), model, 1.0)
    attach(model, LoRA(rank=2, alpha=2, targets=["lm_head"]))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight and lm_head.weight are one tied tensor"):
        penalty(model)
