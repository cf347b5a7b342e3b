"""The laws of whole layers and models catch the faults they are there for."""

import pytest
import torch
from torch import nn

from llmtune.errors import LawBroken
from llmtune.integrations import register
from llmtune.testing.invariance import check_causal, check_packing_invariant, check_padding_invariant
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

register()


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.flip(1).cumsum(dim=1).flip(1),
        lambda x: x - x.mean(dim=1, keepdim=True),
        lambda x: torch.cat([x[:, 1:], x[:, :1]], dim=1),  # one step ahead
        lambda x: x / x.abs().amax(),  # a scale from the whole sequence
        lambda x: x.sum(dim=-1).cumsum(1) + x[:, -1].sum(-1)[:, None] * 1e-5,
    ],
)
def test_a_layer_that_looks_ahead_is_caught(fault):
    with pytest.raises(LawBroken, match='law "causal": other inputs after position'):
        check_causal(fault)
    check_causal(lambda x: x.cumsum(dim=1))


def test_a_model_that_looks_ahead_is_caught_by_its_token_ids():
    ids = torch.arange(3, 17).view(2, 7)
    with pytest.raises(LawBroken, match="after position 0 changed the output at position 0"):
        check_causal(lambda x: tiny_bert()(input_ids=x).logits, ids)
    check_causal(lambda x: tiny_gpt2()(input_ids=x).logits, ids)


def test_a_layer_that_cannot_be_checked_says_why():
    with pytest.raises(LawBroken, match=r"two calls on the same inputs differ; switch dropout off"):
        check_causal(nn.Dropout(0.5))
    with pytest.raises(LawBroken, match="the output has NaN"):
        check_causal(lambda x: x * float("nan"))
    with pytest.raises(ValueError, match="at least 2 positions"):
        check_causal(lambda x: x, torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="two different token ids"):
        check_causal(lambda x: x, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"fn must return a tensor \[B, T, ...\]"):
        check_causal(lambda x: x.sum(dim=1))


def test_causality_is_checked_on_inputs_that_fit_the_module():
    check_causal(nn.Linear(13, 5))
    check_causal(nn.LayerNorm(17).double())
    with pytest.raises(LawBroken, match="causal"):
        check_causal(nn.Sequential(nn.Linear(13, 13), nn.Softmax(dim=1)))


def test_a_model_whose_documents_see_each_other_is_caught():
    with pytest.raises(LawBroken, match=r'"packed equals alone" \(BertForMaskedLM.*"sdpa"\): document 0'):
        check_packing_invariant(tiny_bert())  # transformers' encoders know nothing of packing
    with pytest.raises(LawBroken, match='"packed equals alone"'):
        check_packing_invariant(broken(tiny_llama))


def test_a_model_that_attends_to_padding_is_caught():
    for make in (tiny_llama, tiny_bert, tiny_t5):
        with pytest.raises(LawBroken, match='"padded equals alone"'):
            check_padding_invariant(broken(make))


def test_what_cannot_be_packed_or_padded_says_why():
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder, so its documents cannot"):
        check_packing_invariant(tiny_t5())
    with pytest.raises(ValueError, match=r'sides must be of "right" and "left", got \[\'top\'\]'):
        check_padding_invariant(tiny_llama(), sides=["top"])


def test_the_checks_leave_a_model_in_its_mode():
    model = tiny_bert(attention="llmtune", dropout=0.5).train()
    model.bert.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    check_packing_invariant(model)
    check_padding_invariant(model)
    assert {name: module.training for name, module in model.named_modules()} == before


def broken(make):
    """A model with an attention function that was registered without its mask function."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("without_a_mask", sdpa_attention_forward)
    return make(attention="without_a_mask")
