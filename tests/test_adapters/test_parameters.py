"""LoRA on parameters: the formula, the laws that stacks of experts add, PEFT both ways, and every refusal."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmtune.adapters import (
    DoRA,
    DoRALinear,
    LoRA,
    LoRALinear,
    LoRAParameter,
    adapter_names,
    adapter_parameters,
    attach,
    changed_experts,
    detach,
    load,
    merge,
    save,
    set_active,
    unmerge,
)
from llmtune.forgetting import diagonal_fisher
from llmtune.gradients import per_example_gradients
from llmtune.losses import causal_lm_loss
from llmtune.testing.models import _build, tiny_llama, tiny_qwen3_moe

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
GATE_UP, DOWN, Q = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "q_proj"


def tiny_gpt_oss(experts="eager", width=13):
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=28, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=14, num_local_experts=5, num_experts_per_tok=2, sliding_window=7,
        max_position_embeddings=131072, pad_token_id=2,
    )  # fmt: skip
    config._experts_implementation = experts
    return _build(transformers.GptOssForCausalLM, config, 0, "eager")


def tiny_mixtral():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=97, hidden_size=28, intermediate_size=13, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return _build(transformers.MixtralForCausalLM, config, 0, "sdpa")


class Mixing(nn.Module):
    """A module with a matrix [7, 11] of its own, which it uses in two ways, and a stack [3, 7, 11]."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(7, 11))
        self.stack = nn.Parameter(torch.randn(3, 7, 11))
        self.scale, self.inner = 2.0, nn.Linear(7, 7)

    def forward(self, x, *, back=False):
        y = torch.einsum("...i,eoi->...o", x, self.stack) + x @ self.matrix.T
        return self.inner(y) @ self.matrix if back else self.inner(y)

    def project(self, x):
        return x @ self.matrix.T


def mixing(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Mixing())


def output(model):
    with torch.no_grad():
        if hasattr(model, "get_input_embeddings"):
            return model.eval()(input_ids=IDS).logits
        return model(torch.linspace(-1, 1, 33).view(3, 11))


def move(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def trained(theirs):
    return {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}


def close(one, other, tolerance=1e-6):
    scale = float(other.abs().max())
    assert float((one - other).abs().max()) <= tolerance * scale


# --- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert_has_a_change_of_its_own(transposed):
    E, out, size, r, scaling = 3, 7, 11, 2, 1.7
    shape = (E, size, out) if transposed else (E, out, size)
    weight, a, b = (torch.randn(s, dtype=torch.float64) for s in (shape, (E, r, size), (out, r, E)))
    found = changed_experts(weight, a, b, scaling, transposed=transposed)
    for e in range(E):
        change = scaling * b[:, :, e] @ a[e]
        torch.testing.assert_close(found[e], weight[e] + (change.T if transposed else change), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *x: changed_experts(*x, scaling, transposed=transposed),
        [x.requires_grad_(True) for x in (weight, a, b)],
    )


def test_the_sum_is_made_in_float32_and_rounded_once_under_autocast_too():
    weight, a, b = torch.randn(3, 7, 11).to(torch.bfloat16), torch.randn(3, 2, 11), torch.randn(7, 2, 3)
    exact = (weight.float() + 0.5 * torch.einsum("ore,eri->eoi", b, a)).to(torch.bfloat16)
    assert torch.equal(changed_experts(weight, a, b, 0.5), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(changed_experts(weight, a, b, 0.5), exact)
        full = changed_experts(weight.float(), a, b, 0.5)
    assert torch.equal(full, changed_experts(weight.float(), a, b, 0.5))
    assert full.dtype == torch.float32


def test_a_layer_computes_with_the_changed_parameter_and_hands_back_the_base():
    base = Mixing()
    x, weight, matrix = torch.randn(5, 11), base.stack, base.matrix
    layer = LoRAParameter(base, parameter="stack", rank=2, alpha=3)
    assert torch.equal(layer(x, back=True), base(x, back=True))
    move({"b": layer.lora_b})
    plain = copy.deepcopy(base)
    plain.stack.data += layer.deltas()["stack"]
    torch.testing.assert_close(layer(x, back=True), plain(x, back=True))
    assert base.stack is weight
    assert base.matrix is matrix
    assert layer.matrix is matrix
    layer.active = False
    assert torch.equal(layer(x), base(x))
    assert layer.stack is weight


def test_methods_and_the_parameter_read_from_outside_see_the_change():
    base = Mixing()
    inner = LoRAParameter(base, parameter="matrix", rank=2, alpha=3)
    outer = LoRAParameter(inner, parameter="stack", rank=3, alpha=1)
    other = LoRAParameter(outer, parameter="matrix", rank=1, alpha=2, adapter_name="other")
    move({name: parameter for name, parameter in other.named_parameters() if "lora_b" in name})
    x = torch.randn(5, 11)
    changed = base.matrix + inner.deltas()["matrix"] + other.deltas()["matrix"]
    torch.testing.assert_close(other.project(x), x @ changed.T)
    torch.testing.assert_close(other.matrix, changed)
    torch.testing.assert_close(outer.matrix, base.matrix + inner.deltas()["matrix"])
    assert other.scale == 2.0
    assert other.inner is base.inner
    with pytest.raises(AttributeError, match="nothing"):
        _ = other.nothing
    replaced = nn.Parameter(torch.zeros(7, 11))
    other.matrix = replaced
    assert base.matrix is replaced
    assert "matrix" not in dict(other.named_parameters(recurse=False))


def test_an_exception_in_the_module_leaves_its_parameters_as_they_were():
    base = Mixing()
    weights = dict(base.named_parameters())
    layer = LoRAParameter(LoRAParameter(base, parameter="stack", rank=2, alpha=3), parameter="matrix", rank=2, alpha=3)
    with pytest.raises(RuntimeError, match=r"shapes|size|subscript"):
        layer(torch.randn(5, 12))
    assert all(parameter is weights[name] for name, parameter in base.named_parameters())
    assert all(type(parameter) is nn.Parameter for parameter in base._parameters.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_two_layers_train_alike_plain_checkpointed_and_compiled(compiled):
    base = Mixing().requires_grad_(False)
    layer = LoRAParameter(LoRAParameter(base, parameter="stack", rank=2, alpha=3), parameter="matrix", rank=2, alpha=3)
    own = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    move(own)
    x = torch.randn(5, 11, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [*own.values(), x])
    if compiled:
        run = torch.compile(layer, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(run(x).square().sum(), [*own.values(), x])
        torch.compiler.reset()
    else:
        found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [*own.values(), x])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in base.parameters())
    assert all(type(parameter) is nn.Parameter for parameter in base._parameters.values())


def test_layers_of_other_kinds_stand_under_and_over_it():
    base = nn.Linear(11, 7).requires_grad_(False)
    x = torch.randn(5, 11)
    for order in (0, 1):
        layer = base
        for kind in (0, 1)[:: 1 - 2 * order]:
            if kind:
                layer = LoRAParameter(layer, parameter="weight", rank=2, alpha=3, adapter_name="p")
            else:
                layer = LoRALinear(layer, rank=2, alpha=3, adapter_name="l")
        chain = [layer, layer.base]
        for one in chain:
            move({"b": one.lora_b, "a": one.lora_a})
        weight = base.weight + sum(one.deltas()["weight"] for one in chain)
        torch.testing.assert_close(layer(x), x @ weight.T + base.bias)


# --- a whole model --------------------------------------------------------------------------------------------------


def attached(make=tiny_qwen3_moe, targets=("q_proj",), names=(GATE_UP, DOWN), **options):
    model = make()
    attach(model, LoRA(**{"rank": 3, "alpha": 5, "targets": targets, "target_parameters": names} | options))
    return model


def test_the_report_names_parameters_and_what_stays_frozen():
    model = tiny_qwen3_moe()
    report = attach(model, LoRA(rank=2, alpha=4))
    assert report.experts == tuple(f"model.layers.{i}.{name}" for i in (0, 1) for name in (GATE_UP, DOWN))
    assert (
        "frozen: 4 parameters of experts (mlp.experts.gate_up_proj 2, mlp.experts.down_proj 2); "
        "LoRA changes those that target_parameters names"
    ) in str(report)
    detach(model)
    report = attach(model, LoRA(rank=2, alpha=4, target_parameters=[DOWN, "layers.1.mlp.experts.gate_up_proj"]))
    assert report.parameters == (
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    )
    assert report.experts == ("model.layers.0.mlp.experts.gate_up_proj",)
    assert str(report).startswith(
        'adapter "default": 8 modules (all-linear 8), 3 parameters (mlp.experts.down_proj 2, '
        "mlp.experts.gate_up_proj 1)\n"
    )
    detach(model)
    assert attach(model, LoRA(rank=2, alpha=4, targets=["q_proj"])).experts == ()


def test_what_is_no_stack_of_experts_is_not_reported_as_one():
    model = nn.Sequential(nn.Conv1d(3, 5, 2), nn.Linear(5, 7), nn.Bilinear(3, 5, 7))
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 7)))
    nn.utils.parametrizations.weight_norm(model[0])
    assert attach(model, LoRA(rank=1, alpha=1)).experts == ()


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_gpt_oss, partial(tiny_qwen3_moe, experts="batched_mm")])
def test_experts_that_no_token_reached_get_zero_and_the_base_gets_nothing(make):
    model = attached(make)
    move(adapter_parameters(model))
    seen: list[torch.Tensor] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].unique()))
    model(input_ids=IDS[:1, :1]).logits.sum().backward()
    reached = set(seen[0].tolist())
    assert 0 < len(reached) < 5
    for layer in (experts, experts.base):
        assert layer.lora_a.grad is not None
        for e in range(5):
            for gradient in (layer.lora_a.grad[e], layer.lora_b.grad[:, :, e]):
                assert bool(gradient.any()) == (e in reached)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
def test_other_ways_of_running_experts_give_the_same(how):
    one = attached(partial(tiny_gpt_oss, width=12))
    move(adapter_parameters(one))
    other = attached(partial(tiny_gpt_oss, experts=how, width=12))
    other.load_state_dict(one.state_dict())
    close(output(other), output(one), 3e-6)


def test_gradient_checkpointing_needs_nothing_more():
    model = attached()
    move(adapter_parameters(model))
    model.train()
    own = list(adapter_parameters(model).values())
    wanted = torch.autograd.grad(model(input_ids=IDS).logits.square().mean(), own)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = torch.autograd.grad(model(input_ids=IDS).logits.square().mean(), own)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    experts = model.model.layers[0].mlp.experts.base.base
    assert all(type(parameter) is nn.Parameter for parameter in experts._parameters.values())


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_gpt_oss])
def test_a_bf16_base_rounds_once_merged_or_not(make):
    model = attached(lambda: make().to(torch.bfloat16), targets=())
    move(adapter_parameters(model))
    experts = model.model.layers[0].mlp.experts
    kept = {name: p.detach().clone() for name, p in experts.base.base.named_parameters()}
    exact = {}
    for layer in (experts, experts.base):
        exact |= {name: kept[name].float() + delta for name, delta in layer.deltas().items()}
    tuned = output(model)
    assert tuned.dtype == torch.bfloat16
    merge(model)
    for name, value in exact.items():
        assert torch.equal(experts.base.base.get_parameter(name), value.to(torch.bfloat16))
    assert torch.equal(output(model), tuned)
    unmerge(model)
    assert all(torch.equal(p, kept[name]) for name, p in experts.base.base.named_parameters())


def test_a_model_on_meta_takes_parameters():
    with torch.device("meta"):
        model = nn.Sequential(Mixing())
    attach(model, LoRA(rank=2, alpha=3, targets=(), target_parameters=["stack", "matrix"]))
    assert {p.device.type for p in adapter_parameters(model).values()} == {"meta"}


def test_two_adapters_on_one_parameter_switch_and_come_off_in_any_order():
    for first_off in ("one", "two"):
        model = tiny_qwen3_moe()
        start = output(model)
        attach(model, LoRA(rank=2, alpha=3, targets=(), target_parameters=[GATE_UP]), "one")
        move(adapter_parameters(model, "one"))
        only_one = output(model)
        attach(model, LoRA(rank=3, alpha=5, targets=["q_proj"], target_parameters=[DOWN, GATE_UP]), "two")
        assert torch.equal(output(model), only_one)
        move(adapter_parameters(model, "two"))
        both = output(model)
        set_active(model, "one")
        assert torch.equal(output(model), only_one)
        set_active(model, ["one", "two"])
        merge(model, "one")
        merge(model, "two")
        close(output(model), both, 2e-5)
        unmerge(model, "two")
        unmerge(model, "one")
        assert torch.equal(output(model), both)
        detach(model, first_off)
        if first_off == "two":
            assert torch.equal(output(model), only_one)
        detach(model, "two" if first_off == "one" else "one")
        assert torch.equal(output(model), start)
        assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"


def test_an_encoder_layer_of_torchs_takes_the_changed_projection():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(10, 2, 14, batch_first=True)).eval()
    x = torch.randn(3, 7, 10)
    with torch.no_grad():
        start = model(x)
        attach(model, LoRA(rank=2, alpha=3, targets=(), target_parameters=["self_attn.in_proj_weight"]))
        assert torch.equal(model(x), start)
        move(adapter_parameters(model))
        tuned = model(x)
        merge(model)
        torch.testing.assert_close(model(x), tuned)
    assert not torch.allclose(tuned, start)


# --- PEFT -----------------------------------------------------------------------------------------------------------

both = {"target_parameters": [GATE_UP, DOWN]}
CASES = {
    "one": (tiny_qwen3_moe, {"target_parameters": [GATE_UP]}),
    "the other": (tiny_qwen3_moe, {"target_parameters": [DOWN]}),
    "two": (tiny_qwen3_moe, both),
    "two, the other order": (tiny_qwen3_moe, {"target_parameters": [DOWN, GATE_UP]}),
    "short names": (tiny_qwen3_moe, {"target_parameters": ["down_proj", "gate_up_proj"]}),
    "one layer's": (tiny_qwen3_moe, {"target_parameters": ["model.layers.1.mlp.experts.down_proj"]}),
    "beside linear layers": (tiny_qwen3_moe, both | {"targets": ["q_proj", "v_proj"]}),
    "beside a head trained whole": (tiny_qwen3_moe, both | {"train_modules": ["lm_head"]}),
    "rank pattern": (tiny_qwen3_moe, both | {"rank_pattern": {"down_proj": 2, r"layers\.1\..*gate_up_proj": 5}}),
    "alpha pattern": (tiny_qwen3_moe, both | {"alpha_pattern": {"gate_up_proj": 11, "q_proj": 3}, "targets": [Q]}),
    "rslora": (tiny_qwen3_moe, both | {"rslora": True}),
    "gaussian": (tiny_qwen3_moe, both | {"initialise": "gaussian"}),
    "the router": (tiny_qwen3_moe, {"target_parameters": ["mlp.gate.weight"]}),
    "experts and router": (tiny_qwen3_moe, {"target_parameters": [DOWN, "gate.weight", GATE_UP], "rslora": True}),
    "a linear layer's weight": (tiny_qwen3_moe, {"target_parameters": ["q_proj.weight"], "targets": ["v_proj"]}),
    "transposed": (tiny_gpt_oss, {"target_parameters": [DOWN, GATE_UP]}),
    "transposed, patterns": (tiny_gpt_oss, both | {"rank_pattern": {"gate_up_proj": 2}, "targets": ["o_proj"]}),
    "biases, as matrices": (tiny_gpt_oss, {"target_parameters": ["experts.gate_up_proj_bias", GATE_UP]}),
    "mixtral": (tiny_mixtral, both | {"targets": ["q_proj"]}),
    "matrix": (mixing, {"target_parameters": ["0.matrix"]}),
    "matrix and stack": (mixing, {"target_parameters": ["stack", "matrix"]}),
    "around a linear layer": (mixing, {"target_parameters": ["stack", "matrix"], "targets": ["inner"]}),
}  # fmt: skip
FROM_PEFT = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "rslora": "use_rslora",
             "train_modules": "modules_to_save", "initialise": "init_lora_weights"}  # fmt: skip


def written(folder):
    return {key: (tuple(t.shape), t.dtype) for key, t in load_file(folder / "adapter_model.safetensors").items()}


@pytest.fixture(params=CASES)
def case(request):
    pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
    make, options = CASES[request.param]
    return make, {"rank": 4, "alpha": 6, "targets": []} | options


def test_what_we_write_peft_reads(case, tmp_path):
    import peft

    make, options = case
    model = make()
    attach(model, LoRA(**options))
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", autocast_adapter_dtype=False)
    close(output(model), output(theirs))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    ours, back = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    assert ours["target_parameters"] == options["target_parameters"]
    assert set(back["target_parameters"]) == set(options["target_parameters"])
    assert ours.keys() | {"peft_version"} == back.keys() | {"peft_version"}
    again = make()
    load(again, tmp_path / "ours")
    assert torch.equal(output(again), output(model))


def test_what_peft_writes_we_read(case, tmp_path):
    import peft

    make, options = case
    config = {FROM_PEFT.get(name, name): value for name, value in options.items()}
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**config))
    move(trained(theirs))
    theirs.save_pretrained(tmp_path)
    model = make()
    report = load(model, tmp_path)
    assert (report.missing, report.unexpected, report.unmatched) == ((), (), ())
    close(output(model), output(theirs))
    save(model, tmp_path / "again")
    assert written(tmp_path / "again") == written(tmp_path)


def test_the_names_in_a_file_are_those_of_the_order_of_definition(tmp_path):
    for order in ([GATE_UP, DOWN], [DOWN, GATE_UP]):
        model = attached(targets=(), names=order)
        shapes = {key.removeprefix("base_model.model.model.layers."): shape for key, (shape, _) in written(
            save(model, tmp_path)
        ).items()}  # fmt: skip
        assert shapes["0.mlp.experts.base_layer.lora_A.weight"] == (5 * 3, 28)  # gate_up_proj [5, 26, 28]
        assert shapes["0.mlp.experts.base_layer.lora_B.weight"] == (26, 3 * 5)
        assert shapes["0.mlp.experts.lora_A.weight"] == (5 * 3, 13)  # down_proj [5, 28, 13]
        assert shapes["0.mlp.experts.lora_B.weight"] == (28, 3 * 5)


def test_patterns_of_a_file_that_mean_nothing_here_are_reported(tmp_path):
    model = attached(names=(DOWN,))
    save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    entries = json.loads(path.read_text())
    entries |= {"target_parameters": [DOWN, "mlp.experts.w13"], "rank_pattern": {"w13": 2}}
    path.write_text(json.dumps(entries))
    assert load(tiny_qwen3_moe(), tmp_path).unmatched == ("target_parameters mlp.experts.w13", "rank_pattern w13")


def test_an_attached_adapter_must_scale_its_parameters_as_the_file_says(tmp_path):
    save(attached(alpha_pattern={"down_proj": 7}), tmp_path)
    with pytest.raises(ValueError, match=r'scales model.layers.0.mlp.experts.down_proj by 2.33333, the attached "def'):
        load(attached(), tmp_path)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LoRA(rank=2, alpha=3, target_parameters="down_proj"), TypeError,
         "target_parameters must be a list of suffixes; got the string 'down_proj'"),
        (lambda: LoRA(rank=2, alpha=3, targets=(), target_parameters=()), ValueError, "targets names no module"),
        (lambda: LoRA(rank=2, alpha=3, target_parameters=[DOWN], dropout=0.1), ValueError,
         "dropout has no place with target_parameters"),
        (lambda: LoRA(rank=2, alpha=3, target_parameters=[DOWN], lora_bias=True), ValueError,
         "lora_bias has no place with target_parameters"),
        (lambda: DoRA(rank=2, alpha=3, target_parameters=[DOWN]), ValueError,
         "DoRA has no place with target_parameters"),
    ],
)  # fmt: skip
def test_a_record_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (tiny_qwen3_moe, {"target_parameters": ["mlp.experts.gate_up"]}, ValueError,
         "gate_up\" matches no parameter's name or its end. Did you mean \"mlp.experts.gate_up_proj\", \"mlp.exp"),
        (tiny_qwen3_moe, {"target_parameters": ["perts.down_proj"]}, ValueError, "matches no parameter's name"),
        (tiny_qwen3_moe, {"target_parameters": [DOWN], "rank": 14}, ValueError,
         "the rank 14 is larger than model.layers.0.mlp.experts.down_proj allows: the smaller of its two sizes is 13"),
        (tiny_qwen3_moe, {"target_parameters": [DOWN], "rank_pattern": {"down": 2}}, ValueError,
         'rank_pattern: "down" fits none'),
        (tiny_qwen3_moe, {"target_parameters": ["input_layernorm.weight"]}, TypeError,
         r"model.layers.0.input_layernorm.weight has the shape \(28,\): target_parameters takes matrices"),
        (tiny_qwen3_moe, {"target_parameters": ["q_proj.weight"], "targets": ["q_proj"]}, ValueError,
         "q_proj.weight is named in target_parameters and its module in targets: leave one out"),
        (tiny_qwen3_moe, {"target_parameters": [DOWN], "train_modules": ["mlp"]}, ValueError,
         "down_proj is named in target_parameters and its module in train_modules: leave one out"),
        (Mixing, {"target_parameters": ["matrix"]}, ValueError,
         "the model itself, a Mixing, owns matrix: put it into a module"),
        (lambda: nn.Sequential(nn.MultiheadAttention(6, 2)), {"target_parameters": ["out_proj.weight"]}, TypeError,
         "0.out_proj.weight belongs to nn.MultiheadAttention"),
    ],
)  # fmt: skip
def test_a_model_refuses_and_is_as_it_was(model, options, error, message):
    model = model()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=message):
        attach(model, LoRA(**{"rank": 2, "alpha": 3, "targets": ()} | options))
    assert adapter_names(model) == []
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_layer_refuses_what_it_cannot_change():
    base = Mixing()
    for options, error, message in [
        ({"parameter": "matrx"}, TypeError, "Mixing.matrx is no parameter: the Mixing has matrix, stack of its own"),
        ({"rank": 0}, ValueError, "the rank must be a whole number of at least 1; got 0"),
        ({"initialise": "zeros"}, ValueError, 'initialise must be "kaiming" or "gaussian"; got \'zeros\''),
    ]:
        with pytest.raises(error, match=message):
            LoRAParameter(base, **{"parameter": "matrix", "rank": 2, "alpha": 3} | options)
    base.matrix = nn.Parameter(torch.zeros(7, 11, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"Mixing.matrix is a Parameter of torch.int8: .*Name its module in targets"):
        LoRAParameter(base, parameter="matrix", rank=2, alpha=3)
    with pytest.raises(TypeError, match='cannot be changed under adapter "default", which is made for the weights'):
        LoRAParameter(DoRALinear(nn.Linear(5, 3), rank=2, alpha=3), parameter="weight", rank=2, alpha=3)
    with pytest.raises(TypeError, match='DoRA is made for the bare weight, but adapter "default" stands before it'):
        DoRALinear(LoRAParameter(nn.Linear(5, 3), parameter="weight", rank=2, alpha=3), rank=2, alpha=3)


def test_a_module_that_another_adapter_trains_whole_is_taken():
    model = tiny_qwen3_moe()
    attach(model, LoRA(rank=2, alpha=3, targets=(), train_modules=["mlp"]), "whole")
    with pytest.raises(ValueError, match=r'mlp.experts already belongs to adapter "whole" \(model.layers.0.mlp\)'):
        attach(model, LoRA(rank=2, alpha=3, targets=(), target_parameters=[DOWN]))


def test_a_tied_matrix_is_not_merged_by_half():
    model = tiny_llama(tied=True)
    attach(model, LoRA(rank=2, alpha=3, targets=(), target_parameters=["embed_tokens.weight"]))
    move(adapter_parameters(model))
    tuned = output(model)
    with pytest.raises(ValueError, match="tied weights"):
        merge(model)
    merge(model, untie=True)
    close(output(model), tuned, 2e-5)
    unmerge(model)
    assert torch.equal(output(model), tuned)


def test_gradients_of_examples_and_fisher_see_the_changed_parameter():
    model = attached(targets=(), names=(DOWN,))
    move(adapter_parameters(model))
    batch = {"input_ids": IDS, "labels": IDS}
    with pytest.raises(ValueError, match="lora_a is in no module of a known kind"):
        per_example_gradients(model, batch, loss=causal_lm_loss, method="hooks")
    found = per_example_gradients(model, batch, loss=causal_lm_loss)
    causal_lm_loss(model, {"input_ids": IDS[1:], "labels": IDS[1:]}).backward()
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(found[name][1], parameter.grad)
    name = "model.layers.0.mlp.experts.down_proj"
    fisher = diagonal_fisher(model, [batch], kind="empirical", parameters=[name])[name]
    merge(model, keep_base=False)
    close(diagonal_fisher(model, [batch], kind="empirical", parameters=[name])[name], fisher, 1e-4)
