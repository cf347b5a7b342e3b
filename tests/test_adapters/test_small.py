"""BitFit and LayerNorm tuning: against models whose own biases or norms are set, in every dtype, and every refusal."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    BitFit,
    LayerNormTuning,
    LoRA,
    TrainedBias,
    TrainedCopy,
    TrainedNorm,
    adapter_parameters,
    attach,
    detach,
    load,
    merge,
    save,
)
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
METHODS = {
    "biases of gpt2": (tiny_gpt2, BitFit()),
    "biases of bert": (tiny_bert, BitFit(dtype=torch.float32)),
    "norms of llama": (tiny_llama, LayerNormTuning()),
    "norms of gpt2": (tiny_gpt2, LayerNormTuning(dtype=torch.float32)),
    "norms of bert": (tiny_bert, LayerNormTuning()),
    "norms of t5": (tiny_t5, LayerNormTuning(dtype=torch.float32)),
}


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    return model(input_ids=IDS, **inputs).logits


def quiet(model):
    """Without gradients: with them, attention may take another kernel once the rest is frozen."""
    with torch.no_grad():
        return output(model)


def move(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def trains(record, name):
    """Return whether a bare parameter is one of those that the record trains."""
    if isinstance(record, BitFit):
        return name.endswith("bias")
    return any(part in name for part in ("norm", "ln_", "LayerNorm"))


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def test_it_is_training_the_parameters_themselves(method):
    """The same outputs and gradients as a plain model of which those parameters, and no others, are trained."""
    make, record = method
    model, plain = make().double(), make().double()
    own = {name: p for name, p in plain.named_parameters() if trains(record, name)}
    attach(model, record)
    parameters = adapter_parameters(model)
    assert sorted(p.numel() for p in parameters.values()) == sorted(p.numel() for p in own.values())
    move(parameters)
    merged = copy.deepcopy(model)
    merge(merged, keep_base=False, untie=True)  # BERT's head and its parent share a bias
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(output(model), output(plain), rtol=1e-12, atol=1e-12)
    for one in (model, plain):
        output(one).square().mean().backward()
    wanted = {tuple(p.shape): [] for p in own.values()}
    for p in own.values():
        wanted[tuple(p.shape)].append(p.grad)
    for name, p in parameters.items():
        near = [torch.allclose(p.grad, other, rtol=1e-9, atol=1e-13) for other in wanted[tuple(p.shape)]]
        assert any(near), f"the gradient of {name} is none of the plain model's"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_start_is_invisible_in_every_dtype(method, dtype):
    make, record = method
    model = make().to(dtype)
    start = quiet(model)
    attach(model, record)
    assert torch.equal(quiet(model), start)
    assert start.dtype == dtype
    kinds = {p.dtype for p in adapter_parameters(model).values()}
    assert kinds == {dtype if record.dtype is None else torch.promote_types(dtype, record.dtype)}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5])
def test_float32_norms_on_a_bf16_base_are_rounded_on_use(make):
    """Steps too small for bfloat16 add up; what is used, and merged, is the nearest bfloat16 number."""
    model = make().to(torch.bfloat16)
    attach(model, LayerNormTuning(dtype=torch.float32))
    name, parameter = next(iter(adapter_parameters(model).items()))
    with torch.no_grad():
        for _ in range(100):
            parameter += 1e-4
    assert not torch.equal(parameter, parameter.to(torch.bfloat16).float())
    tuned = output(model)
    assert tuned.dtype == torch.bfloat16
    tuned.float().square().mean().backward()
    assert float(parameter.grad.abs().max()) > 0, name
    tuned = quiet(model)
    merge(model)
    assert torch.equal(quiet(model), tuned)


def test_a_copy_in_another_dtype_runs_in_the_bases():
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(torch.bfloat16)
    layer, x = TrainedCopy(base, dtype=torch.float32), torch.randn(2, 5, dtype=torch.bfloat16)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert {p.grad.dtype for p in layer.copy.parameters()} == {torch.float32}
    assert {p.dtype for p in TrainedCopy(nn.Linear(5, 3), dtype=torch.bfloat16).copy.parameters()} == {torch.float32}
    assert TrainedBias(nn.Linear(5, 3), dtype=torch.bfloat16).trained_bias.dtype == torch.float32


def test_which_biases_and_which_norms():
    model = tiny_bert()
    report = attach(model, BitFit())
    everywhere = [name.removesuffix(".bias") for name, _ in tiny_bert().named_parameters() if name.endswith(".bias")]
    assert set(report.modules) == {*everywhere, "cls.predictions.decoder"} - {"cls.predictions"}  # a tied bias, once
    assert "every bias 20" in str(report)
    detach(model)
    report = attach(model, BitFit(targets=r".*attention\..*", train_modules=["transform"]))
    assert len(report.modules) == 2 * 5
    assert all(name.startswith("bert.encoder.layer") for name in report.modules)
    detach(model)
    report = attach(model, LayerNormTuning(train_modules=["transform"]))
    assert len(report.modules) == 5
    assert report.copied == ("cls.predictions.transform",)
    assert "every norm 5" in str(report)


class FancyRMSNormGated(nn.RMSNorm):
    """A name as some models have it."""


class MatrixNorm(nn.Linear):
    """A name that says norm, over a weight that is none."""


def test_a_norm_is_known_by_its_structure():
    model = nn.Sequential(
        nn.Linear(7, 7), nn.LayerNorm(7), nn.LayerNorm(7, elementwise_affine=False), nn.RMSNorm(7), nn.GroupNorm(1, 7),
        FancyRMSNormGated(7), nn.BatchNorm1d(7), MatrixNorm(7, 7),
    )  # fmt: skip
    assert attach(model, LayerNormTuning()).modules == ("1", "3", "4", "5")
    assert isinstance(model[1], TrainedNorm)
    assert sum(p.requires_grad for p in model.parameters()) == 2 + 1 + 2 + 1


class SharedBias(nn.Module):
    """Two layers that add one bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(7, 3), nn.Linear(7, 3)
        self.two.bias = self.one.bias


@pytest.mark.parametrize(
    ("make", "record", "error", "message"),
    [
        (tiny_llama, BitFit, ValueError, "LlamaForCausalLM has no bias to train: use LayerNormTuning, .* or LoRA"),
        (tiny_t5, BitFit, ValueError, "T5ForConditionalGeneration has no bias to train"),
        (
            tiny_llama, partial(BitFit, targets=["q_proj"]), TypeError,
            "q_proj is a Linear without a bias: BitFit goes to linear layers, Conv1D and layer norms with a bias",
        ),
        (tiny_gpt2, partial(BitFit, targets=["mlp"]), TypeError, "mlp is a GPT2MLP without a bias"),
        (
            lambda: nn.Sequential(nn.Linear(5, 3), nn.Conv1d(5, 3, 2)), BitFit, TypeError,
            r"BitFit cannot train 1.bias of a Conv1d: name the module in train_modules, or name the modules whose bias",
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(5, 3, 2)), partial(BitFit, targets=["0"]), TypeError,
            "0 is a Conv1d: BitFit goes to linear layers",
        ),
        (
            lambda: nn.Sequential(nn.MultiheadAttention(6, 2)), partial(BitFit, targets=["out_proj"]), TypeError,
            "belongs to nn.MultiheadAttention, which takes its bias without calling it",
        ),
        (SharedBias, BitFit, ValueError, "one and two add one and the same bias: name them in train_modules instead"),
        (lambda: nn.Sequential(nn.Linear(5, 3)), LayerNormTuning, ValueError, "this Sequential has no norm with a wei"),
        (
            tiny_llama, partial(LayerNormTuning, targets=["q_proj"]), TypeError,
            "q_proj is a Linear, no norm with a weight of one dimension: narrow the targets, or name it in",
        ),
        (tiny_llama, partial(LayerNormTuning, targets=["ln_1"]), ValueError, 'targets: "ln_1" matches no module'),
        (tiny_llama, partial(LayerNormTuning, targets=()), ValueError, "targets names no module"),
        (tiny_llama, partial(BitFit, dtype="float32"), TypeError, "dtype must be a floating torch dtype"),
        (tiny_llama, partial(BitFit, train_modules="lm_head"), TypeError, "train_modules must be a list of suffixes"),
        (
            tiny_llama, partial(LayerNormTuning, targets=["norm"], train_modules=["norm"]), ValueError,
            "norm is named both in targets and in train_modules",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_changed(make, record, error, message):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        attach(model, record())
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_beside_other_adapters():
    model = tiny_gpt2()
    attach(model, LoRA(rank=2, alpha=3, targets=["c_attn"]), "low")
    move(adapter_parameters(model, "low"))
    start = quiet(model)
    attach(model, BitFit(), "biases")
    assert torch.equal(quiet(model), start)
    move(adapter_parameters(model, "biases"))
    tuned = quiet(model)
    merge(model, "biases")
    torch.testing.assert_close(quiet(model), tuned, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match='ln_f already belongs to adapter "biases" and cannot be trained whole'):
        attach(model, LoRA(rank=2, alpha=3, train_modules=["ln_f"]), "third")
    model = tiny_gpt2()
    attach(model, LayerNormTuning(), "one")
    with pytest.raises(ValueError, match=r'ln_1 already belongs to adapter "one" and cannot be trained whole'):
        attach(model, LayerNormTuning(), "two")


def test_checkpointing_gives_the_same_gradients(method):
    make, record = method
    gradients = []
    for checkpointing in (False, True):
        model = make().double().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        attach(model, record)
        move(adapter_parameters(model))
        output(model).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-15)


def test_a_base_on_the_meta_device(method):
    make, record = method
    model = make()
    attach(model, record)
    move(adapter_parameters(model))
    with torch.device("meta"):
        empty = make()
    attach(empty, record)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), strict=True)
    for name, buffer in model.named_buffers():
        if "original" not in name:
            empty.get_buffer(name).copy_(buffer)
    assert torch.equal(quiet(empty), quiet(model))


def test_bitfit_goes_into_files_of_our_own(tmp_path):
    model = tiny_gpt2()
    attach(model, BitFit(targets=["ln_1", "c_attn"], train_modules=["ln_f"], dtype=torch.float64))
    move(adapter_parameters(model))
    save(model, tmp_path)
    assert '"method": "BitFit"' in (tmp_path / "adapter_config.json").read_text()
    again = tiny_gpt2()
    load(again, tmp_path)
    assert torch.equal(output(again), output(model))
    assert {p.dtype for p in adapter_parameters(again).values()} == {torch.float64, torch.float32}
    other = tiny_gpt2()
    attach(other, LayerNormTuning())
    with pytest.raises(ValueError, match=r'is BitFit, the attached "default" is LayerNormTuning: detach it first'):
        load(other, tmp_path)
