"""Bad input ends in one sentence that says what was expected and what came, and changes nothing."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.adapters import (
    IA3,
    AdaLoRA,
    BitFit,
    Bottleneck,
    DoRA,
    LayerNormTuning,
    LoRA,
    LoRALinear,
    LoRAParameter,
    NewTokens,
    PrefixTuning,
    PromptTuning,
    VeRA,
    active,
    adapter_names,
    adapter_parameters,
    attach,
    check_gradients,
    combine,
    detach,
    load,
    memory_summary,
    quantize,
    save,
    set_active,
    trainable_summary,
)
from llmtune.adapters.attach import adapter_layers
from llmtune.optim import parameter_groups
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.weights import merge_deltas

lora = partial(LoRA, rank=2, alpha=3)
adalora = partial(AdaLoRA, alpha=3, total_steps=5, initial_rank=3, target_rank=2)
RECORDS = {
    "LoRA": lora,
    "DoRA": partial(DoRA, rank=2, alpha=3),
    "AdaLoRA": adalora,
    "VeRA": partial(VeRA, rank=2),
    "IA3": partial(IA3, targets=["k_proj", "down_proj"], feedforward=["down_proj"]),
    "BitFit": BitFit,
    "LayerNormTuning": LayerNormTuning,
    "NewTokens": partial(NewTokens, tokens=[3]),
    "PromptTuning": partial(PromptTuning, tokens=2),
    "PrefixTuning": partial(PrefixTuning, tokens=2),
    "Bottleneck": partial(Bottleneck, size=2),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("value", [1, None, [1], [None], torch.ones(2)], ids=str)
def test_every_record_wants_a_list_of_suffixes_to_train(name, value):
    with pytest.raises(TypeError, match="train_modules must be a list of suffixes, strings all, or"):
        RECORDS[name](train_modules=value)


@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
@pytest.mark.parametrize("flag", ["rslora", "lora_bias", "any_rank"])
@pytest.mark.parametrize("value", ["no", 0, 1, None, torch.ones(2)], ids=str)
def test_flags_are_true_or_false(name, flag, value):
    with pytest.raises(TypeError, match=f"{flag} must be True or False; got "):
        RECORDS[name](**{flag: value})


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: lora(rank_pattern=3), TypeError, "rank_pattern must be a dict with strings for keys, .*; got 3"),
        (lambda: lora(rank_pattern=None), TypeError, "rank_pattern must be a dict"),
        (lambda: lora(rank_pattern=""), TypeError, "rank_pattern must be a dict"),
        (lambda: lora(alpha_pattern={3: 4}), TypeError, "alpha_pattern must be a dict"),
        (lambda: lora(target_parameters=None), TypeError, "target_parameters must be a list of suffixes"),
        (lambda: lora(targets=None), ValueError, "targets must be suffixes or one regular expression; got None$"),
        (lambda: lora(targets={"q_proj": 1}), ValueError, "targets must be suffixes or one regular expression"),
        (lambda: lora(exclude=[3]), ValueError, r"exclude must be suffixes or one regular expression; got \[3\]$"),
        (lambda: lora(dtype=torch.float8_e4m3fn), TypeError, "dtype must have 16 bits or more"),
        (lambda: adalora(kept_ranks=[1]), TypeError, "kept_ranks must be a dict"),
        (lambda: adalora(orthogonality=torch.ones(2)), ValueError, "orthogonality must be a number above 0"),
        (lambda: VeRA(rank=2, save_projection=1), TypeError, "save_projection must be True or False; got 1"),
        (lambda: Bottleneck(size=2, activation=[]), ValueError, r"activation must be one of .*; got \[\]"),
        (lambda: LoRALinear(nn.Linear(5, 3), rank=2.5, alpha=3), ValueError, "the rank must be a whole number"),
        (lambda: LoRALinear(nn.Linear(5, 3), rank=2, alpha="x"), ValueError, "alpha must be a number above 0"),
        (lambda: LoRALinear(nn.Linear(5, 3), rank=2, alpha=3, dropout="x"), ValueError, "dropout must be a prob"),
        (lambda: LoRALinear(nn.Linear(5, 3), rank=2, alpha=3, rslora=1), TypeError, "rslora must be True or False"),
        (lambda: LoRALinear(nn.Linear(5, 3), rank=2, alpha=3, lora_bias=1), TypeError, "lora_bias must be True or"),
        (lambda: LoRALinear(nn.Linear(5, 3), rank=2, alpha=3, dtype=torch.int8), TypeError, "dtype must be a float"),
        (
            lambda: LoRAParameter(nn.Linear(5, 3), parameter="weight", rank=2.5, alpha=3),
            ValueError,
            "the rank must be a whole number",
        ),
        (
            lambda: LoRAParameter(nn.Linear(5, 3), parameter="weight", rank=2, alpha=None),
            ValueError,
            "alpha must be a number above 0",
        ),
    ],
)
def test_records_and_layers_refuse_wrong_types(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("value", [None, "x", 1, [nn.Linear(2, 2)]], ids=str)
@pytest.mark.parametrize(
    "verb",
    [
        lambda model: attach(model, lora()),
        detach,
        lambda model: set_active(model, ()),
        lambda model: combine(model, ["a"], [1.0], new_name="b"),
        lambda model: save(model, "nowhere"),
        lambda model: load(model, "nowhere"),
        lambda model: parameter_groups(model, learning_rate=1e-3),
        adapter_names,
        adapter_parameters,
        check_gradients,
        memory_summary,
        quantize,
        trainable_summary,
    ],
)
def test_every_verb_wants_a_module(verb, value):
    with pytest.raises(TypeError, match="a model, that is a torch module, is expected; got "):
        verb(value)


def pair():
    model = tiny_llama()
    for name in ("a", "b"):
        attach(model, lora(targets=["q_proj"]), name)
    return model


def enter(model, names):
    with active(model, names):
        pass


dare = {"new_name": "n", "method": "dare", "rank": 2, "density": 0.5}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: detach(m, ["a"]), TypeError, r'by its name, a string such as "default"; got \[\'a\'\]'),
        (lambda m: adapter_parameters(m, None), TypeError, "by its name, a string"),
        (lambda m: save(m, "nowhere", {}), TypeError, "by its name, a string"),
        (lambda m: set_active(m, None), TypeError, "names must be an adapter's name or a list of names, .*; got None"),
        (lambda m: set_active(m, [None]), TypeError, "by its name, a string"),
        (lambda m: enter(m, 3), TypeError, "names must be an adapter's name or a list of names"),
        (lambda m: attach(m, lora(), "x" * 201), ValueError, "at most 200 characters"),
        (lambda m: attach(m, lora(), "adapter_config.json"), ValueError, "none of the file names"),
        (lambda m: attach(m, lora(), "Adapter_model.SafeTensors"), ValueError, "none of the file names"),
        (lambda m: attach(m, lora(), "adapter_model.bin"), ValueError, "none of the file names"),
        (lambda m: combine(m, ["a"], 1.0, new_name="n"), TypeError, "weights must be a list of numbers; got 1.0"),
        (lambda m: combine(m, ["a"], ["1"], new_name="n"), TypeError, "weights must be a list of numbers"),
        (lambda m: combine(m, None, [1.0], new_name="n"), TypeError, "names must be a list of adapters' names"),
        (lambda m: combine(m, [["a"]], [1.0], new_name="n"), TypeError, "by its name, a string"),
        (lambda m: combine(m, ["a"], [1.0], generator=1, **dare), TypeError, "generator must be a torch.Generator"),
        (lambda m: quantize(nn.Sequential(nn.Linear(2, 2)), exclude=3), ValueError, "exclude must be suffixes or"),
    ],
)
def test_verbs_refuse_wrong_arguments_and_change_nothing(call, kind, message):
    model = pair()
    before = state(model)
    with pytest.raises(kind, match=message):
        call(model)
    assert state(model) == before


def state(model):
    layers = [(layer.adapter_name, layer.active) for layer in adapter_layers(model)]
    return adapter_names(model), layers, [p.requires_grad for p in model.parameters()], sorted(vars(model))


def test_the_longest_name_is_saved_and_loaded(tmp_path):
    model, name = tiny_llama(), "x" * 200
    attach(model, lora(targets=["q_proj"]), name)
    assert load(tiny_llama(), save(model, tmp_path, name), name).missing == ()


t = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: merge_deltas([{"a": 1}]), TypeError, r"a in deltas\[0\] must be a tensor; got 1"),
        (lambda: merge_deltas([None]), TypeError, r"a list with one dict of tensors for each model; got \[None\]"),
        (lambda: merge_deltas({"a": t}), TypeError, "a list with one dict of tensors for each model"),
        (lambda: merge_deltas([{"a": t}], "1"), TypeError, "weights must be a list of numbers; got '1'"),
        (lambda: merge_deltas([{"a": t}], [None]), TypeError, "weights must be a list of numbers"),
        (
            lambda: merge_deltas([{"a": t}], method="dare", density=0.5, generator="x"),
            TypeError,
            "generator must be a torch.Generator or None; got 'x'",
        ),
        (lambda: parameter_groups(nn.Linear(2, 2), learning_rate=None), ValueError, "learning_rate must be a number"),
        (
            lambda: parameter_groups(nn.Linear(2, 2), learning_rate=1e-3, weight_decay="x"),
            ValueError,
            "weight_decay must be a number of at least 0; got 'x'",
        ),
        (
            lambda: parameter_groups(nn.Linear(2, 2), learning_rate=1e-3, layer_decay=[]),
            ValueError,
            r"layer_decay must be a number above 0 and at most 1; got \[\]",
        ),
    ],
)
def test_weights_and_optim_refuse_wrong_types(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_weights_may_be_a_tensor():
    assert torch.equal(merge_deltas([{"a": t}, {"a": 3 * t}], torch.tensor([1.0, 3.0]))["a"], 2.5 * t)


def saved(folder, record, make=tiny_llama):
    model = make()
    attach(model, record)
    save(model, folder)
    return json.loads((folder / "adapter_config.json").read_text())


def write(folder, entries):
    (folder / "adapter_config.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        ("LoRA", {"use_rslora": "false"}, "use_rslora must be True or False; got 'false'"),
        ("LoRA", {"use_dora": "false"}, "use_dora must be True or False"),
        ("LoRA", {"lora_bias": 0}, "lora_bias must be True or False"),
        ("LoRA", {"r": "16"}, "rank must be a whole number"),
        ("LoRA", {"target_modules": [1]}, "target_modules must be suffixes or one regular expression"),
        ("LoRA", {"target_modules": "("}, "target_modules must be suffixes or one regular expression"),
        ("LoRA", {"modules_to_save": 1.5}, "modules_to_save must be a list of suffixes"),
        ("LoRA", {"target_parameters": [[1]]}, "target_parameters must be a list of suffixes"),
        ("LoRA", {"rank_pattern": [1]}, "rank_pattern must be a dict"),
        ("LoRA", {"alpha_pattern": {"(": 1}}, r"'\(' is no regular expression"),
        ("LoRA", {"trainable_token_indices": 3}, "trainable_token_indices: the tokens to train must be a list"),
        ("LoRA", {"init_lora_weights": 1.5}, "init_lora_weights must be true, false or the name of a start"),
        ("AdaLoRA", {"rank_pattern": [1]}, "rank_pattern must be a dict"),
        ("AdaLoRA", {"rank_pattern": {"q_proj.lora_E": 3}}, r"rank_pattern\['q_proj.lora_E'\] must be a list of true"),
        ("AdaLoRA", {"rank_pattern": {"q_proj.lora_E": [1]}}, "must be a list of true and false"),
        ("IA3", {"feedforward_modules": "("}, "feedforward_modules must be suffixes or one regular expression"),
        ("IA3", {"feedforward_modules": 3}, "feedforward_modules must be suffixes or one regular expression"),
        ("VeRA", {"save_projection": "no"}, "save_projection must be True or False"),
        ("VeRA", {"d_initial": ""}, "d_initial must be a number other than 0; got ''"),
        ("NewTokens", {"token_indices": [1.5]}, "token_indices: a token to train must be given by its id"),
        ("Bottleneck", {"settings": [1]}, r"settings must be a dict .*; got \[1\]"),
        ("PromptTuning", {"modules_to_save": 1}, "modules_to_save must be a list of suffixes"),
    ],
)
def test_a_wrong_entry_is_named_with_its_file(tmp_path, record, change, message):
    write(tmp_path, saved(tmp_path, RECORDS[record]()) | change)
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{message}"):
        load(model, tmp_path)
    assert state(model) == state(tiny_llama())


def test_a_missing_setting_is_named(tmp_path):
    entries = saved(tmp_path, NewTokens(tokens=[3], train_modules=["norm"]))
    del entries["settings"]["tokens"]
    write(tmp_path, entries)
    with pytest.raises(ValueError, match="NewTokens needs the setting 'tokens', which is not there"):
        load(tiny_llama(), tmp_path)


@pytest.mark.parametrize("key", ["use_rslora", "use_dora", "lora_bias", "init_lora_weights", "rank_pattern"])
def test_null_means_what_it_means_to_peft(tmp_path, key):
    write(tmp_path, saved(tmp_path, lora()) | {key: None})
    model = tiny_llama()
    assert load(model, tmp_path).missing == ()
    assert all(layer.scaling == 1.5 and layer.lora_bias is None for layer in adapter_layers(model))


VALUES = [None, False, -1, 1.5, "", "16", "(", [], {}, [None], [[1]], [{}], ["("], {"a": None}, {"q_proj": [1]}]
PYTHON = ("not iterable", "has no attribute", "unhashable", "not subscriptable", "unsupported operand", "must be str",
          "not supported between", "unexpected keyword", "missing 1", "first argument must", "no len()")  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("DoRA", "AdaLoRA"))) for name in RECORDS]
)
def test_any_value_of_any_entry_loads_or_ends_in_a_sentence(tmp_path, name):
    make = tiny_gpt2 if name == "BitFit" else tiny_llama  # a Llama has no biases
    entries, model = saved(tmp_path, RECORDS[name](), make), make()
    before = state(model)
    for key in entries:
        inner = [None, *entries[key]] if key == "settings" else [None]
        for setting in inner:
            for value in VALUES:
                changed = copy.deepcopy(entries)
                (changed if setting is None else changed[key])[key if setting is None else setting] = value
                write(tmp_path, changed)
                try:
                    load(model, tmp_path)
                except ValueError as error:  # whatever else it is fails the test
                    sentence = str(error)
                    assert str(tmp_path) in sentence, sentence
                    assert not any(words in sentence for words in PYTHON), (key, setting, value, sentence)
                else:
                    detach(model)
                assert state(model) == before


@pytest.mark.parametrize("keep", [0, 4, 8, 50, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    saved(tmp_path, lora())
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged, .*: copy or save it once more"):
        load(tiny_llama(), tmp_path)


def test_a_garbled_pickle_is_named(tmp_path):
    saved(tmp_path, lora())
    (tmp_path / "adapter_model.safetensors").unlink()
    for content in (b"", b"\xff" * 100, b"PK\x03\x04" + b"\0" * 50):
        (tmp_path / "adapter_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.bin is damaged"):
            load(tiny_llama(), tmp_path, allow_bin=True)


def test_eight_bit_floats_are_refused_by_name(tmp_path):
    saved(tmp_path, lora(targets=["q_proj"]))
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"lora_A.weight in .* is torch.float8_e4m3fn, .*16 bits or more"):
        load(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rename": {"(": "x"}}, ValueError, r"rename: '\(' to 'x' cannot be put through re.sub"),
        ({"rename": {"q_proj": "\\9"}}, ValueError, "cannot be put through re.sub: invalid group reference"),
        ({"rename": {"q_proj": None}}, TypeError, "what stands for 'q_proj' must be a string; got None"),
        ({"rename": {1: "x"}}, TypeError, "rename must be a dict"),
        ({"rename": ["q_proj"]}, TypeError, "rename must be a dict"),
        ({"strict": "no"}, TypeError, "strict must be True or False; got 'no'"),
        ({"allow_bin": 1}, TypeError, "allow_bin must be True or False"),
        ({"name": None}, TypeError, "by its name, a string"),
    ],
)
def test_load_refuses_wrong_arguments(tmp_path, options, kind, message):
    saved(tmp_path, lora(targets=["q_proj"]))
    model = tiny_llama()
    with pytest.raises(kind, match=message):
        load(model, tmp_path, **options)
    assert state(model) == state(tiny_llama())
