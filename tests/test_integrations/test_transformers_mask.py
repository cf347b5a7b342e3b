"""What travels from transformers' mask function to the attention layers, and what they make of it."""

import gc
import weakref

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import masking_utils

from llmtune.attention import Causal, Documents, Mask, Padding, scaled_dot_product_attention
from llmtune.attention.window import SlidingWindow
from llmtune.integrations import register, transformers_attention
from llmtune.integrations.transformers_attention import attention_function
from llmtune.integrations.transformers_mask import attention_mask_function, read_window_tensor, window_tensor
from llmtune.testing.models import tiny_bert, tiny_llama, tiny_t5

register()

LLAMA, T5 = tiny_llama(attention="llmtune").config, tiny_t5(attention="llmtune").config


def token_ids(B=3, T=17):
    return torch.randint(3, 97, (B, T), generator=torch.Generator().manual_seed(0))


def right_padding():
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 11:], mask[2, 5:] = 0, 0
    return mask


def mistral(window):
    config = hf.MistralConfig(
        vocab_size=97, hidden_size=28, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, sliding_window=window, attn_implementation="llmtune",
    )  # fmt: skip
    return hf.MistralForCausalLM(config).eval()


def made(*, T=5, S=5, config=LLAMA, **knobs):
    return attention_mask_function(batch_size=2, q_length=T, kv_length=S, config=config, device="cpu", **knobs)


def real(*lengths, S=5):
    return torch.arange(S) < torch.tensor(lengths)[:, None]


def test_a_plain_causal_mask_travels_as_nothing_or_as_its_padding():
    assert made() is None
    assert made(attention_mask=real(5, 5)) is None
    assert torch.equal(made(attention_mask=real(5, 3)), real(5, 3))
    assert made(T=2, S=5, q_offset=3) is None  # a cache of 3, and the last query sees the last key
    assert torch.equal(made(T=2, S=5, q_offset=3, attention_mask=real(5, 3)), real(5, 3))


def test_a_plain_bidirectional_mask_does_too():
    both = {"mask_function": masking_utils.bidirectional_mask_function, "allow_is_causal_skip": False}
    assert made(**both, allow_is_bidirectional_skip=True, S=7) is None
    padding = real(7, 3, S=7)
    assert torch.equal(made(**both, allow_is_bidirectional_skip=True, S=7, attention_mask=padding), padding)
    assert made(**both, S=7).shape == (2, 1, 5, 7)  # asked for as a table


def test_a_mask_that_is_not_aligned_to_the_last_key_travels_as_a_table():
    table = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool).expand(2, 1, 2, 5)
    assert torch.equal(made(T=2, S=5), table)  # a static cache of 5, nothing in it yet
    assert torch.equal(made(T=2, S=5, q_offset=torch.tensor(0)), table)  # static caches tell their offset as a tensor
    assert made(T=2, S=5, q_offset=torch.tensor(3)).shape == (2, 1, 2, 5)  # which is not read


def windowed(travels):
    """The size, the padding and the documents that a window tensor [2, S] tells of, as lists."""
    size, *rest = read_window_tensor(travels)
    return size, *(None if each is None else each.tolist() for each in rest)


def test_a_window_travels_small_and_only_where_it_hides_something():
    window = masking_utils.sliding_window_causal_mask_function
    assert made(mask_function=window(5), local_size=5) is None
    assert windowed(made(mask_function=window(4), local_size=4)) == (4, None, None)
    padding = real(5, 3)
    assert windowed(made(mask_function=window(4), local_size=4, attention_mask=padding)) == (4, padding.tolist(), None)
    assert torch.equal(made(mask_function=window(5), local_size=5, attention_mask=padding), padding)
    table = made(mask_function=window(4), local_size=4, config=T5)  # would not carry it
    assert torch.equal(table[0, 0], torch.ones(5, 5).tril().triu(-3).bool())


def test_a_window_on_both_sides_does_too():
    window = masking_utils.sliding_window_bidirectional_mask_function
    knobs = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    # transformers' size is the largest distance that is seen, ours the smallest that is not
    assert windowed(made(mask_function=window(2), local_size=2, **knobs)) == (3, None, None)
    assert made(mask_function=window(4), local_size=4, **knobs) is None
    assert made(mask_function=window(2), local_size=2, **knobs, T=3).shape == (2, 1, 3, 5)  # not aligned
    assert made(mask_function=window(2), local_size=2, allow_is_causal_skip=False).shape == (2, 1, 5, 5)


def test_a_window_tensor_says_all_in_its_numbers():
    documents, keys = torch.tensor([[0, 0, 1], [2, 3, 3]]), torch.tensor([[True, True, True], [False, True, False]])
    assert windowed(window_tensor(7, 2, 3)) == (7, None, None)
    assert windowed(window_tensor(1, 2, 3, real=keys)) == (1, keys.tolist(), None)
    assert windowed(window_tensor(2**31, 2, 3, documents=documents).clone()) == (2**31, None, documents.tolist())
    assert windowed(window_tensor(7, 2, 3, real=~keys & False)) == (7, [[False] * 3] * 2, None)
    for other in (keys, keys.long(), documents.int()):  # what else comes as [B, S]
        assert read_window_tensor(other) is None


WINDOWS = {
    "causal": masking_utils.sliding_window_causal_mask_function,
    "both sides": masking_utils.sliding_window_bidirectional_mask_function,
}


SIZES = [("causal", T, n, gone) for T, n, gone in [(7, 0, 0), (1, 6, 0), (3, 4, 0), (1, 9, 5), (4, 9, 5)]]


@pytest.mark.parametrize(("kind", "T", "before", "dropped"), [*SIZES, ("both sides", 7, 0, 0)])
def test_a_small_window_is_the_table_of_transformers(masks, kind, T, before, dropped):
    """T queries after `before` keys of a cache, which has dropped the first `dropped`."""
    S = before + T - dropped
    padding = torch.arange(before + T) >= torch.tensor([0, dropped + 1])[:, None]
    sizes = {
        "batch_size": 2, "q_length": T, "kv_length": S, "q_offset": before, "kv_offset": dropped, "local_size": 3,
        "mask_function": WINDOWS[kind](3), "attention_mask": padding, "device": "cpu",
    }  # fmt: skip
    causal = {"allow_is_causal_skip": kind == "causal", "allow_is_bidirectional_skip": kind != "causal"}
    travels = attention_mask_function(**sizes, **causal, config=LLAMA)
    assert travels.shape == (2, S)
    x = torch.zeros(2, 2, S, 3)
    attention_function(Layer() if kind == "causal" else CrossLayer(), x[:, :, :T], x, x, travels)
    table = masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False)
    assert torch.equal(masks[0].dense(T, S).expand(2, 1, T, S), table)


def test_a_window_that_is_not_aligned_to_the_last_key_travels_as_a_table():
    window = {"mask_function": masking_utils.sliding_window_causal_mask_function(3), "local_size": 3}
    for offset in (1, torch.tensor(3)):  # a static cache that is not full; one that tells its offset as a tensor
        assert made(T=2, S=5, q_offset=offset, **window).shape == (2, 1, 2, 5)


def test_half_a_window_is_no_window():
    past = masking_utils.sliding_window_overlay(3)  # lets the future through
    for function in (past, masking_utils.and_masks(past, masking_utils.bidirectional_mask_function)):
        table = made(mask_function=function, local_size=3)
        assert torch.equal(table[0, 0], torch.ones(5, 5).triu(-2).bool())
    twice = masking_utils.and_masks(past, masking_utils.sliding_window_causal_mask_function(2))
    assert torch.equal(made(mask_function=twice)[0, 0], torch.ones(5, 5).tril().triu(-1).bool())


def test_a_cache_that_has_dropped_its_beginning_keeps_the_padding_of_the_rest():
    padding = ~real(5, 2, S=8)
    travels = made(T=1, S=4, q_offset=7, kv_offset=4, attention_mask=padding)
    assert torch.equal(travels, padding[:, 4:])


def test_a_chunk_that_ends_within_a_short_cache_travels_as_a_table():
    chunks = masking_utils.chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.long))
    table = made(T=1, S=4, q_offset=7, kv_offset=4, mask_function=chunks, local_size=5)  # keys 4 ... 7, chunks end at 5
    assert table[:, 0, 0].tolist() == [[False, True, True, True]] * 2


def test_anything_joined_to_a_mask_makes_it_a_table():
    assert made(allow_is_causal_skip=False).shape == (2, 1, 5, 5)
    joined = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k == 4)
    for flag in (False, True):  # a model may call the function by itself and leave the flag as it is
        table = made(mask_function=joined, allow_is_causal_skip=flag, use_vmap=True)
        assert bool(table[..., 4].all())


def packed(inner, ids):
    """The closure of a packed batch, as transformers makes it (older releases left the positions alone)."""
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(inner, torch.zeros_like(ids), ids)
    return masking_utils.and_masks(inner, masking_utils.packed_sequence_mask_function(ids))


def test_packed_documents_travel_as_their_ids():
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    travels = made(mask_function=packed(masking_utils.causal_mask_function, ids), allow_is_causal_skip=False)
    assert travels.dtype == torch.int32
    assert torch.equal(travels, ids.int())
    wide = masking_utils.sliding_window_causal_mask_function(5)
    assert torch.equal(made(mask_function=packed(wide, ids), allow_is_causal_skip=False, local_size=5), ids.int())
    narrow = masking_utils.sliding_window_causal_mask_function(2)
    travels = made(mask_function=packed(narrow, ids), allow_is_causal_skip=False, local_size=2)
    assert windowed(travels) == (2, None, ids.tolist())


def test_packing_with_anything_more_in_it_travels_as_a_table():
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    causal = masking_utils.causal_mask_function

    def same_shape(batch, head, query, key):
        return key <= query

    for function in (
        packed(masking_utils.bidirectional_mask_function, ids),
        masking_utils.packed_sequence_mask_function(ids),  # sees the future of its document
        packed(same_shape, ids),  # does what causal does, but who could know
        masking_utils.and_masks(packed(causal, ids), same_shape),
        masking_utils.or_masks(packed(causal, ids), same_shape),
    ):
        assert made(mask_function=function, allow_is_causal_skip=False).shape == (2, 1, 5, 5)


def test_a_model_that_does_not_carry_small_masks_gets_tables():
    assert torch.equal(made(config=T5, attention_mask=real(5, 3)), masking_utils.sdpa_mask(
        2, 5, 5, attention_mask=real(5, 3), allow_is_causal_skip=False
    ))  # fmt: skip
    assert made(config=T5) is None


@pytest.fixture
def masks(monkeypatch):
    """The masks that attention was called with, layer by layer."""
    seen = []

    def spy(*args, mask=None, **knobs):
        seen.append(mask)
        return scaled_dot_product_attention(*args, mask=mask, **knobs)

    monkeypatch.setattr(transformers_attention, "scaled_dot_product_attention", spy)
    return seen


def kinds(mask):
    return [] if mask is None else [type(part) for part in getattr(mask, "parts", (mask,))]


def test_masks_say_what_they_mean_and_layers_share_them(masks):
    model, ids = tiny_llama(attention="llmtune"), token_ids()
    model(input_ids=ids)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    model(input_ids=ids, attention_mask=right_padding())
    model(input_ids=ids[:1], position_ids=torch.arange(17)[None] % 6, use_cache=False)
    model(input_ids=ids, position_ids=torch.arange(17).expand(3, -1) % 6, use_cache=False)
    assert [kinds(mask) for mask in masks[::2]] == [
        [Causal], [Causal], [Causal, Padding], [Causal, Documents], [Causal, Documents],
    ]  # fmt: skip
    assert masks[6].parts[1].cu_seqlens == (0, 6, 12, 17)
    for first, second in ((4, 5), (6, 7), (8, 9)):
        assert masks[first] is masks[second]


def test_encoders_say_so_too(masks):
    model, ids = tiny_bert(attention="llmtune"), token_ids()
    model(input_ids=ids)
    model(input_ids=ids, attention_mask=right_padding())
    model(input_ids=ids[:1], position_ids=torch.arange(17)[None] % 6)
    assert [kinds(mask) for mask in masks[::2]] == [[], [Padding], [Documents]]


def test_a_window_that_reaches_everywhere_is_no_table(masks):
    mistral(64)(input_ids=token_ids(), attention_mask=right_padding())
    mistral(5)(input_ids=token_ids())
    mistral(64)(input_ids=token_ids(1), position_ids=torch.arange(17)[None] % 6, use_cache=False)
    assert [kinds(mask) for mask in masks[::2]] == [[Causal, Padding], [Causal, SlidingWindow], [Causal, Documents]]


@pytest.mark.parametrize("knobs", [{"use_cache": False}, {"use_cache": True}])
def test_no_table_is_made_for_a_window(masks, knobs):
    model, ids = mistral(5), token_ids()
    model(input_ids=ids, attention_mask=right_padding(), **knobs)
    model(input_ids=ids, position_ids=torch.arange(17).expand(3, -1) % 6, **knobs)
    wanted = [[Causal, SlidingWindow, Padding], [Causal, SlidingWindow, Documents]]
    assert [sorted(kinds(mask), key=lambda kind: kind.__name__) for mask in masks[::2]] == [
        sorted(each, key=lambda kind: kind.__name__) for each in wanted
    ]
    assert all(part.size == 5 for mask in masks for part in mask.parts if isinstance(part, SlidingWindow))
    assert masks[0] is masks[1]


def test_kept_masks_go_with_their_batch(masks):
    model = tiny_llama(attention="llmtune")
    for inputs in (
        {"attention_mask": right_padding()},
        {"position_ids": (torch.arange(17) % 6).expand(3, -1), "use_cache": False},
        {"attention_mask": torch.rand(1, 1, 17, 17) > 0.1},
    ):
        model(input_ids=token_ids(), **inputs)
    assert all(isinstance(mask, Mask) for mask in masks)
    gone = [weakref.ref(mask) for mask in masks]
    masks.clear()
    del inputs
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_a_mask_written_over_in_place_is_read_again():
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    before = call(mask=mask)[0]
    mask[:] = True
    assert torch.equal(call(mask=mask)[0], call(mask=mask.clone())[0])
    assert not torch.equal(call(mask=mask)[0], before)


class Layer(nn.Module):
    is_causal = True


class CrossLayer(nn.Module):
    is_causal = False


def call(module=None, T=5, S=5, mask=None, **kwargs):
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 2, T, 3, generator=g), torch.randn(1, 2, S, 3, generator=g)
    return attention_function(module or Layer(), query, key, key, mask, **kwargs)


def test_the_output_is_turned_as_transformers_wants_it():
    out, weights = call(T=5)
    assert out.shape == (1, 5, 2, 3)
    assert out.is_contiguous()
    assert weights is None


@pytest.mark.parametrize("name", ["indices", "sinks", "alibi", "head_mask", "cache", "output_attentions"])
def test_what_it_cannot_honour_it_refuses(name):
    with pytest.raises(ValueError, match=f"Layer hands {name} to its attention, which attn_implementation"):
        call(**{name: torch.zeros(1) if name != "output_attentions" else True})
    call(**{name: None})


def test_a_window_beside_a_mask_without_one_is_honoured():
    out = call(T=7, S=7, sliding_window=3)[0]
    expected = torch.ones(7, 7, dtype=torch.bool).tril().triu(-2)
    assert torch.equal(out, call(T=7, S=7, mask=expected[None, None])[0])


def test_positions_count_as_packing_only_where_they_surely_are():
    packed = torch.tensor([[0, 1, 0, 1, 2]])
    apart, plain = call(position_ids=packed)[0], call()[0]
    assert not torch.equal(apart, plain)
    for positions in ([0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 1, 5, 6, 2], [0, 1, 2, 1, 2]):
        assert torch.equal(call(position_ids=torch.tensor([positions]))[0], plain)
    assert torch.equal(call(position_ids=packed + 2)[0], apart)  # RoBERTa counts from 2
    cached = torch.tensor([[3, 4, 0, 1, 2]])
    assert torch.equal(call(S=8, position_ids=cached)[0], call(S=8)[0])
    bidirectional = call(CrossLayer())[0]
    assert torch.equal(call(CrossLayer(), position_ids=packed)[0], bidirectional)


def test_nothing_is_added_to_a_table_of_the_users_own():
    table = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    out = call(mask=table)[0]
    assert torch.equal(out, call(CrossLayer())[0])  # not even causality
    assert torch.equal(call(mask=table, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))[0], out)
    for own in (table, torch.zeros(1, 1, 5, 5)):  # the first says what may be seen, the second is added
        with pytest.raises(ValueError, match=r"cu_seq_lens_q cannot be joined to a mask \[B, 1, T, S\]"):
            call(mask=own, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    assert torch.equal(call(mask=table, sliding_window=2)[0], out)


def test_one_mask_beside_other_positions_or_cuts_is_another_mask():
    own = torch.ones(1, 5, dtype=torch.bool)
    for kind, tensors in (
        ("cu_seq_lens_q", [torch.tensor(cuts) for cuts in ([0, 2, 5], [0, 3, 5], [0, 5])]),
        ("cu_seq_lens_q", [(0, 2, 5), (0, 3, 5), (0, 5)]),
    ):
        found = [call(mask=own, **{kind: cuts})[0] for cuts in tensors]
        truth = [call(mask=own.clone(), **{kind: cuts})[0] for cuts in tensors]
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
        assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("inference", [False, True])
def test_positions_changed_in_place_are_read_anew(inference):
    with torch.inference_mode(inference):
        positions = torch.tensor([[0, 1, 0, 1, 2]])
        first = call(position_ids=positions)[0]
        positions.copy_(torch.tensor([[0, 1, 2, 0, 1]]))
        assert torch.equal(call(position_ids=positions)[0], call(position_ids=positions.clone())[0])
        assert not torch.equal(call(position_ids=positions)[0], first)


def test_numbers_to_add_come_together_and_in_any_dtype():
    g = torch.Generator().manual_seed(1)
    numbers, bias = torch.randn(1, 1, 5, 5, generator=g), torch.randn(1, 2, 5, 5, generator=g)
    both = call(mask=numbers, position_bias=bias)[0]
    assert torch.equal(both, call(CrossLayer(), position_bias=numbers + bias)[0])
    low = bias.bfloat16()
    assert torch.equal(call(CrossLayer(), position_bias=low)[0], call(CrossLayer(), position_bias=low.float())[0])


def test_dropout_waits_for_training():
    layer = Layer()
    assert torch.equal(call(layer.eval(), dropout=0.9)[0], call()[0])
    assert not torch.equal(call(layer.train(), dropout=0.9)[0], call()[0])


def test_a_single_query_may_have_cuts_of_its_keys():
    decoding = {"cu_seq_lens_q": torch.tensor([0, 1]), "cu_seq_lens_k": torch.tensor([0, 7])}
    assert torch.equal(call(T=1, S=7, **decoding)[0], call(T=1, S=7)[0])


def test_cuts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"Documents covers 4 queries, but there are 5 \(T\)"):
        call(cu_seq_lens_q=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="needs cu_seq_lens_q and cu_seq_lens_k to be the same"):
        call(S=7, cu_seq_lens_q=torch.tensor([0, 2, 5]), cu_seq_lens_k=torch.tensor([0, 4, 7]))
    x = torch.zeros(2, 2, 5, 3)
    with pytest.raises(ValueError, match="cuts the documents of one row, but the batch has 2"):
        attention_function(Layer(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 5]))


def test_what_is_made_in_inference_mode_serves_training_afterwards():
    model = tiny_llama(attention="llmtune")
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    for inputs in (
        {"position_ids": positions, "input_ids": ids[:1]},
        {"attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool).tril(), "input_ids": ids[:1]},
        {"attention_mask": (torch.arange(12) > 3).long().expand(2, -1), "input_ids": ids},
    ):
        with torch.inference_mode():
            before = model(**inputs).logits
        after = model(**inputs).logits
        torch.testing.assert_close(after, before.clone())
        after.sum().backward()
