"""`attn_implementation="llmtune"` in the ways a model is run: narrow, compiled, checkpointed, with dropout."""

import pytest
import torch
from architectures import PAIRS, build, make, padding, token_ids
from torch import nn

from llmtune.integrations import register
from llmtune.testing.close import assert_close

register()

WAYS = ["llama", "mistral, window", "gemma2, windows, softcap", "gpt2", "bert", "modernbert, windows", "t5", "bart"]


def inputs_of(name, side="right"):
    inputs = {"input_ids": token_ids(), "attention_mask": padding(side)}
    return inputs | ({"decoder_input_ids": token_ids(3, 11, seed=1)} if name in PAIRS else {})


def logits_of(model, name, **more):
    """Logits [n, V] at real tokens, at all of a decoder's beside an encoder."""
    logits = model(**inputs_of(name), **more).logits
    return logits.flatten(0, 1) if name in PAIRS else logits[padding("right").bool()]


def test_a_mask_of_the_users_own_is_the_whole_mask():
    ids = token_ids(1)
    table = torch.rand(1, 1, 17, 17, generator=torch.Generator().manual_seed(0)) > 0.4
    table = table | torch.eye(17, dtype=torch.bool)  # sees the future: nothing causal is added
    numbers = torch.zeros(1, 1, 17, 17).masked_fill(~table, torch.finfo(torch.float32).min)
    eager = build("llama", "eager")(input_ids=ids, attention_mask=numbers).logits
    for mask in (table, numbers):
        assert_close(build("llama", "llmtune")(input_ids=ids, attention_mask=mask).logits, eager, rtol=1e-5)


def test_bfloat16_autocast_mixes_no_dtypes():
    models = [build("qwen3", attention) for attention in ("llmtune", "sdpa")]  # its q and k norms give float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (logits_of(model, "qwen3") for model in models)
    assert_close(ours.float(), theirs.float(), rtol=3e-2)


@pytest.mark.parametrize("name", WAYS)
def test_a_bfloat16_model_is_as_exact_as_eager(name):
    truth = logits_of(build(name, "eager"), name).double()
    ours, theirs = (
        (logits_of(make(name, attention).bfloat16(), name).double() - truth).norm()
        for attention in ("llmtune", "eager")
    )
    assert ours <= 1.5 * theirs


DROPOUT = {
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "llama": {"attention_dropout": 0.3},
    "bert": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.0},
    "bart": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_of_attention_acts_in_training_only(name):
    model = make(name, "llmtune", **DROPOUT[name])
    assert torch.equal(logits_of(model, name), logits_of(model, name))
    model.train()
    assert not torch.equal(logits_of(model, name), logits_of(model, name))
    none = make(name, "llmtune", **dict.fromkeys(DROPOUT[name], 0.0)).train()
    assert torch.equal(logits_of(none, name), logits_of(none, name))  # so it was attention's


def gradients(model, name, **more):
    model.zero_grad()
    logits_of(model, name, **more).square().mean().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_activation_checkpointing_changes_nothing(name, reentrant):
    model = make(name, "llmtune")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    more = {} if "bert" in name else {"use_cache": False}
    plain = gradients(model, name, **more)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # what the reentrant kind needs
    again = gradients(model, name, **more)
    assert again.keys() == plain.keys()
    for key, gradient in plain.items():
        if gradient.abs().max() > 1e-6:
            assert_close(again[key], gradient, rtol=1e-5, what=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral, window", *(name for name in WAYS if name[:7] != "mistral")])
def test_a_compiled_model_equals_itself(name):
    torch.compiler.reset()
    model = make(name, "llmtune")
    compiled = torch.compile(model, backend="aot_eager")
    more = {} if "bert" in name else {"use_cache": False}
    assert_close(logits_of(compiled, name, **more), logits_of(model, name, **more), rtol=1e-5)
    if name not in PAIRS and name != "modernbert, windows":
        packed = {"input_ids": token_ids(), "position_ids": (torch.arange(17) % 6).expand(3, -1), **more}
        assert_close(compiled(**packed).logits, model(**packed).logits, rtol=1e-5)


def test_attention_weights_are_refused():
    for name, layer in (("llama", "LlamaAttention"), ("bert", "BertSelfAttention"), ("t5", "T5Attention")):
        with pytest.raises(ValueError, match=f"{layer} hands output_attentions to its attention, which attn_implem"):
            build(name, "llmtune")(**inputs_of(name), output_attentions=True)


def test_registering_twice_changes_nothing():
    from transformers import AttentionInterface, AttentionMaskInterface

    before = AttentionInterface()["llmtune"], AttentionMaskInterface()["llmtune"]
    register()
    assert (AttentionInterface()["llmtune"], AttentionMaskInterface()["llmtune"]) == before


def test_a_model_can_be_switched():
    model = make("llama", "eager")
    before = model(input_ids=token_ids()).logits
    model.set_attn_implementation("llmtune")
    assert model.config._attn_implementation == "llmtune"
    assert_close(model(input_ids=token_ids()).logits, before, rtol=1e-5)
