"""(IA)^3: its formula, its change of the weights, what it refuses, and PEFT as oracle both ways."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmtune.adapters import (
    IA3,
    IA3Linear,
    LoRA,
    LoRALinear,
    TrainedBias,
    active,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    ia3_scale,
    load,
    merge,
    save,
    unmerge,
)
from llmtune.forgetting import EWC
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
classifier = partial(tiny_bert, labels=3)


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conv1d(size, out):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, size)


def moved(module, seed=3):
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(module.named_parameters())):
            if p.requires_grad:
                p.add_(0.3 * draw(*p.shape, seed=seed + i).to(p.dtype))
    return module


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def close(one, other, tolerance=1e-6):
    scale = float(other.abs().max())
    assert float((one - other).abs().max()) <= tolerance * scale


# --- the function and the layer -------------------------------------------------------------------------------------


def test_the_scale_is_made_wide_and_rounded_once():
    x, scale = draw(5, 7, seed=0, dtype=torch.bfloat16), draw(7, seed=1, dtype=torch.float32)
    assert torch.equal(ia3_scale(x, scale), (x.float() * scale).to(torch.bfloat16))
    assert torch.equal(ia3_scale(x, torch.ones(7)), x)


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("make", [nn.Linear, partial(nn.Linear, bias=False), conv1d], ids=["linear", "bare", "conv1d"])
def test_the_output_is_the_closed_form_and_the_deltas_are_the_change(make, feedforward):
    base = make(11, 7).double().requires_grad_(False)
    if base.bias is not None:
        base.bias.copy_(draw(7, seed=5))
    layer = moved(IA3Linear(base, feedforward=feedforward, dtype=torch.float64))
    x, scale = draw(2, 5, 11, seed=0), layer.scale
    weight = base.weight.T if layer.in_features == base.weight.shape[0] else base.weight
    bias = 0.0 if base.bias is None else base.bias
    truth = (x * scale) @ weight.T + bias if feedforward else (x @ weight.T + bias) * scale
    torch.testing.assert_close(layer(x), truth, rtol=1e-12, atol=1e-12)
    folded = copy.deepcopy(base)
    deltas = layer.deltas()
    assert deltas.keys() == ({"weight"} if feedforward or base.bias is None else {"weight", "bias"})
    with torch.no_grad():
        for name, delta in deltas.items():
            assert delta.shape == folded.get_parameter(name).shape
            folded.get_parameter(name).add_(delta)
    torch.testing.assert_close(folded(x), truth, rtol=1e-12, atol=1e-12)
    assert layer.low_rank() is None
    torch.testing.assert_close(torch.autograd.grad(deltas["weight"].sum(), layer.scale)[0].shape, layer.scale.shape)


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_exact_over_a_conv1d_and_over_a_layer_of_ones_own(feedforward, dtype):
    class Own(nn.Module):
        in_features, out_features = 11, 7

        def forward(self, x):
            return x[..., :7] * 3

    x = draw(5, 11, seed=0, dtype=dtype)
    for base in (conv1d(11, 7).to(dtype), Own()):
        layer = IA3Linear(base, feedforward=feedforward)
        assert torch.equal(layer(x), base(x))
        assert layer.scale.dtype == torch.float32
        assert layer.scale.shape == (11 if feedforward else 7,)
    with pytest.raises(ValueError, match=r"known for a floating weight \[7, 11\], and this Own has none: de-quantise"):
        layer.deltas()


def test_gradients_pass_a_checkpoint_and_a_bf16_base():
    for feedforward in (False, True):
        layer = moved(IA3Linear(nn.Linear(11, 7).to(torch.bfloat16).requires_grad_(False), feedforward=feedforward))
        x = draw(5, 11, seed=0, dtype=torch.bfloat16).requires_grad_()
        plain = torch.autograd.grad(layer(x).float().square().sum(), [layer.scale, x])
        kept = torch.autograd.grad(
            checkpoint(layer, x, use_reentrant=False).float().square().sum(), [layer.scale, x]
        )  # fmt: skip
        assert plain[0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_a_base_on_the_meta_device_can_be_attached_to():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(11, 7), nn.Linear(7, 5))
    attach(model, IA3(targets=["0", "1"], feedforward=["1"]))
    assert [tuple(p.shape) for p in adapter_parameters(model).values()] == [(7,), (7,)]
    assert {p.device.type for p in adapter_parameters(model).values()} == {"meta"}


# --- beside other adapters ------------------------------------------------------------------------------------------


def test_what_stands_before_it_is_refused_and_what_comes_after_composes():
    lora = LoRALinear(nn.Linear(5, 3), rank=2, alpha=3)
    with pytest.raises(TypeError, match='IA3 is made for the bare weight, but adapter "default" stands before it'):
        IA3Linear(lora)
    biased = TrainedBias(nn.Linear(5, 3), adapter_name="first")
    with pytest.raises(TypeError, match='adapter "first" stands before it: attach IA3 first, or detach that one'):
        IA3Linear(biased)
    IA3Linear(biased, feedforward=True)  # which leaves the bias alone
    model = tiny_bert()
    attach(model, IA3(targets=["query", "dense"], feedforward=["output.dense"]), "scales")
    move(model, "scales")
    attach(model, LoRA(rank=2, alpha=3, targets=["query", "dense"], train_bias="lora_only"), "lora")
    move(model, "lora")
    both = output(model)
    with pytest.raises(ValueError, match=r'"scales" is made for the weights as they are, .* merge "scales" first'):
        merge(model, "lora")
    merge(model, "scales")
    close(output(model), both, 1e-5)
    merge(model, "lora")
    close(output(model), both, 1e-5)
    unmerge(model, "lora")
    unmerge(model, "scales")
    assert torch.equal(output(model), both)


def test_a_bias_trained_around_it_is_not_merged_under_it():
    model = tiny_bert()
    attach(model, IA3(targets=["query"]), "scales")
    attach(model, LoRA(rank=2, alpha=3, targets=["value"], train_bias="all"), "biases")
    move(model, "scales")
    move(model, "biases")
    both = output(model)
    with pytest.raises(ValueError, match='merge "scales" first'):
        merge(model, "biases")
    assert torch.equal(output(model), both)
    merge(model, "scales")
    merge(model, "biases", untie=True)
    close(output(model), both, 1e-5)


def test_a_merged_layer_does_not_know_its_change():
    model = tiny_llama()
    attach(model, IA3(targets=["k_proj"]))
    move(model)
    layer = model.model.layers[0].self_attn.k_proj
    expected = layer.weight * layer.scale[:, None]
    merge(model)
    assert torch.equal(layer.weight, expected), "one product, rounded once"
    with pytest.raises(ValueError, match='adapter "default" is merged: what IA3 changes is known again after unmerge'):
        layer.deltas()


def test_a_penalty_on_effective_weights_sees_it():
    model = tiny_gpt2()
    attach(model, IA3(targets=["c_attn"]))
    name = "transformer.h.0.attn.c_attn.weight"
    anchor = {name: model.transformer.h[0].attn.c_attn.weight.detach().clone()}
    move(model)
    layer = model.transformer.h[0].attn.c_attn
    penalty = EWC({name: torch.ones_like(anchor[name])}, anchor, strength=2.0)
    truth = (anchor[name] * (layer.scale - 1)).square().sum()
    torch.testing.assert_close(penalty(model), truth, rtol=1e-5, atol=0)
    got = torch.autograd.grad(penalty(model), layer.scale)[0]
    torch.testing.assert_close(got, torch.autograd.grad(truth, layer.scale)[0], rtol=1e-4, atol=1e-5)


def test_switching_one_of_two_off():
    model = tiny_llama()
    attach(model, IA3(targets=["k_proj"]), "scales")
    move(model, "scales")
    alone = output(model)
    attach(model, LoRA(rank=2, alpha=3, targets=["k_proj"]), "lora")
    move(model, "lora")
    with active(model, "scales"):
        assert torch.equal(output(model), alone)
    detach(model, "lora")
    assert torch.equal(output(model), alone)


# --- the record -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IA3(targets=()), ValueError, "targets names no module"),
        (lambda: IA3(targets="("), ValueError, "targets must be suffixes or one regular expression"),
        (lambda: IA3(targets=["q"], feedforward=[3]), ValueError, "feedforward must be suffixes or one regular expr"),
        (lambda: IA3(targets=["q"], dtype=torch.int8), TypeError, "dtype must be a floating torch dtype"),
        (lambda: IA3(targets=["q"], train_modules="q"), TypeError, "train_modules must be a list of suffixes"),
        (lambda: IA3Linear(nn.LayerNorm(5)), TypeError, "needs a module with in_features .*; got LayerNorm"),
    ],
)
def test_what_a_record_does_not_take(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            IA3(targets=["k_proj", "down_proj"], feedforward=["dwn_proj"]),
            ValueError,
            'feedforward: "dwn_proj" matches no module\'s name or its end among the modules adapted. Did you mean',
        ),
        (
            IA3(targets=["k_proj"], feedforward=["up_proj"]),
            ValueError,
            '"up_proj" matches no .* among the modules adap',
        ),
        (
            IA3(targets=["k_proj"], feedforward="down_proj"),
            ValueError,
            '"down_proj" matches no .* whole name among the',
        ),
        (IA3(targets=["k_prj"]), ValueError, 'targets: "k_prj" matches no module\'s name or its end in this model'),
        (IA3(targets=["embed_tokens"]), TypeError, "embed_tokens is a Embedding: IA3 goes to linear layers and Conv1D"),
    ],
)
def test_what_cannot_be_carried_out_changes_nothing(config, error, message):
    model = tiny_llama()
    with pytest.raises(error, match=message):
        attach(model, config)
    assert adapter_names(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_the_weight_of_multihead_attention_is_not_called():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match=r"out_proj belongs to nn\.MultiheadAttention"):
        attach(model, IA3(targets=["out_proj"]))


# --- PEFT as oracle -------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
CASES = {
    "llama": (tiny_llama, {"targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]}),
    "llama outputs alone": (tiny_llama, {"targets": ["k_proj", "v_proj"]}),
    "llama expressions": (
        tiny_llama,
        {"targets": r".*layers\.1\..*(k|v|down)_proj", "feedforward": r".*\.down_proj"},
    ),
    "llama expression and suffix": (tiny_llama, {"targets": r".*(k|down)_proj", "feedforward": ["mlp.down_proj"]}),
    "llama all linear": (tiny_llama, {"targets": "all-linear", "feedforward": ["down_proj", "o_proj"]}),
    "llama narrower suffix": (tiny_llama, {"targets": ["k_proj", "down_proj"], "feedforward": ["0.mlp.down_proj"]}),
    "llama excluded": (
        tiny_llama,
        {"targets": ["k_proj", "down_proj"], "exclude": ["layers.0.self_attn.k_proj"], "feedforward": ["down_proj"]},
    ),
    "llama head trained whole": (
        tiny_llama,
        {"targets": ["v_proj", "down_proj"], "feedforward": ["down_proj"], "train_modules": ["lm_head"]},
    ),
    "llama tied head": (partial(tiny_llama, tied=True), {"targets": ["lm_head", "k_proj"]}),
    "gpt2": (tiny_gpt2, {"targets": ["c_attn", "mlp.c_proj"], "feedforward": ["mlp.c_proj"]}),
    "gpt2 all linear": (tiny_gpt2, {"targets": "all-linear", "feedforward": ["mlp.c_proj"]}),
    "bert": (tiny_bert, {"targets": ["key", "value", "output.dense"], "feedforward": ["output.dense"]}),
    "bert, one dense for another": (
        tiny_bert,
        {"targets": ["attention.output.dense", "intermediate.dense"], "feedforward": ["intermediate.dense"]},
    ),
    "classifier": (
        classifier,
        {"targets": ["key", "output.dense"], "feedforward": ["output.dense"], "train_modules": ["classifier"]},
    ),
    "t5": (tiny_t5, {"targets": ["k", "v", "wo"], "feedforward": ["wo"]}),
    "t5, o by its dot": (tiny_t5, {"targets": ["k", "o", "wo"], "feedforward": ["o"]}),
}
PEFT_NAMES = {"targets": "target_modules", "exclude": "exclude_modules", "feedforward": "feedforward_modules",
              "train_modules": "modules_to_save"}  # fmt: skip


def move(model, name="default"):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(adapter_parameters(model, name).items()):
            p.add_((0.2 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def written(folder):
    return {key: (tuple(t.shape), t.dtype) for key, t in load_file(folder / "adapter_model.safetensors").items()}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_what_we_write_peft_reads(case, tmp_path):
    make, options = case
    model = make()
    attach(model, IA3(**options))
    move(model)
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    close(output(model), output(theirs))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    ours, back = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    assert ours.keys() | {"peft_version"} == back.keys()
    again = make()
    report = load(again, tmp_path / "theirs")
    assert not report.unmatched
    assert torch.equal(output(again), output(model))


def from_peft(make, folder, **options):
    theirs = peft.get_peft_model(make(), peft.IA3Config(**options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(folder, save_embedding_layers=False)
    return theirs


OURS_ALONE = {"llama narrower suffix", "llama all linear", "gpt2 all linear"}  # PEFT wants suffixes that are targets


@pytest.mark.parametrize("name", [name for name in CASES if name not in OURS_ALONE])
def test_what_peft_writes_we_read(name, tmp_path):
    make, options = CASES[name]
    theirs = from_peft(make, tmp_path, **{"feedforward_modules": [], **{PEFT_NAMES[k]: v for k, v in options.items()}})
    model = make()
    report = load(model, tmp_path)
    assert not report.unmatched
    close(output(model), output(theirs))
    save(model, tmp_path / "again")
    assert written(tmp_path / "again") == written(tmp_path)
    merge(model, untie=True)
    close(output(model), output(theirs), 1e-5)


def test_peft_takes_ends_without_their_dots(tmp_path):
    options = {"target_modules": ["k", "o", "wo"], "feedforward_modules": ["o"]}
    theirs = from_peft(tiny_t5, tmp_path, **options)
    model = tiny_t5()
    load(model, tmp_path)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.feedforward, "wo ends in o"
    close(output(model), output(theirs))


def test_patterns_that_match_nothing_are_reported(tmp_path):
    theirs = from_peft(
        tiny_llama, tmp_path, target_modules=["k_proj", "down_proj", "c_attn"], feedforward_modules=["c_attn"]
    )
    model = tiny_llama()
    assert load(model, tmp_path).unmatched == ("target_modules c_attn", "feedforward_modules c_attn")
    close(output(model), output(theirs))


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedforward_modules": None}, "feedforward_modules is not set, which leaves it to a table of PEFT's: write"),
        ({"target_modules": None}, "target_modules is not set, which leaves it to a table"),
        ({"a_new_option": "yes"}, 'a_new_option="yes" asks for something that is not offered here'),
        ({"feedforward_modules": []}, r"2 mismatched: .*down_proj.ia3_l \(1, 37\) in the file, \(28, 1\) in the model"),
        ({"target_modules": ["k_proj"], "feedforward_modules": []}, r"2 unexpected: .*down_proj\.ia3_l"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(tmp_path, changes, message):
    from_peft(tiny_llama, tmp_path, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    edit(tmp_path, **changes)
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path)
    assert adapter_names(model) == []


def test_an_attached_adapter_must_scale_the_same_side(tmp_path):
    make = partial(tiny_llama)
    model = make()
    attach(model, IA3(targets=["o_proj"], train_modules=["lm_head"]))
    move(model)
    save(model, tmp_path)
    again = make()
    attach(again, IA3(targets=["o_proj"], train_modules=["lm_head"]))
    load(again, tmp_path)
    assert torch.equal(output(again), output(model))
    detach(again)
    attach(again, IA3(targets=["o_proj"], feedforward=["o_proj"]))
    with pytest.raises(ValueError, match=r"in whether the inputs of model\.layers\.0\.self_attn\.o_proj are scaled"):
        load(again, tmp_path)


def test_the_dtype_of_the_tensors_goes_round(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    attach(model, IA3(targets=["k_proj", "down_proj"], feedforward=["down_proj"], dtype=torch.bfloat16))
    move(model)
    save(model, tmp_path)
    assert {dtype for _, dtype in written(tmp_path).values()} == {torch.bfloat16}
    again = tiny_llama().to(torch.bfloat16)
    load(again, tmp_path)
    assert {p.dtype for p in adapter_parameters(again).values()} == {torch.bfloat16}
    assert torch.equal(output(again), output(model))
    theirs = peft.PeftModel.from_pretrained(
        tiny_llama().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False
    )  # fmt: skip
    assert torch.equal(output(theirs), output(model))


def test_a_tensor_too_many_is_named(tmp_path):
    from_peft(tiny_llama, tmp_path, target_modules=["k_proj"], feedforward_modules=[])
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"odd": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="1 unexpected: odd"):
        load(tiny_llama(), tmp_path)
