"""Where a model's body is, and every refusal of prompts and prefixes: at attaching before anything, or at the batch."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    adapter_names,
    adapter_parameters,
    attach,
    disabled,
)
from llmtune.adapters.body import find_body
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

T, N = 11, 5
IDS = torch.randint(3, 97, (2, T), generator=torch.Generator().manual_seed(0))
RECORDS = [PromptTuning(tokens=N), PTuning(tokens=N), PrefixTuning(tokens=N)]
every_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)


def encoder_only():
    from transformers import T5EncoderModel

    return T5EncoderModel(tiny_t5().config)


def distilbert():
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=97, dim=22, n_layers=2, n_heads=2, hidden_dim=29))


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=22, num_hidden_layers=2, state_size=3))


def tiny_opt(cls=None):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=97, hidden_size=26, ffn_dim=31, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=26, pad_token_id=0, dropout=0.0,
    )  # fmt: skip
    return (cls or OPTForCausalLM)(config).eval()


def opt_classifier():
    from transformers import OPTForSequenceClassification

    return tiny_opt(OPTForSequenceClassification)


def bart_decoder():
    from transformers import BartConfig, BartForCausalLM

    config = BartConfig(
        vocab_size=97, d_model=26, encoder_layers=2, encoder_attention_heads=2, decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=31, dropout=0.0,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return BartForCausalLM(config).eval()


class Stub(nn.Module):
    """What a Hugging Face model shows of itself, and no more."""

    base_model_prefix = "body"

    def __init__(self, body, **config):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: config.get("text", self.config))
        self.body = body


class Speechless(nn.Module):
    def forward(self, inputs_embeds):
        return inputs_embeds


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (tiny_llama, ("model", None)),
        (tiny_gpt2, ("transformer", None)),
        (tiny_bert, ("bert", None)),
        (tiny_t5, ("encoder", "decoder")),
        (lambda: tiny_t5().get_submodule(""), ("encoder", "decoder")),
        (encoder_only, ("encoder", None)),
        (tiny_opt, ("model.decoder", None)),
        (opt_classifier, ("model.decoder", None)),
        (bart_decoder, ("model.decoder", None)),
        (lambda: nn.ModuleDict({"inner": tiny_bert().bert}), ("inner", None)),
        (lambda: nn.ModuleDict({"inner": tiny_llama()}), ("inner.model", None)),
        (lambda: nn.ModuleDict({"inner": tiny_t5()}), ("inner.encoder", "inner.decoder")),
    ],
)
def test_the_body_is_found_bare_or_adapted(make, places):
    model = make()
    for _ in range(2):
        body = find_body(model, "it")
        assert (body.place, body.decoder_place) == places
        attach(model, PromptTuning(tokens=N), f"adapter{len(adapter_names(model))}")


@every_record
@pytest.mark.parametrize("make", [tiny_opt, opt_classifier, bart_decoder, tiny_llama, tiny_gpt2])
def test_the_body_found_is_the_one_that_runs(make, record):
    model, mask = make(), torch.ones_like(IDS)
    with torch.no_grad():
        plain = model(input_ids=IDS, attention_mask=mask).logits
        attach(model, record)
        assert not torch.allclose(model(input_ids=IDS, attention_mask=mask).logits, plain, atol=1e-3)
    model(input_ids=IDS, attention_mask=mask).logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter_parameters(model).values())


def test_an_encoder_without_a_decoder_keeps_its_shape():
    model = encoder_only().eval()
    attach(model, PromptTuning(tokens=N))
    assert model(input_ids=IDS).last_hidden_state.shape == (2, T, 26)
    for record in RECORDS:
        with torch.no_grad():
            plain = model(input_ids=IDS).last_hidden_state
            attach(model, record, type(record).__name__)
            found = model(input_ids=IDS).last_hidden_state
            masked = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
        assert not torch.allclose(found, plain, atol=1e-3)
        torch.testing.assert_close(masked, found)


@every_record
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_bert().bert, "the model itself, a BertModel, is the body .* put it into a module that calls it"),
        (lambda: tiny_llama().model, "the model itself, a LlamaModel, is the body"),
        (lambda: nn.Linear(3, 5), "needs one Hugging Face model to stand in the body of; this Linear holds none"),
        (lambda: nn.ModuleList([tiny_bert(), tiny_gpt2()]), "this ModuleList holds BertForMaskedLM, GPT2LMHeadModel"),
        (lambda: Stub(nn.Identity(), text=1), "goes to models of text alone; Stub has parts beside its text model"),
        (lambda: Stub(nn.Linear(3, 5)), "needs a body that takes inputs_embeds; Linear does not"),
    ],
)
def test_a_model_without_such_a_body_is_refused(make, message, record):
    model = make()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError, match=message):
        attach(model, record)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert adapter_names(model) == []


def test_what_each_needs_of_a_body():
    for record in RECORDS[:2]:
        with pytest.raises(TypeError, match="needs a body with an embedding of tokens; Speechless has none"):
            attach(Stub(Speechless()), record)
    for make in (distilbert, mamba):
        model = make()
        with pytest.raises(TypeError, match=r"PrefixTuning needs a body in which each of the 2 layers keeps keys"):
            attach(model, PrefixTuning(tokens=N))
        attach(model, PromptTuning(tokens=N))


@every_record
def test_batches_to_which_nothing_can_be_put_first_are_refused(record):
    model = tiny_llama()
    attach(model, record)
    packed = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5])
    for inputs, message in (
        ({"position_ids": packed[None]}, r"the batch is packed .* give one document a row \(collate_padded\)"),
        ({"position_ids": packed[None], "attention_mask": torch.ones_like(IDS)}, "the batch is packed"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 11])}, "the batch is packed"),
        ({"position_ids": packed.expand(3, 2, -1)}, r"need position_ids as \[B, T\]; got \[3, 2, 11\]"),
        ({"attention_mask": torch.ones(2, 1, T, T)}, r"attention_mask as \[B, S\], .*; got \[2, 1, 11, 11\]"),
        ({"attention_mask": {"full_attention": None}}, r"attention_mask as \[B, S\], .*; got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=IDS, **inputs)
        if not isinstance(inputs.get("attention_mask"), dict) and "position_ids" not in inputs:
            with disabled(model):
                model(input_ids=IDS, **inputs)
    padded = torch.tensor([[0] * 5 + list(range(6))])
    mask = torch.ones_like(IDS)
    mask[:, :5] = 0
    model(input_ids=IDS, attention_mask=mask, position_ids=padded)  # padding on the left looks alike, and is not packed
    with pytest.raises(ValueError, match=r"StaticCache is of a fixed size, .* use a dynamic cache|attention_mask as"):
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), cache_implementation="static")


@pytest.mark.parametrize("attention", ["sdpa", "llmtune"])
def test_the_training_loop_refuses_packed_batches_with_the_same_sentence(attention):
    from llmtune.integrations import register
    from llmtune.losses.packed import check_documents_apart

    register()
    model = tiny_llama(attention=attention)
    attach(model, PrefixTuning(tokens=N))
    with pytest.raises(ValueError, match="the batch is packed"):
        check_documents_apart(model, {"input_ids": IDS, "position_ids": torch.arange(T).expand(2, -1)})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PromptTuning(tokens=0), ValueError, "tokens must be a whole number of at least 1; got 0"),
        (lambda: PrefixTuning(tokens=2.0), ValueError, "tokens must be a whole number of at least 1; got 2.0"),
        (lambda: PTuning(tokens=5, dtype="float32"), TypeError, "dtype must be a floating torch dtype; got 'float32'"),
        (lambda: PromptTuning(tokens=5, train_modules="head"), TypeError, "train_modules must be a list of suffixes"),
        (lambda: PromptTuning(tokens=5, initialise="text"), ValueError, '"random" or "vocabulary"; got \'text\''),
        (lambda: PromptTuning(tokens=5, seed="3"), TypeError, "seed must be a whole number or None; got '3'"),
        (lambda: PTuning(tokens=5, encoder="gru"), ValueError, '"mlp", "lstm" or None; got \'gru\''),
        (lambda: PTuning(tokens=5, hidden=0), ValueError, "hidden must be a whole number of at least 1; got 0"),
        (lambda: PTuning(tokens=5, layers=3), ValueError, "layers and dropout are of the LSTM .* got layers=3"),
        (lambda: PTuning(tokens=5, dropout=0.1), ValueError, "layers and dropout are of the LSTM .* dropout=0.1"),
        (lambda: PTuning(tokens=5, encoder="lstm", dropout=1.0), ValueError, "dropout must be a probability"),
        (lambda: PTuning(tokens=5, encoder="lstm", layers=1, dropout=0.1), ValueError, "layers=1 has no between"),
        (lambda: PTuning(tokens=5, encoder=None, hidden=3), ValueError, "hidden has no meaning without an encoder"),
        (lambda: PrefixTuning(tokens=5, hidden=3), ValueError, "hidden has no meaning without projection=True; got 3"),
        (lambda: PrefixTuning(tokens=5, projection=7), TypeError, "projection must be True or False"),
    ],
)
def test_a_record_says_what_is_wrong_with_it(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_modules_trained_whole_keep_to_themselves():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r'train_modules: "nothing" matches no module'):
        attach(model, PromptTuning(tokens=N, train_modules=["nothing"]))
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"], train_modules=["layers.1"]).__class__(
        rank=2, alpha=3, targets=[], train_modules=["layers.1"]))  # fmt: skip
    with pytest.raises(ValueError, match=r"layers.1.self_attn already belongs to adapter \"default\""):
        attach(model, PrefixTuning(tokens=N), "prefix")
    attach(model, PromptTuning(tokens=N), "prompt")
