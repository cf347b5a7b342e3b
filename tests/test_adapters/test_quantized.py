"""Adapters over weights in 4 and 8 bits: the laws, the gradients, merging by de-quantising, PEFT and transformers."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmtune.adapters import (
    DoRA,
    DoRALinear,
    LoRA,
    LoRALinear,
    TrainedBias,
    TrainedCopy,
    adapter_names,
    adapter_parameters,
    attach,
    dequantized_weight,
    detach,
    disabled,
    load,
    merge,
    quantize,
    quantized_kind,
    save,
    unmerge,
)
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes (the extra quant) is not installed")
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def output(model):
    """In training mode, which changes nothing here but in int8 layers: in eval mode those round their input."""
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits


def move(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def close(one, other, tolerance=1e-6):
    scale = float(other.abs().max())
    assert float((one - other).abs().max()) <= tolerance * scale


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def train(model, name="default"):
    move(adapter_parameters(model, name))
    optimizer = torch.optim.AdamW(adapter_parameters(model, name).values(), lr=1e-2)
    for step in range(3):
        model.train()
        model(input_ids=IDS).logits.square().mean().backward()
        assert all(p.grad is not None for p in adapter_parameters(model, name).values()), f"step {step}"
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()(input_ids=IDS)  # an evaluation on the way must not end the training


def linear(kind, size=71, out=53, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, out, bias=bias, dtype=dtype))
    quantize(model, kind)
    return model[0]


# --- the layers by themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_quantised_layer_stands_for(kind, dtype):
    torch.manual_seed(0)
    plain = nn.Linear(71, 53, dtype=dtype)
    model = nn.Sequential(copy.deepcopy(plain))
    assert quantize(model, kind) == ("0",)
    layer = model[0]
    assert quantized_kind(layer) == kind
    assert quantized_kind(plain) is None
    found = dequantized_weight(layer)
    assert found.dtype == torch.float32
    assert found.shape == (53, 71)
    error = (found - plain.weight.float()).abs()
    if kind == "int8":  # a row is rounded to 127 steps of its largest; float16 comes before
        assert bool((error <= plain.weight.float().abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-10)).all())
    else:  # the largest gap of NF4's table is 0.304, of a block's largest; the scales are rounded too
        blocks = F.pad(plain.weight.float().flatten(), (0, -53 * 71 % 64)).view(-1, 64).abs().amax(1)
        largest = blocks.repeat_interleave(64)[: 53 * 71].view(53, 71)
        assert bool((error <= largest * 0.16).all())
    x = torch.randn(2, 5, 71, dtype=dtype)
    torch.testing.assert_close(layer.train()(x), F.linear(x, found.to(dtype), plain.bias), rtol=1e-2, atol=2e-2)
    if dtype == torch.float32:
        torch.testing.assert_close(layer(x), F.linear(x, found, plain.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("make", [LoRALinear, DoRALinear, partial(LoRALinear, lora_bias=True)])
def test_gradients_are_those_of_the_dequantised_weight(kind, make):
    base = linear(kind)
    plain = nn.Linear(71, 53).requires_grad_(False)
    plain.load_state_dict({"weight": dequantized_weight(base), "bias": base.bias})
    x = torch.randn(2, 5, 71, requires_grad=True)
    layers = [make(layer, rank=3, alpha=5) for layer in (base.requires_grad_(False), plain)]
    layers[1].load_state_dict({k: v for k, v in layers[0].state_dict().items() if "base." not in k}, strict=False)
    assert torch.equal(layers[0](x), base(x))
    gradients = []
    for layer in layers:
        own = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        move(own)
        gradients.append(torch.autograd.grad(layer.train()(x).square().sum(), [*own.values(), x]))
    for found, wanted in zip(*gradients, strict=True):
        close(found, wanted, 3e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_bf16_layer_is_invisible_at_first_rounds_once_and_can_be_checkpointed(kind):
    base = linear(kind, dtype=torch.bfloat16)
    layer = LoRALinear(base, rank=3, alpha=5)
    x = torch.randn(2, 5, 71, dtype=torch.bfloat16)
    assert torch.equal(layer(x), base(x))
    move({"b": layer.lora_b})
    assert layer.lora_b.dtype == torch.float32
    change = layer.scaling * (x.float() @ layer.lora_a.T @ layer.lora_b.T)
    assert torch.equal(layer(x), (base(x).float() + change).to(torch.bfloat16))
    x.requires_grad_(True)
    inputs = [layer.lora_a, layer.lora_b, x]
    wanted = torch.autograd.grad(layer(x).float().square().sum(), inputs)
    found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).float().square().sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


class Foreign(nn.Module):
    """A frozen layer that maps [..., in] to [..., out] in a way of its own."""

    def __init__(self, size=11, out=7, sizes=True):
        super().__init__()
        self.register_buffer("codes", torch.randint(-8, 8, (out, size), dtype=torch.int8))
        if sizes:
            self.in_features, self.out_features = size, out

    def forward(self, x):
        return x @ self.codes.to(x.dtype).T / 8


def test_any_frozen_layer_with_sizes_will_do():
    model = nn.Sequential(Foreign(), nn.Linear(7, 5))
    x = torch.randn(3, 11)
    start = model(x)
    attach(model, LoRA(rank=2, alpha=3, targets=["0"]))
    assert torch.equal(model(x), start)
    move(adapter_parameters(model))
    layer = model[0]
    torch.testing.assert_close(layer(x), x @ (layer.base.codes / 8 + layer.deltas()["weight"]).T)
    with pytest.raises(ValueError, match="trains a weight where the base Foreign has none"):
        merge(model, dequantize=True)
    with pytest.raises(TypeError, match=r"LoRALinear needs .* got Foreign. One that maps \[..., in\] to \[..., out\]"):
        LoRALinear(Foreign(sizes=False), rank=2, alpha=3)
    with pytest.raises(TypeError, match="DoRA needs a base with a floating weight, or one that bitsandbytes"):
        DoRALinear(Foreign(), rank=2, alpha=3)


def test_what_cannot_be_done_to_a_quantised_layer():
    with pytest.raises(TypeError, match=r"a Linear4bit with a weight of torch.uint8 \(quantised\) cannot be trained"):
        TrainedCopy(linear("nf4"))
    with pytest.raises(TypeError, match=r"a Linear8bitLt with a weight of torch.int8 \(quantised\) cannot be trained"):
        TrainedCopy(linear("int8"))


# --- whole models ---------------------------------------------------------------------------------------------------

lora, dora = partial(LoRA, rank=3, alpha=5), partial(DoRA, rank=3, alpha=5)
MODELS = {
    "nf4": (tiny_llama, "nf4", lora()),
    "int8": (tiny_llama, "int8", lora()),
    "nf4 tied": (partial(tiny_llama, tied=True), "nf4", lora(dropout=0.0, rslora=True)),
    "nf4, the head trained whole": (tiny_llama, "nf4", lora(targets=["q_proj"], train_modules=["lm_head"])),
    "nf4 dora": (tiny_llama, "nf4", dora()),
    "int8 dora": (tiny_llama, "int8", dora()),
    "nf4 biases": (tiny_bert, "nf4", lora(train_bias="lora_only", lora_bias=True)),
    "int8 biases": (tiny_bert, "int8", lora(train_bias="lora_only")),
    "nf4 conv1d": (tiny_gpt2, "nf4", lora(targets=["c_attn", "c_proj"])),
    "nf4, some": (tiny_llama, "nf4", lora(targets=["q_proj", "down_proj", "embed_tokens"])),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, kind, config = MODELS[request.param]

    def quantised():
        model = make().eval()
        quantize(model, kind)
        return model

    return quantised, config


def test_the_laws_hold_over_quantised_weights(case, tmp_path):
    make, config = case
    model = make()
    start = output(model)
    modules, before = {name: type(m) for name, m in model.named_modules()}, snapshot(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attach(model, config)
    assert torch.equal(output(model), start)
    train(model)
    tuned = output(model)
    assert not torch.equal(tuned, start)
    with disabled(model):
        assert torch.equal(output(model), start)

    save(model, tmp_path)
    again = make()
    load(again, tmp_path)
    assert torch.equal(output(again), tuned)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied), tuned)

    with pytest.raises(ValueError, match=r"is quantised \((nf4|int8)\).* pass dequantize=True"):
        merge(model)
    assert torch.equal(output(model), tuned)
    quantised = {name: m for name, m in model.named_modules() if quantized_kind(m)}
    report = merge(model, dequantize=True)
    close(output(model), tuned, 2e-5)
    assert len(report.dequantized) == len([name for name in quantised if name.endswith("base")])
    assert all(name in report.parameters for name in report.dequantized)
    again = copy.deepcopy(model)
    for merged in (model, again):
        unmerge(merged)
        assert torch.equal(output(merged), tuned)
    assert all(model.get_submodule(name) is module for name, module in quantised.items()), "the very layers"

    detach(model)
    assert torch.equal(output(model), start)
    same(snapshot(model), before)
    assert {name: type(m) for name, m in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not [name for name in vars(model) if "llmtune" in name]
    assert torch.equal(output(copied), tuned)


def test_merging_for_good_leaves_plain_layers(case):
    make, config = case
    model = make()
    names = [name for name, m in model.named_modules() if quantized_kind(m)]
    attach(model, config)
    train(model)
    tuned = output(model)
    report = merge(model, keep_base=False, dequantize=True, untie=True)
    close(output(model), tuned, 2e-5)
    done = {name.removesuffix(".weight") for name in report.dequantized}
    for name in names:
        layer = model.get_submodule(name)
        assert (type(layer) is nn.Linear) == (name in done)
        assert not layer.weight.requires_grad
        assert layer.weight.dtype == torch.float32 or name not in done
    assert not [name for name in vars(model) if "llmtune" in name]


def test_the_sum_is_float32_and_rounded_once_and_the_report_counts():
    model = tiny_llama().to(torch.bfloat16)
    quantize(model)
    attach(model, LoRA(rank=3, alpha=5, targets=["q_proj"]))
    move(adapter_parameters(model))
    layer = model.model.layers[0].self_attn.q_proj
    exact = (dequantized_weight(layer.base) + layer.deltas()["weight"]).detach()
    before = [module.base for module in model.modules() if isinstance(module, LoRALinear)]
    report = merge(model, dequantize=True)
    assert torch.equal(layer.base.weight, exact.to(torch.bfloat16))
    assert report.largest_rounding >= float((exact - exact.to(torch.bfloat16).float()).abs().max()) > 0
    assert report.added_bytes == 2 * 56 * 28 * 2
    assert "\n2 weights de-quantised, which take 0.0 MiB more than before" in str(report)
    unmerge(model)
    report = merge(model, dequantize=torch.float32, keep_base=False)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    stored = (
        56 * 28 // 2 + 25 + 16 * 4 + 4 + 4 + 256 * 4
    )  # codes, scales of 64, NF4's table; scales' scale, mean, table
    assert report.added_bytes == sum(56 * 28 * 4 - stored for _ in before)


def test_two_adapters_merge_one_after_the_other():
    model = tiny_llama()
    quantize(model)
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj", "v_proj"]), "one")
    move(adapter_parameters(model, "one"))
    attach(model, LoRA(rank=3, alpha=5, targets=["q_proj", "up_proj"]), "two")
    move(adapter_parameters(model, "two"))
    both = output(model)
    merge(model, "one", dequantize=True)
    report = merge(model, "two", dequantize=True)
    assert len(report.dequantized) == 2, "q_proj is plain already"
    close(output(model), both, 2e-5)
    unmerge(model, "two")
    unmerge(model, "one")
    assert torch.equal(output(model), both)
    assert quantized_kind(model.model.layers[0].self_attn.q_proj.base.base) == "nf4"


def test_merging_refuses_hooks_and_dtypes_before_it_changes_anything():
    model = tiny_llama()
    quantize(model)
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]))
    move(adapter_parameters(model))
    tuned = output(model)
    handle = model.model.layers[1].self_attn.q_proj.base.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.weight has hooks, which a plain layer"):
        merge(model, dequantize=True)
    handle.remove()
    with pytest.raises(ValueError, match=r"dequantize must be True or a floating dtype; got torch.int8"):
        merge(model, dequantize=torch.int8)
    model.model.layers[1].self_attn.q_proj.lora_b.data *= 1e6
    with pytest.raises(ValueError, match=r"q_proj.weight is too large for torch.float16"):
        merge(model, dequantize=torch.float16)
    model.model.layers[1].self_attn.q_proj.lora_b.data /= 1e6
    assert quantized_kind(model.model.layers[0].self_attn.q_proj.base) == "nf4"
    close(output(model), tuned)


def test_a_bias_alone_merges_without_dequantising():
    model = nn.Sequential(nn.Linear(11, 7))
    quantize(model)
    model[0] = TrainedBias(model[0])
    move({"bias": model[0].trained_bias})
    x = torch.randn(3, 11)
    torch.testing.assert_close(model(x), model[0].base(x) + model[0].deltas()["bias"])


# --- quantize -------------------------------------------------------------------------------------------------------


def test_quantize_takes_linear_layers_but_the_head():
    model = tiny_llama()
    names = quantize(model, exclude=["layers.1.mlp.up_proj", "o_proj"])
    assert len(names) == 14 - 3
    assert {name for name, m in model.named_modules() if quantized_kind(m)} == set(names)
    assert type(model.lm_head) is nn.Linear
    assert all(not p.requires_grad for name, p in model.named_parameters() if name.removesuffix(".weight") in names)
    classifier = tiny_bert(labels=3)
    assert not any("classifier" in name for name in quantize(classifier, "int8"))


def test_a_model_quantised_here_is_the_same_in_both_modes():
    model = tiny_llama()
    quantize(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, output(model))
    attach(model, LoRA(rank=2, alpha=3))  # nothing has been packed on the way
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if quantized_kind(m))


def test_quantize_refuses_and_leaves_the_model_as_it_was():
    model = tiny_llama()
    with pytest.raises(ValueError, match='kind must be "nf4" or "int8"; got \'fp4\''):
        quantize(model, "fp4")
    with pytest.raises(ValueError, match='exclude: "qproj" matches no module'):
        quantize(model, exclude=["qproj"])
    with pytest.raises(ValueError, match="this LlamaForCausalLM has no linear layer to quantise"):
        quantize(model, exclude=r".*_proj")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"0.mlp.up_proj.weight and .*1.mlp.up_proj.weight are one tied weight: excl"):
        quantize(model)
    assert not [m for m in model.modules() if quantized_kind(m)]
    attach(model, LoRA(rank=2, alpha=3))
    with pytest.raises(ValueError, match="the model has adapters: quantise it first"):
        quantize(model)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(ValueError, match="0 is on the meta device: load the model first"):
        quantize(empty)
    model = nn.Sequential(nn.Linear(11, 7))
    model[0].weight = nn.Parameter(torch.zeros(7, 11, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0 has a weight of torch.int8: only floating ones"):
        quantize(model)


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None
import torch
from torch import nn
from llmtune.adapters import LoRA, attach, detach, memory_summary, merge, quantize
model = nn.Sequential(nn.Linear(5, 3))
attach(model, LoRA(rank=2, alpha=3)); memory_summary(model); merge(model, keep_base=False)
try:
    quantize(model)
except ImportError as error:
    print(error)
"""


def test_everything_else_works_without_bitsandbytes():
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert run.stdout == 'quantize needs bitsandbytes: pip install "llmtune[quant]"\n'


# --- transformers and PEFT ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose sizes suit the kernels that bitsandbytes has for some CPUs: multiples of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def from_transformers(folder, bits=4, dtype=torch.float32):
    pytest.importorskip("accelerate", reason="transformers quantises through accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_transformers_quantised_is_trained_merged_and_saved(folder, bits, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    model = from_transformers(folder, bits, dtype)
    attach(model, LoRA(rank=3, alpha=5))
    before = snapshot(model)
    train(model)
    frozen, after = [{k: v for k, v in state.items() if "lora_" not in k} for state in (before, snapshot(model))]
    same(frozen, {key: after[key] for key in frozen})
    tuned = output(model)
    report = merge(model, dequantize=True, keep_base=False)
    assert len(report.dequantized) == 14
    assert {p.dtype for p in model.parameters()} == {dtype}
    close(output(model).float(), tuned.float(), 1e-5 if dtype == torch.float32 else 0.05)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert not [m for m in again.modules() if quantized_kind(m)]
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_peft_reads_what_we_write_over_the_same_weights(folder, bits, method, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle of this test")
    model = from_transformers(folder, bits)
    attach(model, (dora if method == "dora" else lora)())
    move(adapter_parameters(model))
    save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(from_transformers(folder, bits), tmp_path)
    assert type(theirs.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
    close(output(theirs), output(model), 3e-6 if method == "lora" else 3e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_we_read_what_peft_writes_over_the_same_weights(folder, method, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is the oracle of this test")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=method == "dora")
    theirs = peft.get_peft_model(from_transformers(folder), config)
    move({name: p for name, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(tmp_path)
    model = from_transformers(folder)
    load(model, tmp_path)
    close(output(theirs), output(model), 3e-6 if method == "lora" else 3e-5)


def test_weights_are_kept_from_being_packed_while_there_are_adapters(folder):
    model = from_transformers(folder)
    layers = [m for m in model.modules() if quantized_kind(m)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on a CPU that has it
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), "one")
    attach(model, LoRA(rank=2, alpha=3, targets=["v_proj"]), "two")
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers), "layers without an adapter too"
    detach(model, "one")
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    detach(model, "two")
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    layers[3].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"o_proj was run in eval mode, and bitsandbytes has packed its weight"):
        attach(model, LoRA(rank=2, alpha=3))
    assert adapter_names(model) == []
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)


def test_an_effective_value_of_a_quantised_weight_is_refused():
    from llmtune.forgetting import diagonal_fisher

    model = tiny_llama()
    quantize(model)
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.weight is quantised: it has no effective value"):
        diagonal_fisher(model, [{"input_ids": IDS, "labels": IDS}])
