"""A module trained whole has a copy in every task that names it, and the newest that is on runs."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from llmtune.adapters import AdapterStack, LoRA, detach, load, merge, unmerge
from llmtune.adapters.effective import anchor_of
from llmtune.testing.models import tiny_bert
from llmtune.testing.small import moved

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
CONFIG = LoRA(rank=2, alpha=3, targets=["query"], train_modules=["classifier"])


def output(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def three_tasks():
    """Return a stack of three trained tasks, and what the model gave with the first n of them."""
    stack = AdapterStack(tiny_bert(labels=3))
    seen = [output(stack.model)]
    for number, task in enumerate(("first", "second", "third")):
        stack.start(CONFIG, task)
        assert torch.equal(output(stack.model), seen[-1]), "the new copy starts from the one in use"
        moved(stack.model, seed=number)
        seen.append(output(stack.model))
    return stack, seen


def test_every_task_has_its_own_copy_and_use_brings_it_back():
    stack, seen = three_tasks()
    base = tiny_bert(labels=3)
    for number in (0, 1, 2, 3, 1):
        stack.use(stack.names[:number])
        assert torch.equal(output(stack.model), seen[number])
    for name in reversed(stack.names):
        detach(stack.model, name)
    assert torch.equal(output(stack.model), output(base))


def test_a_task_that_does_not_name_it_leaves_it_frozen():
    stack, _ = three_tasks()
    head = stack.model.classifier.copy.weight.detach().clone()
    stack.start(LoRA(rank=2, alpha=3, targets=["query"]), "fourth")
    moved(stack.model)
    assert torch.equal(stack.model.classifier.copy.weight, head)
    assert not stack.model.classifier.copy.weight.requires_grad


def test_a_copy_that_is_off_is_not_started_from():
    stack, seen = three_tasks()
    stack.use(["first"])
    stack.start(CONFIG, "fourth")
    assert torch.equal(output(stack.model), seen[1])


def test_the_effective_head_is_the_one_that_runs():
    stack, _ = three_tasks()
    assert torch.equal(anchor_of(stack.model)["classifier.weight"], stack.model.classifier.copy.weight)
    stack.use(["first"])
    first = stack.model.classifier.base.base
    assert torch.equal(anchor_of(stack.model, ["classifier.weight"])["classifier.weight"], first.copy.weight)


def test_they_are_saved_and_each_loads_by_itself(tmp_path):
    stack, seen = three_tasks()
    stack.save(tmp_path)
    again = AdapterStack.load(tiny_bert(labels=3), tmp_path)
    assert torch.equal(output(again.model), seen[-1])
    again.use(["first", "second"])
    assert torch.equal(output(again.model), seen[2])
    alone = tiny_bert(labels=3)
    load(alone, tmp_path, "second")
    assert torch.equal(alone.classifier.copy.weight, again.model.classifier.base.copy.weight)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "second" / "adapter_model.safetensors")


def test_they_are_merged_in_their_order():
    stack, seen = three_tasks()
    before = {name: p.clone() for name, p in stack.model.named_parameters()}
    with pytest.raises(ValueError, match='adapter "third" trains a copy of a Linear, and so does "second" before it'):
        merge(stack.model, "third")
    with pytest.raises(ValueError, match='merge "second" first'):
        stack.merge_and_start(CONFIG, "fourth")
    assert all(torch.equal(p, before[name]) for name, p in stack.model.named_parameters())
    folded = copy.deepcopy(stack.model)
    for name in stack.names:
        merge(stack.model, name)
        torch.testing.assert_close(output(stack.model), seen[-1], rtol=2e-5, atol=2e-5)
        merge(folded, name, keep_base=False)
    assert type(folded.classifier).__name__ == "Linear"
    torch.testing.assert_close(output(folded), seen[-1], rtol=2e-5, atol=2e-5)
    for name in reversed(stack.names):
        unmerge(stack.model, name)
    assert torch.equal(output(stack.model), seen[-1])


def test_a_head_under_lora_has_no_copy():
    stack = AdapterStack(tiny_bert(labels=3))
    stack.start(LoRA(rank=2, alpha=3, targets=["classifier"]), "first")
    with pytest.raises(ValueError, match='classifier already belongs to adapter "first" and cannot be trained whole'):
        stack.start(CONFIG, "second")
