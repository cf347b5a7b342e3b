"""New tokens: against models whose own rows are set; ties, losses, merges, company, and every refusal."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.adapters import (
    DoRA,
    LoRA,
    NewTokens,
    NewTokensEmbedding,
    NewTokensHead,
    TrainedBias,
    adapter_parameters,
    attach,
    detach,
    disabled,
    load,
    merge,
    save,
    unmerge,
)
from llmtune.adapters.effective import anchor_of
from llmtune.forgetting import EWC, diagonal_fisher
from llmtune.losses import causal_lm_loss, masked_lm_loss, sequence_to_sequence_loss
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
TOKENS = [37, 96, 13]  # the first and the last are in IDS
tied = partial(tiny_llama, tied=True)
TIED = {
    "llama": (tied, ["model.embed_tokens", "lm_head"]),
    "gpt2": (tiny_gpt2, ["transformer.wte", "lm_head"]),
    "bert": (tiny_bert, ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]),
    "t5": (tiny_t5, ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
}
MODELS = {**{name: make for name, (make, _) in TIED.items()}, "llama untied": tiny_llama}


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    return model(input_ids=IDS, **inputs).logits


def quiet(model):
    with torch.no_grad():
        return output(model)


def move(model, name="default", seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapter_parameters(model, name).items()):
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def attached(make, **options):
    model = make()
    attach(model, NewTokens(tokens=TOKENS, **options))
    return move(model)


def with_rows(make, rows):
    """The plain model with its rows set: what the adapter stands for."""
    model = make().to(rows.dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENS] = rows
    return model


def rows_of(model):
    (rows,) = adapter_parameters(model).values()
    return rows


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_it_is_the_model_with_those_rows_set_and_trained(make):
    model = attached(lambda: make().double())
    plain = with_rows(make, rows_of(model).detach())
    torch.testing.assert_close(output(model), output(plain), rtol=1e-12, atol=1e-12)
    for one in (model, plain):
        output(one).square().mean().backward()
    torch.testing.assert_close(
        rows_of(model).grad, plain.get_input_embeddings().weight.grad[TOKENS], rtol=1e-9, atol=1e-13
    )
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(adapter_parameters(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_start_is_invisible_in_every_dtype(make, dtype):
    for asked in (torch.float32, torch.bfloat16):
        model = make().to(dtype)
        start = quiet(model)
        attach(model, NewTokens(tokens=TOKENS, dtype=asked))
        assert torch.equal(quiet(model), start)
        assert start.dtype == dtype
        assert rows_of(model).dtype == torch.promote_types(asked, dtype)


@pytest.mark.parametrize(("make", "places"), TIED.values(), ids=TIED)
def test_tied_rows_are_one_parameter(make, places):
    model = make()
    report = attach(model, NewTokens(tokens=TOKENS))
    assert list(report.tokens) == places
    assert f"trained rows of single tokens: {', '.join(places)}" in str(report)
    layers = [model.get_submodule(place) for place in places]
    assert len({id(layer.rows) for layer in layers}) == 1
    assert [name for name in model.state_dict() if name.endswith("trained_rows")] == [f"{places[0]}.trained_rows"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * layers[0].embedding_dim
    copied = copy.deepcopy(model)
    move(copied)
    own = [copied.get_submodule(place) for place in places]
    assert len({id(layer.rows) for layer in own}) == 1
    assert own[0].rows is not layers[0].rows
    assert torch.equal(quiet(model), quiet(make())), "what the copy learns, the model does not"
    before = quiet(copied)
    with torch.no_grad():
        own[-1].rows.add_(0.1)
    assert not torch.equal(quiet(copied), before)


class Shapes(TorchDispatchMode):
    """The shapes that operations give; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.seen.add((tuple(result.shape), func.__name__))
        return result


def test_no_copy_of_the_weight_is_made():
    model = attached(tied)
    with Shapes() as shapes:
        output(model).square().mean().backward()
    assert not [name for shape, name in shapes.seen if sorted(shape) == [28, 97]]


# --- losses that take the head apart --------------------------------------------------------------------------------

LOSSES = {  # name: (model, loss, targets)
    "llama": (tied, causal_lm_loss, None),
    "llama untied head": (tiny_llama, causal_lm_loss, ["lm_head"]),
    "gpt2": (tiny_gpt2, causal_lm_loss, None),
    "bert": (tiny_bert, masked_lm_loss, None),
    "t5": (tiny_t5, sequence_to_sequence_loss, None),
}


@pytest.mark.parametrize(("make", "loss", "targets"), LOSSES.values(), ids=LOSSES)
def test_losses_see_the_rows_in_the_head(make, loss, targets):
    """They may compute from hidden states and the head's weight: with the rows put in, as if the model had them."""
    model, plain, start = attached(lambda: make().double(), targets=targets), make().double(), make().double()
    weight = plain.get_output_embeddings().weight
    with torch.no_grad():
        weight[TOKENS] = rows_of(model)
    batch = {"input_ids": IDS, "labels": IDS.where(IDS % 3 > 0, -100)}
    ours, theirs = loss(model, batch), loss(plain, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, model(**batch).loss, rtol=1e-6, atol=0, check_dtype=False)
    assert abs(ours.item() - loss(start, batch).item()) > 1e-3, "the rows matter to this loss"
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(rows_of(model).grad, weight.grad[TOKENS], rtol=1e-9, atol=1e-13)


class TakesTheWeight(nn.Module):
    """A model that multiplies by its embedding's weight without calling a head, as DeBERTa does."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(17, 5)
        self.inner = nn.Linear(5, 5)

    def get_input_embeddings(self):
        return self.words

    def forward(self, ids):
        return self.inner(self.words(ids)) @ self.words.weight.T


def test_a_weight_that_is_taken_without_a_call_has_the_rows_in_it():
    model, ids = TakesTheWeight(), torch.arange(17)
    start = model(ids)
    attach(model, NewTokens(tokens=[3, 11]))
    assert torch.equal(model(ids), start)
    move(model)
    tuned = model(ids)
    assert torch.equal(tuned[0, [0, 1, 2]], start[0, [0, 1, 2]])
    assert not torch.equal(tuned[0, [3, 11]], start[0, [3, 11]])
    tuned.sum().backward()
    with disabled(model):
        assert model.words.weight is model.words.base.weight
        assert torch.equal(model(ids), start)
    merged = copy.deepcopy(model)
    merge(merged)
    torch.testing.assert_close(merged(ids), tuned, rtol=1e-6, atol=1e-6)


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "places"), TIED.values(), ids=TIED)
def test_a_tied_weight_is_merged_once_and_stays_tied(make, places, dtype):
    model = attached(lambda: make().to(dtype))
    tuned, rows = quiet(model), rows_of(model)
    before = model.get_input_embeddings().base.weight.detach().clone()
    report = merge(model)
    weight = model.get_input_embeddings().base.weight
    assert report.parameters == (f"{places[0]}.weight",)
    assert report.untied == ()
    assert report.kept_bytes == before.nbytes
    assert all(model.get_submodule(place).base.weight is weight for place in places)
    assert torch.equal(weight[TOKENS], rows.to(dtype))
    if dtype == torch.float32:
        torch.testing.assert_close(quiet(model), tuned, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="is merged: what its rows change is known again after unmerge"):
        model.get_input_embeddings().deltas()
    unmerge(model)
    assert torch.equal(model.get_input_embeddings().base.weight, before)
    assert torch.equal(quiet(model), tuned)
    merge(model, keep_base=False)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings


def test_merged_rows_are_the_trained_ones_exactly():
    """W + (R - W) would round to something else where R is small."""
    model = attached(tied)
    with torch.no_grad():
        rows_of(model).copy_(1e-9 * torch.randn(3, 28, generator=torch.Generator().manual_seed(0)))
    weight = model.lm_head.base.weight
    assert not torch.equal(weight[TOKENS] + (rows_of(model) - weight[TOKENS]), rows_of(model))
    merge(model)
    assert torch.equal(weight[TOKENS], rows_of(model))


def test_others_are_not_merged_under_the_rows():
    model = tiny_llama()
    attach(model, NewTokens(tokens=TOKENS, targets=["lm_head"]), "rows")
    attach(model, LoRA(rank=2, alpha=3, targets=["lm_head"]), "low")
    for name in ("rows", "low"):
        move(model, name)
    tuned = quiet(model)
    with pytest.raises(ValueError, match=r'adapter "rows" is made for the weights as they are, .* merge "rows" first'):
        merge(model, "low")
    merge(model, "rows")
    merge(model, "low")
    torch.testing.assert_close(quiet(model), tuned, rtol=2e-5, atol=2e-5)
    unmerge(model, "low")
    unmerge(model, "rows")
    assert torch.equal(quiet(model), tuned)


# --- company --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["one", "two"])
def test_two_with_different_tokens(first):
    model = tied()
    start = quiet(model)
    attach(model, NewTokens(tokens=[37, 20]), "one")
    move(model, "one")
    with pytest.raises(ValueError, match=r'token 37 of model.embed_tokens is trained by adapter "one" already'):
        attach(model, NewTokens(tokens=[5, 37]), "two")
    only = quiet(model)
    attach(model, NewTokens(tokens=[13, 96]), "two")
    assert torch.equal(quiet(model), only)
    move(model, "two", seed=4)
    both = quiet(model)
    other = {"one": "two", "two": "one"}[first]
    merge(model, first)
    merge(model, other)
    torch.testing.assert_close(quiet(model), both, rtol=2e-5, atol=2e-5)
    unmerge(model, other)
    unmerge(model, first)
    assert torch.equal(quiet(model), both)
    assert torch.equal(model.get_input_embeddings().weight, model.lm_head.weight), "with the rows of both"
    detach(model, "two")
    assert torch.equal(quiet(model), only)
    assert not torch.equal(only, start)


@pytest.mark.parametrize("order", [("low", "rows"), ("rows", "low")])
def test_with_a_low_rank_change_of_the_same_modules(order):
    """Whichever came first: what both add, they add."""
    model = tiny_llama().double()
    both = ["embed_tokens", "lm_head"]
    records = {
        "low": LoRA(rank=2, alpha=3, targets=both, dtype=torch.float64),
        "rows": NewTokens(tokens=TOKENS, targets=both, dtype=torch.float64),
    }
    for name in order:
        before = quiet(model)
        attach(model, records[name], name)
        assert torch.equal(quiet(model), before)
        move(model, name)
    plain = tiny_llama().double()
    with torch.no_grad():
        for place in ("model.embed_tokens", "lm_head"):
            layer = model.get_submodule(place)
            plain.get_submodule(place).weight += layer.deltas()["weight"] + layer.base.deltas()["weight"]
    torch.testing.assert_close(quiet(model), quiet(plain), rtol=1e-12, atol=1e-12)


def test_what_cannot_stand_beside_it():
    model = tiny_llama()
    attach(model, DoRA(rank=2, alpha=3, targets=["lm_head"]), "dora")
    with pytest.raises(ValueError, match='"dora" is made for the whole weight of lm_head, or stands in it merged'):
        attach(model, NewTokens(tokens=TOKENS, targets=["lm_head"]), "rows")
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["embed_tokens"]), "low")
    merge(model, "low")
    with pytest.raises(ValueError, match=r'"low" is made for the whole weight of model.embed_tokens, or stands in it'):
        attach(model, NewTokens(tokens=TOKENS), "rows")
    model = attached(tiny_llama)
    with pytest.raises(ValueError, match='embed_tokens already belongs to adapter "default" and cannot be trained'):
        attach(model, LoRA(rank=2, alpha=3, train_modules=["embed_tokens"]), "copy")
    with pytest.raises(TypeError, match="DoRA is made for the bare weight"):
        attach(attached(tied), DoRA(rank=2, alpha=3, targets=["lm_head"]), "dora")


def test_a_head_whose_bias_is_trained_too():
    base = nn.Linear(5, 11).double()
    layer = NewTokensHead(TrainedBias(base, adapter_name="bias"), tokens=[9, 2])
    x = torch.randn(7, 5).double()
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        layer.base.trained_bias.add_(1.0)
        layer.rows.add_(0.5)
    weight = base.weight.detach().clone()
    weight[[9, 2]] += 0.5
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, base.bias + 1.0))


class TwoOfAName(nn.Module):
    """An embedding whose whole name is the end of another's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"words": nn.Embedding(7, 3)})
        self.words = nn.Embedding(17, 5)

    def get_input_embeddings(self):
        return self.words


def test_a_full_name_means_one_module():
    expected = ("words",)
    assert attach(TwoOfAName(), NewTokens(tokens=[11])).tokens == expected
    assert attach(TwoOfAName(), NewTokens(tokens=[11], targets="words")).tokens == expected
    assert attach(TwoOfAName(), NewTokens(tokens=[5], targets=["words"])).tokens == ("inner.words", "words")


@pytest.mark.parametrize("make", [tied, tiny_t5], ids=["llama", "t5"])
def test_what_protects_against_forgetting_sees_one_weight(make):
    """The Fisher information and the anchor of a tied, adapted weight are those of the model it stands for."""
    model = attached(lambda: make().double())
    plain = with_rows(make, rows_of(model).detach())
    name = f"{TIED['llama' if make is tied else 't5'][1][0]}.weight"
    torch.testing.assert_close(anchor_of(model, [name])[name], plain.get_input_embeddings().weight.detach())
    batch = {"input_ids": IDS, "labels": IDS}
    ours, theirs = (diagonal_fisher(one, [batch], kind="empirical", parameters=[name]) for one in (model, plain))
    torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-8)
    assert float(ours[name][TOKENS].sum()) > 0
    penalty = EWC(ours, {name: make().double().get_input_embeddings().weight.detach()}, strength=2.0)
    penalty(model).backward()
    assert float(rows_of(model).grad.abs().max()) > 0


# --- embeddings of other kinds, moves, memory -----------------------------------------------------------------------


class Scaled(nn.Embedding):
    """An embedding that multiplies what it gives, as Gemma's does."""

    def __init__(self, size, width, scale):
        super().__init__(size, width)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_embedding_with_a_factor(dtype):
    base, ids = Scaled(11, 5, 5**0.5).to(dtype), torch.arange(11).reshape(1, 11)
    layer = NewTokensEmbedding(base, tokens=[9, 2])
    assert torch.equal(layer(ids), base(ids))
    with torch.no_grad():
        layer.rows.mul_(2)
    expected = base(ids).clone()
    expected[0, [9, 2]] *= 2
    assert torch.equal(layer(ids), expected)


def test_a_padding_token_is_trained_where_it_is_named():
    base = nn.Embedding(11, 5, padding_idx=2)
    layer = NewTokensEmbedding(base, tokens=[9, 2])
    layer(torch.tensor([2, 2, 9, 1])).sum().backward()
    assert layer.rows.grad[:, 0].tolist() == [1.0, 2.0]
    assert layer.padding_idx == 2


def test_a_float32_row_is_rounded_on_the_way_out():
    base = nn.Embedding(11, 5).to(torch.bfloat16)
    layer = NewTokensEmbedding(base, tokens=[9, 2])
    with torch.no_grad():
        layer.rows.add_(1e-4)
    assert torch.equal(layer(torch.tensor([2])), layer.rows[1:].to(torch.bfloat16))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_base_on_the_meta_device_and_moves(make):
    model = attached(make)
    for assign in (False, True):
        with torch.device("meta"):
            empty = make()
        attach(empty, NewTokens(tokens=TOKENS))
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(model.state_dict(), assign=assign)
        for name, buffer in model.named_buffers():
            if not name.endswith(("index", "row_of")):
                module, _, local = name.rpartition(".")
                empty.get_submodule(module)._buffers[local] = buffer.clone()
        assert torch.equal(quiet(empty), quiet(model))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert quiet(half).dtype == torch.bfloat16
    assert torch.equal(quiet(half.to(torch.float32)), quiet(copy.deepcopy(half)))


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tied().double().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        attach(model, LoRA(rank=2, alpha=3, train_tokens=TOKENS))
        torch.manual_seed(0)
        move(model)
        output(model).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("make", [tied, tiny_llama, tiny_t5], ids=["tied", "untied", "t5"])
def test_tokens_that_are_new(make, tmp_path):
    """Whatever a new row starts as, a file holds what it has become."""
    models = []
    for seed in (0, 1):
        model = make()
        torch.manual_seed(seed)
        model.resize_token_embeddings(101, mean_resizing=False)
        models.append(model)
    targets = ["embed_tokens", "lm_head"] if make is tiny_llama else None
    attach(models[0], NewTokens(tokens=[97, 98, 99, 100], targets=targets))
    move(models[0])
    save(models[0], tmp_path)
    load(models[1], tmp_path)
    ids = torch.tensor([[5, 98, 7, 100]])
    inputs = {"labels": ids} if make is tiny_t5 else {}
    one, other = (model(input_ids=ids, **inputs).logits for model in models)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert one.shape[-1] == 101


# --- refusals -------------------------------------------------------------------------------------------------------


class Normed(nn.Embedding):
    """An embedding with a forward pass of its own."""

    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


lora = partial(LoRA, rank=2, alpha=3)


@pytest.mark.parametrize(
    ("make", "record", "error", "message"),
    [
        (tied, partial(NewTokens, tokens=[]), ValueError, "there is no token to train: give the ids"),
        (tied, partial(NewTokens, tokens="13"), TypeError, "the tokens to train must be a list of token ids; got '13'"),
        (tied, partial(NewTokens, tokens=[1.5]), TypeError, "by its id, a whole number; got 1.5"),
        (tied, partial(NewTokens, tokens=[True]), TypeError, "by its id, a whole number; got True"),
        (tied, partial(NewTokens, tokens=[3, -1]), ValueError, "id of a token to train must be 0 or more; got -1"),
        (tied, partial(NewTokens, tokens=[3, 5, 3]), ValueError, "token 3 is named 2 times among the tokens to train"),
        (
            tied, partial(NewTokens, tokens=[97, 5]), ValueError,
            r"token 97 is out of range: model.embed_tokens has 97 rows, 0 to 96. For new tokens call model.resize",
        ),
        (tied, partial(NewTokens, tokens=[1], dtype=torch.int8), TypeError, "dtype must be a floating torch dtype"),
        (tied, partial(NewTokens, tokens=[1], targets=["wte"]), ValueError, 'targets: "wte" matches no module'),
        (tied, partial(NewTokens, tokens=[1], targets=["norm"]), TypeError, "model.norm is a LlamaRMSNorm: rows of"),
        (
            lambda: nn.Sequential(nn.Embedding(7, 3)), partial(NewTokens, tokens=[1]), ValueError,
            r"this Sequential has no get_input_embeddings\(\) that tells its input embedding: name the module",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(7, 3, max_norm=1.0)), partial(NewTokens, tokens=[1], targets=["0"]),
            TypeError, "0 is a Embedding: rows of single tokens are trained in an nn.Embedding without max_norm",
        ),
        (
            lambda: nn.Sequential(Normed(7, 3)), partial(NewTokens, tokens=[1], targets=["0"]), TypeError,
            "0 is a Normed: rows of single tokens",
        ),
        (
            tied, partial(NewTokens, tokens=[1], train_modules=["lm_head"]), ValueError,
            "rows of single tokens are trained in lm_head, which train_modules names too: leave it out there",
        ),
        (tied, partial(lora, train_tokens=[97]), ValueError, "token 97 is out of range"),
        (tied, partial(lora, train_tokens=[4, 4]), ValueError, "token 4 is named 2 times"),
        (tied, partial(lora, train_tokens={"embed_tokens": []}), ValueError, "there is no token to train"),
        (tied, partial(lora, train_tokens="4"), TypeError, "must be a list of token ids"),
        (tied, partial(lora, train_tokens={"wte": [4]}), ValueError, 'train_tokens: "wte" matches no module'),
        (
            tied, partial(lora, targets=["embed_tokens", "lm_head"], train_tokens=[4]), ValueError,
            "rows of single tokens are trained in model.embed_tokens, which targets names too: leave it out there",
        ),
        (
            tied, partial(lora, train_tokens={"embed_tokens": [4], "lm_head": [5]}), ValueError,
            "lm_head and model.embed_tokens are one weight: the same tokens must be trained in both",
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
