"""PEFT as oracle: what it writes we read, what we write it reads; same outputs, keys, shapes and dtypes."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune.adapters import DoRA, LoRA, adapter_names, adapter_parameters, attach, detach, load, merge, save
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
classifier = partial(tiny_bert, labels=3)


class Config(dict):
    """A model's configuration, asked for entries by PEFT and for an attribute here."""

    model_type = "plain"


class Tiny(nn.Module):
    """A plain model that answers as those of transformers do."""

    def __init__(self, seed=0, **layers):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, make in layers.items():
                self.add_module(name, make())
        self.config = Config()

    def forward(self, input_ids):
        hidden = (
            nn.functional.one_hot(input_ids, 97).to(next(self.parameters()).dtype)
            if not hasattr(self, "emb")
            else self.emb(input_ids)
        )
        for name, layer in self._modules.items():
            hidden = hidden if name == "emb" else layer(hidden)
        return SimpleNamespace(logits=hidden)


plain = partial(Tiny, **{"0": partial(nn.Linear, 97, 19), "1": nn.Tanh, "3": partial(nn.Linear, 19, 13)})
embedding = partial(Tiny, emb=partial(nn.Embedding, 97, 19), out=partial(nn.Linear, 19, 13))
conv1d = partial(Tiny, emb=partial(nn.Embedding, 97, 19), conv=partial(Conv1D, 23, 19), out=partial(nn.Linear, 23, 13))

CASES = {
    "llama all linear": (tiny_llama, {}),
    "llama suffixes": (tiny_llama, {"targets": ["q_proj", "v_proj"]}),
    "llama expression": (tiny_llama, {"targets": r".*layers\.1\..*(gate|up)_proj"}),
    "llama excluded": (tiny_llama, {"targets": ["q_proj", "k_proj"], "exclude": ["layers.0.self_attn.q_proj"]}),
    "llama excluded by expression": (
        tiny_llama,
        {"targets": ["q_proj", "k_proj"], "exclude": r".*0\.self_attn\.q_proj"},
    ),
    "llama rslora": (tiny_llama, {"rslora": True}),
    "llama rank pattern": (tiny_llama, {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}}),
    "llama alpha pattern": (tiny_llama, {"alpha_pattern": {"self_attn.v_proj": 11}}),
    "llama both patterns, rslora": (
        tiny_llama,
        {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"o_proj": 2}, "rslora": True},
    ),
    "llama embeddings": (tiny_llama, {"targets": ["embed_tokens", "q_proj"]}),
    "llama head": (tiny_llama, {"targets": ["lm_head", "q_proj"]}),
    "llama head trained whole": (tiny_llama, {"targets": ["q_proj"], "train_modules": ["lm_head"]}),
    "llama norms trained whole": (tiny_llama, {"targets": ["q_proj"], "train_modules": ["input_layernorm", "norm"]}),
    "llama tied": (partial(tiny_llama, tied=True), {}),
    "llama dropout": (tiny_llama, {"dropout": 0.3}),
    "gpt2 all linear": (tiny_gpt2, {}),
    "gpt2 attention": (tiny_gpt2, {"targets": ["c_attn"]}),
    "gpt2 positions": (tiny_gpt2, {"targets": ["wpe", "c_fc"]}),
    "gpt2 all biases": (tiny_gpt2, {"targets": ["c_attn"], "train_bias": "all"}),
    "bert": (tiny_bert, {}),
    "bert lora bias": (tiny_bert, {"targets": ["query", "value"], "lora_bias": True}),
    "bert own biases": (tiny_bert, {"targets": ["query", "value"], "train_bias": "lora_only"}),
    "bert words": (tiny_bert, {"targets": ["word_embeddings", "position_embeddings"]}),
    "classifier": (classifier, {"targets": ["query", "value"], "train_modules": ["classifier"]}),
    "classifier all biases": (classifier, {"targets": ["query"], "train_bias": "all"}),
    "t5": (tiny_t5, {"targets": ["q", "v", "wi", "wo"]}),
    "t5 head": (tiny_t5, {"targets": ["q", "lm_head"]}),
    "llama dora": (tiny_llama, {"dora": True}),
    "llama dora, rslora, patterns": (
        tiny_llama,
        {"dora": True, "rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 11}},
    ),
    "llama dora, head trained whole": (
        tiny_llama,
        {"dora": True, "targets": ["q_proj"], "train_modules": ["lm_head"]},
    ),
    "gpt2 dora": (tiny_gpt2, {"dora": True, "targets": ["c_attn", "c_proj"]}),
    "bert dora": (tiny_bert, {"dora": True, "targets": ["query", "value"]}),
    "bert dora, all linear": (tiny_bert, {"dora": True}),
    "linear": (plain, {"targets": ["0", "3"]}),
    "linear, lora bias": (plain, {"targets": ["3"], "lora_bias": True}),
    "linear, own biases": (plain, {"targets": ["0"], "train_bias": "lora_only"}),
    "linear dora": (plain, {"targets": ["0", "3"], "dora": True}),
    "linear, last trained whole": (plain, {"targets": ["0"], "train_modules": ["3"]}),
    "embedding and linear": (embedding, {"targets": ["emb", "out"]}),
    "embedding alone, rslora": (embedding, {"targets": ["emb"], "rslora": True}),
    "conv1d": (conv1d, {"targets": ["conv"]}),
    "conv1d and linear": (conv1d, {"targets": ["conv", "out"], "rank_pattern": {"conv": 2}}),
    "conv1d dora": (conv1d, {"targets": ["conv"], "dora": True}),
    "llama one layer by expression": (tiny_llama, {"targets": r"model\.layers\.0\..*_proj"}),
    "llama large rank on some": (tiny_llama, {"targets": ["gate_proj"], "rank_pattern": {"layers.1.mlp.gate_proj": 9}}),
    "llama fractional alpha": (tiny_llama, {"alpha": 2.5}),
    "llama tied, embeddings": (partial(tiny_llama, tied=True), {"targets": ["embed_tokens", "q_proj"]}),
    "llama two modules whole": (tiny_llama, {"targets": ["q_proj"], "train_modules": ["lm_head", "embed_tokens"]}),
    "llama everything at once": (
        tiny_llama,
        {
            "rslora": True,
            "dropout": 0.1,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"k_proj": 3},
            "exclude": ["o_proj"],
            "train_modules": ["lm_head"],
        },
    ),
    "gpt2 own biases": (tiny_gpt2, {"targets": ["c_attn", "c_fc"], "train_bias": "lora_only"}),
    "gpt2 lora bias": (tiny_gpt2, {"targets": ["c_proj"], "lora_bias": True}),
    "gpt2 words and positions": (tiny_gpt2, {"targets": ["wte", "wpe"]}),
    "gpt2 dora, patterns": (tiny_gpt2, {"dora": True, "targets": ["c_attn"], "rank_pattern": {"h.1.attn.c_attn": 2}}),
    "bert all biases": (tiny_bert, {"targets": ["query"], "train_bias": "all"}),
    "bert rslora by expression": (tiny_bert, {"targets": r".*layer\.1.*\.(query|key)", "rslora": True}),
    "classifier dora, head": (classifier, {"dora": True, "targets": ["value"], "train_modules": ["classifier"]}),
    "classifier lora bias, head": (
        classifier,
        {"targets": ["value"], "lora_bias": True, "train_modules": ["classifier"]},
    ),
    "t5 all linear": (tiny_t5, {}),
    "t5 excluded": (tiny_t5, {"targets": ["q", "k", "v", "o"], "exclude": r".*EncDecAttention\..*"}),
    "t5 rslora, patterns": (tiny_t5, {"targets": ["q", "wo"], "rslora": True, "rank_pattern": {"wo": 7}}),
    "t5 dora": (tiny_t5, {"dora": True, "targets": ["q", "v", "wi", "wo"]}),
}
FROM_PEFT = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "exclude": "exclude_modules",
             "dropout": "lora_dropout", "rslora": "use_rslora", "train_bias": "bias",
             "train_modules": "modules_to_save", "dora": "use_dora"}  # fmt: skip


def record(options):
    options = dict(options)
    return (DoRA if options.pop("dora", False) else LoRA)(**options)


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def move(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def close(one, other, tolerance=1e-6):
    scale = float(other.abs().max())
    assert float((one - other).abs().max()) <= tolerance * scale


def same_model(model, theirs, options):
    """The same outputs, where no bias is trained to the bit. DoRA's norms are summed in another order than PEFT's:
    float32 shows it, and float64 that it is nothing else."""
    if not options.get("dora"):
        close(output(model), output(theirs))
        biases = "train_bias" in options or "lora_bias" in options
        assert biases or torch.equal(output(model), output(theirs))
        return
    close(output(model), output(theirs), 3e-6)
    close(output(copy.deepcopy(model).double()), output(copy.deepcopy(theirs).double()), 1e-13)


def written(folder):
    return {key: (tuple(t.shape), t.dtype) for key, t in load_file(folder / "adapter_model.safetensors").items()}


@pytest.fixture(params=CASES)
def case(request):
    make, options = CASES[request.param]
    return make, {"rank": 4, "alpha": 6} | options


def test_what_we_write_peft_reads(case, tmp_path):
    make, options = case
    model = make()
    attach(model, record(options))
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", autocast_adapter_dtype=False)
    same_model(model, theirs, options)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    ours, back = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    assert ours.keys() | {"peft_version"} == back.keys() | {"peft_version"}


def test_what_peft_writes_we_read(case, tmp_path):
    make, options = case
    config = {FROM_PEFT.get(name, name): value for name, value in options.items()}
    config.setdefault("target_modules", "all-linear")
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**config), autocast_adapter_dtype=False).to(
        dtype=torch.float32
    )
    move({name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad})
    theirs.save_pretrained(tmp_path)
    model = make()
    report = load(model, tmp_path)
    assert not report.missing
    assert not report.unexpected
    same_model(model, theirs, options)
    save(model, tmp_path / "again")
    assert written(tmp_path / "again") == {
        k: v for k, v in written(tmp_path).items() if not k.endswith("base_layer.weight")
    }


def test_the_dtype_of_the_tensors_goes_round(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    attach(model, LoRA(rank=3, alpha=5, dtype=torch.bfloat16))
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(
        tiny_llama().to(torch.bfloat16), tmp_path / "ours", autocast_adapter_dtype=False
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert {dtype for _, dtype in written(tmp_path / "theirs").values()} == {torch.bfloat16}
    for side in ("ours", "theirs"):
        again = tiny_llama().to(torch.bfloat16)
        load(again, tmp_path / side)
        assert {p.dtype for p in adapter_parameters(again).values()} == {torch.bfloat16}
        assert torch.equal(output(again), output(model))
        assert torch.equal(output(theirs), output(model))


def test_transformers_reads_what_we_write(tmp_path):
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    move(adapter_parameters(model))
    save(model, tmp_path)
    theirs = tiny_llama()
    theirs.load_adapter(str(tmp_path))
    close(output(theirs), output(model))


def test_named_adapters_lie_in_folders_of_their_names(tmp_path):
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]))
    attach(model, LoRA(rank=3, alpha=5, targets=["v_proj"]), "second")
    for name in ("default", "second"):
        move(adapter_parameters(model, name))
        save(model, tmp_path, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "second",
    ]
    again = tiny_llama()
    load(again, tmp_path)
    load(again, tmp_path, "second")
    assert adapter_names(again) == ["default", "second"]
    assert torch.equal(output(again), output(model))
    load(tiny_llama(), tmp_path / "second", "other")  # any folder, under any name


def test_into_an_adapter_that_is_attached(tmp_path):
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3))
    move(adapter_parameters(model))
    save(model, tmp_path)
    again = tiny_llama()
    attach(again, LoRA(rank=2, alpha=3))
    load(again, tmp_path)
    assert torch.equal(output(again), output(model))


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]))
    move(adapter_parameters(model))
    save(model, tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qalora": True}, "use_qalora=true asks for something that is not offered here"),
        ({"use_dora": True}, r"2 missing: .*lora_magnitude_vector"),
        ({"trainable_token_indices": [1]}, r"1 missing: .*embed_tokens\.token_adapter\.trainable_tokens_delta"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=.* asks for"),
        ({"layers_to_transform": 0}, "layers_to_transform=0 asks for"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"a_new_option": "yes"}, 'a_new_option="yes" asks for'),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base weights"),
        ({"peft_type": "LOHA"}, "\"peft_type\" is 'LOHA', which is not known here; known are .*LORA"),
        ({"r": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"target_modules": ["nothing"]}, 'targets: "nothing" matches no module'),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, None),
    ],
)
def test_what_is_not_offered_is_refused_by_name(saved, changes, message):
    edit(saved, **changes)
    model = tiny_llama()
    if message is None:
        load(model, saved)  # a module's name in the file is never imported
        return
    with pytest.raises(ValueError, match=message):
        load(model, saved)
    assert adapter_names(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tensors_that_do_not_fit_are_named_and_nothing_is_left(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second, third, _ = sorted(tensors)
    changed = {"odd.key": tensors[first], second: torch.zeros(3, 3), third: tensors[third], "empty": torch.zeros(0)}
    save_file(changed, path)
    model = tiny_llama()
    with pytest.raises(
        ValueError, match=r"2 missing: .*; 2 unexpected: .*; 1 mismatched: .*strict=False loads what fits"
    ):
        load(model, saved)
    assert adapter_names(model) == []
    report = load(model, saved, strict=False)
    assert set(report.unexpected) == {"odd.key", "empty"}
    assert report.loaded == 1
    assert len(report.mismatched) == 1


def test_missing_and_pickled_files_are_told_apart(saved, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        load(tiny_llama(), tmp_path_factory.mktemp("empty"))
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model.safetensors.* a pickle: allow_bin=True reads"):
        load(tiny_llama(), saved)
    (saved / "adapter_config.json").write_text("[" * 100_000)
    save_file({"x": torch.zeros(1)}, saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"no JSON"):
        load(tiny_llama(), saved)


def test_a_base_weight_in_the_file_must_be_the_models_own(tmp_path):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(key.endswith("base_layer.weight") for key in written(tmp_path))
    load(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match=r"1 unexpected: .*embed_tokens\.base_layer\.weight"):
        load(tiny_llama(1), tmp_path)


def test_an_empty_tensor_is_never_written(tmp_path):
    model = nn.Sequential(nn.Linear(5, 3))
    attach(model, LoRA(rank=2, alpha=3))
    model[0].lora_a.data = torch.zeros(0, 5)
    with pytest.raises(ValueError, match=r"0\.lora_A\.weight is empty: gather the model's shards"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def from_peft(make, folder, **options):
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, **options))
    move({name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad})
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    ("make", "options", "unmatched"),
    [
        (classifier, {"task_type": "SEQ_CLS", "target_modules": ["query"]}, ("modules_to_save score",)),
        (tiny_llama, {"target_modules": ["q_proj", "c_attn"]}, ("target_modules c_attn",)),
        (tiny_llama, {"target_modules": ["q_proj"], "exclude_modules": ["v_proj"]}, ("exclude_modules v_proj",)),
        (
            tiny_llama,
            {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"up": 3}},
            ("rank_pattern v_proj", "alpha_pattern up"),
        ),
        (tiny_llama, {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]}, ()),
        (tiny_llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, ()),
        (tiny_bert, {"target_modules": ["query"], "bias": "all"}, ()),
    ],
)
def test_what_peft_lets_pass_is_read_and_reported(make, options, unmatched, tmp_path):
    theirs = from_peft(make, tmp_path / "theirs", **options)
    model = make()
    report = load(model, tmp_path / "theirs")
    assert report.unmatched == unmatched
    assert all(pattern in str(report) for pattern in unmatched)
    close(output(model), output(theirs))
    save(model, tmp_path / "ours")
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    close(output(again), output(model))


@pytest.mark.parametrize("patterns", [{"q_proj": 2, ".*proj": 3}, {".*proj": 3, "[gu].*_proj": 2}])
def test_the_first_pattern_that_fits_decides_also_after_a_file(patterns, tmp_path):
    model = tiny_llama()
    attach(model, LoRA(rank=4, alpha=6, rank_pattern=patterns, alpha_pattern={k: 5.0 * v for k, v in patterns.items()}))
    move(adapter_parameters(model))
    save(model, tmp_path)
    again = tiny_llama()
    load(again, tmp_path)
    assert torch.equal(output(again), output(model))
    close(output(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)), output(model))


def test_an_attached_adapter_must_scale_as_the_file_says(saved):
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=5, targets=["q_proj"]))
    with pytest.raises(
        ValueError, match=r'scales model.layers.0.self_attn.q_proj by 1.5, the attached "default" by 2.5'
    ):
        load(model, saved)
    detach(model)
    load(model, saved)
    merge(model)
    with pytest.raises(ValueError, match='adapter "default" is merged into the weights: unmerge it before loading'):
        load(model, saved)


def test_another_adapter_is_never_taken_for_a_mistyped_name(tmp_path):
    model = tiny_llama()
    for name in ("default", "french"):
        attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), name)
        save(model, tmp_path, name)
    with pytest.raises(ValueError, match=r'none called "frnech": french. Did you mean "french"\?'):
        load(tiny_llama(), tmp_path, "frnech")


def test_loading_draws_nothing_and_a_failure_keeps_what_was_trained(saved):
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=3, targets=["v_proj"]), "first")
    state = torch.get_rng_state()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    save_file({"odd": torch.zeros(1)}, saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load(model, saved)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert torch.equal(torch.get_rng_state(), state)


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickled_file_is_read_when_asked_for_and_makes_tensors_only(saved, capsys):
    tensors = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="allow_bin=True reads its tensors"):
        load(tiny_llama(), saved)
    assert load(tiny_llama(), saved, allow_bin=True).loaded == len(tensors)
    torch.save(list(tensors.values()), saved / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds no dictionary of tensors"):
        load(tiny_llama(), saved, allow_bin=True)
    torch.save(tensors | {"x": Harmful()}, saved / "adapter_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load(tiny_llama(), saved, allow_bin=True)
    assert "run" not in capsys.readouterr().out


def test_a_model_whose_names_have_changed_takes_the_file_by_rename(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace("model.layers", "language_model.blocks"): t for key, t in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"4 missing: .*; 4 unexpected: .*language_model\.blocks"):
        load(tiny_llama(), saved)
    assert load(tiny_llama(), saved, rename={r"language_model\.blocks": "model.layers"}).loaded == 4
    with pytest.raises(ValueError, match=r"rename: 'nothing' matches no tensor"):
        load(tiny_llama(), saved, rename={"nothing": "model"})
    with pytest.raises(ValueError, match=r"gives several tensors of .* the same name"):
        load(tiny_llama(), saved, rename={r".*lora_A.*": "one"})
