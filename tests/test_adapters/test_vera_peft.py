"""VeRA's files, with PEFT as oracle: what it writes we read, what we write it reads, with A and B or without."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.adapters import (
    LoRA,
    SharedProjections,
    VeRA,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    draw_projections,
    load,
    merge,
    save,
)
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # PEFT's, about A and B left out of the file
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
classifier = partial(tiny_bert, labels=3)
FILE_A, FILE_B = "base_model.vera_A", "base_model.vera_B"

CASES = {
    "llama all linear": (tiny_llama, {}),
    "llama, of the seed": (tiny_llama, {"seed": 11, "save_projection": False}),
    "llama, seed and matrices": (tiny_llama, {"seed": 11, "d_initial": 0.7}),
    "llama suffixes, larger than the layers": (tiny_llama, {"targets": ["q_proj", "v_proj"], "rank": 61}),
    "llama expression": (tiny_llama, {"targets": r".*layers\.1\..*(gate|down)_proj", "save_projection": False}),
    "llama dropout": (tiny_llama, {"dropout": 0.3}),
    "llama head": (tiny_llama, {"targets": ["lm_head", "k_proj"], "save_projection": False}),
    "llama head trained whole": (tiny_llama, {"targets": ["q_proj"], "train_modules": ["lm_head"]}),
    "gpt2 all linear": (tiny_gpt2, {}),
    "gpt2, of the seed": (tiny_gpt2, {"targets": ["c_attn", "c_proj"], "save_projection": False}),
    "gpt2 all biases": (tiny_gpt2, {"targets": ["c_attn"], "train_bias": "all"}),
    "bert": (tiny_bert, {"targets": ["query", "value", "dense"], "save_projection": False}),
    "bert own biases": (tiny_bert, {"targets": ["query", "value"], "train_bias": "vera_only"}),
    "classifier": (classifier, {"targets": ["query", "value"], "train_modules": ["classifier"]}),
    "t5": (tiny_t5, {"targets": ["q", "v", "wi", "wo"], "save_projection": False}),
    "t5 with matrices": (tiny_t5, {"targets": ["q", "v", "wi", "wo"], "seed": 3}),
}
PEFT_NAMES = {"rank": "r", "targets": "target_modules", "dropout": "vera_dropout", "seed": "projection_prng_key",
              "train_bias": "bias", "train_modules": "modules_to_save"}  # fmt: skip


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def move(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(parameters.items()):
            p.add_((0.2 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def close(one, other, tolerance=1e-6):
    scale = float(other.abs().max())
    assert float((one - other).abs().max()) <= tolerance * scale


def same_model(model, theirs):
    """The same outputs. The products are associated otherwise than PEFT's, lambda_b B lambda_d first: with deep models
    float32 shows it, and float64 that it is nothing else."""
    close(output(model), output(theirs), 1.5e-6)
    close(output(copy.deepcopy(model).double()), output(copy.deepcopy(theirs).double()), 1e-13)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def written(folder):
    return {key: (tuple(t.shape), t.dtype) for key, t in tensors_of(folder).items()}


def entries_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(params=CASES)
def case(request):
    make, options = CASES[request.param]
    return make, {"rank": 5} | options


def test_what_we_write_peft_reads(case, tmp_path):
    make, options = case
    model = make()
    attach(model, VeRA(**options))
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    same_model(model, theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    assert (FILE_A in written(tmp_path / "ours")) == options.get("save_projection", True)
    ours, back = entries_of(tmp_path / "ours"), entries_of(tmp_path / "theirs")
    assert ours.keys() | {"peft_version"} == back.keys()
    assert {k: v for k, v in ours.items() if k != "target_modules"}.items() <= back.items()
    again = make()
    assert not load(again, tmp_path / "theirs").unmatched
    assert torch.equal(output(again), output(model))


def from_peft(make, folder, **options):
    theirs = peft.get_peft_model(make(), peft.VeraConfig(**options))
    move({name: p for name, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(folder, save_embedding_layers=False)
    return theirs


def test_what_peft_writes_we_read(case, tmp_path):
    make, options = case
    config = {"target_modules": "all-linear"} | {PEFT_NAMES.get(name, name): value for name, value in options.items()}
    theirs = from_peft(make, tmp_path, **config)
    model = make()
    report = load(model, tmp_path)
    assert not report.unmatched
    same_model(model, theirs)
    save(model, tmp_path / "again")
    assert written(tmp_path / "again") == written(tmp_path)
    if "train_bias" not in options:
        merge(model, untie=True)
        close(output(model), output(theirs), 1e-5)


def test_the_seed_gives_the_numbers_of_pefts(tmp_path):
    from_peft(tiny_gpt2, tmp_path, r=7, target_modules=["c_attn", "mlp.c_proj"], projection_prng_key=13)
    theirs = tensors_of(tmp_path)
    for ours, key in zip(draw_projections(7, 31, 78, seed=13), (FILE_A, FILE_B), strict=True):
        assert torch.equal(ours, theirs[key])


def test_what_peft_has_no_exclusion_for_is_written_out(tmp_path):
    for targets in (["q_proj", "k_proj"], r".*(q|k)_proj", "all-linear"):
        model = tiny_llama()
        attach(model, VeRA(rank=5, targets=targets, exclude=["layers.0.self_attn.q_proj"], save_projection=False))
        move(adapter_parameters(model))
        save(model, tmp_path)
        assert "exclude_modules" not in entries_of(tmp_path)
        close(output(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)), output(model))
        again = tiny_llama()
        load(again, tmp_path)
        assert torch.equal(output(again), output(model))


def edit(folder, **changes):
    (folder / "adapter_config.json").write_text(json.dumps(entries_of(folder) | changes))


def others(folder):
    """Put other matrices into the file than those of its seed."""
    path = folder / "adapter_model.safetensors"
    a, b = draw_projections(5, 28, 56, seed=99)
    save_file(load_file(path) | {FILE_A: a, FILE_B: b}, path)


@pytest.fixture
def saved(tmp_path):
    from_peft(tiny_llama, tmp_path, r=5, target_modules=["q_proj", "v_proj"])
    return tmp_path


def test_matrices_in_the_file_win_over_the_seed_and_are_written_again(saved, tmp_path):
    others(saved)
    theirs = output(peft.PeftModel.from_pretrained(tiny_llama(), saved))
    edit(saved, save_projection=False)
    fresh, attached = tiny_llama(), tiny_llama()
    attach(attached, VeRA(rank=5, targets=["q_proj", "v_proj"], seed=4, save_projection=False))
    for model in (fresh, attached):
        load(model, saved)
        close(output(model), theirs)
        save(model, tmp_path / "again")
        assert entries_of(tmp_path / "again")["save_projection"] is True
        again = tiny_llama()
        load(again, tmp_path / "again")
        assert torch.equal(output(again), output(model))
    assert len({id(m) for m in fresh.modules() if isinstance(m, SharedProjections)}) == 1


def test_without_matrices_the_seed_decides_and_an_attached_adapter_must_have_them_of_it(tmp_path):
    theirs = from_peft(
        tiny_llama, tmp_path, r=5, target_modules=["q_proj"], projection_prng_key=3, save_projection=False
    )
    assert FILE_A not in written(tmp_path)
    for seed in (3, 4):
        model = tiny_llama()
        attach(model, VeRA(rank=5, targets=["q_proj"], seed=seed))
        if seed == 3:
            load(model, tmp_path)
            close(output(model), output(theirs))
        else:
            with pytest.raises(ValueError, match='draws its A and B from seed 3, the attached "default" has others: d'):
                load(model, tmp_path)
            detach(model)
            load(model, tmp_path)
            close(output(model), output(theirs))


def test_matrices_that_the_file_promises_must_be_there(saved):
    path = saved / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if k not in (FILE_A, FILE_B)}, path)
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"2 missing: base_model\.vera_A, base_model\.vera_B"):
        load(model, saved)
    assert adapter_names(model) == []


def test_in_bf16_all_of_it_goes_round(tmp_path):
    for save_projection in (True, False):
        model = tiny_llama().to(torch.bfloat16)
        attach(model, VeRA(rank=5, targets=["q_proj"], dtype=torch.bfloat16, save_projection=save_projection))
        move(adapter_parameters(model))
        save(model, tmp_path)
        assert (FILE_A in written(tmp_path)) == save_projection
        assert {dtype for _, dtype in written(tmp_path).values()} == {torch.bfloat16}
        again = tiny_llama().to(torch.bfloat16)
        load(again, tmp_path)
        assert torch.equal(output(again), output(model))
        theirs = peft.PeftModel.from_pretrained(
            tiny_llama().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False
        )  # fmt: skip
        close(output(theirs).float(), output(model).float(), 0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\] asks for something that is not offered here"),
        ({"layers_pattern": "h"}, 'layers_pattern="h" asks for something'),
        ({"a_new_option": "yes"}, 'a_new_option="yes" asks for something'),
        ({"bias": "lora_only"}, 'train_bias must be "none", "vera_only" or "all"'),
        ({"r": 3}, r"6 mismatched: .*vera_lambda_d \(5,\) in the file, \(3,\) in the model"),
        ({"target_modules": ["q_proj"]}, r"4 unexpected: .*v_proj\.vera_lambda_b"),
        ({"target_modules": ["nothing"]}, 'targets: "nothing" matches no module'),
    ],
)
def test_what_is_not_offered_is_refused_by_name(saved, changes, message):
    edit(saved, **changes)
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        load(model, saved)
    assert adapter_names(model) == []


def test_patterns_that_match_nothing_are_reported_and_other_methods_refused(saved):
    edit(saved, target_modules=["q_proj", "v_proj", "c_attn"], init_weights=False)
    model = tiny_llama()
    assert load(model, saved).unmatched == ("target_modules c_attn",)
    detach(model)
    attach(model, LoRA(rank=5, alpha=5, targets=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match='is VeRA, the attached "default" is LoRA'):
        load(model, saved)
