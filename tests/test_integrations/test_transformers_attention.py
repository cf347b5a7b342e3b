"""`attn_implementation="llmtune"` against transformers' own "eager", on tiny models."""

import pytest
import torch
import transformers as hf
from torch import nn

from llmtune.integrations import register
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

register()

SIZES = {
    "vocab_size": 97, "hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 14, "max_position_embeddings": 128, "pad_token_id": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": 97, "hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 29,
    "max_position_embeddings": 64,
}  # fmt: skip
DECODERS = {
    "llama": None,
    "gpt2": None,
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES)),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=None)),
    "mistral, window 5": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=5)),
    "mistral, window 64": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=64)),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**SIZES, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=14),
    ),
    "gpt_oss": (  # sinks
        hf.GptOssForCausalLM,
        hf.GptOssConfig(
            **{**SIZES, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}, num_local_experts=2,
            num_experts_per_tok=1, sliding_window=5,
        ),
    ),
}  # fmt: skip


def build(name, attention):
    own = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5}
    if name in own:
        return own[name](attention=attention)
    kind, config = DECODERS[name]
    return filled(kind, config, attention)


def filled(kind, config, attention):
    config = type(config)(**config.to_dict())
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    return model


def token_ids(B=3, T=17, seed=0):
    return torch.randint(3, 97, (B, T), generator=torch.Generator().manual_seed(seed))


def padding(side):
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 11:], mask[2, 5:] = 0, 0
    return mask if side == "right" else mask.flip(1)


def agree(name, real=None, **inputs):
    """Logits at the real tokens, and every parameter's gradient, as with "eager"."""
    models = [build(name, attention) for attention in ("llmtune", "eager")]
    logits = [model(**inputs).logits for model in models]
    logits = logits if real is None else [each[real] for each in logits]
    assert_close(logits[0], logits[1], rtol=1e-5, what="logits")
    for each in logits:
        each.square().mean().backward()
    for (parameter, p), (_, q) in zip(*(model.named_parameters() for model in models), strict=True):
        if q.grad is not None and q.grad.abs().max() > 1e-6:
            assert_close(p.grad, q.grad, rtol=1e-4, what=f"gradient of {parameter}")


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_equal_eager(name):
    agree(name, input_ids=token_ids())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_padded_decoders_equal_eager(name, side):
    mask = padding(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # 0, 0, 0, 1, 2 ... on the left: no documents, though it looks so
    agree(name, mask.bool(), input_ids=token_ids(), attention_mask=mask, position_ids=positions)
    agree(name, mask.bool(), input_ids=token_ids(), attention_mask=mask, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gpt_oss"])  # its eager sees across documents
def test_packed_decoders_equal_eager(name):
    one = torch.cat([torch.arange(5), torch.arange(1), torch.arange(11)])
    for positions in (one[None], torch.stack([one, torch.arange(17), torch.arange(17) % 4])):
        agree(name, input_ids=token_ids(len(positions)), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("name", ["llama", "mistral, window 5"])
def test_positions_that_restart_in_a_padded_batch_are_positions_only(name):
    mask = padding("right")
    agree(name, mask.bool(), input_ids=token_ids(), attention_mask=mask, position_ids=(torch.arange(17) % 6)[None])


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_stay_apart_whatever_else_is_handed_in(name):
    model, ids = build(name, "llmtune"), token_ids(1)
    lengths = (5, 1, 11)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cuts = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
    for extra in (
        {"attention_mask": torch.ones_like(ids), "use_cache": False},
        {"use_cache": True},
        {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 11, "max_length_k": 11, "use_cache": False},
    ):
        logits = model(input_ids=ids, position_ids=positions, **extra).logits
        assert_close(logits, alone, rtol=1e-5, what=f"logits with {sorted(extra)}")


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_from_a_left_padded_batch_equals_eager(name, how):
    outputs = []
    for attention in ("llmtune", "eager"):
        model = build(name, attention)
        model.generation_config.eos_token_id = None
        outputs.append(
            model.generate(
                token_ids(), attention_mask=padding("left"), max_new_tokens=9, do_sample=False, pad_token_id=2, **how
            )
        )
    assert torch.equal(*outputs)


def test_a_prompt_in_chunks_equals_the_prompt_at_once():
    ids = token_ids()
    for name in ("llama", "mistral, window 5"):
        model = build(name, "llmtune")
        cache = hf.DynamicCache(config=model.config)
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([7, 5, 5], dim=1)]
        assert_close(torch.cat(parts, dim=1), model(input_ids=ids).logits, rtol=1e-5, what=name)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (hf.BertForMaskedLM, hf.BertConfig(**ENCODER)),
        (hf.RobertaForMaskedLM, hf.RobertaConfig(**ENCODER, pad_token_id=1)),
        (hf.ModernBertForMaskedLM, hf.ModernBertConfig(**{**ENCODER, "hidden_size": 28}, local_attention=4,
                                                       pad_token_id=0, cls_token_id=1, sep_token_id=2)),
    ],
    ids=["bert", "roberta", "modernbert, window"],
)  # fmt: skip
def test_encoders_equal_eager(kind, config):
    models = [filled(kind, config, attention) for attention in ("llmtune", "eager")]
    for mask in (None, padding("right"), padding("left")):
        ours, theirs = (model(input_ids=token_ids(), attention_mask=mask).logits for model in models)
        real = slice(None) if mask is None else mask.bool()
        assert_close(ours[real], theirs[real], rtol=1e-5)


def test_a_packed_encoder_that_keeps_its_positions_to_itself_needs_the_cuts():
    config = hf.DistilBertConfig(
        vocab_size=97, dim=22, n_layers=2, n_heads=2, hidden_dim=29, max_position_embeddings=64
    )
    model, ids = filled(hf.DistilBertForMaskedLM, config, "llmtune"), token_ids(1)
    alone = torch.cat([model(input_ids=part).logits for part in ids.split([5, 12], dim=1)], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(12)])[None]
    packed = model(input_ids=ids, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 5, 17])).logits
    assert_close(packed, alone, rtol=1e-5)


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_t5_equals_eager(side):
    inputs = {"input_ids": token_ids(), "decoder_input_ids": token_ids(3, 11, seed=1)}
    real = None
    if side is not None:
        decoder = padding(side)[:, :11] if side == "right" else padding(side)[:, 6:]
        inputs |= {"attention_mask": padding(side), "decoder_attention_mask": decoder}
        real = decoder.bool()
    agree("t5", real, **inputs)


def test_t5_generates_as_eager_does():
    outputs = []
    for attention in ("llmtune", "eager"):
        model = build("t5", attention)
        model.generation_config.eos_token_id = None
        outputs.append(model.generate(token_ids(), attention_mask=padding("right"), max_new_tokens=7, do_sample=False))
    assert torch.equal(*outputs)


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
        ours, theirs = (model(input_ids=token_ids(), attention_mask=padding("right")).logits for model in models)
    real = padding("right").bool()
    assert_close(ours[real].float(), theirs[real].float(), rtol=3e-2)


def test_dropout_acts_in_training_only():
    model = tiny_gpt2(attention="llmtune", dropout=0.3)
    ids = token_ids()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_activation_checkpointing_changes_nothing():
    model = build("llama", "llmtune").train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=token_ids(), attention_mask=padding("right"), use_cache=False).logits.square().mean().backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    assert_close(gradients[1], gradients[0], rtol=1e-6)


def test_a_compiled_model_equals_itself():
    model, ids = build("mistral, window 5", "llmtune"), token_ids()
    compiled = torch.compile(model, backend="aot_eager")
    for inputs in ({"attention_mask": padding("right")}, {"position_ids": (torch.arange(17) % 6).expand(3, -1)}):
        logits = compiled(input_ids=ids, use_cache=False, **inputs).logits
        assert_close(logits, model(input_ids=ids, use_cache=False, **inputs).logits, rtol=1e-5)


def test_registering_twice_changes_nothing():
    from transformers import AttentionInterface, AttentionMaskInterface

    before = AttentionInterface()["llmtune"], AttentionMaskInterface()["llmtune"]
    register()
    assert (AttentionInterface()["llmtune"], AttentionMaskInterface()["llmtune"]) == before


def test_a_model_can_be_switched():
    model = build("llama", "eager")
    before = model(input_ids=token_ids()).logits
    model.set_attn_implementation("llmtune")
    assert_close(model(input_ids=token_ids()).logits, before, rtol=1e-5)


def test_a_model_with_attention_of_its_own_is_refused_by_name():
    config = hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)
    model = filled(hf.BloomForCausalLM, config, "llmtune")
    with pytest.raises(ValueError, match=r"modeling_bloom computes its attention by itself and does not take"):
        model(input_ids=token_ids())
