import copy
import re

import pytest
import torch
from torch.nn import functional as F

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.prompt import PromptTuning
from llmtune.data.collate import collate_padded
from llmtune.losses.classification import classification_loss
from llmtune.regularizers import hidden_mixing, mixup_classifier
from llmtune.regularizers.hidden_mixing import layer_stack
from llmtune.regularizers.mixing import Pairs, mixup_pairs
from llmtune.regularizers.mixup_classifier import MixupLoss
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.types import LossFunction

LABELS = (2, 0, -100, 1, 0)
ROWS = [{**row, "labels": LABELS[index]} for index, row in enumerate(uneven_rows(5))]
EQUAL = [{**row, "input_ids": [*row["input_ids"], *range(3, 30)][:11]} for row in ROWS]


def classifier(kind):
    """Return a classifier of three classes in float64 whose padding token, 0, is in no row."""
    if kind == "bert":
        return tiny_bert(labels=3).double()
    from transformers import GPT2ForSequenceClassification, LlamaForSequenceClassification

    made, base = {
        "llama": (LlamaForSequenceClassification, tiny_llama()),
        "gpt2": (GPT2ForSequenceClassification, tiny_gpt2()),
    }[kind]
    config = copy.deepcopy(base.config)
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    model = made(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def by_hand(model, batch, pairs, layer):
    """The mixed logits, layer by layer, with each row's mask built by hand."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    T = ids.shape[1]
    causal = torch.ones(T, T).tril().bool() if hasattr(model, "model") else torch.ones(T, T).bool()
    joined = torch.where((pairs.weights < 1)[:, None], real | real[pairs.partners], real)
    if hasattr(model, "bert"):
        h, layers, extra = model.bert.embeddings(input_ids=ids), model.bert.encoder.layer, {}
    else:
        h, layers = model.model.embed_tokens(ids), model.model.layers
        extra = {"position_embeddings": model.model.rotary_emb(h, position_ids=torch.arange(T)[None])}
    own = pairs.weights.double()[:, None, None]
    for number, module in enumerate(layers):
        if number == layer:
            h = h * real[..., None]
            h = own * h + (1 - own) * h[pairs.partners]
        seen = real if number < layer else joined
        h = module(h, attention_mask=causal & seen[:, None, None, :], **extra)
    if hasattr(model, "bert"):
        return model.classifier(model.bert.pooler(h))
    last = (joined * torch.arange(T)).argmax(1)
    return model.score(model.model.norm(h))[torch.arange(len(h)), last]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_equals_the_mixture_by_hand(kind, layer, side):
    model, batch = classifier(kind), collate_padded(ROWS, side=side)
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    loss = MixupLoss(alpha=1.0, layer=layer)
    torch.manual_seed(7)
    found = loss(model, batch)
    torch.manual_seed(7)
    pairs = mixup_pairs(batch["labels"], alpha=1.0)
    logits = by_hand(model, batch, pairs, layer)
    kept = batch["labels"] != -100
    soft = F.one_hot(batch["labels"].clamp(min=0), 3) * pairs.weights.double()[:, None]
    soft = soft + (F.one_hot(batch["labels"].clamp(min=0), 3)[pairs.partners] * (1 - pairs.weights.double())[:, None])
    assert_close(found, F.cross_entropy(logits[kept], soft[kept]), rtol=1e-6)
    assert isinstance(loss, LossFunction)
    assert loss.count_targets(batch) == 4


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_share_1_is_the_plain_loss(kind, monkeypatch):
    whole = Pairs(torch.ones(5), torch.tensor([1, 3, 2, 4, 0]))
    monkeypatch.setattr(mixup_classifier, "mixup_pairs", lambda targets, alpha: whole)
    model, batch = classifier(kind), collate_padded(ROWS)
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    for layer in (0, 1):
        assert_close(MixupLoss(alpha=1.0, layer=layer)(model, batch), classification_loss(model, batch), rtol=1e-9)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_share_0_of_rows_of_one_length_is_the_partners_loss(kind, monkeypatch):
    given = Pairs(torch.zeros(5), torch.tensor([1, 3, 2, 4, 0]))
    monkeypatch.setattr(mixup_classifier, "mixup_pairs", lambda targets, alpha: given)
    model, batch = classifier(kind), collate_padded(EQUAL)
    for layer in (0, 1):
        assert_close(MixupLoss(alpha=1.0, layer=layer)(model, batch), classification_loss(model, batch), rtol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_more_padding_changes_nothing(kind):
    model, batch = classifier(kind), collate_padded(ROWS)
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    wide = {**batch, **{name: F.pad(batch[name], (0, 4)) for name in ("input_ids", "attention_mask")}}
    values = []
    for given in (batch, wide):
        torch.manual_seed(2)
        values.append(MixupLoss(alpha=1.0, layer=1)(model, given).item())
    assert values[1] == pytest.approx(values[0], rel=1e-9)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_joins_the_masks(attention):
    model, batch = classifier("bert"), collate_padded(ROWS)
    torch.manual_seed(2)
    expected = MixupLoss(alpha=1.0)(model, batch).item()
    model.set_attn_implementation(attention)
    torch.manual_seed(2)
    assert MixupLoss(alpha=1.0)(model, batch).item() == pytest.approx(expected, rel=1e-6)


def test_of_several_layers_one_is_drawn(monkeypatch):
    seen = []
    real_one = hidden_mixing.mixed_at
    monkeypatch.setattr(
        mixup_classifier, "mixed_at", lambda m, layer, *rest: seen.append(layer) or real_one(m, layer, *rest)
    )
    model, batch = tiny_bert(labels=3), collate_padded(ROWS)
    for _ in range(30):
        MixupLoss(alpha=1.0, layer=(0, 1))(model, batch)
    assert 5 < seen.count(0) < 25
    assert seen.count(0) + seen.count(1) == 30


def test_the_model_is_as_it_was_and_evaluation_is_plain():
    model, batch = tiny_bert(labels=3), collate_padded(ROWS)
    modules = dict(model.named_modules())
    MixupLoss(alpha=1.0)(model, batch)
    with pytest.raises(ValueError, match="layer must be between 0 and 1, the model has 2; got 5"):
        MixupLoss(alpha=1.0, layer=5)(model, batch)
    with pytest.raises(IndexError, match="out of range"):
        MixupLoss(alpha=1.0)(model, {**batch, "input_ids": batch["input_ids"] + 97})
    assert dict(model.named_modules()) == modules
    with torch.no_grad():
        assert MixupLoss(alpha=1.0)(model, batch).item() == classification_loss(model, batch).item()


def gradient_of(model, batch):
    model.zero_grad()
    torch.manual_seed(4)
    MixupLoss(alpha=1.0, layer=1)(model, batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_under_adapters_checkpointing_and_autocast(kind):
    """What checkpointing runs again must be mixed as it was: the gradient says so."""
    model, batch = classifier(kind).train(), collate_padded(ROWS)
    attach(model, LoRA(rank=2, alpha=4, dtype=torch.float64))
    expected = gradient_of(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(gradient_of(model, batch), expected, rtol=1e-6)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = MixupLoss(alpha=1.0)(model.float(), batch)
    loss.backward()
    assert loss.dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_model_is_mixed():
    model, batch = tiny_bert(labels=3), collate_padded(ROWS)
    once = torch.compile(copy.deepcopy(model), backend="aot_eager")
    once(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for seed in range(3):
        values = []
        for called in (model, once):
            torch.manual_seed(seed)
            values.append(MixupLoss(alpha=1.0, layer=1)(called, batch).item())
        assert values[1] == pytest.approx(values[0], rel=1e-5)
    torch._dynamo.reset()


def test_the_stack_is_found():
    assert [len(layer_stack(model)) for model in (tiny_bert(labels=3), tiny_llama(), tiny_gpt2())] == [2, 2, 2]
    message = r"T5ForConditionalGeneration has encoder\.block, decoder\.block"
    with pytest.raises(ValueError, match=message):
        layer_stack(tiny_t5())
    with pytest.raises(ValueError, match="Linear has none"):
        layer_stack(torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be a finite number larger than 0; got 0.0"),
        (
            {"alpha": 1.0, "layer": (0, 0.5)},
            "layer must be a number from 0, or a tuple of one or more such; got (0, 0.5)",
        ),
        ({"alpha": 1.0, "layer": "0"}, "layer must be a number from 0, or a tuple of one or more such; got '0'"),
        ({"alpha": 1.0, "layer": -1}, "layer must be a number from 0, or a tuple of one or more such; got -1"),
        ({"alpha": 1.0, "layer": ()}, "or a tuple of one or more such; got ()"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MixupLoss(**options)


def test_what_cannot_be_mixed_is_refused():
    loss, batch = MixupLoss(alpha=1.0), collate_padded(ROWS)
    message = r"mixup is for classification of whole rows, so integer labels \[B\] are needed; got "
    with pytest.raises(ValueError, match=message + r"torch.int64 \[5, 7\]. A mixture of two texts has no next token"):
        loss(tiny_llama(), collate_padded(uneven_rows(5)))
    with pytest.raises(ValueError, match=message + r"torch.float32 \[5\]"):
        loss(tiny_bert(labels=3), {**batch, "labels": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"mixup needs two rows .* got 1 of 1"):
        loss(tiny_bert(labels=3), collate_padded(ROWS[:1]))
    model = tiny_bert(labels=3)
    attach(model, PromptTuning(tokens=3))
    with pytest.raises(ValueError, match=r"is given \[5, 10, 22\] where hidden states \[5, 7, 'E'\] are expected"):
        loss(model, batch)
