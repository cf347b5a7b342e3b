"""PEFT as oracle for norms and new tokens: what it writes we read, what we write it reads, also beside LoRA."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.adapters import (
    DoRA,
    LayerNormTuning,
    LoRA,
    NewTokens,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    load,
    save,
)
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
TOKENS = [37, 96, 13]  # the first and the last are in IDS
tied = partial(tiny_llama, tied=True)
classifier = partial(tiny_bert, labels=3)


def bert_without_bias():
    """PEFT leaves out the bias of a head that is tied to adapted tokens; with a bias of 0 that says nothing."""
    model = tiny_bert()
    torch.nn.init.zeros_(model.cls.predictions.bias)
    return model


norms, tokens = LayerNormTuning, partial(NewTokens, tokens=TOKENS)
lora, dora = (partial(method, rank=4, alpha=6, targets=["q_proj", "v_proj"]) for method in (LoRA, DoRA))
tune = peft.LNTuningConfig
rows = partial(peft.TrainableTokensConfig, token_indices=TOKENS)
low_rank = partial(peft.LoraConfig, r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
BOTH = {"embed_tokens": TOKENS, "lm_head": [2, 41]}
CASES = {  # name: (model, our record, PEFT's configuration)
    "llama norms": (tiny_llama, norms(), tune()),
    "llama norms of the mlp": (tiny_llama, norms(targets=["post_attention_layernorm"]),
                               tune(target_modules=["post_attention_layernorm"])),
    "llama norms, head trained whole": (tiny_llama, norms(targets=["norm"], train_modules=["lm_head"]),
                                        tune(target_modules=["norm"], modules_to_save=["lm_head"])),
    "gpt2 norms": (tiny_gpt2, norms(), tune()),
    "gpt2 norms by expression": (tiny_gpt2, norms(targets=r".*h\.1\.ln_\d"), tune(target_modules=r".*h\.1\.ln_\d")),
    "gpt2 norms excluded": (tiny_gpt2, norms(targets=["ln_1", "ln_f"], exclude=["h.0.ln_1"]),
                            tune(target_modules=["ln_1", "ln_f"], exclude_modules=["h.0.ln_1"])),
    "classifier norms": (classifier, norms(targets=["LayerNorm"], train_modules=["classifier"]),
                         tune(target_modules=["LayerNorm"], modules_to_save=["classifier"])),
    "bert norms": (tiny_bert, norms(), tune(target_modules=["LayerNorm"])),
    "t5 norms": (tiny_t5, norms(), tune()),
    "llama tokens": (tiny_llama, tokens(), rows()),
    "llama tokens, head too": (tiny_llama, tokens(targets=["embed_tokens", "lm_head"]),
                               rows(target_modules=["embed_tokens", "lm_head"])),
    "llama tied tokens": (tied, tokens(), rows()),
    "gpt2 tokens": (tiny_gpt2, tokens(), rows()),
    "gpt2 positions": (tiny_gpt2, tokens(tokens=[0, 7], targets=["wpe"]),
                       rows(token_indices=[0, 7], target_modules=["wpe"])),
    "bert tokens": (bert_without_bias, tokens(), rows()),
    "classifier tokens": (classifier, tokens(), rows()),
    "t5 tokens": (tiny_t5, tokens(), rows()),
    "llama lora and tokens": (tiny_llama, lora(train_tokens=TOKENS), low_rank(trainable_token_indices=TOKENS)),
    "llama lora and tokens by name": (tiny_llama, lora(train_tokens=BOTH), low_rank(trainable_token_indices=BOTH)),
    "llama tied lora and tokens": (tied, lora(train_tokens=TOKENS), low_rank(trainable_token_indices=TOKENS)),
    "llama tied lora and tokens by name": (tied, lora(train_tokens={"embed_tokens": TOKENS}),
                                           low_rank(trainable_token_indices={"embed_tokens": TOKENS})),
    "llama tied dora and tokens": (tied, dora(train_tokens=TOKENS),
                                   low_rank(trainable_token_indices=TOKENS, use_dora=True)),
    "gpt2 lora and tokens": (tiny_gpt2, lora(targets=["c_attn"], train_tokens=TOKENS, dropout=0.2),
                             low_rank(target_modules=["c_attn"], trainable_token_indices=TOKENS, lora_dropout=0.2)),
    "bert lora and tokens": (bert_without_bias, lora(targets=["query"], train_tokens=TOKENS),
                             low_rank(target_modules=["query"], trainable_token_indices=TOKENS)),
    "classifier lora and tokens": (
        classifier, lora(targets=["query"], train_tokens=TOKENS, train_modules=["classifier"], rslora=True),
        low_rank(target_modules=["query"], trainable_token_indices=TOKENS, modules_to_save=["classifier"],
                 use_rslora=True)),
    "t5 lora and tokens": (tiny_t5, lora(targets=["q", "v"], train_tokens=TOKENS),
                           low_rank(target_modules=["q", "v"], trainable_token_indices=TOKENS)),
}  # fmt: skip


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def move(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def close(one, other, tolerance=1e-6):
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def written(folder):
    return {key: (tuple(t.shape), t.dtype) for key, t in load_file(folder / "adapter_model.safetensors").items()}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_what_we_write_peft_reads(case, tmp_path):
    make, record, _ = case
    model = make()
    start = output(model)
    attach(model, record)
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert not torch.equal(output(model), start)
    close(output(model), output(theirs), 3e-6 if isinstance(record, DoRA) else 1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    ours, back = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    assert ours.keys() | {"peft_version"} == back.keys()


def test_what_peft_writes_we_read(case, tmp_path):
    make, record, config = case
    theirs = peft.get_peft_model(make(), config)
    move(trained(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    model = make()
    report = load(model, tmp_path / "theirs")
    assert not report.unmatched
    close(output(model), output(theirs), 3e-6 if isinstance(record, DoRA) else 1e-6)
    detach(model)
    attach(model, record)
    load(model, tmp_path / "theirs")  # what PEFT means is what our record means
    save(model, tmp_path / "again")
    assert written(tmp_path / "again") == written(tmp_path / "theirs")
    again = make()
    load(again, tmp_path / "again")
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("record", [norms(), tokens(), lora(train_tokens=TOKENS)], ids=["norms", "tokens", "lora"])
def test_a_half_precision_base(record, tmp_path):
    """PEFT keeps norms in the base's dtype and rows in float32; so do we, whatever the file is made of."""
    model = tied().to(torch.bfloat16)
    attach(model, record)
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tied().to(torch.bfloat16), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    kind = torch.bfloat16 if isinstance(record, LayerNormTuning) else torch.float32
    assert {dtype for _, dtype in written(tmp_path / "ours").values()} == {kind}
    close(output(model).float(), output(theirs).float(), 2e-2)
    again = tied().to(torch.bfloat16)
    load(again, tmp_path / "theirs")
    assert torch.equal(output(again), output(model))


def test_peft_forgets_the_bias_of_a_tied_head_and_we_do_not(tmp_path):
    model, theirs = tiny_bert(), peft.get_peft_model(tiny_bert(), rows())
    start = output(model)
    attach(model, tokens())
    assert torch.equal(output(model), start)
    bias = model.cls.predictions.bias
    close(output(theirs) + bias, start)


def test_all_biases_beside_tokens_have_pefts_names(tmp_path):
    options = {"target_modules": ["query"], "bias": "all", "trainable_token_indices": TOKENS}
    theirs = peft.get_peft_model(tiny_bert(), low_rank(**options))
    move(trained(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_bert()
    load(model, tmp_path / "theirs")
    save(model, tmp_path / "ours")
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    tensors, again = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)


def test_what_peft_lets_pass_is_read_and_reported(tmp_path):
    theirs = peft.get_peft_model(
        tiny_llama(),
        tune(target_modules=["norm", "ln_f"], exclude_modules=["ln_1"], modules_to_save=["lm_head", "score"]),
    )
    move(trained(theirs))
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    report = load(model, tmp_path)
    assert report.unmatched == ("target_modules ln_f", "exclude_modules ln_1", "modules_to_save score")
    close(output(model), output(theirs))


@pytest.fixture
def saved(tmp_path):
    model = tied()
    attach(model, tokens())
    move(adapter_parameters(model))
    return save(model, tmp_path)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_indices": [37, 96, 97]}, "token 97 is out of range: model.embed_tokens has 97 rows, 0 to 96"),
        ({"token_indices": []}, "there is no token to train"),
        ({"token_indices": [1, 5]}, "2 mismatched"),
        ({"target_modules": ["nothing"]}, 'targets: "nothing" matches no module'),
        ({"target_modules": ["lm_head"]}, "the rows of lm_head were trained apart from the weight tied to them"),
        ({"target_modules": ["norm"]}, "model.norm is a LlamaRMSNorm: rows of single tokens are trained in an"),
        ({"a_new_option": "yes"}, 'a_new_option="yes" asks for something that is not offered here'),
    ],
)
def test_what_is_not_offered_is_refused_by_name(saved, changes, message):
    edit(saved, **changes)
    model = tied()
    with pytest.raises(ValueError if "norm" not in str(changes) else (TypeError, ValueError), match=message):
        load(model, saved)
    assert adapter_names(model) == []


def test_tied_places_named_apart(tmp_path):
    """PEFT trains rows of their own for each place that is named, though the model has one weight there."""
    model, both = tied(), ["embed_tokens", "lm_head"]
    attach(model, tokens(targets=both))
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours")
    close(output(model), output(theirs))
    theirs = peft.get_peft_model(tied(), rows(target_modules=both))
    move(trained(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="the file holds different rows for them, trained apart, which is not offered"):
        load(tied(), tmp_path / "theirs")


def test_rows_that_differ_where_the_model_has_one_weight_are_refused(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    head = next(key for key in tensors if "lm_head" in key)
    save_file(tensors | {head: tensors[head] + 1}, path)
    with pytest.raises(ValueError, match=r"model.embed_tokens and lm_head are one weight in this model, and the file"):
        load(tied(), saved)
    load(tiny_llama(), saved, strict=False)  # an untied model takes the embedding's


def test_lora_files_with_ties_that_are_not_followed_are_refused(tmp_path):
    for indices, message in [
        ({"lm_head": TOKENS}, "the rows of lm_head were trained apart from the weight tied to them"),
        ({"embed_tokens": TOKENS, "lm_head": [1]}, "lm_head and model.embed_tokens are one weight: the same tokens"),
    ]:
        peft.get_peft_model(tied(), low_rank(trainable_token_indices=indices)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load(tied(), tmp_path)


def test_rows_of_other_tokens_are_never_loaded_into_an_attached_adapter(saved, tmp_path):
    model = tied()
    attach(model, tokens(tokens=[96, 37, 13]))
    with pytest.raises(
        ValueError,
        match=r"trains tokens 37, 96, 13 of model.embed_tokens, the attached \"default\" 96, 37, 13 of model.embed_tok",
    ):
        load(model, saved)
    detach(model)
    attach(model, lora(train_tokens=TOKENS))
    save(model, tmp_path / "lora")
    again = tied()
    attach(again, lora())
    with pytest.raises(ValueError, match=r"trains tokens 37, 96, 13 of .*, the attached \"default\" of no module"):
        load(again, tmp_path / "lora")


def test_modules_trained_whole_beside_tokens_go_into_our_own_format(tmp_path):
    model = tiny_gpt2()
    attach(model, tokens(train_modules=["ln_f"]))
    move(adapter_parameters(model))
    save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["method"] == "NewTokens"
    again = tiny_gpt2()
    load(again, tmp_path)
    assert torch.equal(output(again), output(model))
