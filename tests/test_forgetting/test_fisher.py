import copy
import re

import pytest
import torch
from torch import nn

from llmtune.adapters.attach import attach, set_active
from llmtune.adapters.config import LoRA
from llmtune.adapters.layer import AdapterLayer, named_places
from llmtune.adapters.merge import merge
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import moved

ROWS = uneven_rows(5)
CLASSES = [{**row, "labels": index % 3} for index, row in enumerate(ROWS)]
X = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))


class Logistic(nn.Module):
    """Logits [0, w x]: p(1) is the logistic function of w x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -1.1, 0.7, 0.2, -0.4]))

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), x @ self.w], dim=1)


def softmax_layer(classes=3):
    layer = nn.Linear(5, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, 5, generator=torch.Generator().manual_seed(1)))
        layer.bias.copy_(torch.linspace(-1, 1, classes))
    return layer


def pairs(x=X, *, size=23, classes=3):
    labels = torch.arange(len(x)) % classes
    return list(zip(x.split(size), labels.split(size), strict=True))


def reference(model, rows, *, shift=True, unit="sequence", of=None):
    """Return the empirical Fisher information by the plain formula, in float64, each row run alone."""
    model = copy.deepcopy(model).double().eval()
    named = {n: p for n, p in model.named_parameters() if of is None or n in of}
    for parameter in named.values():
        parameter.requires_grad_(True)
    sums, count = {name: torch.zeros_like(p) for name, p in named.items()}, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        if labels.ndim == 0:
            log_p, targets = model(input_ids=ids).logits.log_softmax(-1), labels[None]
        else:
            inputs = {"input_ids": ids, "use_cache": False}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels[None])
            elif not shift:
                del inputs["use_cache"]
            log_p, targets = model(**inputs).logits[0].log_softmax(-1), labels
            if shift:
                log_p, targets = log_p[:-1], targets[1:]
        scores = [log_p[place, target] for place, target in enumerate(targets.tolist()) if target != -100]
        for score in scores if unit == "token" else [sum(scores)]:
            found = torch.autograd.grad(score, list(named.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                sums[name] += 0 if gradient is None else gradient.square()
            count += 1
    return {name: total / count for name, total in sums.items()}


def agree(found, expected, *, rtol=1e-4, names=None):
    """Compare every name; where the information is 0 but for rounding, against the model's largest."""
    assert set(found) == set(expected if names is None else names)
    largest = max(float(value.max()) for value in expected.values())
    for name, value in found.items():
        off = float((value.double() - expected[name].double()).abs().max())
        assert off <= rtol * float(expected[name].max()) + 1e-12 * largest, f"{name}: off by {off}"


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_logistic_regression():
    """F = E[p (1 - p) x^2]."""
    model = Logistic()
    p = torch.sigmoid(X.double() @ model.w.detach().double())
    expected = ((p * (1 - p))[:, None] * X.double().square()).mean(0)
    assert_close(diagonal_fisher(model, pairs(classes=2), kind="exact")["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_softmax_by_enumeration(method):
    """F of W[c, i] = E_x sum_y p_y (1[y = c] - p_c)^2 x_i^2 = E[p_c (1 - p_c) x_i^2]; of the bias without x."""
    model = softmax_layer()
    p = (X.double() @ model.weight.T.double() + model.bias.double()).softmax(-1).detach()
    weight, bias = torch.zeros(3, 5).double(), torch.zeros(3).double()
    for n in range(len(X)):
        for y in range(3):
            slope = (torch.arange(3) == y).double() - p[n]
            weight += p[n, y] * (slope[:, None] * X[n].double()).square() / len(X)
            bias += p[n, y] * slope.square() / len(X)
    assert_close(weight, ((p * (1 - p)).T @ X.double().square()) / len(X), rtol=1e-12)
    fisher = diagonal_fisher(model, pairs(size=7), kind="exact", method=method)
    assert_close(fisher["weight"], weight, rtol=1e-6)
    assert_close(fisher["bias"], bias, rtol=1e-6)


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_linear_gaussian(method):
    """Of y = W x + noise of variance 1 F of W[c, i] is E[x_i^2], of the bias 1; the given targets give E[e^2 x^2]."""
    model, Y = softmax_layer(), torch.linspace(-2, 3, 69).reshape(23, 3)
    batches, x = [(X[:10], Y[:10]), (X[10:], Y[10:])], X.double()
    exact = diagonal_fisher(model, batches, kind="exact", method=method)
    assert_close(exact["weight"], x.square().mean(0).expand(3, 5), rtol=1e-6)
    assert_close(exact["bias"], torch.ones(3), rtol=1e-6)
    given = diagonal_fisher(model, batches, kind="empirical", method=method)
    error = (Y - model(X)).detach().double()
    assert_close(given["weight"], error.square().T @ x.square() / 23, rtol=1e-6)
    many, draws = [(X.repeat(1000, 1), Y.repeat(1000, 1))], torch.Generator().manual_seed(0)
    drawn = diagonal_fisher(model, many, method="hooks", generator=draws)
    assert_close(drawn["weight"], exact["weight"], rtol=0.05)


def test_a_regressor_of_hugging_face():
    """One logit: F of the head's weight is E[h^2], h what enters it. Several classes at once are no regression."""
    model = tiny_bert(labels=1).eval()
    batch = collate_padded([{**row, "labels": 0.5} for row in ROWS])
    seen = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(**{name: value for name, value in batch.items() if name != "labels"})
    handle.remove()
    fisher = diagonal_fisher(model, [batch], kind="exact")
    assert_close(fisher["classifier.weight"], seen[0].square().mean(0, keepdim=True), rtol=1e-4)
    for unit in ("sequence", "token"):
        assert diagonal_fisher(model, [batch], unit=unit)["classifier.weight"].min() > 0
    several = {**batch, "labels": torch.zeros(len(ROWS), 3)}
    with pytest.raises(
        ValueError, match=r"needs integer labels, or one float an output of a model that regresses; got"
    ):
        diagonal_fisher(tiny_bert(labels=3), [several])


def test_empirical_by_the_formula():
    model = softmax_layer()
    p = (X.double() @ model.weight.T.double() + model.bias.double()).softmax(-1).detach()
    slope = nn.functional.one_hot(torch.arange(23) % 3, 3) - p
    expected = slope.square().T @ X.double().square() / 23
    assert_close(diagonal_fisher(model, pairs(), kind="empirical")["weight"], expected, rtol=1e-6)


def test_the_mean_of_many_draws_is_the_exact_one():
    model, generator = softmax_layer(), torch.Generator().manual_seed(0)
    exact = diagonal_fisher(model, pairs(), kind="exact")
    many = [(X.repeat(1000, 1), torch.zeros(23000, dtype=torch.long))]
    drawn = diagonal_fisher(model, many, kind="sampled", method="hooks", generator=generator)
    for name in exact:
        assert_close(drawn[name], exact[name], rtol=0.05)


def test_sampled_sequences_of_a_language_model_average_to_the_exact():
    model, rows = tiny_llama(), [{"input_ids": [5, 7, 11], "labels": [5, 7, 11]}]
    names = ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"]
    exact = diagonal_fisher(model, [collate_packed(rows)], kind="exact", parameters=names)
    token = diagonal_fisher(model, [collate_packed(rows)], kind="exact", unit="token", parameters=names)
    batch = collate_padded(rows * 500)
    drawn = diagonal_fisher(
        model, [batch], parameters=names, method="hooks", generator=torch.Generator().manual_seed(1)
    )
    for name in names:
        assert_close(token[name] * 2, exact[name], rtol=1e-5)  # two targets, drawn independently given the text
        assert_close(drawn[name].sum(), exact[name].sum(), rtol=0.1)


def test_squared_batch_means_are_something_else():
    """What many libraries compute: about B times too small, and another number for another batch size."""
    model = softmax_layer()
    exact = diagonal_fisher(model, pairs(), kind="empirical")["weight"].sum()
    for size, least in ((23, 8.0), (7, 3.0)):
        squared = 0.0
        for x, y in pairs(size=size):
            loss = nn.functional.cross_entropy(model(x), y)
            squared += torch.autograd.grad(loss, model.weight)[0].square().sum() / len(pairs(size=size))
        assert exact / squared > least


# --- language models, classifiers, encoder-decoders ------------------------------------------------------------------

TOKEN_CLASSES = [{**row, "labels": [label % 3 if label >= 0 else -100 for label in row["labels"]]} for row in ROWS]


def bert_for_tokens():
    from transformers import BertForTokenClassification

    torch.manual_seed(0)
    config = tiny_bert(labels=3).config
    return BertForTokenClassification(config).eval()


KINDS = {
    "bert, a class a token": (bert_for_tokens, TOKEN_CLASSES, False),
    "llama": (tiny_llama, ROWS, True),
    "llama tied": (lambda: tiny_llama(tied=True), ROWS, True),
    "gpt2": (lambda: tiny_gpt2(dropout=0.4).train(), ROWS, True),
    "bert classifier": (lambda: tiny_bert(labels=3), CLASSES, True),
    "bert masked": (tiny_bert, ROWS, False),
    "t5": (tiny_t5, ROWS, False),
}


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_empirical_fisher_is_the_plain_formulas(kind, unit):
    make, rows, shift = KINDS[kind]
    model = make()
    found = diagonal_fisher(model, [collate_padded(rows)], kind="empirical", unit=unit)
    agree(found, reference(model, rows, shift=shift, unit=unit), rtol=1e-3 if kind == "t5" else 1e-4)


@pytest.mark.parametrize("kind", ["llama tied", "gpt2", "bert classifier"])
def test_hooks_give_the_same(kind):
    make, rows, shift = KINDS[kind]
    model = make()
    found = diagonal_fisher(model, [collate_padded(rows)], kind="empirical", method="hooks")
    agree(found, reference(model, rows, shift=shift))


BATCHES = {
    "one padded batch": [collate_padded(ROWS)],
    "padded left, to a multiple": [collate_padded(ROWS, side="left", pad_to_multiple_of=16)],
    "one row a batch": [collate_padded([row]) for row in ROWS],
    "two and three": [collate_padded(ROWS[:2]), collate_padded(ROWS[2:])],
    "another order": [collate_padded([ROWS[i] for i in (3, 0, 4, 2, 1)])],
    "packed": [collate_packed(ROWS)],
    "packed in two": [collate_packed(ROWS[:3]), collate_packed(ROWS[3:])],
    "with rows without a target": [collate_padded([*ROWS, {"input_ids": [5, 6], "labels": [5, -100]}])],
}


@pytest.mark.parametrize("method", ["loop", "hooks"])
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_batch_size_order_padding_and_packing_change_nothing(make, batches, method):
    model = make()
    names = (
        ["lm_head.weight"] if make is tiny_llama else ["transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"]
    )
    expected = diagonal_fisher(model, [collate_padded([row]) for row in ROWS], kind="empirical", parameters=names)
    agree(diagonal_fisher(model, BATCHES[batches], kind="empirical", parameters=names, method=method), expected)


def test_draws_do_not_depend_on_the_batches_either():
    model = tiny_llama()
    found = [
        diagonal_fisher(
            model, BATCHES[name], generator=torch.Generator().manual_seed(3), parameters=["model.norm.weight"]
        )
        for name in ("one padded batch", "one row a batch", "packed in two")
    ]
    for other in found[1:]:
        assert_close(other["model.norm.weight"], found[0]["model.norm.weight"], rtol=1e-4)


# --- effective weights ------------------------------------------------------------------------------------------------


def adapted(make=tiny_llama, **options):
    model = make()
    attach(model, LoRA(rank=3, alpha=5, dropout=0.3, **options))
    return moved(model).train()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"targets": ["q_proj", "embed_tokens"], "exclude": ["layers.0.self_attn.q_proj"]}),
        (tiny_gpt2, {"targets": ["c_attn", "c_proj"], "train_bias": "all"}),
        (lambda: tiny_bert(labels=3), {"train_modules": ["classifier"], "train_bias": "lora_only"}),
        (tiny_llama, {"targets": ["q_proj", "lm_head"]}),
        (tiny_llama, {"targets": ["q_proj"], "train_modules": ["lm_head"]}),
    ],
)
def test_under_lora_it_is_that_of_the_merged_model(make, options):
    model, rows = adapted(make, **options), CLASSES if options.get("train_modules") == ["classifier"] else ROWS
    found = diagonal_fisher(model, [collate_padded(rows)], kind="empirical")
    assert not any("lora" in name or "base" in name for name in found)
    full = copy.deepcopy(model)
    merge(full, keep_base=False)
    agree(found, reference(full, rows, of=set(found)), rtol=1e-3)
    trained = {place for place, module in named_places(model) if isinstance(module, AdapterLayer)}
    assert {name.rsplit(".", 1)[0] for name in found} == trained


def test_under_lora_at_its_start_it_is_that_of_the_base():
    model = tiny_llama()
    expected = reference(model, ROWS)
    attach(model, LoRA(rank=3, alpha=5))
    found = diagonal_fisher(model, [collate_packed(ROWS)], kind="empirical")
    assert len(found) == 14
    agree(found, expected, names=list(found))


def test_only_active_adapters_count():
    model = adapted(targets=["q_proj"])
    attach(model, LoRA(rank=2, alpha=3, targets=["v_proj"]), name="second")
    moved(model, seed=9)
    both = diagonal_fisher(model, [collate_padded(ROWS)], kind="empirical")
    set_active(model, "second")
    one = diagonal_fisher(model, [collate_padded(ROWS)], kind="empirical")
    assert {name.split(".")[-2] for name in both} == {"q_proj", "v_proj"}
    assert {name.split(".")[-2] for name in one} == {"v_proj"}
    name = "model.layers.0.self_attn.v_proj.weight"
    assert (one[name] - both[name]).abs().max() > 0.01 * both[name].max()


class Scaled(AdapterLayer):
    """An adapter that does more than add: it scales the rows of the weight it is put on."""

    def __init__(self, base, **options):
        super().__init__(base, **options)
        self.factor = nn.Parameter(torch.linspace(0.5, 2.0, base.weight.shape[0]))

    def forward(self, x):
        return self.base(x) * self.factor

    def deltas(self):
        return {"weight": (self.factor[:, None] - 1) * self.base.weight}


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_under_any_other_adapter_too(method):
    model = nn.Sequential(softmax_layer(4), softmax_layer_of(4))
    plain = copy.deepcopy(model)
    model.requires_grad_(False)
    model[0] = Scaled(model[0])
    model[0].base.bias.data.zero_()
    with torch.no_grad():
        plain[0].bias.zero_()
        plain[0].weight.mul_(model[0].factor[:, None])
    layer, before = model[0], {name: p.clone() for name, p in model.named_parameters()}
    found = diagonal_fisher(model, pairs(), kind="exact", method=method)
    expected = diagonal_fisher(plain, pairs(), kind="exact", parameters=["0.weight"])
    assert list(found) == ["0.weight"]
    assert_close(found["0.weight"], expected["0.weight"], rtol=1e-5)
    assert model[0] is layer
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def softmax_layer_of(width, classes=3):
    layer = nn.Linear(width, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, width, generator=torch.Generator().manual_seed(2)))
    return layer


def test_a_tied_weight_adapted_in_one_place_raises():
    model = tiny_llama(tied=True)
    attach(model, LoRA(rank=2, alpha=2, targets=["lm_head", "q_proj"]))
    with pytest.raises(
        ValueError, match=r"model.embed_tokens.weight and lm_head.weight are one tied tensor, and an active"
    ):
        diagonal_fisher(model, [collate_padded(ROWS)])
    found = diagonal_fisher(model, [collate_padded(ROWS)], parameters=lambda name: "q_proj" in name)
    assert len(found) == 2


# --- what it leaves, and what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_flags_modes_gradients_and_random_state_are_as_before(fails):
    model = adapted(tiny_gpt2)
    model.transformer.h[1].eval()
    model.transformer.ln_f.weight.grad = torch.ones(26)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    state = torch.get_rng_state()
    batches = [collate_padded(ROWS)] + ([{"input_ids": torch.tensor([[1, 2]])}] if fails else [])
    if fails:
        with pytest.raises(ValueError, match="needs integer labels"):
            diagonal_fisher(model, batches)
    else:
        diagonal_fisher(model, batches)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.grad is not None for p in model.parameters()) == 1


def test_a_generator_is_drawn_from_and_torchs_own_is_not():
    model, generator = softmax_layer(), torch.Generator().manual_seed(5)
    torch.manual_seed(0)
    first = diagonal_fisher(model, pairs())["weight"]
    assert torch.equal(diagonal_fisher(model, pairs())["weight"], first)  # from the same state, which was put back
    one = diagonal_fisher(model, pairs(), generator=generator)["weight"]
    two = diagonal_fisher(model, pairs(), generator=generator)["weight"]
    assert not torch.equal(one, two)
    assert torch.equal(diagonal_fisher(model, pairs(), generator=generator.manual_seed(5))["weight"], one)


def test_half_precision_is_accumulated_in_float32():
    model = tiny_llama().bfloat16()
    found = diagonal_fisher(model, [collate_padded(ROWS)], kind="empirical", parameters=["lm_head.weight"])
    expected = reference(model, ROWS, of={"lm_head.weight"})
    assert found["lm_head.weight"].dtype == torch.float32
    assert_close(found["lm_head.weight"].sum(), expected["lm_head.weight"].sum(), rtol=0.03)


def test_wrapped_models_answer_by_bare_names():
    model = softmax_layer()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    found = diagonal_fisher(wrapped, pairs(), kind="exact")
    assert torch.equal(found["weight"], diagonal_fisher(model, pairs(), kind="exact")["weight"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "mc"}, ValueError, "kind must be one of sampled, exact, empirical; got 'mc'"),
        ({"unit": "word"}, ValueError, "unit must be one of sequence, token; got 'word'"),
        ({"method": "vmap"}, ValueError, 'method must be "auto", "loop" or "hooks"; got \'vmap\''),
        ({"parameters": "weight"}, TypeError, "parameters must be a list of names .* got the one string 'weight'"),
        ({"parameters": ["wieght"]}, ValueError, 'the bare model has no parameter "wieght". Did you mean "weight"'),
        ({"parameters": lambda name: False}, ValueError, "none of the model's 2 parameters is chosen: nothing matches"),
        ({"batches": pairs()[0]}, TypeError, "a batch must be a dict of tensors or a pair"),
        ({"batches": {"x": X}}, TypeError, "got a single one"),
        (
            {"batches": [pairs()[0], "more"]},
            TypeError,
            "must be a dict of tensors or a pair .inputs, targets.; got str",
        ),
        ({"batches": []}, ValueError, "no example has a target"),
        ({"batches": [(X[:2], torch.tensor([-100, -100]))]}, ValueError, "all of their labels are -100"),
        (
            {"batches": [(X[:2], torch.tensor([0.5, 1.0]))]},
            ValueError,
            r"needs integer labels, .* got torch.float32 \[1\]",
        ),
        ({"batches": [(X[:2], torch.tensor([0, 3]))]}, ValueError, r"labels must be in 0 \.\.\. 2 or -100; got 3"),
        ({"batches": [(X[:2], torch.tensor([[0], [1]]))]}, ValueError, r"must be classes \[n\]; got \[1, 1\]"),
        (
            {"batches": [(X[:2, None], torch.tensor([0, 1]))]},
            ValueError,
            r"need logits \[1, C\], C >= 2; the model gave",
        ),
        ({"batches": [(X[:2] * float("nan"), torch.tensor([0, 1]))]}, ValueError, "predictions are not finite"),
        (
            {"batches": [(X[:2] * float("nan"), torch.tensor([0, 1]))], "kind": "exact"},
            ValueError,
            "the Fisher information of weight is not finite",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    options = {"batches": pairs(), **options}
    with pytest.raises(error, match=message):
        diagonal_fisher(softmax_layer(), options.pop("batches"), **options)


def test_more_bad_input_for_language_models():
    model = tiny_llama()
    long = {"input_ids": list(range(3, 60)), "labels": list(range(3, 60))}
    with pytest.raises(
        ValueError, match=re.escape('kind="exact" needs a backward pass for each of 97 classes at each of 56')
    ):
        diagonal_fisher(model, [collate_packed([long])], kind="exact", parameters=["model.norm.weight"])
    with pytest.raises(ValueError, match="all of their labels are -100"):
        diagonal_fisher(model, [collate_padded([{"input_ids": [5, 6], "labels": [5, -100]}])])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none requires a gradient and no active adapter changes one"):
        diagonal_fisher(model, [collate_packed(ROWS)])
    assert diagonal_fisher(model, [collate_packed(ROWS)], parameters=["model.norm.weight"])["model.norm.weight"].any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.bool])
def test_labels_of_any_integers(dtype):
    layer = nn.Linear(3, 2)
    inputs, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])
    wide = diagonal_fisher(layer, [(inputs, labels)], kind="empirical")
    narrow = diagonal_fisher(layer, [(inputs, labels.to(dtype))], kind="empirical")
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)
