import copy

import pytest
import torch
from penalty_runs import fitted, through_a_file
from torch import nn

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.effective import anchor_of
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.forgetting.online_ewc import OnlineEWC
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import moved

ROWS = uneven_rows(4)
CLASSES = [{**row, "labels": index % 3} for index, row in enumerate(ROWS)]


def layer():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    return model


def test_by_hand():
    """F~ = gamma F1 + F2, held where the second task ended, half of it squared."""
    model, penalty = layer(), OnlineEWC(3.0, gamma=0.5)
    before = penalty(model)
    assert before.item() == 0.0
    before.backward()
    assert model.weight.grad is None
    penalty.finish_task(model, fisher={"weight": torch.tensor([[4.0, 6.0]])})
    with torch.no_grad():
        model.weight.add_(torch.tensor([[1.0, -1.0]]))
    assert penalty(model).item() == 3.0 / 2 * (4.0 + 6.0)
    penalty.finish_task(model, fisher={"weight": torch.tensor([[1.0, 5.0]])})
    assert penalty(model).item() == 0.0
    with torch.no_grad():
        model.weight.add_(torch.tensor([[2.0, 1.0]]))
    value = penalty(model)
    assert value.item() == 3.0 / 2 * ((0.5 * 4 + 1) * 4.0 + (0.5 * 6 + 5) * 1.0)
    value.backward()
    assert model.weight.grad.tolist() == [[3.0 * 3.0 * 2.0, 3.0 * 8.0 * 1.0]]
    assert penalty.tasks == 2


def test_one_task_is_ewc_and_batches_are_the_fisher_of_them():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    moved(model, seed=4)
    batches = [collate_padded(ROWS)]
    names = [name for name in anchor_of(model) if "v_proj" in name]
    fisher = diagonal_fisher(model, batches, kind="empirical", parameters=names)
    online, given, plain = OnlineEWC(2.0, parameters=names), OnlineEWC(2.0), EWC(fisher, model, 2.0)
    online.finish_task(model, batches, kind="empirical")
    given.finish_task(model, fisher=fisher)
    moved(model)
    assert online(model).item() == given(model).item() == plain(model).item() > 0


def test_what_is_held_once_stays_held_and_new_parameters_join():
    """A head that is frozen for the second task keeps gamma times its information, plus what the new task adds."""
    model = tiny_bert(labels=3)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    penalty = OnlineEWC(1.0, gamma=0.5)
    penalty.finish_task(model, [collate_padded(CLASSES)], kind="exact")
    assert set(penalty.importance) == {"classifier.weight", "classifier.bias"}
    first = penalty.importance["classifier.bias"].clone()
    model.classifier.requires_grad_(False)
    model.bert.pooler.requires_grad_(True)
    penalty.finish_task(model, [collate_padded(CLASSES)], kind="exact")
    assert len(penalty.importance) == 4
    assert_close(penalty.importance["classifier.bias"], 1.5 * first, rtol=1e-6)
    moved(model)
    assert penalty(model).item() > 0


def test_the_fisher_of_a_is_0_while_b_is_0_and_that_of_the_effective_weight_is_not():
    """Why the effective weight is held, and not A and B."""
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5, targets=["q_proj"]))
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    causal_lm_loss(model, collate_padded(ROWS)).backward()
    assert not layer.lora_a.grad.any()
    penalty = OnlineEWC(1.0)
    penalty.finish_task(model, [collate_padded(ROWS)])
    assert penalty.importance[f"{name}.weight"].min() > 0


@pytest.mark.parametrize("lora", [False, True])
def test_the_state_goes_through_a_file_bit_for_bit(tmp_path, lora):
    model = tiny_gpt2()
    if lora:
        attach(model, LoRA(rank=3, alpha=5, targets=["c_attn"]))
        moved(model, seed=3)
    start = copy.deepcopy(model)
    penalty, other = OnlineEWC(2.0, gamma=0.9), OnlineEWC(2.0, gamma=0.9)
    penalty.finish_task(model, [collate_padded(ROWS)], method="loop")
    other.load_state_dict(through_a_file(penalty.state_dict(), tmp_path))
    moved(model)
    twin = moved(start)  # another model of the same values
    assert torch.equal(other(twin), penalty(model))
    penalty(model).backward()
    other(twin).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    again = other.state_dict()
    assert torch.equal(
        torch.cat([v.flatten() for v in again["importance"].values()]),
        torch.cat([v.flatten() for v in penalty.state_dict()["importance"].values()]),
    )
    if lora:
        assert all(value["copy"] is None for value in again["anchors"].values())
        with torch.no_grad():
            twin.get_submodule("transformer.h.0.attn.c_attn").base.weight[0, 0] += 1.0
        with pytest.raises(ValueError, match=r"c_attn.weight was frozen .* has changed since"):
            other(twin)


def test_a_saved_state_with_other_numbers_is_refused():
    penalty = OnlineEWC(2.0, gamma=0.9)
    for other, message in (
        (OnlineEWC(3.0, gamma=0.9), "had strength 2.0; this one has 3.0"),
        (OnlineEWC(2.0), "the saved OnlineEWC had gamma 0.9; this one has 1.0"),
        (OnlineEWC(2.0, gamma=0.9, dtype=torch.bfloat16), "had dtype None; this one has torch.bfloat16"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(penalty.state_dict())


CASES = {
    "bert": (lambda: tiny_bert(labels=3), CLASSES, classification_loss, ["query"]),
    "gpt2": (tiny_gpt2, ROWS, causal_lm_loss, ["c_attn"]),
    "t5": (tiny_t5, ROWS, sequence_to_sequence_loss, ["q"]),
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_within_the_second_task_goes_on_bit_for_bit(tmp_path, case, lora):
    make, rows, loss, targets = CASES[case]

    def start():
        torch.manual_seed(1)
        model, penalty = make(), OnlineEWC(50.0)
        if lora:
            attach(model, LoRA(rank=2, alpha=4, targets=targets))
            moved(model, seed=2)
        penalty.finish_task(model, [collate_padded(rows)], kind="empirical", method="loop")
        return model, penalty

    whole = fitted(*start(), rows, loss)
    assert whole.history[-1]["penalty"] > 0
    fitted(*start(), rows, loss, tmp_path, stop=2)
    model, penalty = start()[0], OnlineEWC(50.0)  # what it had learned is in the checkpoint
    resumed = fitted(model, penalty, rows, loss, tmp_path)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert penalty.tasks == 1
    assert [row["penalty"] for row in resumed.history] == [row["penalty"] for row in whole.history]


F = {"weight": torch.ones(1, 2)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OnlineEWC(-1.0), "strength must be a finite number, 0 or more; got -1.0"),
        (lambda: OnlineEWC(1.0, gamma=0.0), "gamma must be above 0 and at most 1; got 0.0"),
        (lambda: OnlineEWC(1.0, gamma=1.5), "gamma must be above 0 and at most 1; got 1.5"),
        (lambda: OnlineEWC(1.0, dtype=torch.int8), "dtype must be one of torch.float16, .*; got torch.int8"),
        (lambda: OnlineEWC(1.0).finish_task(layer()), "needs the task's batches, or its fisher, and not both"),
        (lambda: OnlineEWC(1.0).finish_task(layer(), [1], fisher=F), "needs the task's batches, or its fisher"),
        (lambda: OnlineEWC(1.0).finish_task(layer(), fisher={}), "fisher names no parameter"),
        (lambda: OnlineEWC(1.0).finish_task(nn.Linear(2, 2), []), "no example has a target: the batches are empty"),
        (
            lambda: OnlineEWC(1.0).finish_task(layer(), fisher={"weight": torch.ones(3, 2)}),
            r"weight is \[1, 2\] in the model and \[3, 2\] in the Fisher information: another model's",
        ),
        (
            lambda: OnlineEWC(1.0).finish_task(layer(), fisher={"wieght": F["weight"]}),
            'no parameter "wieght".*"weight"',
        ),
        (lambda: OnlineEWC(1.0).finish_task(layer(), fisher={"weight": -F["weight"]}), "of weight is negative"),
        (lambda: OnlineEWC(1.0).finish_task(layer(), fisher={"weight": F["weight"] / 0}), "of weight is not finite"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="parameters must be names, or a function of one; got the one string 'weight'"):
        OnlineEWC(1.0, parameters="weight")


def test_a_refusal_changes_nothing_and_a_missing_name_is_one():
    model, penalty = nn.Linear(2, 3), OnlineEWC(1.0)
    penalty.finish_task(model, fisher={"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    before = penalty.state_dict()
    moved(model)
    with pytest.raises(ValueError, match=r'the Fisher information lacks "bias", which is held since an earlier task'):
        penalty.finish_task(model, fisher={"weight": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="of bias is negative"):
        penalty.finish_task(model, fisher={"weight": torch.ones(3, 2), "bias": -torch.ones(3)})
    after = penalty.state_dict()
    assert after["tasks"] == before["tasks"] == 1
    assert all(torch.equal(value, after["importance"][name]) for name, value in before["importance"].items())
    assert all(torch.equal(value["copy"], after["anchors"][n]["copy"]) for n, value in before["anchors"].items())


def test_frozen_since_the_anchor_was_taken_and_another_model():
    model, penalty = nn.Linear(2, 3), OnlineEWC(1.0)
    penalty.finish_task(model, fisher={"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"OnlineEWC reaches no parameter that is trained: .* Unfreeze what was frozen"
    ):
        penalty(model)
    with pytest.raises(ValueError, match=r"weight is \[5, 2\] in the model and \[3, 2\] in fisher: another model's"):
        penalty(nn.Linear(2, 5))
    with pytest.raises(ValueError, match='fisher names "bias", which the model has not'):
        penalty(nn.Linear(2, 3, bias=False))


def test_another_parts_state_is_refused():
    with pytest.raises(CheckpointError, match=r'has no "numbers": it is none of OnlineEWC, it has \[\'kept\'\]'):
        OnlineEWC(1.0).load_state_dict({"kept": {}})
