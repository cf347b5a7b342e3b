import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.gradients import per_example
from llmtune.gradients.hooks import HookTape, UnsupportedModuleError
from llmtune.gradients.per_example import per_example_gradients
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import SmallModel, moved
from llmtune.training.switches import recomputing

ROWS = uneven_rows(4)
CLASSES = [{**row, "labels": index % 3} for index, row in enumerate(ROWS)]
CASES = {
    "llama padded": (tiny_llama, collate_padded(ROWS), causal_lm_loss),
    "llama packed": (tiny_llama, collate_packed(ROWS), causal_lm_loss),
    "llama tied": (lambda: tiny_llama(tied=True), collate_padded(ROWS, side="left"), causal_lm_loss),
    "gpt2": (tiny_gpt2, collate_padded(ROWS), causal_lm_loss),
    "gpt2 with dropout": (lambda: tiny_gpt2(dropout=0.5).train(), collate_padded(ROWS), causal_lm_loss),
    "bert classifier": (lambda: tiny_bert(labels=3), collate_padded(CLASSES), classification_loss),
    "bert masked": (tiny_bert, collate_padded(ROWS), masked_lm_loss),
    "t5": (tiny_t5, collate_padded(ROWS), sequence_to_sequence_loss),
}


class PlainLoss:
    """A user's own loss, on a module that is not Hugging Face's."""

    def __call__(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["labels"]), {"a part": 1.0}

    def count_targets(self, batch):
        return len(batch["labels"])


PLAIN = {"x": torch.randn(3, 5, dtype=torch.float64), "labels": torch.tensor([2, 0, 1])}


@pytest.mark.parametrize("case", CASES)
def test_loop_gives_each_examples_own_gradient(case):
    """Against autograd in float64, on each row collated alone."""
    make, batch, loss = CASES[case]
    model = make()
    gradients = per_example_gradients(model, batch, loss=loss, method="loop")
    reference = copy.deepcopy(model).double().eval()
    for index, row in enumerate(CLASSES if "classifier" in case else ROWS):
        reference.zero_grad()
        alone = {k: v for k, v in collate_padded([row]).items() if k != "attention_mask"}
        loss(reference, alone).backward()
        expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            off = float((gradients[name][index] - gradient).abs().max())  # some are 0 but for rounding
            assert off <= 1e-4 * float(gradient.abs().max()) + 1e-6 * largest, f"{name} of row {index}"


def watched(
    model, *, without=("lm_head", "wte", "embed_tokens", "decoder.", "cls.predictions", "word_emb", "shared", "bias.w")
):
    return {name: p for name, p in model.named_parameters() if not any(part in name for part in without)}


@pytest.mark.parametrize("case", CASES)
def test_hooks_agree_with_the_loop(case):
    make, batch, loss = CASES[case]
    model = make()
    parameters = dict(model.named_parameters()) if "classifier" in case else watched(model)
    if case == "t5":
        parameters = {
            n: p for n, p in model.named_parameters() if n.endswith(("q.weight", "layer_norm.weight", "wi.weight"))
        }
    assert parameters
    looped = per_example_gradients(model, batch, loss=loss, parameters=parameters, method="loop")
    hooked = per_example_gradients(model, batch, loss=loss, parameters=parameters, method="hooks")
    for name, expected in looped.items():
        if "key.bias" not in name:
            assert_close(hooked[name], expected, rtol=1e-4, what=name)


def test_hooks_add_up_tied_weights_and_second_calls():
    model = moved(SmallModel())
    looped = per_example_gradients(model, PLAIN, loss=PlainLoss(), method="loop")
    hooked = per_example_gradients(model, PLAIN, loss=PlainLoss(), method="hooks")
    assert set(looped) == {
        "first.weight",
        "first.bias",
        "second.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    for name, expected in looped.items():
        assert_close(hooked[name], expected, rtol=1e-12, what=name)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_hooks_know_lora(make):
    model = make()
    targets = ["c_attn", "c_fc"] if make is tiny_gpt2 else ["q_proj", "down_proj", "embed_tokens"]
    attach(model, LoRA(rank=3, alpha=5, targets=targets, train_bias="all", lora_bias=make is tiny_gpt2, dropout=0.3))
    moved(model)
    batch = collate_padded(ROWS)
    if make is tiny_llama:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
    looped = per_example_gradients(model, batch, loss=causal_lm_loss, method="loop")
    hooked = per_example_gradients(model, batch, loss=causal_lm_loss, method="hooks")
    assert any("lora_a" in name for name in looped)
    assert any("lora_b" in name for name in looped)
    for name, expected in looped.items():
        assert_close(hooked[name], expected, rtol=1e-5, what=name)


def test_a_frozen_parameter_may_be_chosen_by_any_name():
    model = tiny_llama()
    model.requires_grad_(False)
    weight = model.model.layers[1].mlp.up_proj.weight
    gradients = per_example_gradients(model, collate_padded(ROWS), loss=causal_lm_loss, parameters={"mine": weight})
    assert list(gradients) == ["mine"]
    assert gradients["mine"].abs().sum() > 0


def test_an_example_without_a_target_has_gradient_0():
    rows = [ROWS[0], {"input_ids": [4, 5, 6], "labels": [-100] * 3}, ROWS[2]]
    gradients = per_example_gradients(tiny_llama(), collate_padded(rows), loss=causal_lm_loss)
    assert [bool(g.any()) for g in gradients["lm_head.weight"]] == [True, False, True]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_everything_is_as_before(method, fails):
    model = tiny_gpt2(dropout=0.4).train()
    model.transformer.h[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)  # chosen below all the same
    model.transformer.ln_f.weight.grad = torch.full((26,), 0.5)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    state = torch.get_rng_state()

    class Failing(type(causal_lm_loss)):
        calls = 0

        def __call__(self, model, batch):
            torch.rand(3)
            Failing.calls += 1
            if fails and Failing.calls > 1:
                raise KeyError("the loss fails")
            return super().__call__(model, batch)

    def run():
        parameters = watched(model)
        return per_example_gradients(model, collate_padded(ROWS), loss=Failing(), parameters=parameters, method=method)

    if fails:
        with pytest.raises(KeyError, match="the loss fails"):
            run()
    else:
        run()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["transformer.ln_f.weight"]
    assert bool((model.transformer.ln_f.weight.grad == 0.5).all())


def test_auto_falls_back_where_hooks_cannot_see(monkeypatch):
    """A weight used without its module, and a module that mixes examples: the loop's gradients come out."""

    class Sneaky(SmallModel):
        def forward(self, x):
            return super().forward(x) + F.linear(x, self.head.weight)

    monkeypatch.setattr(per_example, "SHORT", 10**9)
    monkeypatch.setattr(per_example.ExampleGradients, "_hooks_are_faster", lambda *_: True)
    model = Sneaky()
    looped = per_example_gradients(model, PLAIN, loss=PlainLoss(), method="loop")
    auto = per_example_gradients(model, PLAIN, loss=PlainLoss())
    assert all(torch.equal(auto[name], looped[name]) for name in looped)
    with pytest.raises(
        ValueError, match=r'method="hooks" does not fit: the gradient of head.weight is off by .* from the'
    ):
        per_example_gradients(model, PLAIN, loss=PlainLoss(), method="hooks")


class InPlace(SmallModel):
    """Changes a module's output in place, then another's input."""

    def forward(self, x):
        hidden = self.first(x)
        hidden += 1.0
        return self.head(self.norm(torch.tanh(hidden)))


class InputInPlace(SmallModel):
    def forward(self, x):
        x = x.clone()
        hidden = self.first(x)
        x.zero_()
        return self.head(self.norm(torch.tanh(hidden)))


class TwoRows(SmallModel):
    """Runs a module on rows that are no examples."""

    def forward(self, x):
        return self.head(self.norm(self.first(x.repeat(2, 1))))[: len(x)]


def test_in_place_changes():
    model = InPlace()
    names = {n: p for n, p in model.named_parameters() if n.startswith(("first", "head"))}
    looped = per_example_gradients(model, PLAIN, loss=PlainLoss(), parameters=names, method="loop")
    hooked = per_example_gradients(model, PLAIN, loss=PlainLoss(), parameters=names, method="hooks")
    for name, expected in looped.items():
        assert_close(hooked[name], expected, rtol=1e-12, what=name)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(InputInPlace, "the model changes a module's input in place"), (TwoRows, "a Linear is called with 4 rows for 2")],
)
def test_hooks_refuse_what_they_cannot_do(kind, message):
    model = kind()
    names = {"head.weight": model.head.weight, "first.weight": model.first.weight}
    with pytest.raises(ValueError, match=message):
        per_example_gradients(model, PLAIN, loss=PlainLoss(), parameters=names, method="hooks")
    assert per_example_gradients(model, PLAIN, loss=PlainLoss(), parameters={"head.bias": model.head.bias})


def test_hooks_refuse_a_parameter_of_no_known_module():
    with pytest.raises(UnsupportedModuleError, match="scale is in no module of a known kind"):
        HookTape(SmallModel(), {"scale": SmallModel().scale}, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fast"}, 'method must be "auto", "loop" or "hooks"; got \'fast\''),
        ({"parameters": {}}, "there is no parameter to take gradients of"),
        ({"parameters": {"n": nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)}}, "n is torch.int8"),
        ({"parameters": {"other": SmallModel().head.weight}}, r"\(the first: other\) depends on none of them"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        per_example_gradients(SmallModel(), PLAIN, loss=PlainLoss(), **options)


def test_examples_of_very_different_lengths_are_not_padded_together():
    short = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    long = {"input_ids": list(range(3, 60)), "labels": list(range(3, 60))}
    batch = collate_packed([short, short, long, long, short])
    model, sizes = tiny_llama(), []
    model.model.register_forward_pre_hook(lambda m, a, k: sizes.append([*k["input_ids"].shape]), with_kwargs=True)
    names = {"norm": model.model.norm.weight}
    hooked = per_example_gradients(model, batch, loss=causal_lm_loss, parameters=names, method="hooks")
    assert sizes[-2:] == [[2, 3], [3, 57]]
    looped = per_example_gradients(model, batch, loss=causal_lm_loss, parameters=names, method="loop")
    assert_close(hooked["norm"], looped["norm"], rtol=1e-5)


def test_a_large_embedding_is_done_a_few_examples_at_a_time(monkeypatch):
    from llmtune.gradients import hooks

    model = tiny_gpt2()
    names = {"wpe": model.transformer.wpe.weight, "ln": model.transformer.ln_f.bias}
    expected = per_example_gradients(model, collate_padded(ROWS), loss=causal_lm_loss, parameters=names, method="loop")
    monkeypatch.setattr(hooks, "PIECE_BYTES", 4 * 26 * 3)
    found = per_example_gradients(model, collate_padded(ROWS), loss=causal_lm_loss, parameters=names, method="hooks")
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-5, what=name)


def test_padding_idx_of_an_embedding_gets_no_gradient():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 3, padding_idx=2)

        def forward(self, x):
            return self.table(x).sum(1)

    batch = {"x": torch.tensor([[1, 2, 2], [6, 1, 2]]), "labels": torch.tensor([0, 2])}
    model = Bag()
    looped = per_example_gradients(model, batch, loss=PlainLoss(), method="loop")["table.weight"]
    assert_close(per_example_gradients(model, batch, loss=PlainLoss(), method="hooks")["table.weight"], looped)
    assert not looped[:, 2].any()


class Twice(SmallModel):
    """Calls each of its layers twice, as models do that share one layer among all depths."""

    def forward(self, x):
        for _ in range(2):
            x = self.norm(torch.tanh(self.first(x)))
        return self.head(x)


class Recomputed(Twice):
    """Keeps no activation of its layers: they run again in the backward pass."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [Twice, Recomputed])
def test_modules_called_twice_and_modules_run_again_in_the_backward_pass(kind):
    """Each call adds its share, once: what runs again in the backward pass is no further call."""
    model = moved(kind())
    names = {n: p for n, p in model.named_parameters() if n != "scale" and "second" not in n}
    found = per_example_gradients(model, PLAIN, loss=PlainLoss(), parameters=names, method="hooks")
    plain = moved(Twice()).eval()
    for index in range(3):
        plain.zero_grad()
        F.cross_entropy(plain(PLAIN["x"][index : index + 1]), PLAIN["labels"][index : index + 1]).backward()
        for name in names:
            assert_close(found[name][index], plain.get_parameter(name).grad, rtol=1e-10, what=name)


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_gradient_checkpointing_changes_nothing(method):
    """transformers checkpoints in train mode alone, and gradients of single examples are those of eval mode."""
    model, batch, found = tiny_gpt2().train(), collate_padded(ROWS), []
    for switched in (False, True):
        with recomputing(model, switched):
            found.append(
                per_example_gradients(model, batch, loss=causal_lm_loss, parameters=watched(model), method=method)
            )
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_position_embeddings_have_a_gradient_for_each_example(make):
    """Their ids are [1, T], the same for all examples, so that a plain hook sees the sum over the batch."""
    model, batch = make(), collate_padded(ROWS)
    loss = causal_lm_loss if make is tiny_gpt2 else masked_lm_loss
    (name,) = [n for n, _ in model.named_parameters() if "wpe" in n or "position_embeddings" in n]
    names = {name: model.get_parameter(name)}
    found = per_example_gradients(model, batch, loss=loss, parameters=names, method="hooks")[name]
    looped = per_example_gradients(model, batch, loss=loss, parameters=names, method="loop")[name]
    assert_close(found, looped, rtol=1e-5)
    for index, row in enumerate(ROWS):
        length = len(row["input_ids"])
        assert found[index, :length].any()
        assert not found[index, length:].any()  # nothing of longer examples


class Gaussian:
    """Minus log N(y; w x, sigma^2), but for what does not depend on w."""

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, model, batch):
        return ((batch["y"] - model(batch["x"])).square() / (2 * self.sigma**2)).sum(1).mean()

    def count_targets(self, batch):
        return len(batch["y"])


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_linear_gaussian_fisher(method):
    """F = E[x^2] / sigma^2: y at one sigma on either side of the mean has the second moment of y's distribution."""
    model, sigma = nn.Linear(5, 1, bias=False).double(), 0.7
    x = torch.randn(11, 5, dtype=torch.float64)
    with torch.no_grad():
        mean = model(x)
    batch = {"x": torch.cat([x, x]), "y": torch.cat([mean + sigma, mean - sigma])}
    gradients = per_example_gradients(model, batch, loss=Gaussian(sigma), method=method)["weight"]
    assert_close(gradients.square().mean(0)[0], x.square().mean(0) / sigma**2, rtol=1e-10)
