"""Layers put together from our parts compute what Hugging Face's own layers compute, with the same weights."""

import pytest
import torch
from rebuilt import (
    LENGTHS,
    B,
    S,
    T,
    bert,
    captured,
    gemma2,
    gpt2,
    gpt_neox,
    llama,
    olmo2,
    parameters,
    phi,
    qwen3,
    t5,
)

from llmtune.attention import Causal, Padding
from llmtune.testing import assert_close

DECODERS = {
    "gpt2": gpt2, "llama": llama, "qwen3": qwen3, "gpt_neox": gpt_neox, "olmo2": olmo2, "gemma2": gemma2, "phi": phi
}  # fmt: skip


def token_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (B, length), generator=torch.Generator().manual_seed(seed))


def attention_mask(length: int, side: str = "right") -> torch.Tensor:
    mask = (torch.arange(length) < torch.tensor(LENGTHS)[:, None]).long()
    return mask if side == "right" else mask.flip(1)


def check_same(made, output, theirs, real):
    """The outputs at the real tokens, and the gradients of the parameters in `theirs.names`."""
    assert_close(made[real], output[real], rtol=1e-5)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)) * real[..., None]
    others = parameters(theirs.layer, theirs.names)
    ours = dict(theirs.block.named_parameters())
    got = torch.autograd.grad(made, [ours[name] for name in others], weights)
    wanted = torch.autograd.grad(output, list(others.values()), weights)
    # One scale for all: the gradient of a key's bias is 0 but for rounding, since it moves all scores of a query alike.
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for name, mine, other in zip(others, got, wanted, strict=True):
        off = float((mine - other).abs().max())
        assert off <= 1e-5 * largest, f"gradient of {name} is off by {off:.3g}, the largest is {largest:.3g}"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_layer(name, side):
    theirs, mask = DECODERS[name](), attention_mask(T, side)
    hidden, output = captured(
        theirs.layer, lambda: theirs.model(input_ids=token_ids(T), attention_mask=mask, use_cache=False)
    )
    made = theirs.block(hidden.detach(), mask=Causal() & Padding.from_attention_mask(mask))
    check_same(made, output, theirs, mask.bool())


def test_a_bert_layer():
    theirs, mask = bert(), attention_mask(T)
    hidden, output = captured(theirs.layer, lambda: theirs.model(input_ids=token_ids(T), attention_mask=mask))
    made = theirs.block(hidden.detach(), mask=Padding(LENGTHS))
    check_same(made, output, theirs, mask.bool())


def run_t5(theirs, mask):
    """What the layer is given and gives, and what the encoder hands to the decoder."""
    kept = {}

    def run():
        kept["outputs"] = theirs.model(
            input_ids=token_ids(T), attention_mask=mask, decoder_input_ids=token_ids(S, seed=1), use_cache=False
        )

    hidden, output = captured(theirs.layer, run)
    return hidden, output, kept["outputs"].encoder_last_hidden_state


def test_a_t5_encoder_layer():
    theirs, mask = t5("encoder"), attention_mask(T)
    hidden, output, _ = run_t5(theirs, mask)
    made = theirs.block(hidden.detach(), bias=theirs.bias, mask=Padding(LENGTHS))
    check_same(made, output, theirs, mask.bool())


def test_a_t5_decoder_layer():
    theirs, mask = t5("decoder"), attention_mask(T)
    hidden, output, encoded = run_t5(theirs, mask)
    made = theirs.block(
        hidden.detach(), bias=theirs.bias, mask=Causal(), context=encoded.detach(), context_mask=Padding(LENGTHS)
    )
    check_same(made, output, theirs, torch.ones(B, S, dtype=torch.bool))


def test_the_gradient_reaches_the_hidden_states_and_the_shared_bias():
    theirs, mask = t5("encoder"), attention_mask(T)
    hidden, output, _ = run_t5(theirs, mask)
    # In their model the bias is computed in the first layer: hand it to this one apart, so that it is all of the way.
    first, attention = theirs.model.encoder.block[0].layer[0].SelfAttention, theirs.layer.layer[0]
    inputs = hidden.detach().requires_grad_()
    position_bias = first.compute_bias(T, T) + torch.where(mask[:, None, None, :].bool(), 0.0, -1e30)
    again = theirs.layer.layer[1](
        inputs + attention.SelfAttention(attention.layer_norm(inputs), position_bias=position_bias)[0]
    )
    assert_close(again[mask.bool()], output[mask.bool()])
    weights = torch.randn(output.shape) * mask[..., None]
    wanted = torch.autograd.grad(again, [inputs, first.relative_attention_bias.weight], weights)

    leaf = hidden.detach().requires_grad_()
    made = theirs.block(leaf, bias=theirs.bias, mask=Padding(LENGTHS))
    got = torch.autograd.grad(made, [leaf, theirs.bias.weight], weights)
    for ours, others in zip(got, wanted, strict=True):
        assert_close(ours, others, rtol=1e-5)
