import copy
import json

import pytest
import torch
from torch import nn

from llmtune.adapters.anchor import Pin
from llmtune.adapters.attach import active, attach, disabled
from llmtune.adapters.config import DoRA, LoRA
from llmtune.adapters.effective import anchor_of, effective_parameters
from llmtune.adapters.ia3_config import IA3
from llmtune.adapters.merge import merge, unmerge
from llmtune.errors import CheckpointError
from llmtune.regularizers.delta_norm import DeltaNorm
from llmtune.regularizers.l2sp import L2SP
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_qwen3_moe
from llmtune.testing.small import SmallModel, moved
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback, Penalty

ROWS = uneven_rows(8)


def adapted(make=tiny_llama, *, trained=False, config=None, **options):
    model = make()
    attach(model, config or LoRA(rank=3, alpha=5, **options))
    return moved(model, seed=4) if trained else model


def two_adapters():
    model = adapted(trained=True)
    attach(model, LoRA(rank=2, alpha=8, targets=["q_proj", "down_proj"]), name="second")
    return model


def formula(model, anchor, strength):
    now = anchor_of(model, list(anchor))
    return strength / 2 * sum((now[n].double() - anchor[n].double()).square().sum() for n in anchor)


def test_by_hand():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(3.0)
    penalty = L2SP({"weight": torch.tensor([[0.0, 4.0]])}, strength=2.0, new_strength=4.0)
    value = penalty(model)
    assert value.item() == (1.0 + 4.0) + 2 * 9.0
    value.backward()
    assert model.weight.grad.tolist() == [[2 * 1.0, 2 * -2.0]]  # strength (theta - anchor)
    assert model.bias.grad.tolist() == [4 * 3.0]
    assert isinstance(penalty, Penalty)
    assert isinstance(penalty, Callback)


CASES = {
    "full": (tiny_llama, {}),
    "tied": (lambda: tiny_llama(tied=True), {}),
    "lora": (adapted, {}),
    "lora on Conv1D, biases": (lambda: adapted(tiny_gpt2, targets=["c_attn", "c_proj"], train_bias="all"), {}),
    "lora on embeddings": (lambda: adapted(targets=["embed_tokens", "q_proj"]), {}),
    "lora and a copied head": (
        lambda: adapted(lambda: tiny_bert(labels=3), train_modules=["classifier"], targets=["query", "dense"]),
        {},
    ),
    "trained lora": (lambda: adapted(trained=True), {}),
    "pissa": (lambda: adapted(initialise="pissa"), {}),
    "two adapters": (two_adapters, {}),
    "dora": (lambda: adapted(config=DoRA(rank=2, alpha=3)), {}),
    "ia3": (lambda: adapted(config=IA3(targets=["k_proj"])), {}),
    "experts": (lambda: adapted(tiny_qwen3_moe, target_parameters=["mlp.experts.down_proj"]), {}),
    "bfloat16 base": (lambda: adapted(lambda: tiny_llama().bfloat16()), {}),
}


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_formula_on_effective_weights(case, tensors):
    model = CASES[case][0]()
    anchor = anchor_of(model)
    penalty = L2SP(anchor if tensors else model, 3.0)
    at_anchor = penalty(model)
    rounding = 1e-9 if case == "pissa" else 0.0  # as tensors the start W + B A - B A is rounded
    assert at_anchor.item() <= rounding
    at_anchor.backward()
    assert not any((p.grad.abs() > 1e4 * rounding).any() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    moved(model)
    value = penalty(model)
    assert_close(value.detach(), formula(model, anchor, 3.0), rtol=1e-4)

    value.backward()
    reference = copy.deepcopy(model)
    reference.zero_grad()
    entries = effective_parameters(reference)
    wide = {
        name: entries[name].value().to(torch.promote_types(entries[name].value().dtype, torch.float32))
        for name in anchor
    }
    (1.5 * sum((wide[name] - anchor[name]).square().sum() for name in anchor)).backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any(g is not None for g in got.values())
    for name, p in reference.named_parameters():
        if p.requires_grad:
            assert (got[name] is None) == (p.grad is None)
            if p.grad is not None:
                assert_close(got[name], p.grad, rtol=2e-2 if p.dtype == torch.bfloat16 else 1e-3, what=name)


def test_on_a_frozen_weight_it_is_the_delta_norm():
    model = adapted()
    penalty = L2SP(model, 2.0)
    moved(model)
    assert_close(penalty(model).detach(), DeltaNorm(2.0)(model).detach(), rtol=1e-6)


def test_cross_terms_of_two_adapters_are_exact():
    """Two adapters that undo each other cost nothing, however large they are."""
    model = tiny_llama()
    for name in ("one", "two"):
        attach(model, LoRA(rank=2, alpha=4, targets=["o_proj"]), name=name)
    model.requires_grad_(False)
    penalty = L2SP(anchor_of(model, lambda n: "o_proj" in n), 1.0)
    first, second = ([m for m in model.modules() if getattr(m, "adapter_name", "") == name] for name in ("one", "two"))
    for one, two in zip(first, second, strict=True):
        with torch.no_grad():
            one.lora_b.normal_()
            two.lora_a.copy_(one.lora_a)
            two.lora_b.copy_(-one.lora_b)
        one.lora_b.requires_grad_(True)
    assert penalty(model).item() < 1e-4
    with active(model, "one"):
        assert penalty(model).item() > 10


def test_a_frozen_weight_is_not_kept_twice():
    model = adapted()
    penalty = L2SP(anchor_of(model), 1.0)
    assert not any(isinstance(a.base, Pin) for a in penalty.anchors.values())
    penalty(model)
    assert all(isinstance(a.base, Pin) for a in penalty.anchors.values())
    assert all(isinstance(a.base, Pin) for a in L2SP(model, 1.0).anchors.values())


def test_nothing_of_a_weights_size_is_built_under_lora():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "stack" not in str(function):
                self.entries = max(self.entries, out.numel())
            return out

    model = nn.Sequential(nn.Linear(101, 103))
    attach(model, LoRA(rank=2, alpha=3))
    penalty = L2SP(model, 1.0)
    moved(model)
    with Largest() as seen:
        penalty(model).backward()
    assert seen.entries <= 2 * 103


def test_an_anchor_with_an_adapter_in_it():
    """The anchor is W + s B A; with the adapter off what is left is -s B A; a later adapter starts at the anchor."""
    model = adapted(trained=True)
    anchor, penalty = anchor_of(model), L2SP(model, 2.0)
    with disabled(model), torch.no_grad():
        assert_close(penalty(model), formula(model, anchor, 2.0), rtol=1e-5)
    attach(model, LoRA(rank=3, alpha=5), name="second")
    assert penalty(model).item() == 0.0
    moved(model, seed=9)
    assert_close(penalty(model).detach(), formula(model, anchor, 2.0), rtol=1e-4)


def test_an_anchor_with_an_adapter_in_it_whose_weight_is_trained_later():
    model = adapted(trained=True)
    anchor, penalty = anchor_of(model), L2SP(model, 2.0)
    for name in anchor:
        effective_parameters(model)[name].parameter.requires_grad_(True)
    assert penalty(model).item() < 1e-11  # W is in the sum now, and rounds it
    moved(model)
    assert_close(penalty(model).detach(), formula(model, anchor, 2.0), rtol=1e-4)


def test_an_anchor_with_an_adapter_in_it_beside_one_that_is_not_of_low_rank():
    model = adapted(config=IA3(targets=["k_proj"]), trained=True)
    attach(model, LoRA(rank=3, alpha=5, targets=["k_proj"]), name="second")
    moved(model)
    with active(model, "second"):
        anchor, penalty = anchor_of(model), L2SP(model, 2.0)
    moved(model, seed=8)
    assert_close(penalty(model).detach(), formula(model, anchor, 2.0), rtol=1e-4)


def test_the_anchor_of_an_earlier_model_under_a_later_adapter():
    """The frozen weight is not its own anchor here: the dense path."""
    model = tiny_llama()
    anchor = anchor_of(model, lambda name: "proj" in name)
    moved(model)
    attach(model, LoRA(rank=3, alpha=5))
    moved(model, seed=2)
    penalty = L2SP(anchor, 2.0)
    value = penalty(model)
    assert_close(value.detach(), formula(model, anchor, 2.0), rtol=1e-5)
    value.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_frozen_weight_that_changes_is_noticed():
    model = adapted(trained=True)
    penalty = L2SP(model, 1.0)
    moved(model)
    expected = penalty(model).item()
    merge(model)
    with pytest.raises(
        ValueError, match=r"q_proj.weight was frozen .* make the penalty anew with the anchor as tensors"
    ):
        penalty(model)
    unmerge(model)
    assert penalty(model).item() == expected


def test_new_parameters_are_pulled_to_zero():
    model = tiny_bert(labels=3)
    new = {name: p for name, p in model.named_parameters() if name.startswith("classifier")}
    pretrained = {name: p for name, p in model.named_parameters() if name not in new}
    square = sum(p.detach().double().square().sum() for p in new.values())
    penalties = [
        L2SP(pretrained, 2.0, new_strength=6.0),
        L2SP(model, 2.0, new_strength=6.0, new=lambda name: name.startswith("classifier")),
        L2SP(dict(model.named_parameters()), 2.0, new_strength=6.0, new=list(new)),
    ]
    for penalty in penalties:
        model.zero_grad()
        value = penalty(model)
        assert_close(value.double(), 3 * square, rtol=1e-6)
        value.backward()
        assert_close(model.classifier.weight.grad, 6 * model.classifier.weight.detach(), rtol=1e-6)
        assert not model.bert.embeddings.word_embeddings.weight.grad.any()
    free = L2SP(model, 2.0, new=list(new))  # neither held nor pulled
    with torch.no_grad():
        model.classifier.weight += 1.0
    assert free(model).item() == 0.0


def test_new_that_means_nothing_raises_without_its_strength_too():
    """Otherwise a misspelt classifier is held to its random start."""
    model = tiny_bert(labels=3)
    with pytest.raises(
        ValueError, match=r'new names "clasifier.weight", which the model has not. Did you mean "classi'
    ):
        L2SP(model, 2.0, new=["clasifier.weight"])(model)
    with pytest.raises(ValueError, match="new is true of none of the model's 41 parameters: leave it out"):
        L2SP(model, 2.0, new=lambda name: name.startswith("score"))(model)


def test_what_is_frozen_is_not_new():
    model = nn.ModuleDict({"held": nn.Linear(2, 3), "frozen": nn.Linear(2, 3), "new": nn.Linear(3, 2, bias=False)})
    model["frozen"].requires_grad_(False)
    penalty = L2SP({name: p for name, p in model.named_parameters() if "held" in name}, 1.0, new_strength=2.0)
    assert_close(penalty(model).detach(), model["new"].weight.detach().square().sum(), rtol=1e-6)


def test_new_parameters_under_an_adapter_are_its_copies():
    model = adapted(lambda: tiny_bert(labels=3), train_modules=["classifier"], targets=["query"])
    penalty = L2SP(model, 2.0, new_strength=6.0, new=["classifier.weight", "classifier.bias"])
    square = sum(p.detach().square().sum() for p in model.classifier.copy.parameters())
    value = penalty(model)
    assert_close(value.detach(), 3 * square, rtol=1e-6)
    value.backward()
    assert_close(model.classifier.copy.weight.grad, 6 * model.classifier.copy.weight.detach(), rtol=1e-6)


def test_tied_weights_count_once():
    model = tiny_llama(tied=True)
    penalty = L2SP(model, 2.0)
    assert "lm_head.weight" not in penalty.anchors
    with torch.no_grad():
        model.lm_head.weight += 1.0
    assert_close(penalty(model).detach(), torch.tensor(97.0 * 28), rtol=1e-6)


def test_wrappers_and_autocast_change_nothing():
    model = adapted()
    penalty = L2SP(nn.DataParallel(model), 1.0)
    moved(model)
    expected = penalty(model).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = penalty(torch.compile(nn.DataParallel(model), backend="eager"))
    assert inside.dtype == torch.float32
    assert inside.item() == expected > 0


@pytest.mark.parametrize("make", [tiny_llama, adapted])
def test_counts_once_a_step_however_many_micro_batches(make):
    """Gradient and reported penalty are those of strength (theta - anchor), with 1, 2 and 8 micro-batches."""
    seen = []
    for rows in (8, 4, 1):
        torch.manual_seed(5)
        model = make()
        penalty = L2SP(model, 7.0)
        moved(model)
        settings = LoopSettings(max_steps=1, rows_per_step=8, rows_per_micro_batch=rows, progress=False)
        with_it, without = (
            TrainingLoop(model, ROWS, settings=settings, penalties=penalties) for penalties in ([penalty], [])
        )
        batches = with_it.micro_batches(0)
        assert len(batches) == 8 // rows
        without.accumulate_gradients(batches)
        task = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        metrics = with_it.accumulate_gradients(batches)
        added = {name: p.grad - task[name] for name, p in model.named_parameters() if p.grad is not None}
        expected = torch.autograd.grad(penalty(model), [dict(model.named_parameters())[name] for name in added])
        for (name, got), want in zip(added.items(), expected, strict=True):
            assert_close(got, want, rtol=1e-3, what=name)
        seen.append(float(metrics["penalty"]))
    assert len(set(seen)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [False, True])
def test_an_anchor_of_half_precision_on_a_device_of_its_own(dtype, lora):
    """The value is that of the plain formula with the rounded anchor; a frozen weight stays its own, exact."""
    model = adapted() if lora else tiny_llama()
    anchor = anchor_of(model)
    penalty = L2SP(model, 3.0, dtype=dtype, device="cpu")
    copies = [held.base for held in penalty.anchors.values() if isinstance(held.base, torch.Tensor)]
    assert {value.dtype for value in copies} == (set() if lora else {dtype})
    moved(model, seed=3)
    rounded = anchor if lora else {name: value.to(dtype).float() for name, value in anchor.items()}
    value = penalty(model)
    assert value.dtype == torch.float32
    assert_close(value.detach(), L2SP(rounded, 3.0)(model).detach(), rtol=1e-5)
    value.backward()
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float16, .*, or None; got torch.int8"):
        L2SP(model, 3.0, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"the anchor of weight overflows in torch.float16: use torch.bfloat16"):
        L2SP({"weight": torch.tensor([1e6])}, 3.0, dtype=torch.float16)


def test_state_tells_one_from_another_and_survives_json():
    model = adapted()
    penalty = L2SP(anchor_of(model), 2.0, new_strength=0.5, new=["lm_head.weight"])
    state = json.loads(json.dumps(penalty.state_dict()))
    L2SP(anchor_of(model), 2.0, new_strength=0.5).load_state_dict(state)
    L2SP(model, 2.0, new_strength=0.5).load_state_dict(state)  # pinned: the same bits, plus nothing
    with pytest.raises(CheckpointError, match=r"the saved L2SP had strength 2.0; this one has 3.0"):
        L2SP(model, 3.0, new_strength=0.5).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"the saved L2SP had new_strength 0.5; this one has 0.0"):
        L2SP(model, 2.0).load_state_dict(state)
    moved(model)
    with pytest.raises(CheckpointError, match=r"the saved L2SP had another anchor of model.layers.0.self_attn.q_proj"):
        L2SP(model, 2.0, new_strength=0.5).load_state_dict(state)


A = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((A, -1.0), ValueError, "strength must be a finite number, 0 or more; got -1.0"),
        ((A, float("nan")), ValueError, "strength must be a finite number"),
        (({}, 1.0), ValueError, "the anchor names no parameter"),
        (({**A, "bias": torch.tensor([1, float("nan"), 2])}, 1.0), ValueError, "the anchor of bias is not finite"),
        (({**A, "bias": torch.ones(3, dtype=torch.long)}, 1.0), TypeError, "the anchor of bias must be a tensor of fl"),
        ((nn.Linear(2, 3).requires_grad_(False), 1.0), ValueError, "none of the model's 2 parameters is chosen"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        L2SP(*arguments)


def test_bad_knobs_for_what_is_new():
    with pytest.raises(ValueError, match=r"new_strength must be a finite number, 0 or more; got -2.0"):
        L2SP(A, 1.0, new_strength=-2.0)
    with pytest.raises(
        TypeError, match="new must be a list of names or a function of a name; got the one string 'bias'"
    ):
        L2SP(A, 1.0, new="bias")
    with pytest.raises(ValueError, match="the anchor names no parameter"):
        L2SP(A, 1.0, new=lambda name: True)
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"new_strength is 2.0 and no trained parameter is new"):
        L2SP(A, 1.0, new_strength=2.0)(model)
    with pytest.raises(ValueError, match=r'new names "bais", which the model has not. Did you mean "bias"'):
        L2SP({"weight": A["weight"]}, 1.0, new_strength=2.0, new=["bais"])(model)


def test_another_model():
    with pytest.raises(ValueError, match=r'the anchor names "bais", which the model has not. Did you mean "bias"'):
        L2SP({"bais": torch.zeros(3)}, 1.0)(nn.Linear(2, 3))
    with pytest.raises(
        ValueError, match=r"weight is \[5, 2\] in the model and \[3, 2\] in the anchor: another model's"
    ):
        L2SP(A, 1.0)(nn.Linear(2, 5))


def test_what_reaches_nothing_that_is_trained_raises():
    with pytest.raises(ValueError, match=r"L2SP reaches no parameter that is trained: all 2 .* \(the first: weight\)"):
        L2SP(A, 1.0)(nn.Linear(2, 3).requires_grad_(False))
    model = adapted()
    with pytest.raises(ValueError, match="L2SP reaches no parameter that is trained"):
        L2SP({"lm_head.weight": torch.zeros(97, 28)}, 1.0)(model)
    with torch.no_grad():
        L2SP({"lm_head.weight": torch.zeros(97, 28)}, 1.0)(model)


def test_a_tied_weight_adapted_in_one_place_raises():
    model = tiny_llama(tied=True)
    penalty = L2SP(model, 1.0)
    attach(model, LoRA(rank=2, alpha=2, targets=["lm_head"]))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight and lm_head.weight are one tied tensor"):
        penalty(model)


def test_the_small_model_by_float64():
    model = SmallModel()
    penalty, start = L2SP(model, 3.0), copy.deepcopy(model)
    moved(model)
    expected = 1.5 * sum(
        (p - q).square().sum() for p, q in zip(model.parameters(), start.parameters(), strict=True) if p.requires_grad
    )
    assert_close(penalty(model).detach(), expected.detach(), rtol=1e-12)
