"""Task after task: the old tasks stay to the bit, whatever is trained next, and a saved stack comes back as it was."""

import copy
import json

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    AdapterStack,
    DoRA,
    LoRA,
    adapter_names,
    adapter_parameters,
    attach,
    combine,
    detach,
    load,
    merge,
    unmerge,
)
from llmtune.adapters.attach import record_of
from llmtune.adapters.trial import trial
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
Q, V = LoRA(rank=3, alpha=5, targets=["q_proj"]), LoRA(rank=2, alpha=7, targets=["q_proj", "v_proj"])


def output(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model, steps=3):
    """Train what requires a gradient, from a start moved so that everything learns."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def state(model):
    return {name: (t.clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}


def unchanged(model, before):
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, flag) in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].requires_grad == flag, name


# --- freeze and add -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_the_old_tasks_stay_to_the_bit(make):
    model = make()
    stack = AdapterStack(model)
    base = {name: p.clone() for name, p in model.named_parameters()}
    seen = {(): output(model)}
    for number, task in enumerate(("first", "second", "third")):
        stack.start(LoRA(rank=2 + number, alpha=5), task)
        assert torch.equal(output(model), seen[tuple(stack.names[:-1])]), "a new task starts where the old ones stand"
        assert stack.trained == [task]
        old = {name: {k: p.clone() for k, p in adapter_parameters(model, name).items()} for name in stack.names[:-1]}
        train(model)
        for name, parameters in old.items():
            after = adapter_parameters(model, name)
            assert all(torch.equal(p, q) for p, q in zip(parameters.values(), after.values(), strict=True))
        seen[tuple(stack.names)] = output(model)
        assert not torch.equal(seen[tuple(stack.names)], seen[tuple(stack.names[:-1])])
    for names, expected in seen.items():
        stack.use(names)
        assert stack.active == list(names)
        assert torch.equal(output(model), expected), names
    for name in reversed(stack.names):
        detach(model, name)
    assert torch.equal(output(model), seen[()])
    assert all(torch.equal(p, base[name]) and p.requires_grad for name, p in model.named_parameters())


def test_what_is_off_stays_off_when_the_next_task_starts():
    stack = AdapterStack(tiny_llama())
    stack.start(Q, "first")
    train(stack.model)
    stack.use(())
    expected = output(stack.model)
    stack.start(V, "second")
    assert stack.active == ["second"]
    assert torch.equal(output(stack.model), expected)


def test_the_state_is_in_the_model_so_that_a_copy_has_its_own():
    stack = AdapterStack(tiny_llama())
    stack.start(Q, "first")
    train(stack.model)
    copied = AdapterStack(copy.deepcopy(stack.model))
    assert (copied.names, copied.trained) == (["first"], ["first"])
    expected = output(stack.model)
    copied.start(V, "second")
    train(copied.model)
    assert stack.names == ["first"]
    assert torch.equal(output(stack.model), expected)
    assert AdapterStack(copied.model).names == ["first", "second"]


# --- merge and start anew -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_base", [False, True])
def test_the_last_is_folded_and_the_next_starts_there(keep_base):
    model = tiny_llama()
    stack = AdapterStack(model)
    start = output(model)
    stack.start(Q, "first")
    train(model)
    tuned = output(model)
    merged, report = stack.merge_and_start(V, "second", keep_base=keep_base)
    assert merged.name == "first"
    assert report.name == "second"
    assert (merged.kept_bytes > 0) == keep_base
    assert stack.names == (["first", "second"] if keep_base else ["second"])
    assert stack.folded == ([] if keep_base else ["first"])
    assert stack.trained == ["second"]
    torch.testing.assert_close(output(model), tuned, rtol=2e-5, atol=2e-5)
    train(model)
    detach(model, "second")
    torch.testing.assert_close(output(model), tuned, rtol=2e-5, atol=2e-5)
    if keep_base:
        unmerge(model, "first")
        assert torch.equal(output(model), tuned)
        detach(model, "first")
        assert torch.equal(output(model), start)
    assert not [name for name in vars(model) if "llmtune" in name]
    assert all(p.requires_grad for p in model.parameters())


def test_folding_leaves_the_older_tasks_alone():
    stack = AdapterStack(tiny_llama())
    for config, task in ((Q, "first"), (V, "second")):
        stack.start(config, task)
        train(stack.model)
    old = {name: p.clone() for name, p in adapter_parameters(stack.model, "first").items()}
    stack.merge_and_start(Q, "third")
    stack.merge_and_start(Q, "fourth")
    assert stack.names == ["first", "fourth"]
    assert stack.folded == ["second", "third"]
    after = adapter_parameters(stack.model, "first").values()
    assert all(torch.equal(p, q) for p, q in zip(old.values(), after, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        DoRA(rank=2, alpha=3, targets=["query"]),
        LoRA(rank=2, alpha=3, targets=["query"], train_modules=["classifier"]),
    ],
)
def test_the_next_may_stand_where_the_folded_one_stood(config):
    """DoRA must be the first at its place: after folding the place is free."""
    model = tiny_bert(labels=3)
    stack = AdapterStack(model)
    stack.start(config, "first")
    train(model)
    tuned, drawn = output(model), torch.get_rng_state()
    stack.merge_and_start(config, "second")
    torch.testing.assert_close(output(model), tuned, rtol=2e-5, atol=2e-5)
    again = copy.deepcopy(model)
    detach(again, "second")
    torch.set_rng_state(drawn)
    attach(again, config, "second")
    drawn_once = adapter_parameters(again, "second").values()
    assert all(torch.equal(p, q) for p, q in zip(adapter_parameters(model, "second").values(), drawn_once, strict=True))
    train(model)
    assert stack.names == ["second"]


@pytest.mark.parametrize(
    ("config", "name", "options", "message"),
    [
        (V, "first", {"keep_base": True}, 'already has an adapter "first"'),
        (LoRA(rank=2, alpha=3, targets=["nothing"]), "second", {}, 'targets: "nothing" matches no module'),
        (LoRA(rank=99, alpha=3), "second", {}, "the rank 99 is larger than"),
        (V, "q_proj", {}, 'the adapter\'s name "q_proj" is also the name of a module'),
        (V, "zeroth", {}, 'already has an adapter "zeroth"'),
    ],
)
def test_what_cannot_be_done_changes_nothing(config, name, options, message):
    stack = AdapterStack(tiny_llama())
    stack.start(Q, "zeroth")
    stack.start(V, "first")
    train(stack.model)
    before, expected, drawn = state(stack.model), output(stack.model), torch.get_rng_state()
    flags = copy.deepcopy(record_of(stack.model, "first").flags)
    with pytest.raises(ValueError, match=message):
        stack.merge_and_start(config, name, **options)
    unchanged(stack.model, before)
    assert torch.equal(output(stack.model), expected)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert stack.names == ["zeroth", "first"]
    assert record_of(stack.model, "first").flags == flags


def test_a_trial_puts_everything_back():
    model = stacked(active=("default", "third")).model
    before, expected, modules = state(model), output(model), list(model.named_modules())
    record = record_of(model, "second")
    inside = copy.deepcopy(vars(record))

    def fail_half_way():
        with trial(model):
            for name in ("default", "third", "second"):
                detach(model, name)
            attach(model, Q, "other")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    unchanged(model, before)
    assert torch.equal(output(model), expected)
    assert list(model.named_modules()) == modules
    assert record_of(model, "second") is record
    assert vars(record) == inside


def test_the_refusals_of_the_verbs_come_through():
    with pytest.raises(TypeError, match="a stack of adapters is a module's; got str"):
        AdapterStack("model")
    stack = AdapterStack(tiny_llama(tied=True))
    with pytest.raises(ValueError, match=r"there is no adapter to merge: start the first task with start\(config"):
        stack.merge_and_start(Q, "first")
    with pytest.raises(ValueError, match="there is no adapter to save: start a task first"):
        stack.save("nowhere")
    stack.start(LoRA(rank=2, alpha=3, targets=["embed_tokens"]), "first")
    with pytest.raises(ValueError, match='already has an adapter "first"'):
        stack.start(Q, "first")
    before = state(stack.model)
    with pytest.raises(ValueError, match="tied weights"):
        stack.merge_and_start(Q, "second")
    unchanged(stack.model, before)
    stack.merge_and_start(Q, "second", untie=True)
    with pytest.raises(ValueError, match=r'has no adapter "frist"'):
        stack.use("frist")
    stack.use(())
    with pytest.raises(ValueError, match='adapter "second" is switched off, and merging it would change'):
        stack.merge_and_start(V, "third")
    assert stack.names == ["second"]


@pytest.mark.parametrize("merging", [False, True])
def test_wrapped_models(merging):
    stack = AdapterStack(torch.compile(tiny_llama(), backend="eager"))
    stack.start(Q, "first")
    (stack.merge_and_start if merging else stack.start)(V, "second")
    assert stack.trained == ["second"]
    wrapped = nn.parallel.DistributedDataParallel.__new__(
        nn.parallel.DistributedDataParallel
    )  # without a process group
    nn.Module.__init__(wrapped)
    wrapped.module = stack.model._orig_mod
    parallel = AdapterStack(wrapped)
    before = state(wrapped)
    with pytest.raises(TypeError, match="DistributedDataParallel does not see parameters that come later"):
        (parallel.merge_and_start if merging else parallel.start)(Q, "third")
    with pytest.raises(TypeError, match="DistributedDataParallel does not see parameters that come later"):
        combine(wrapped, ["second"], [0.5], new_name="third")
    unchanged(wrapped, before)


# --- files ----------------------------------------------------------------------------------------------------------


def stacked(*, active=("default", "second")):
    stack = AdapterStack(tiny_llama())
    for config, task in ((Q, "default"), (V, "second"), (Q, "third")):
        stack.start(config, task)
        train(stack.model)
    stack.use(active)
    return stack


@pytest.mark.parametrize("active", [("default", "second", "third"), ("second",), ()])
@pytest.mark.parametrize("trained", ["second", "third"])
def test_a_saved_stack_comes_back_as_it_was(active, trained, tmp_path):
    stack = stacked(active=active)
    for name in stack.names:
        for parameter in adapter_parameters(stack.model, name).values():
            parameter.requires_grad_(name == trained)
    stack.save(tmp_path)
    again = AdapterStack.load(tiny_llama(), tmp_path)
    assert (again.names, again.active, again.trained) == (stack.names, list(active), [trained])
    assert torch.equal(output(again.model), output(stack.model))
    unchanged(again.model, state(stack.model))
    load(tiny_llama(), tmp_path, "second")  # each adapter is a file of its own as well
    for name in reversed(again.names):
        detach(again.model, name)
    unchanged(again.model, state(tiny_llama()))


def test_a_merged_adapter_comes_back_merged(tmp_path):
    stack = AdapterStack(tiny_llama(tied=True))
    stack.start(LoRA(rank=2, alpha=3, targets=["embed_tokens", "q_proj"]), "first")
    train(stack.model)
    stack.merge_and_start(V, "second", keep_base=True, untie=True)
    train(stack.model)
    stack.save(tmp_path)
    again = AdapterStack.load(tiny_llama(tied=True), tmp_path)
    assert torch.equal(output(again.model), output(stack.model))
    for one in (stack, again):
        unmerge(one.model, "first")
    assert torch.equal(output(again.model), output(stack.model))


def test_weights_that_hold_folded_tasks_must_be_vouched_for(tmp_path):
    stack = AdapterStack(tiny_llama())
    stack.start(Q, "first")
    train(stack.model)
    stack.merge_and_start(V, "second")
    train(stack.model)
    stack.save(tmp_path)
    model = copy.deepcopy(stack.model)
    detach(model, "second")  # the weights that "first" was folded into
    message = (
        r"stands on weights into which these tasks were merged for good: first; folded names none\. Give the model"
    )
    for bare in (tiny_llama(), copy.deepcopy(model)):
        with pytest.raises(ValueError, match=message):
            AdapterStack.load(bare, tmp_path)
        assert adapter_names(bare) == []
    again = AdapterStack.load(model, tmp_path, folded=["first"])
    assert again.folded == ["first"]
    assert torch.equal(output(again.model), output(stack.model))


def test_merging_for_good_beside_others_is_remembered():
    stack = stacked(active=("default", "second", "third"))
    merge(stack.model, "second", keep_base=False)
    assert stack.folded == ["second"]
    assert stack.names == ["default", "third"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "holds no adapter_stack.json: give the folder that a stack was saved into"),
        ("{", ValueError, "adapter_stack.json is no JSON"),
        ("[]", ValueError, "describes no stack of adapters: it must hold lists of names for names, active"),
        ('{"names": []}', ValueError, "describes no stack of adapters"),
    ],
)
def test_files_that_are_none(text, error, message, tmp_path):
    stacked().save(tmp_path)
    path = tmp_path / "adapter_stack.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(error, match=message):
        AdapterStack.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize(("key", "value"), [("active", ["gone"]), ("names", ["default", "gone"]), ("merged", ["gone"])])
def test_a_stack_that_cannot_be_loaded_leaves_the_model_as_it_was(key, value, tmp_path):
    stacked().save(tmp_path)
    path = tmp_path / "adapter_stack.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match="gone"):
        AdapterStack.load(model, tmp_path)
    unchanged(model, before)
    assert not [name for name in vars(model) if "llmtune" in name]


def test_a_stack_goes_onto_a_model_without_adapters(tmp_path):
    stacked().save(tmp_path)
    model = tiny_llama()
    attach(model, Q, "other")
    with pytest.raises(ValueError, match="a stack is loaded into a model without adapters; this one has other: detach"):
        AdapterStack.load(model, tmp_path)


def test_any_module_will_do(tmp_path):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(2, 5)
    stack = AdapterStack(model)
    stack.start(LoRA(rank=2, alpha=3), "first")
    for parameter in adapter_parameters(model, "first").values():
        parameter.data.add_(0.1)
    stack.save(tmp_path)
    again = copy.deepcopy(model)
    detach(again, "first")
    assert torch.equal(AdapterStack.load(again, tmp_path).model(x), model(x))
