"""`attn_implementation="llmtune"` against transformers' own "eager", on a tiny seeded model of each architecture."""

import inspect

import pytest
import torch
import transformers as hf
from architectures import (
    ALL,
    CUTS,
    DECODERS,
    ENCODERS,
    PAIRS,
    POSITIONS,
    WINDOWED,
    alone,
    both,
    build,
    config_of,
    padding,
    token_ids,
)

from llmtune.integrations import refusal
from llmtune.testing.close import assert_close
from llmtune.testing.invariance import check_packing_invariant


def agree(name, real=None, **inputs):
    """Logits at the real tokens, and every parameter's gradient, as with "eager"."""
    models = both(name)
    for model in models:
        model.zero_grad()
    logits = [model(**inputs).logits for model in models]
    logits = logits if real is None else [each[real] for each in logits]
    assert_close(logits[0], logits[1], rtol=1e-5, what="logits")
    for each in logits:
        each.square().mean().backward()
    compare_gradients(*models)


def compare_gradients(model, truth):
    for (name, parameter), (_, q) in zip(model.named_parameters(), truth.named_parameters(), strict=True):
        assert (parameter.grad is None) == (q.grad is None), name
        if q.grad is not None and q.grad.abs().max() > 1e-6:
            assert_close(parameter.grad, q.grad, rtol=1e-4, what=f"gradient of {name}")


@pytest.mark.parametrize("name", ALL)
def test_every_attention_layer_runs_here(name, calls):
    inputs = {"decoder_input_ids": token_ids(3, 5)} if name in PAIRS else {}
    build(name, "llmtune")(input_ids=token_ids(), **inputs)
    own_encoder = name in ("bigbird_pegasus", "pegasus_x")  # whose encoders compute their attention by themselves
    assert len(calls) == (4 if own_encoder or "shared" in name else 6 if name in PAIRS else 2)
    assert refusal(config_of(name)) is None


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_equal_eager(name, side):
    if side is None:
        agree(name, input_ids=token_ids())
        return
    mask = padding(side)
    extra = {}
    if "position_ids" in inspect.signature(build(name, "llmtune").forward).parameters:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # on the left 0, 0, 0, 1 ...: no documents
    for use_cache in (True, False):
        agree(name, mask.bool(), input_ids=token_ids(), attention_mask=mask, use_cache=use_cache, **extra)


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_equal_eager(name, side):
    mask = None if side is None else padding(side)
    agree(name, None if mask is None else mask.bool(), input_ids=token_ids(), attention_mask=mask)


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_train_as_with_eager(name, side):
    labels = token_ids(3, 11, seed=1)
    inputs = {"input_ids": token_ids()}
    if side is not None:
        labels[~padding("right", 11).bool()] = -100
        inputs |= {"attention_mask": padding(side), "decoder_attention_mask": padding("right", 11)}
    models = both(name)
    losses = []
    for model in models:
        model.zero_grad()
        losses.append(model(**inputs, labels=labels).loss)
        losses[-1].backward()
    assert_close(losses[0], losses[1], rtol=1e-5, what="loss")
    compare_gradients(*models)


def generated(name, **how):
    """What both generate, greedily, from one prompt each."""
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 2, **how}
    return [model.generate(token_ids(), **how) for model in both(name)]


@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_generation_equals_eager(name):
    side = "right" if name in PAIRS else "left"
    assert torch.equal(*generated(name))
    assert torch.equal(*generated(name, attention_mask=padding(side)))
    assert torch.equal(*generated(name, attention_mask=padding(side), num_beams=2))


@pytest.mark.parametrize("name", ["llama", *WINDOWED])
def test_generation_with_a_static_cache_equals_eager(name):
    how = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(*generated(name, **how))
    assert torch.equal(*generated(name, attention_mask=padding("left"), **how))


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_equal_each_alone(name):
    check_packing_invariant(build(name, "llmtune"))


@pytest.mark.parametrize("name", [name for name in DECODERS if "sinks" not in name and name != "opt"])  # they mix there
def test_packed_decoders_equal_eager(name):
    positions = torch.cat([POSITIONS, torch.arange(17)[None], torch.arange(17)[None] % 4])
    agree(name, input_ids=token_ids(1), position_ids=POSITIONS, use_cache=False)
    agree(name, input_ids=token_ids(), position_ids=positions, use_cache=False)


def test_chunks_beside_packed_documents_are_counted_or_refused():
    model, ids = build("llama4, chunks", "llmtune"), token_ids(1)
    packed = {"input_ids": ids, "position_ids": POSITIONS, "use_cache": False}
    assert_close(model(**packed, cu_seq_lens_q=CUTS).logits, alone(model, ids), rtol=1e-5)
    for more in ({"use_cache": True}, {"attention_mask": torch.ones_like(ids)}):
        more = {"cu_seq_lens_q": CUTS, **more}
        with pytest.raises(ValueError, match="the chunks of chunked attention begin anew in every packed document"):
            model(**{**packed, **more})


@pytest.mark.parametrize("name", [name for name in DECODERS if "chunks" not in name])
def test_packed_documents_stay_apart_whatever_else_is_handed_in(name):
    model, ids = build(name, "llmtune"), token_ids(1)
    expected = alone(model, ids)
    for extra in (
        {"attention_mask": torch.ones_like(ids), "use_cache": False},
        {"use_cache": True},
        {"cu_seq_lens_q": CUTS, "cu_seq_lens_k": CUTS, "max_length_q": 11, "max_length_k": 11, "use_cache": False},
    ):
        logits = model(input_ids=ids, position_ids=POSITIONS, **extra).logits
        assert_close(logits, expected, rtol=1e-5, what=f"logits with {sorted(extra)}")


@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_positions_that_restart_in_a_padded_batch_are_positions_only(name):
    mask = padding("right")
    agree(name, mask.bool(), input_ids=token_ids(), attention_mask=mask, position_ids=(torch.arange(17) % 6)[None])


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "electra", "albert"])
def test_packed_documents_of_an_encoder_equal_each_alone(name):
    check_packing_invariant(build(name, "llmtune"))


@pytest.mark.parametrize("name", ["distilbert", "modernbert, windows"])
def test_an_encoder_that_keeps_its_positions_to_itself_packs_by_its_cuts(name):
    model, ids = build(name, "llmtune"), token_ids(1)
    cuts = {"cu_seq_lens_q": CUTS, "cu_seq_lens_k": CUTS, "max_length_q": 11, "max_length_k": 11}
    assert_close(model(input_ids=ids, position_ids=POSITIONS, **cuts).logits, alone(model, ids), rtol=1e-5)
    with pytest.raises(AssertionError, match="packed equals alone"):  # so it needs them
        check_packing_invariant(model)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("chunks", [[17], [7, 5, 5], [4, 1, 1, 11], [2, 2, 2, 2, 9]])
def test_a_prompt_in_chunks_through_a_sliding_cache_equals_eager(name, chunks):
    ids = token_ids()
    results = []
    for model in both(name):
        word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        cache = hf.DynamicCache(config=model.config)
        parts, seen = [], 0
        for part in ids.split(chunks, dim=1):
            seen += part.shape[1]
            parts.append(model(input_ids=part, attention_mask=padding("left")[:, :seen], **{word: cache}).logits)
        results.append(torch.cat(parts, dim=1)[padding("left").bool()])
    assert_close(results[0], results[1], rtol=1e-5)
