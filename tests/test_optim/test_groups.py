"""Parameter groups: every parameter once, and tables of learning rates and decay for the four shapes of model."""

import re
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import AdaLoRA, DoRA, LoRA, adapter_parameters, attach
from llmtune.optim import parameter_groups
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training import LoopSettings, TrainingLoop

RATE, DECAY = 1e-2, 0.5
groups_of = partial(parameter_groups, learning_rate=RATE)
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "classifier": partial(tiny_bert, labels=3),
          "t5": tiny_t5}  # fmt: skip
ADAPTERS = {
    "plain": None,
    "lora": LoRA(rank=2, alpha=3),
    "lora and biases": LoRA(rank=2, alpha=3, train_bias="lora_only"),
    "dora": DoRA(rank=2, alpha=3),
}


def named(model, groups):
    """Return {name: (rate, decay)}, having checked that each trained parameter is in one group and nothing else is."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert sorted(name for name, _ in found) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    labels = [group["name"] for group in groups]
    assert len(set(labels)) == len(labels)
    assert all(group["params"] for group in groups)
    return dict(found)


def built(model, adapter):
    model = MODELS[model]()
    if ADAPTERS[adapter] is not None:
        attach(model, ADAPTERS[adapter])
    return model


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer_decay", [None, DECAY])
@pytest.mark.parametrize(
    ("adapter", "ratio"),
    [(adapter, ratio) for adapter in ADAPTERS for ratio in (None, 16) if ratio is None or ADAPTERS[adapter]],
)
def test_every_parameter_is_in_one_group_that_an_optimizer_takes(model, adapter, layer_decay, ratio):
    model = built(model, adapter)
    groups = groups_of(model, weight_decay=0.1, layer_decay=layer_decay, lora_plus_ratio=ratio)
    named(model, groups)
    optimizer = torch.optim.AdamW(groups)
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in groups]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, (rate, decay) in named(model, groups).items():
        moved = dict(model.named_parameters())[name] - before[name] * (1 - rate * decay)
        torch.testing.assert_close(moved, torch.full_like(moved, -rate), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_matrices_decay_and_vectors_and_biases_do_not(model):
    model = built(model, "plain")
    found = named(model, groups_of(model, weight_decay=0.1))
    for name, parameter in model.named_parameters():
        decays = parameter.ndim == 2 and "relative_attention_bias" not in name
        assert found[name] == (RATE, 0.1 if decays else 0.0), name
    assert [group["name"] for group in groups_of(model)] == sorted({"decay", "no_decay"})
    dora = built("llama", "dora")
    for name, (_, decay) in named(dora, groups_of(dora, weight_decay=0.1)).items():
        assert decay == (0.0 if name.endswith("magnitude") else 0.1)


def test_a_bias_of_two_dimensions_is_a_bias():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(3, 5, 7)), nn.Parameter(torch.zeros(3, 5))
            self.unbiased = nn.Linear(3, 2, bias=False)

    model = Experts()
    found = named(model, groups_of(model, weight_decay=0.1))
    assert {name: decay for name, (_, decay) in found.items()} == {"weight": 0.1, "bias": 0.0, "unbiased.weight": 0.1}


RATES = {  # steps below the top, by expressions for whole names; the first that fits
    "llama": {r"model\.embed_tokens\..*": 3, r"model\.layers\.0\..*": 2, r"model\.layers\.1\..*": 1, ".*": 0},
    "gpt2": {
        r"transformer\.(wte|wpe)\..*": 3, r"transformer\.h\.0\..*": 2, r"transformer\.h\.1\..*": 1,
        r"transformer\.ln_f\..*": 0,
    },
    "bert": {
        r"bert\.embeddings\..*": 3, r"bert\.encoder\.layer\.0\..*": 2, r"bert\.encoder\.layer\.1\..*": 1,
        r"cls\..*": 0,
    },
    "classifier": {
        r"bert\.embeddings\..*": 3, r"bert\.encoder\.layer\.0\..*": 2, r"bert\.encoder\.layer\.1\..*": 1,
        r"(bert\.pooler|classifier)\..*": 0,
    },
    "t5": {
        r"shared\..*": 3, r"(encoder|decoder)\.block\.0\..*": 2, r"(encoder|decoder)\.block\.1\..*": 1,
        r"(encoder|decoder)\.final_layer_norm\..*|lm_head.*": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("adapter", ["plain", "lora"])
@pytest.mark.parametrize("model", RATES)
def test_rates_fall_from_the_top_down(model, adapter):
    table = RATES[model]
    model = built(model, adapter)
    if adapter == "lora":
        for parameter in model.parameters():  # so that embeddings and heads are looked at as well
            parameter.requires_grad_(True)
    found = named(model, groups_of(model, layer_decay=DECAY))
    for name, (rate, _) in found.items():
        steps = next(steps for pattern, steps in table.items() if re.fullmatch(pattern, name))
        assert rate == pytest.approx(RATE * DECAY**steps), name
    assert len({rate for rate, _ in found.values()}) == 4


def test_each_stack_is_counted_by_itself():
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=97, d_model=26, d_kv=11, d_ff=31, num_layers=5, num_decoder_layers=2, num_heads=2)
        )
    found = named(model, groups_of(model, layer_decay=DECAY))
    rates = {name: rate / RATE for name, (rate, _) in found.items()}
    assert rates["encoder.block.0.layer.0.SelfAttention.q.weight"] == pytest.approx(DECAY**5)
    assert rates["encoder.block.4.layer.1.DenseReluDense.wi.weight"] == pytest.approx(DECAY)
    assert rates["decoder.block.0.layer.2.DenseReluDense.wi.weight"] == pytest.approx(DECAY**2)
    assert rates["decoder.block.1.layer.1.EncDecAttention.q.weight"] == pytest.approx(DECAY)
    assert rates["shared.weight"] == pytest.approx(DECAY**6), "below the deepest of the two"


def test_embeddings_inside_a_stack_go_with_it():
    stack = partial(nn.ModuleDict, {})
    model = nn.ModuleDict()
    for name, depth in (("encoder", 3), ("decoder", 1)):
        model[name] = stack()
        model[name]["embed_positions"] = nn.Embedding(7, 5)
        model[name]["layers"] = nn.ModuleList(nn.Linear(5, 5) for _ in range(depth))
    model["embed_out"] = nn.Linear(5, 3, bias=False)  # GPT-NeoX's name for its head
    model["unembedding"] = nn.Linear(5, 3, bias=False)
    model["tokens"] = nn.Embedding(7, 5)
    rates = {name: rate / RATE for name, (rate, _) in named(model, groups_of(model, layer_decay=DECAY)).items()}
    assert rates["encoder.embed_positions.weight"] == pytest.approx(DECAY**4)
    assert rates["decoder.embed_positions.weight"] == pytest.approx(DECAY**2)
    assert rates["tokens.weight"] == pytest.approx(DECAY**4)
    assert rates["embed_out.weight"] == rates["unembedding.weight"] == 1


def test_frozen_layers_count_for_the_depth():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=r".*layers\.0\..*q_proj"))
    assert {rate for rate, _ in named(model, groups_of(model, layer_decay=DECAY)).values()} == {RATE * DECAY**2}


def test_layer_decay_of_one_is_one_rate():
    model = tiny_llama()
    assert {rate for rate, _ in named(model, groups_of(model, layer_decay=1.0)).values()} == {RATE}


# --- LoRA+ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_decay", [None, DECAY])
def test_b_gets_the_ratio_and_of_an_embedding_a(layer_decay):
    model = tiny_llama()
    config = LoRA(rank=2, alpha=3, targets=["embed_tokens", "q_proj"], train_bias="none")
    attach(model, config)
    found = named(model, groups_of(model, weight_decay=0.1, layer_decay=layer_decay, lora_plus_ratio=16))
    for name, (rate, decay) in found.items():
        steps = 0 if layer_decay is None else 3 if "embed" in name else 2 if "layers.0." in name else 1
        faster = name.endswith("embed_tokens.lora_a") or (name.endswith("lora_b") and "embed" not in name)
        assert rate == pytest.approx(RATE * DECAY**steps * (16 if faster else 1)), name
        assert decay == 0.1
    started = {name: bool(p.any()) for name, p in model.named_parameters() if "lora" in name}
    assert all(started[name] == (rate <= RATE) for name, (rate, _) in found.items() if layer_decay is None)


def test_vectors_beside_b_keep_the_rate():
    model = tiny_bert()
    attach(model, LoRA(rank=2, alpha=3, lora_bias=True, train_bias="lora_only"))
    found = named(model, groups_of(model, lora_plus_ratio=4))
    assert {name.rpartition(".")[2] for name, (rate, _) in found.items() if rate != RATE} == {"lora_b"}


def test_it_knows_peft_by_its_names():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    model = peft.get_peft_model(tiny_llama(), config)
    found = named(model, groups_of(model, layer_decay=DECAY, lora_plus_ratio=16))
    for name, (rate, _) in found.items():
        steps = 3 if "embed" in name else 2 if "layers.0." in name else 1
        faster = "lora_B" in name or "lora_embedding_A" in name
        assert rate == pytest.approx(RATE * DECAY**steps * (16 if faster else 1)), name


def test_a_loop_trains_with_it():
    class LoRAPlus(TrainingLoop):
        def configure_optimizer(self):
            groups = parameter_groups(self.model, learning_rate=1e-3, lora_plus_ratio=16)
            optimizer = torch.optim.AdamW(groups)
            return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    rows = [{"input_ids": [5, 7, 11, 13], "labels": [5, 7, 11, 13]}] * 4
    model = tiny_llama()
    attach(model, LoRA(rank=4, alpha=8))
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    history = LoRAPlus(model, rows, settings=LoopSettings(max_steps=5, rows_per_step=2, progress=False)).fit()
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(not torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


def test_plain_gradient_descent_moves_b_by_the_ratio():
    steps = {}
    for ratio in (1.0, 16.0):
        model = tiny_llama()
        torch.manual_seed(0)
        attach(model, LoRA(rank=4, alpha=8, targets=["q_proj"]))
        optimizer = torch.optim.SGD(groups_of(model, lora_plus_ratio=ratio))
        model(input_ids=torch.tensor([[5, 7, 11]])).logits.square().mean().backward()
        optimizer.step()
        steps[ratio] = {n: p.detach().clone() for n, p in adapter_parameters(model).items() if n.endswith("lora_b")}
    for name, step in steps[1.0].items():
        assert step.any()
        torch.testing.assert_close(steps[16.0][name], 16 * step, rtol=1e-6, atol=0)


# --- a new head -----------------------------------------------------------------------------------------------------


def classifier(kind):
    """Return a model with a new head, and the name of its module."""
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    make, head = {
        "llama": (AutoModelForSequenceClassification, "score"),
        "gpt2": (AutoModelForSequenceClassification, "score"),
        "bert": (AutoModelForSequenceClassification, "classifier"),
        "t5": (AutoModelForSequenceClassification, "classification_head"),
        "answers": (AutoModelForQuestionAnswering, "qa_outputs"),
    }[kind]
    config = MODELS["bert" if kind == "answers" else kind]().config
    config.num_labels, config.pad_token_id = 3, 0
    return make.from_config(config), head


@pytest.mark.parametrize("adapter", ["plain", "lora"])
@pytest.mark.parametrize("layer_decay", [None, DECAY])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "answers"])
def test_a_new_head_has_a_rate_of_its_own(kind, layer_decay, adapter):
    model, head = classifier(kind)
    if adapter == "lora":
        attach(model, LoRA(rank=2, alpha=3, train_modules=[head]))
    found = named(model, groups_of(model, weight_decay=0.1, layer_decay=layer_decay, head_rate=0.7))
    in_head = {name for name in found if head in name.split(".")}
    assert in_head
    before = named(model, groups_of(model, weight_decay=0.1, layer_decay=layer_decay))
    for name, (rate, decay) in found.items():
        assert rate == (0.7 if name in in_head else before[name][0]), name
        assert decay == before[name][1]


def test_a_head_of_ones_own_is_named():
    layer = nn.ModuleDict({"verdict": nn.Linear(5, 5)})  # of the same name, and no head
    model = nn.ModuleDict({"layers": nn.ModuleList([layer]), "verdict": nn.Linear(5, 3)})
    found = named(model, groups_of(model, head_rate=0.7, heads=["verdict"]))
    assert {name for name, (rate, _) in found.items() if rate == 0.7} == {"verdict.weight", "verdict.bias"}
    with pytest.raises(ValueError, match=r"head_rate is for a new head .* \(the last that is trained: verdict.bias\)"):
        groups_of(model, head_rate=0.7)
    with pytest.raises(ValueError, match="heads has no effect without a head_rate"):
        groups_of(model, heads=["verdict"])


def test_a_language_models_own_head_is_no_new_one():
    for model in (tiny_llama(), tiny_bert(), tiny_t5()):
        with pytest.raises(ValueError, match="head_rate is for a new head"):
            groups_of(model, head_rate=0.7)


def test_b_in_a_new_head_has_the_ratio_on_top():
    model, _ = classifier("bert")
    attach(model, LoRA(rank=2, alpha=3, targets=["query", "classifier"]))
    found = named(model, groups_of(model, head_rate=0.7, lora_plus_ratio=16))
    assert found["classifier.lora_a"][0] == 0.7
    assert found["classifier.lora_b"][0] == pytest.approx(0.7 * 16)


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "inverse_sqrt", "constant_with_warmup"])
def test_schedules_keep_the_ratios_of_the_groups(schedule):
    from transformers import get_scheduler

    model, _ = classifier("bert")
    attach(model, LoRA(rank=2, alpha=3, train_modules=["classifier"]))
    groups = groups_of(model, weight_decay=0.1, layer_decay=DECAY, lora_plus_ratio=16, head_rate=0.7)
    rates = [group["lr"] for group in groups]
    assert len(set(rates)) == 7  # A and B in two layers and above them, the head
    optimizer = torch.optim.AdamW(groups)
    scheduler, seen = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=11), set()
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        factors = [group["lr"] / rate for group, rate in zip(optimizer.param_groups, rates, strict=True)]
        assert factors == pytest.approx([factors[0]] * len(rates), rel=1e-12)
        seen.add(round(factors[0], 6))
    assert len(seen) > 2


# --- what else comes in ---------------------------------------------------------------------------------------------


def test_meta_tied_and_wrapped_models():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5))
    assert [len(group["params"]) for group in groups_of(model)] == [2, 2]
    tied = tiny_llama(tied=True)
    found = named(tied, groups_of(tied, layer_decay=DECAY))
    assert found["model.embed_tokens.weight"] == (RATE * DECAY**3, 0.0)
    wrapped = torch.compile(tiny_llama(), backend="eager")
    rates = {
        name.removeprefix("_orig_mod."): r for name, r in named(wrapped, groups_of(wrapped, layer_decay=DECAY)).items()
    }
    plain = tiny_llama()
    assert rates == named(plain, groups_of(plain, layer_decay=DECAY))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be a number above 0; got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0; got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a number of at least 0; got -0.1"),
        ({"layer_decay": 0.0}, "layer_decay must be a number above 0 and at most 1; got 0.0"),
        ({"layer_decay": 1.5}, "layer_decay must be a number above 0 and at most 1; got 1.5"),
        ({"head_rate": -1}, "head_rate must be a number above 0; got -1"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio must be a number above 0; got 0"),
        (
            {"lora_plus_ratio": 16},
            r"lora_plus_ratio is for LoRA's B \(parameters called lora_b\), and no such parameter",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(tiny_llama(), **{"learning_rate": RATE} | options)


def test_models_without_what_is_asked_for():
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"layers are told by numbers in parameters' names.* this Sequential has none"):
        groups_of(model, layer_decay=0.9)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient: attach an adapter"):
        groups_of(model)
    frozen = tiny_llama()
    attach(frozen, LoRA(rank=2, alpha=3))
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(not name.endswith("lora_b"))
    with pytest.raises(ValueError, match="no such parameter is trained here"):
        groups_of(frozen, lora_plus_ratio=16)


def test_adalora_has_no_b_that_starts_at_zero():
    model = tiny_llama()
    attach(model, AdaLoRA(alpha=4, total_steps=9, initial_rank=3, target_rank=2))
    with pytest.raises(ValueError, match="lora_plus_ratio is for LoRA's B"):
        parameter_groups(model, learning_rate=1e-3, lora_plus_ratio=16)
