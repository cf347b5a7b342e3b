"""Which models take our attention, and what the others say."""

import re

import pytest
import torch
import transformers as hf
from architectures import BERT, PLAIN, build, token_ids
from torch import nn

from llmtune.integrations import refusal

OTHERS = {
    "bloom": ("Bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "mpt": ("Mpt", {"vocab_size": 97, "d_model": 32, "n_layers": 1, "n_heads": 2}),
    "mpnet": ("MPNet", BERT),
    "megatron-bert": ("MegatronBert", BERT),
    "roformer": ("RoFormer", BERT),
    "deberta": ("Deberta", BERT),
    "deberta-v2": ("DebertaV2", BERT),
    "xlnet": ("XLNet", {"vocab_size": 97, "d_model": 28, "n_layer": 1, "n_head": 2, "d_inner": 29}),
    "falcon": ("Falcon", {**PLAIN, "hidden_size": 32}),
    "gpt-neo": ("GPTNeo", {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
                           "attention_types": [[["global", "local"], 1]]}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_computes_its_own_attention_is_told_by_name(name, calls):
    """Refused when it is built or in its first forward pass; or, if it asks nobody, what it always was."""
    family, sizes = OTHERS[name]
    config, plain = (getattr(hf, f"{family}Config")(**sizes) for _ in range(2))
    why = refusal(config)
    assert why is not None
    assert "modeling_" in why
    config._attn_implementation, plain._attn_implementation = "llmtune", "eager"
    make = getattr(hf, f"{family}Model")
    if "building it raises KeyError" in why:
        with pytest.raises(KeyError, match="llmtune"):
            make(config)
        return
    model = make(config).eval()
    assert refusal(model) == why
    if any(name in why for name in ("deberta", "xlnet")):  # they build no mask, so nobody could stop them
        eager = make(plain).eval()
        eager.load_state_dict(model.state_dict())
        assert torch.equal(model(input_ids=token_ids())[0], eager(input_ids=token_ids())[0])
    else:
        with pytest.raises(ValueError, match=re.escape(f'{why}; load the model with attn_implementation="eager"')):
            model(input_ids=token_ids())
    assert calls == []


def test_refusal_knows_its_kinds():
    with pytest.raises(TypeError, match="takes a Hugging Face model or its configuration, got Linear"):
        refusal(nn.Linear(2, 3))
    assert refusal(build("llama", "eager")) is None
    assert "modeling_deberta computes its attention by itself" in refusal(hf.DebertaConfig())
    assert "modeling_falcon looks its attention up in FALCON_ATTENTION_CLASSES" in refusal(hf.FalconConfig())
    pair = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(), hf.GPT2Config())
    assert refusal(pair) is None
    pair = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.DebertaConfig(), hf.GPT2Config())
    assert "modeling_deberta " in refusal(pair)
    assert "modeling_fnet has no attention" in refusal(hf.FNetConfig())
