"""The tables of attention's family: every backend, every mask, every model we run packed, against all its laws."""

from functools import partial

import pytest
import torch

from llmtune.attention import (
    Causal,
    Dense,
    Documents,
    Padding,
    PrefixCausal,
    SlidingWindow,
    available_backends,
    scaled_dot_product_attention,
)
from llmtune.integrations import register
from llmtune.testing.attention import check_attention
from llmtune.testing.invariance import check_causal, check_packing_invariant, check_padding_invariant
from llmtune.testing.masks import check_mask
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

register()


def accepts(backend, mask):
    """Whether a backend takes a mask: it refuses others by a sentence, before any work."""
    sizes = {"B": 2, "H": 6, "T": 7, "S": 11, **mask.fixed_sizes()}
    query, key = torch.zeros(sizes["B"], sizes["H"], sizes["T"], 5), torch.zeros(sizes["B"], 3, sizes["S"], 5)
    try:
        scaled_dot_product_attention(query, key, key, mask=mask, backend=backend)
    except ValueError as refusal:
        if "cannot take" not in str(refusal):
            raise
        return False
    return True


@pytest.mark.parametrize("backend", ["auto", *available_backends()])
def test_every_backend_keeps_the_laws(backend):
    check_attention(partial(scaled_dot_product_attention, backend=backend), takes=partial(accepts, backend))


MASKS = {
    "causal": Causal(),
    "causal, offset": Causal(-3),
    "causal, offsets": Causal([1, -2]),
    "padding": Padding([3, 0]),
    "padding, left": Padding.from_attention_mask(torch.tensor([[0, 1, 1], [1, 1, 1]])),
    "documents": Documents([0, 3, 3, 7]),
    "documents, keys cut otherwise": Documents([0, 2, 5], [0, 1, 9]),
    "documents by ids": Documents.from_ids(torch.tensor([[0, 1, 1], [2, 2, 2]])),
    "documents by ids, keys too": Documents.from_ids(torch.tensor([[0, 1]]), torch.tensor([[1, 0, 0]])),
    "dense": Dense(torch.tensor([[True, False, True], [False, False, False]])),
    "dense, heads": Dense(torch.rand(1, 3, 7, 11, generator=torch.Generator().manual_seed(0)) > 0.5),
    "dense, one row": Dense(torch.tensor([[[[True, False, True]]]])),
    "dense, causal below a hole": Dense(torch.ones(7, 11).tril(3).bool() & (torch.arange(11) != 2)),
    "padding, none": Padding([11, 11]),
    "padding, a gap": Padding.from_attention_mask(torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]])),
    "padding, left, a row empty": Padding.from_attention_mask(torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])),
    "documents, the first and the last empty": Documents([0, 0, 2, 2, 2, 7, 7]),
    "documents, none for some queries": Documents([0, 2, 5, 7], [0, 0, 11, 11]),
    "documents by ids, coming back": Documents.from_ids(torch.tensor([[5, 5, 2, 2, 5], [-1, 2, 2, 2, 2]])),
    "documents by ids, one": Documents.from_ids(torch.zeros(3, 7, dtype=torch.int32)),
    "joined": Causal() & Padding([2, 5]) & Documents.from_lengths([2, 5]),
    "window": SlidingWindow(3),
    "window, its own key": SlidingWindow(1),
    "window, wider than the keys": SlidingWindow(13),
    "window, offset": SlidingWindow(2, offset=-5),
    "window, past the keys": SlidingWindow(3, offset=12),
    "window, offsets": SlidingWindow(5, offset=[-2, 9]),
    "window, causal": Causal() & SlidingWindow(3),
    "window, causal, offsets": Causal([2, -3]) & SlidingWindow(3, [2, -3]),
    "window, causal, documents, padding": Causal() & SlidingWindow(2) & Documents([0, 3, 3, 7]) & Padding([7, 4]),
    "prefix": PrefixCausal(3),
    "prefix, none": PrefixCausal(0),
    "prefix, all": PrefixCausal(11),
    "prefix, offset": PrefixCausal(2, offset=-4),
    "prefix, rows": PrefixCausal([5, 0]),
    "prefix, rows, offsets": PrefixCausal([7, 1], offset=[-1, 13]),
    "prefix, offsets": PrefixCausal(3, offset=[0, 2, -9]),
    "prefix, padding": PrefixCausal([2, 11]) & Padding([7, 11]),
    "prefix, window": PrefixCausal(5) & SlidingWindow(3),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_every_mask_keeps_its_word(mask):
    check_mask(mask)


def tiny(name, attention):
    """Decoders that `llmtune.testing.models` does not build."""
    import transformers as hf

    sizes = {
        "vocab_size": 97, "hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 14, "max_position_embeddings": 128, "pad_token_id": 2,
    }  # fmt: skip
    config, make = {
        "qwen3": (lambda: hf.Qwen3Config(**sizes), hf.Qwen3ForCausalLM),
        "mistral": (lambda: hf.MistralConfig(**sizes, sliding_window=None), hf.MistralForCausalLM),
        "mistral, window 4": (lambda: hf.MistralConfig(**sizes, sliding_window=4), hf.MistralForCausalLM),
        "gemma2": (
            lambda: hf.Gemma2Config(**sizes, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=14),
            hf.Gemma2ForCausalLM,
        ),
    }[name]
    config = config()
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = make(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.1)
    return model


DECODERS = {
    "llama": lambda attention: tiny_llama(attention=attention),
    "gpt2": lambda attention: tiny_gpt2(attention=attention),
    **{name: partial(tiny, name) for name in ("qwen3", "mistral", "mistral, window 4", "gemma2")},
}
PACKED = [(name, attention) for name in DECODERS for attention in ("sdpa", "llmtune")]
PACKED.remove(("gemma2", "sdpa"))  # torch's kernel has no soft-capping, transformers refuses it


@pytest.mark.parametrize(("name", "attention"), PACKED)
def test_documents_packed_together_equal_each_alone(name, attention):
    check_packing_invariant(DECODERS[name](attention))


def test_documents_packed_for_an_encoder_equal_each_alone():
    check_packing_invariant(tiny_bert(attention="llmtune"))
    check_packing_invariant(tiny_bert(attention="llmtune", labels=3))


@pytest.mark.parametrize("name", DECODERS)
def test_padded_decoders_equal_the_row_alone(name):
    check_padding_invariant(DECODERS[name]("llmtune"))


def test_padded_encoders_and_pairs_equal_the_row_alone():
    check_padding_invariant(tiny_bert(attention="llmtune"), sides=("right", "left"))
    check_padding_invariant(tiny_bert(attention="llmtune", labels=3))
    check_padding_invariant(tiny_t5(attention="llmtune"), sides=("right", "left"))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_see_no_future_token(name):
    model = DECODERS[name]("llmtune")
    check_causal(lambda ids: model(input_ids=ids).logits, torch.arange(3, 17).view(2, 7))
    check_causal(lambda hidden: model(inputs_embeds=hidden).logits, torch.randn(2, 7, model.config.hidden_size))
