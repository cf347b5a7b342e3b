"""The adapters' laws: a table of layers and of models, and modules that break each law."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    IA3,
    AdaLoRA,
    AdaLoRALinear,
    BitFit,
    Bottleneck,
    BottleneckLayer,
    DoRA,
    DoRALinear,
    IA3Linear,
    LayerNormTuning,
    LoRA,
    LoRALinear,
    LoRAParameter,
    LoReFT,
    LoReFTLayer,
    NewTokens,
    NewTokensHead,
    ParallelBottleneckLayer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    TrainedBias,
    TrainedCopy,
    VeRA,
    VeRALinear,
    adapter_parameters,
    attach,
    detach,
    disabled,
    load,
    merge,
    save,
    unmerge,
)
from llmtune.errors import LawBroken
from llmtune.testing.adapters import check_adapter
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_qwen3_moe, tiny_t5

LAYERS = {
    "lora": partial(LoRALinear, rank=3, alpha=5),
    "rslora": partial(LoRALinear, rank=3, alpha=5, rslora=True),
    "lora with bias": partial(LoRALinear, rank=2, alpha=7, lora_bias=True),
    "lora with dropout": partial(LoRALinear, rank=2, alpha=7, dropout=0.4),
    "gaussian": partial(LoRALinear, rank=7, alpha=1, initialise="gaussian"),
    "two nested": lambda base: LoRALinear(LoRALinear(base, rank=2, alpha=3), rank=3, alpha=5, adapter_name="second"),
    "dora": partial(DoRALinear, rank=3, alpha=5),
    "dora with dropout": partial(DoRALinear, rank=2, alpha=7, dropout=0.4, rslora=True),
    "orthogonal": partial(LoRALinear, rank=4, alpha=5, initialise="orthogonal"),
    "pissa": partial(LoRALinear, rank=3, alpha=5, initialise="pissa"),
    "olora with bias": partial(LoRALinear, rank=3, alpha=5, initialise="olora", lora_bias=True),
    "ia3": IA3Linear,
    "ia3 of inputs": partial(IA3Linear, feedforward=True),
    "vera": partial(VeRALinear, rank=3),
    "vera wider than the layer": partial(VeRALinear, rank=17, d_initial=0.7, seed=3),
    "vera with dropout": partial(VeRALinear, rank=5, dropout=0.4),
    "lora of a parameter": partial(LoRAParameter, parameter="weight", rank=3, alpha=5),
    "trained copy": TrainedCopy,
    "trained copy in float32": partial(TrainedCopy, dtype=torch.float32),
    "trained bias": TrainedBias,
    "bottleneck": partial(BottleneckLayer, size=3, scaling=1.7),
    "bottleneck with dropout": partial(BottleneckLayer, size=2, activation="tanh", dropout=0.4),
    "bottleneck beside": partial(ParallelBottleneckLayer, size=3, activation="gelu"),
    "loreft": partial(LoReFTLayer, rank=3),
    "loreft at some positions": partial(LoReFTLayer, rank=2, positions=(1, 2), dropout=0.4),
    "adalora": partial(AdaLoRALinear, rank=3, alpha=5),
    "adalora with dropout": partial(AdaLoRALinear, rank=2, alpha=7, initial_rank=5, dropout=0.4),
}

EXEMPT = {  # a word in a row's name: what it is free of
    "dora": "norm held constant",
    "orthogonal": "start to the digit",
    "pissa": "start to the digit",
    "olora": "start to the digit",
    "trained bias in float32": partial(TrainedBias, dtype=torch.float32),
    "new tokens in a head": partial(NewTokensHead, tokens=[5, 2]),
    "new tokens in a head, bf16": partial(NewTokensHead, tokens=[0], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "two nested"])
def test_layers_keep_the_laws(name):
    exempt = [exemption for word, exemption in EXEMPT.items() if word in name]
    check_adapter(LAYERS[name], exempt=exempt)


class DoRAThatDropsGradient(DoRALinear):
    def forward(self, x):
        return super().forward(x.detach())


def test_an_exemption_is_for_the_tensors_it_names_only():
    with pytest.raises(LawBroken, match="along a random direction the input has slope"):
        check_adapter(partial(DoRAThatDropsGradient, rank=3, alpha=5), exempt=["norm held constant"])


def test_only_known_exemptions_are_granted():
    with pytest.raises(ValueError, match='there is no exemption "true gradients", only norm held constant, '):
        check_adapter(LAYERS["lora"], exempt=["true gradients"])
    with pytest.raises(LawBroken, match="unseen at the start"):
        check_adapter(partial(Plain, start=0.1), exempt=["norm held constant"])


class Plain(nn.Module):
    """A user's own adapter, without anything of ours; the faults below are changes of it."""

    def __init__(self, base, *, scaling=2.0, start=0.0):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.a = nn.Parameter(torch.randn(3, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.full((base.out_features, 3), start))

    def forward(self, x):
        change = x.to(self.a.dtype) @ self.a.T @ self.b.T.to(self.a.dtype) * self.scaling
        return (self.base(x) + change).to(x.dtype)


class TrainsBase(Plain):
    def __init__(self, base):
        super().__init__(base.requires_grad_(True))


class DropsGradient(Plain):
    def forward(self, x):
        return (self.base(x) + x.to(self.a.dtype) @ self.a.detach().T @ self.b.T).to(x.dtype)


class LosesDtype(Plain):
    def forward(self, x):
        return self.base(x).float() + x.to(self.a.dtype) @ self.a.T @ self.b.T


class AlwaysDrops(Plain):
    def forward(self, x):
        return (self.base(x) + nn.functional.dropout(x.to(self.a.dtype), 0.5) @ self.a.T @ self.b.T).to(x.dtype)


shared = nn.Parameter(torch.zeros(7, 3))


class Shares(Plain):
    def __init__(self, base):
        super().__init__(base)
        self.b = shared


class LooksAtBase(Plain):
    """Its trained parameter is a view of the base's memory."""

    def __init__(self, base):
        super().__init__(base)
        self.extra = nn.Parameter(base.weight.detach())

    def forward(self, x):
        return super().forward(x) + 0 * self.extra.sum().to(x.dtype)


class ForgetsItsScaling(Plain):
    def __init__(self, base):
        super().__init__(base, scaling=float(torch.rand(())))


class StaysOn(LoRALinear):
    @property
    def takes_part(self):
        return True


class WrongDelta(LoRALinear):
    def deltas(self):
        return {"weight": self.lora_b @ self.lora_a}


class Frozen(Plain):
    def __init__(self, base):
        super().__init__(base)
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Plain, start=0.1), "unseen at the start .* off by"),
        (LosesDtype, "unseen at the start .*bfloat16.*: expected .*bfloat16, got .*float32"),
        (TrainsBase, "the base stays: weight: off by"),
        (Frozen, "the adapter has no parameter that requires a gradient"),
        (DropsGradient, "true gradients: along a random direction a has slope"),
        (AlwaysDrops, "true gradients|quiet in eval"),
        (Shares, "nothing shared: two adapters hold the same parameter|storage"),
        (LooksAtBase, "the base stays|lies in the base's storage"),
        (ForgetsItsScaling, "kept whole: the output after load_state_dict: off by"),
        (partial(StaysOn, rank=3, alpha=5), "off is off: off by"),
        (partial(WrongDelta, rank=3, alpha=5), "honest change"),
    ],
)
def test_a_fault_is_caught(make, message):
    with pytest.raises(LawBroken, match=message):
        check_adapter(make)


def test_a_plain_module_of_a_users_passes():
    check_adapter(Plain)


# --- whole models ---------------------------------------------------------------------------------------------------

REASONS = {  # the laws of a model that a method may be free of, each with its reason
    "start": "what it trains stands among the tokens, and no start of it is invisible",
    "start to the digit": "the start is taken from the weights and put back by a sum, which rounds",
    "merge": "what it adds is no change of the weights",
}
lora, dora = partial(LoRA, rank=3, alpha=5), partial(DoRA, rank=3, alpha=5)
adalora = partial(AdaLoRA, initial_rank=5, target_rank=3, alpha=7, total_steps=10)
bottleneck = partial(Bottleneck, size=5, activation="gelu")
TOKENS = [37, 96, 13]  # of which the first and the last are in IDS
MODELS = {  # name: (model, record, *laws it is free of)
    "llama": (tiny_llama, lora()),
    "llama tied": (partial(tiny_llama, tied=True), lora()),
    "llama embeddings": (tiny_llama, lora(targets=["embed_tokens", "q_proj", "down_proj"])),
    "llama patterns": (tiny_llama, lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.5}, rslora=True)),
    "gpt2 conv1d": (tiny_gpt2, lora(targets=["c_attn", "c_proj"], dropout=0.2)),
    "gpt2 all biases": (tiny_gpt2, lora(train_bias="all")),
    "bert biases": (tiny_bert, lora(train_bias="lora_only", lora_bias=True)),
    "bert classifier": (partial(tiny_bert, labels=3), lora(targets=["query", "value"], train_modules=["classifier"])),
    "t5": (tiny_t5, lora(targets=r".*\.(q|v|wi|wo)")),
    "llama dora": (tiny_llama, dora(dropout=0.2)),
    "gpt2 dora": (tiny_gpt2, dora(targets=["c_attn", "c_proj"])),
    "bert dora": (tiny_bert, dora(rank_pattern={"query": 2})),
    "bert dora biases": (tiny_bert, dora(train_bias="lora_only")),
    "llama pissa": (tiny_llama, lora(initialise="pissa", rslora=True), "start to the digit"),
    "gpt2 pissa": (tiny_gpt2, lora(targets=["c_attn"], initialise="pissa_niter_4"), "start to the digit"),
    "bert olora": (tiny_bert, lora(initialise="olora", dropout=0.2), "start to the digit"),
    "t5 orthogonal": (tiny_t5, LoRA(rank=4, alpha=5, initialise="orthogonal"), "start to the digit"),
    "t5 dora": (tiny_t5, dora(targets=r".*\.(q|v|wi|wo)")),
    "llama ia3": (tiny_llama, IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"])),
    "gpt2 ia3": (tiny_gpt2, IA3(targets=["c_attn", "mlp.c_proj"], feedforward=["mlp.c_proj"])),
    "bert ia3": (tiny_bert, IA3(targets=["key", "value", "output.dense"], feedforward=["output.dense"])),
    "bert ia3 classifier": (
        partial(tiny_bert, labels=3),
        IA3(targets=["key", "value"], train_modules=["classifier"]),
    ),
    "t5 ia3": (tiny_t5, IA3(targets=r".*\.(k|v|wo)", feedforward=["wo"])),
    "llama vera": (tiny_llama, VeRA(rank=5, dropout=0.2)),
    "llama tied vera": (partial(tiny_llama, tied=True), VeRA(rank=61, targets=["q_proj"], save_projection=False)),
    "gpt2 vera": (tiny_gpt2, VeRA(rank=5, targets=["c_attn", "c_proj"])),
    "gpt2 vera biases": (tiny_gpt2, VeRA(rank=5, targets=["c_fc"], train_bias="all")),
    "bert vera biases": (tiny_bert, VeRA(rank=5, train_bias="vera_only", train_modules=["word_embeddings"])),
    "t5 vera": (tiny_t5, VeRA(rank=5, targets=r".*\.(q|v|wi|wo)", save_projection=False, seed=7)),
    "qwen3 experts": (tiny_qwen3_moe, lora(targets=(), target_parameters=["down_proj", "gate_up_proj"])),
    "qwen3 experts and more": (
        tiny_qwen3_moe,
        lora(target_parameters=["experts.down_proj", "mlp.gate.weight"], rslora=True, train_modules=["lm_head"]),
    ),
    "gpt2 matrices": (tiny_gpt2, lora(targets=["c_fc"], target_parameters=["wpe.weight", "c_attn.weight"])),
    "t5 embeddings": (tiny_t5, lora(targets=["embed_tokens", "q"])),
    "llama prompt": (tiny_llama, PromptTuning(tokens=5), "start", "merge"),
    "llama tied prompt": (
        partial(tiny_llama, tied=True),
        PromptTuning(tokens=5, initialise="vocabulary"),
        "start",
        "merge",
    ),
    "gpt2 prompt": (tiny_gpt2, PromptTuning(tokens=5, seed=3), "start", "merge"),
    "bert classifier prompt": (
        partial(tiny_bert, labels=3),
        PromptTuning(tokens=5, train_modules=["classifier"]),
        "start",
        "merge",
    ),
    "t5 prompt": (tiny_t5, PromptTuning(tokens=5), "start", "merge"),
    "llama p-tuning": (tiny_llama, PTuning(tokens=5), "start", "merge"),
    "gpt2 p-tuning lstm": (tiny_gpt2, PTuning(tokens=5, encoder="lstm", hidden=7, layers=1), "start", "merge"),
    "bert p-tuning": (tiny_bert, PTuning(tokens=5, hidden=13), "start", "merge"),
    "t5 p-tuning": (tiny_t5, PTuning(tokens=5, encoder="lstm", dropout=0.2), "start", "merge"),
    "llama prefix": (tiny_llama, PrefixTuning(tokens=5), "start", "merge"),
    "gpt2 prefix projection": (tiny_gpt2, PrefixTuning(tokens=5, projection=True, hidden=7), "start", "merge"),
    "bert classifier prefix": (
        partial(tiny_bert, labels=3),
        PrefixTuning(tokens=5, train_modules=["classifier"]),
        "start",
        "merge",
    ),
    "t5 prefix": (tiny_t5, PrefixTuning(tokens=5), "start", "merge"),
    "t5 prefix projection": (tiny_t5, PrefixTuning(tokens=5, projection=True), "start", "merge"),
    "llama houlsby": (tiny_llama, bottleneck(dropout=0.2), "merge"),
    "llama parallel": (tiny_llama, bottleneck(kind="parallel", scaling=4.0), "merge"),
    "gpt2 houlsby": (tiny_gpt2, bottleneck(activation="silu"), "merge"),
    "bert houlsby": (tiny_bert, bottleneck(), "merge"),
    "bert parallel": (tiny_bert, bottleneck(kind="parallel"), "merge"),
    "bert pfeiffer": (
        partial(tiny_bert, labels=3),
        bottleneck(size=None, reduction=4, kind="pfeiffer", train_modules=["classifier"]),
        "merge",
    ),
    "t5 houlsby": (tiny_t5, bottleneck(), "merge"),
    "t5 parallel": (tiny_t5, bottleneck(kind="parallel"), "merge"),
    "llama loreft": (tiny_llama, LoReFT(rank=3, positions=(3, 2)), "merge"),
    "gpt2 loreft": (tiny_gpt2, LoReFT(rank=3, layers=[1], positions="all"), "merge"),
    "bert loreft": (tiny_bert, LoReFT(rank=3, positions=(1, 0), dropout=0.2), "merge"),
    "t5 loreft": (tiny_t5, LoReFT(rank=3, positions=(2, 2)), "merge"),
    "llama adalora": (tiny_llama, adalora(dropout=0.2)),
    "gpt2 adalora": (tiny_gpt2, adalora(targets=["c_attn", "c_proj"])),
    "bert adalora": (tiny_bert, adalora(targets=["query", "value"], train_modules=["decoder"])),
    "t5 adalora": (tiny_t5, adalora(targets=r".*\.(q|v|wi|wo)")),
    "gpt2 bitfit": (tiny_gpt2, BitFit()),
    "bert bitfit": (tiny_bert, BitFit(dtype=torch.float32)),
    "bert classifier bitfit": (
        partial(tiny_bert, labels=3),
        BitFit(targets=["query", "LayerNorm"], train_modules=["classifier"]),
    ),
    "llama norms": (tiny_llama, LayerNormTuning()),
    "gpt2 norms": (tiny_gpt2, LayerNormTuning(targets=["ln_1", "ln_f"], exclude=["0.ln_1"])),
    "bert norms": (tiny_bert, LayerNormTuning(train_modules=["transform"])),
    "t5 norms": (tiny_t5, LayerNormTuning(dtype=torch.float32)),
    "llama tokens": (tiny_llama, NewTokens(tokens=TOKENS)),
    "llama tokens, head too": (tiny_llama, NewTokens(tokens=TOKENS, targets=["embed_tokens", "lm_head"])),
    "llama tied tokens": (partial(tiny_llama, tied=True), NewTokens(tokens=TOKENS)),
    "gpt2 tokens": (tiny_gpt2, NewTokens(tokens=TOKENS, train_modules=["ln_f"])),
    "gpt2 positions": (tiny_gpt2, NewTokens(tokens=[0, 7], targets=["wpe"])),
    "bert tokens": (tiny_bert, NewTokens(tokens=TOKENS)),
    "t5 tokens": (tiny_t5, NewTokens(tokens=TOKENS)),
    "llama lora tokens": (tiny_llama, lora(train_tokens=TOKENS)),
    "llama lora tokens by name": (tiny_llama, lora(train_tokens={"embed_tokens": TOKENS, "lm_head": [2, 96]})),
    "llama tied dora tokens": (partial(tiny_llama, tied=True), dora(train_tokens=TOKENS)),
    "bert lora tokens": (tiny_bert, lora(targets=["query"], train_tokens=TOKENS, train_bias="all")),
    "t5 lora tokens": (tiny_t5, lora(targets=["q", "v"], train_tokens=TOKENS)),
}
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def train(model, name="default"):
    """Three steps of AdamW, from a start that has been moved so that every parameter learns."""
    generator = torch.Generator().manual_seed(1)
    parameters = adapter_parameters(model, name)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
        model(input_ids=IDS, **inputs).logits.square().mean().backward()
        optimizer.step()
    missing = [name for name, p in parameters.items() if p.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    optimizer.zero_grad()


def snapshot(model):
    return {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}


@pytest.fixture(params=MODELS)
def case(request):
    make, config, *free = MODELS[request.param]
    for law in free:
        print(f"not checked: {law}: {REASONS[law]}")
    return make, config, free


def starts_as(model, start, free):
    if "start to the digit" in free:
        torch.testing.assert_close(output(model), start, rtol=1e-5, atol=1e-5)
    elif "start" not in free:
        assert torch.equal(output(model), start), "the start is invisible"


def test_a_model_with_an_adapter_keeps_the_laws(case, tmp_path):
    make, config, free = case
    model = make()
    modules = {name: type(module) for name, module in model.named_modules()}
    before, start = snapshot(model), output(model)

    attach(model, config)
    starts_as(model, start, free)
    train(model)
    tuned = output(model)
    assert not torch.equal(tuned, start)
    with disabled(model):
        assert torch.equal(output(model), start), "disabled is the base"
    assert torch.equal(output(model), tuned)

    save(model, tmp_path)
    again = make()
    load(again, tmp_path)
    assert torch.equal(output(again), tuned), "saved and loaded is the same to the bit"

    copied = copy.deepcopy(model)
    if "merge" in free:
        with pytest.raises(ValueError, match="is no change of weights, so it cannot be merged"):
            merge(model)
    else:
        merged_and_unmerged(model, copied, tuned, config)

    detach(model)
    assert torch.equal(output(model), start)
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (tensor, flag) in before.items():
        assert torch.equal(after[name][0], tensor), f"{name} has changed"
        assert after[name][1] == flag
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert not [name for name in vars(model) if "llmtune" in name]
    assert adapter_parameters(copied), "the copy keeps its own adapter"
    assert torch.equal(output(copied), tuned)


def merged_and_unmerged(model, copied, tuned, config):
    if "embed_tokens" in (getattr(config, "targets", None) or ()) and model.config.model_type == "t5":
        with pytest.raises(ValueError, match="tied weights"):
            merge(model)
        assert torch.equal(output(model), tuned), "a refusal changes nothing"
    for merged in (copied, model):
        report = merge(merged, untie=True)
        assert report.kept_bytes > 0
        torch.testing.assert_close(output(merged), tuned, rtol=2e-5, atol=2e-5)
        with pytest.raises(ValueError, match="is merged into the weights and cannot be switched off"), disabled(merged):
            pass
    for merged in (copy.deepcopy(copied), model, copied):
        unmerge(merged)
        assert torch.equal(output(merged), tuned), "unmerged is the same to the bit"


def test_merging_for_good_gives_a_plain_model(case):
    make, config, free = case
    model = make()
    names = list(model.state_dict())
    attach(model, config)
    train(model)
    tuned = output(model)
    if "merge" in free:
        with pytest.raises(ValueError, match="is no change of weights, so it cannot be merged"):
            merge(model, keep_base=False)
        return
    merge(model, keep_base=False, untie=True)
    torch.testing.assert_close(output(model), tuned, rtol=2e-5, atol=2e-5)
    assert list(model.state_dict()) == names
    assert not [name for name in vars(model) if "llmtune" in name]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_bf16_base_rounds_once_and_keeps_float32_adapters():
    model = tiny_llama().to(torch.bfloat16)
    attach(model, LoRA(rank=3, alpha=5))
    train(model)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert output(model).dtype == torch.bfloat16
    layer = model.model.layers[0].self_attn.q_proj
    exact = layer.weight.float() + layer.deltas()["weight"]
    kept = layer.weight.detach().clone()
    report = merge(model)
    assert torch.equal(layer.weight, exact.to(torch.bfloat16)), "float32 sum, one rounding"
    assert 0 < report.largest_rounding < 0.01
    unmerge(model)
    assert torch.equal(layer.weight, kept)


def test_two_adapters_at_once_and_taken_off_in_any_order():
    for first_off in ("one", "two"):
        model = tiny_llama()
        start = output(model)
        attach(model, LoRA(rank=2, alpha=3, targets=["q_proj", "v_proj"]), "one")
        train(model, "one")
        only_one = output(model)
        attach(model, LoRA(rank=3, alpha=5, targets=["q_proj", "up_proj"]), "two")
        assert torch.equal(output(model), only_one), "the second starts invisible on top of the first"
        train(model, "two")
        both = output(model)
        torch.testing.assert_close(merge_both(model), both, rtol=2e-5, atol=2e-5)
        assert torch.equal(output(model), both)
        detach(model, first_off)
        if first_off == "two":
            assert torch.equal(output(model), only_one)
        detach(model, "two" if first_off == "one" else "one")
        assert torch.equal(output(model), start)


def merge_both(model):
    merge(model, "one")
    merge(model, "two")
    merged = output(model)
    with pytest.raises(ValueError, match='adapter "two" was merged after "one": unmerge that one first'):
        unmerge(model, "one")
    unmerge(model, "two")
    unmerge(model, "one")
    return merged
