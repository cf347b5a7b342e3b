"""O-LoRA is a sum over pairs of rows of the same module, 0 for rows that share nothing, and lengths do not count."""

import copy
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.adapters import DoRA, LoRA, VeRA, adapter_parameters, attach, detach, merge, set_active
from llmtune.adapters.attach import adapter_layers
from llmtune.adapters.layer import adapter_chain, named_places
from llmtune.adapters.stack import AdapterStack
from llmtune.forgetting import OrthogonalLoRA, row_overlap
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import SmallModel, moved

TASKS = {  # of each model: what the first, second and third task adapt
    tiny_llama: (
        ["q_proj", "up_proj"],
        ["q_proj", "v_proj", "embed_tokens"],
        ["q_proj", "v_proj", "up_proj", "o_proj"],
    ),
    tiny_gpt2: (["c_attn"], ["c_attn", "c_fc", "wpe"], ["c_attn", "c_fc", "wpe"]),
    tiny_bert: (["query", "word_embeddings"], ["query", "value"], ["query", "value", "word_embeddings"]),
    tiny_t5: (["q", "wi"], ["q", "o"], ["q", "wi", "o"]),
}


def stacked(make=tiny_llama, *, dtype=torch.float64):
    """Return a model with three trained tasks of ranks 2, 3 and 5."""
    stack = AdapterStack(make())
    for number, (rank, targets) in enumerate(zip((2, 3, 5), TASKS[make], strict=True)):
        stack.start(LoRA(rank=rank, alpha=7, targets=targets, dtype=dtype), f"task{number}")
        moved(stack.model, seed=number)
    return stack.model


def by_hand(model, form, *, new="task2", old=("task0", "task1")):
    """Return the sum over modules, earlier adapters and pairs of rows, one at a time."""
    total = 0.0
    for _, module in named_places(model):
        layers = {layer.adapter_name: layer for layer in adapter_chain(module)}
        for name in old:
            if name in layers and new in layers:
                for a in layers[new].lora_a.detach().double():
                    for b in layers[name].lora_a.detach().double():
                        product = float((a * b).sum())
                        length = float((a * a).sum() * (b * b).sum())
                        total += {"normalised": product**2 / length, "paper": product**2, "code": abs(product)}[form]
    return total


@pytest.mark.parametrize("form", ["normalised", "paper", "code"])
@pytest.mark.parametrize("make", TASKS)
def test_it_is_the_double_loop(make, form):
    model = stacked(make)
    value = OrthogonalLoRA(1.7, form)(model).detach()
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(1.7 * by_hand(model, form), rel=1e-10)
    value = OrthogonalLoRA(1.7, form, name="task1")(with_trained(model, "task1")).detach()
    assert float(value) == pytest.approx(1.7 * by_hand(model, form, new="task1", old=["task0"]), rel=1e-10)
    value = OrthogonalLoRA(1.0, form, earlier=["task1"])(model).detach()
    assert float(value) == pytest.approx(by_hand(model, form, old=["task1"]), rel=1e-10)


def with_trained(model, name):
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(True)
    return model


def disjoint():
    """Return a model whose new adapter reads other entries of the input than the earlier one."""
    model = SmallModel()
    for name, first in (("old", 0), ("new", 2)):
        attach(model, LoRA(rank=2, alpha=3, targets=["head"], dtype=torch.float64), name)
        (layer,) = adapter_layers(model, name)
        with torch.no_grad():
            layer.lora_a.zero_()
            layer.lora_a[0, first], layer.lora_a[1, first + 1] = 2.0, -3.0
            layer.lora_b.normal_()
    return model


@pytest.mark.parametrize("form", ["normalised", "paper", "code"])
def test_it_is_0_for_disjoint_rows(form):
    model = disjoint()
    value = OrthogonalLoRA(3.0, form)(model)
    value.backward()
    (layer,) = adapter_layers(model, "new")
    assert float(value.detach()) == 0.0
    assert not layer.lora_a.grad.any()


def test_a_short_a_and_a_long_b_do_not_cheat():
    model = stacked()
    values = {form: float(OrthogonalLoRA(1.0, form)(model).detach()) for form in ("normalised", "paper", "code")}
    with torch.no_grad():
        for layer in adapter_layers(model, "task2"):
            layer.lora_a /= 64  # the change B A is the same
            layer.lora_b *= 64
    after = {form: float(OrthogonalLoRA(1.0, form)(model).detach()) for form in values}
    assert after["normalised"] == pytest.approx(values["normalised"], rel=1e-12)
    assert after["paper"] == pytest.approx(values["paper"] / 64**2, rel=1e-12)
    assert after["code"] == pytest.approx(values["code"] / 64, rel=1e-12)


def test_an_orthogonal_a_leaves_what_the_earlier_task_reads_alone():
    """Why the input side: on the span of the earlier A the new change is 0."""
    model = disjoint()
    new, old = (adapter_layers(model, name)[0] for name in ("new", "old"))
    read = torch.randn(7, 2, dtype=torch.float64) @ old.lora_a
    assert (read @ new.deltas()["weight"].T).abs().max() == 0


def test_on_the_first_task_it_is_0_and_says_so():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5, targets=["q_proj", "up_proj"]), "first")
    value = OrthogonalLoRA(1.0)(model)
    value.backward()
    assert float(value.detach()) == 0.0
    assert all(layer.lora_a.grad is None or not layer.lora_a.grad.any() for layer in adapter_layers(model, "first"))
    report = OrthogonalLoRA(1.0).report(model)
    assert str(report) == 'adapter "first": no earlier adapter, so the penalty is 0'
    assert len(report.alone) == 4


def test_the_report_says_which_modules_are_shared():
    model = stacked()
    report = OrthogonalLoRA(1.0).report(model)
    assert report.modules == {"task0": 4, "task1": 4}  # q_proj and up_proj; q_proj and v_proj: of two layers
    assert report.alone == ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")
    expected = by_hand(model, "normalised", old=["task1"]) / (4 * 5 * 3)
    assert report.cosines["task1"] == pytest.approx(expected, rel=1e-10)
    assert str(report).splitlines()[0] == 'adapter "task2": 2 modules that no earlier adapter touches'
    assert re.fullmatch(r"task1: 4 modules, mean cos\^2 0\.\d+", str(report).splitlines()[2])


def test_modules_that_no_two_share_count_nothing():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), "first")
    attach(model, LoRA(rank=2, alpha=3, targets=["v_proj"]), "second")
    assert float(OrthogonalLoRA(1.0)(model).detach()) == 0.0
    assert OrthogonalLoRA(1.0).report(model).modules == {"first": 0}


def test_gradient_goes_to_the_new_a_alone():
    model = with_trained(with_trained(stacked(), "task0"), "task1")
    OrthogonalLoRA(1.0)(model).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(p.grad is None for n in ("task0", "task1") for p in adapter_parameters(model, n).values())
    assert all(layer.lora_b.grad is None for layer in adapter_layers(model, "task2"))
    assert len(reached) == 6  # q_proj, v_proj and up_proj of two layers


def test_an_embeddings_a_that_starts_at_0_gives_no_nan():
    model = tiny_bert()
    for name in ("first", "second"):
        attach(model, LoRA(rank=2, alpha=3, targets=["word_embeddings"]), name)
    value = OrthogonalLoRA(1.0)(model)
    value.backward()
    (layer,) = adapter_layers(model, "second")
    assert float(value.detach()) == 0.0
    assert not layer.lora_a.grad.any()


def test_all_modules_of_one_shape_are_one_product():
    """The cost is a few products for the whole model, not a loop over pairs of names."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.name().startswith(("aten::bmm", "aten::mm"))
            return func(*args, **(kwargs or {}))

    model = tiny_llama()
    for name in ("first", "second", "third"):
        attach(model, LoRA(rank=2, alpha=3), name)
    with Products() as seen:
        OrthogonalLoRA(1.0)(model)
    assert len(adapter_layers(model, "third")) == 14
    assert seen.count == 3  # inputs of three sizes


def test_it_is_float32_under_autocast_and_with_adapters_of_half_precision():
    model = stacked(dtype=torch.float32)
    expected = float(OrthogonalLoRA(1.0)(model).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = OrthogonalLoRA(1.0)(model)
    assert value.dtype == torch.float32
    assert float(value.detach()) == expected
    half = stacked(dtype=torch.bfloat16)
    value = OrthogonalLoRA(1.0)(half)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(by_hand(half, "normalised"), rel=1e-5)


def test_earlier_tasks_count_switched_off_and_merged_too():
    model = stacked()
    expected = float(OrthogonalLoRA(1.0)(model).detach())
    set_active(model, ["task2"])
    assert float(OrthogonalLoRA(1.0)(model).detach()) == expected
    set_active(model, ["task0", "task1", "task2"])
    merge(model, "task1", keep_base=True)
    assert float(OrthogonalLoRA(1.0)(model).detach()) == expected
    compiled = torch.compile(model, backend="eager")
    assert float(OrthogonalLoRA(1.0)(compiled).detach()) == expected


def test_a_task_merged_for_good_must_be_let_go_in_so_many_words():
    stack = AdapterStack(tiny_llama())
    stack.start(LoRA(rank=2, alpha=3, targets=["q_proj"]), "first")
    moved(stack.model)
    stack.merge_and_start(LoRA(rank=2, alpha=3, targets=["q_proj"]), "second")
    with pytest.raises(ValueError, match="the tasks first were merged for good, and their A is gone: merge with keep"):
        OrthogonalLoRA(1.0)(stack.model)
    assert float(OrthogonalLoRA(1.0, earlier=())(stack.model).detach()) == 0.0


def bad(kind):
    model, q = tiny_llama(), LoRA(rank=2, alpha=3, targets=["q_proj"])
    if kind == "none":
        return model
    first = {
        "dora": DoRA(rank=2, alpha=3, targets=["q_proj"]), "vera": VeRA(rank=2, targets=["q_proj"]),
        "pissa": LoRA(rank=2, alpha=3, targets=["q_proj"], initialise="pissa"),
        "head": LoRA(rank=2, alpha=3, targets=(), train_modules=["lm_head"]),
    }.get(kind, q)  # fmt: skip
    attach(model, first, "first")
    if kind != "head":
        attach(model, q, "second")
    if kind == "merged":
        merge(model, "second")
    if kind == "frozen":
        model.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", r"O-LoRA needs a model with adapters: start a task with AdapterStack\(model\).start"),
        ("dora", 'adapter "first" is DoRA: O-LoRA compares the A of plain LoRA adapters'),
        ("vera", 'adapter "first" is VeRA: O-LoRA compares the A of plain LoRA adapters'),
        ("pissa", 'adapter "first" starts from the weights, so that its A alone does not say what it reads'),
        ("head", 'adapter "first" has no A: it adapts no module by LoRA'),
        ("merged", 'adapter "second" is merged into the weights: unmerge it to train it'),
        ("frozen", 'O-LoRA reaches no parameter: every A of adapter "second" is frozen'),
    ],
)
def test_models_it_cannot_hold(kind, message):
    with pytest.raises(ValueError, match=message):
        OrthogonalLoRA(1.0)(bad(kind))


def test_experts_are_refused():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["v_proj"], target_parameters=["q_proj.weight"]), "first")
    with pytest.raises(ValueError, match='adapter "first" has target_parameters, which O-LoRA does not compare'):
        OrthogonalLoRA(1.0)(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "strength must be a finite number, 0 or more; got -1.0"),
        ({"strength": float("nan")}, ValueError, "strength must be a finite number"),
        ({"form": "papr"}, ValueError, r"form must be one of normalised, paper, code; got 'papr'. Did you mean"),
        ({"earlier": "first"}, TypeError, 'earlier must be a list of adapters\' names; got the string "first"'),
    ],
)
def test_knobs_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        OrthogonalLoRA(**({"strength": 1.0} | options))


def test_names_that_are_none():
    model = stacked()
    with pytest.raises(ValueError, match='the model has no adapter "task9"'):
        OrthogonalLoRA(1.0, name="task9")(model)
    with pytest.raises(ValueError, match='earlier names "task2", which did not come before "task1"'):
        OrthogonalLoRA(1.0, name="task1", earlier=["task2"])(model)
    with pytest.raises(ValueError, match="rows of length 5 have no angle to rows of length 3"):
        row_overlap(torch.zeros(2, 5), torch.zeros(2, 3))


def test_it_keeps_nothing_of_the_model():
    model = stacked()
    penalty = OrthogonalLoRA(1.0)
    other = copy.deepcopy(model)
    expected = float(penalty(model).detach())
    detach(model, "task1")
    assert float(penalty(other).detach()) == expected
    assert float(penalty(model).detach()) == pytest.approx(by_hand(model, "normalised"), rel=1e-10)
