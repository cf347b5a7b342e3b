"""Decoding with a cache equals the full forward pass, whatever the chunks; and what is held is no more than needed."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmtune.attention import Causal, Padding, scaled_dot_product_attention
from llmtune.attention.cache import GrowingCache, StaticCache
from llmtune.attention.window import SlidingWindow

B, H, K, D, DV = 3, 4, 2, 5, 7
T = 157


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(length=T, seed=0):
    shapes = ((B, H, length, D), (B, K, length, D), (B, K, length, DV))
    return [draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def growing(window=None, length=T):
    return GrowingCache(window)


def static(window=None, length=T):
    return StaticCache(B, K, length, D, DV, window=window, dtype=torch.float64)


def causal(window):
    return Causal() if window is None else Causal() & SlidingWindow(window)


def chunks(length, sizes):
    """Cuts at these sizes, over and over until the length is reached."""
    cuts, turn = [0], 0
    while cuts[-1] < length:
        cuts.append(min(cuts[-1] + sizes[turn % len(sizes)], length))
        turn += 1
    return list(pairwise(cuts))


def decode(cache, query, key, value, sizes, mask):
    parts = []
    for start, end in chunks(query.shape[2], sizes):
        assert cache.length == start
        held = cache.held
        keys, values = cache.update(key[:, :, start:end], value[:, :, start:end])
        assert keys.shape[2] == values.shape[2] == held + end - start
        parts.append(scaled_dot_product_attention(query[:, :, start:end], keys, values, mask=mask))
    return torch.cat(parts, dim=2)


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


MAKERS = pytest.mark.parametrize("make", [growing, static])
WINDOWS = pytest.mark.parametrize("window", [None, 1, 2, 7, 31, 156, 157, 500])
SIZES = pytest.mark.parametrize(
    "sizes",
    [[1], [13, 1, 1, 1], [1, 2, 3, 5, 7, 11], [31, 29, 1], [97, 1], [157], [0, 3], [8, 61, 1, 1, 1, 1, 1, 1, 1, 1]],
)


# --- decoding equals the full forward ---


@MAKERS
@WINDOWS
@SIZES
def test_decoding_equals_the_full_forward(make, window, sizes):
    query, key, value = inputs()
    whole = scaled_dot_product_attention(query, key, value, mask=causal(window), backend="reference")
    same(decode(make(window), query, key, value, sizes, causal(window)), whole)


@MAKERS
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("sizes", [[1], [23, 3, 1]])
def test_what_is_returned_are_the_latest_keys_and_values_in_their_order(make, window, sizes):
    _, key, value = inputs()
    cache = make(window)
    for start, end in chunks(T, sizes):
        first = 0 if window is None else max(start - (window - 1), 0)
        assert cache.length - cache.held == first
        keys, values = cache.update(key[:, :, start:end], value[:, :, start:end])
        assert torch.equal(keys, key[:, :, first:end])
        assert torch.equal(values, value[:, :, first:end])


@pytest.mark.parametrize(("make", "window"), [(growing, None), (growing, 7), (static, None), (static, 7)])
def test_transformers_own_layers_return_the_same(make, window):
    _, key, value = inputs()
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    cache = make(window)
    for start, end in chunks(T, [23, 1, 1, 5]):
        new = key[:, :, start:end], value[:, :, start:end]
        for got, wanted in zip(cache.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(got, wanted)


@MAKERS
@pytest.mark.parametrize("window", [None, 7])
def test_padded_rows_of_a_batch_are_the_rows_alone(make, window):
    """Left padding, as generation has it: the padding's mask is cut to the keys that are returned."""
    query, key, value = inputs()
    real = torch.arange(T) >= torch.tensor([0, 3, 17])[:, None]
    cache, parts = make(window), []
    for start, end in chunks(T, [23, 1, 1, 1, 5]):
        keys, values = cache.update(key[:, :, start:end], value[:, :, start:end])
        mask = causal(window) & Padding.from_attention_mask(real[:, end - keys.shape[2] : end])
        parts.append(scaled_dot_product_attention(query[:, :, start:end], keys, values, mask=mask))
    out = torch.cat(parts, dim=2)
    for row, pad in enumerate([0, 3, 17]):
        alone = [x[row : row + 1, :, pad:] for x in (query, key, value)]
        same(out[row : row + 1, :, pad:], scaled_dot_product_attention(*alone, mask=causal(window)))


# --- beams, resets ---


@MAKERS
@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_after_reorder_each_row_goes_on_from_its_new_past(make, window):
    query, key, value = inputs()
    cache, past = make(window), [key, value]
    out, orders = [], {30: [2, 2, 0], 41: torch.tensor([1, 0, 1]), 42: [0, 0, 0], 100: [2, 1, 0]}
    for start, end in chunks(T, [29, *[1] * 200]):
        if start in orders:
            cache.reorder(orders[start])
            order = torch.as_tensor(orders[start])
            past = [torch.cat([x[order, :, :start], x[:, :, start:]], dim=2) for x in past]
        keys, values = cache.update(*(x[:, :, start:end] for x in past))
        out.append(scaled_dot_product_attention(query[:, :, start:end], keys, values, mask=causal(window)))
        whole = scaled_dot_product_attention(
            query[:, :, start:end], *(x[:, :, :end] for x in past), mask=causal(window), backend="reference"
        )
        same(out[-1], whole)


def test_a_growing_cache_may_get_more_or_fewer_rows():
    _, key, value = inputs()
    cache = GrowingCache()
    cache.update(key[:, :, :11], value[:, :, :11])
    cache.reorder([0, 0, 1, 2, 2])
    keys, _ = cache.update(key[[0, 0, 1, 2, 2], :, 11:13], value[[0, 0, 1, 2, 2], :, 11:13])
    assert torch.equal(keys, key[[0, 0, 1, 2, 2], :, :13])
    cache.reorder([4])
    keys, _ = cache.update(key[2:, :, 13:14], value[2:, :, 13:14])
    assert torch.equal(keys, key[2:, :, :14])


@MAKERS
@pytest.mark.parametrize("window", [None, 7])
def test_after_reset_it_is_new(make, window):
    cache = make(window)
    for seed in (0, 5):
        query, key, value = inputs(seed=seed)
        whole = scaled_dot_product_attention(query, key, value, mask=causal(window))
        same(decode(cache, query, key, value, [13, 1, 1], causal(window)), whole)
        cache.reset()
        cache.reorder([2, 0, 1])  # nothing is held: nothing to do
        assert cache.length == cache.held == 0


def test_a_growing_cache_takes_another_batch_after_reset():
    cache = GrowingCache(3)
    cache.update(draw(2, 3, 11, 5), draw(2, 3, 11, 5))
    cache.reset()
    keys, values = cache.update(draw(1, 7, 3, 2).float(), draw(1, 7, 3, 13).float())
    assert (keys.shape, values.shape, keys.dtype) == ((1, 7, 3, 2), (1, 7, 3, 13), torch.float32)


@pytest.mark.parametrize("window", [None, 7])
def test_what_a_growing_cache_returned_is_never_written_to(window):
    _, key, value = inputs()
    cache, seen = GrowingCache(window), []
    for start, end in chunks(T, [3, 1, 1, 23]):
        keys, _ = cache.update(key[:, :, start:end], value[:, :, start:end])
        seen.append((keys, keys.clone()))
        cache.reorder([0, 1, 2])
    cache.reset()
    cache.update(value[..., :D], value)
    assert all(torch.equal(keys, before) for keys, before in seen)


def test_a_copy_goes_its_own_way():
    _, key, value = inputs()
    for make in (growing, static):
        cache = make()
        cache.update(key[:, :, :11], value[:, :, :11])
        other = copy.deepcopy(cache)
        other.update(-key[:, :, 11:13], value[:, :, 11:13])
        keys, _ = cache.update(key[:, :, 11:12], value[:, :, 11:12])
        assert torch.equal(keys, key[:, :, :12])


# --- memory ---


def storage(keys):
    return keys.untyped_storage().data_ptr(), keys.untyped_storage().nbytes() // (keys[:, :, 0].numel() * 8)


def one_by_one(cache, count):
    for _ in range(count):
        keys, _ = cache.update(torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double())
        yield storage(keys)


def test_growing_copies_seldom_and_wastes_at_most_half():
    stores = list(one_by_one(GrowingCache(), 5000))
    assert len(set(stores)) <= 12
    for length, (_, capacity) in enumerate(stores, start=1):
        assert length <= capacity <= max(1.5 * length, length + 64)


@pytest.mark.parametrize("window", [1, 2, 7, 101])
def test_a_window_bounds_the_memory_and_seldom_copies(window):
    cache = GrowingCache(window)
    stores = list(one_by_one(cache, 5000))
    assert max(capacity for _, capacity in stores) <= 3 * window + 64
    changes = sum(before != after for before, after in pairwise(stores))
    assert changes <= 5000 / 32
    cache.update(torch.zeros(1, 1, 9973, 1).double(), torch.zeros(1, 1, 9973, 1).double())  # a long prompt
    assert cache.held == window - 1
    assert max(capacity for _, capacity in one_by_one(cache, 3)) <= 3 * window + 64


@pytest.mark.parametrize(("window", "tokens"), [(None, 5000), (7, 14), (4000, 5000)])
def test_static_memory_is_taken_once(window, tokens):
    cache = StaticCache(1, 1, 5000, 1, window=window, dtype=torch.float64)
    assert {capacity for _, capacity in one_by_one(cache, 5000)} == {tokens}
    cache.reset()
    assert len(set(one_by_one(cache, 100))) == 1


def test_nothing_is_copied_from_a_prompt_that_a_window_drops():
    key = draw(1, 1, 997, 1)
    keys, values = GrowingCache(7).update(key, key)
    assert keys is key
    assert values is key


# --- gradients and modes ---


@MAKERS
@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_is_refused_and_under_no_grad_it_is_not_there(make, which):
    _, key, value = inputs(11)
    pair = [key, value]
    pair[which].requires_grad_()
    cache = make()
    sentence = rf"keeps no gradient, but the {('key', 'value')[which]} requires one: decode under torch.no_grad\(\)"
    with pytest.raises(ValueError, match=sentence):
        cache.update(*pair)
    assert cache.length == 0
    with torch.no_grad():
        keys, values = cache.update(*pair)
    assert not keys.requires_grad
    assert not values.requires_grad


@MAKERS
@pytest.mark.parametrize("window", [None, 3])
def test_inference_mode_and_no_grad_may_alternate(make, window):
    query, key, value = inputs(29)
    cache = make(window)
    with torch.inference_mode():
        decode(cache, *(x[:, :, :13] for x in (query, key, value)), [5, 1], causal(window))
    keys, _ = cache.update(key[:, :, 13:14], value[:, :, 13:14])
    with torch.inference_mode():
        cache.reorder([1, 2, 0])
        cache.update(key[:, :, 14:15], value[:, :, 14:15])
    keys, _ = cache.update(key[:, :, 15:16], value[:, :, 15:16])
    assert torch.equal(keys[:, :, -3], key[[1, 2, 0], :, 13])
    assert torch.equal(keys[:, :, -2:], key[:, :, 14:16])


# --- what is refused ---


def test_too_many_tokens_are_refused_with_the_numbers_and_nothing_is_lost():
    for window in (None, 3):
        _, key, value = inputs(19)
        cache = static(window, 17)
        cache.update(key[:, :, :11], value[:, :, :11])
        with pytest.raises(ValueError, match=r"takes 17 tokens \(max_length\), has seen 11 and is given 7 more"):
            cache.update(key[:, :, 11:18], value[:, :, 11:18])
        assert cache.length == 11
        keys, _ = cache.update(key[:, :, 11:17], value[:, :, 11:17])
        assert torch.equal(keys, key[:, :, (0 if window is None else 9) : 17])


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


@MAKERS
@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (zeros(3, 2, 5), zeros(3, 2, 1, 7), r"must be \[B, K, t, D\] and .*, got \(3, 2, 5\) and \(3, 2, 1, 7\)"),
        (zeros(3, 2, 2, 5), zeros(3, 2, 1, 7), r"of the same tokens, got \(3, 2, 2, 5\) and \(3, 2, 1, 7\)"),
        (zeros(3, 2, 1, 5), zeros(3, 2, 1, 7, dtype=torch.float32), "one dtype and one device, got torch.float64 on"),
        (zeros(2, 2, 1, 5), zeros(2, 2, 1, 7), "holds keys of 3 rows, 2 heads and size 5, got 2, 2 and 5: reset()"),
        (zeros(3, 4, 1, 5), zeros(3, 4, 1, 7), "holds keys of 3 rows, 2 heads and size 5, got 3, 4 and 5: reset()"),
        (zeros(3, 2, 1, 5), zeros(3, 2, 1, 5), "holds values of 3 rows, 2 heads and size 7, got 3, 2 and 5: reset()"),
        (
            zeros(3, 2, 1, 5, dtype=torch.float32), zeros(3, 2, 1, 7, dtype=torch.float32),
            "holds keys in torch.float64 on cpu, got torch.float32 on cpu",
        ),
    ],
)  # fmt: skip
def test_tokens_that_do_not_fit_what_is_held_are_refused(make, key, value, sentence):
    cache = make()
    cache.update(*inputs(11)[1:])
    with pytest.raises(ValueError, match=sentence.replace("()", r"\(\)")):
        cache.update(key, value)
    assert cache.length == 11


@MAKERS
@pytest.mark.parametrize("bad", [[0, 1, 3], [0, -1, 1]])
def test_rows_that_do_not_exist_are_refused(make, bad):
    cache = make()
    cache.update(*inputs(11)[1:])
    with pytest.raises(ValueError, match=r"rows must be between 0 and 2, for the cache has 3, got \["):
        cache.reorder(bad)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GrowingCache(0), "window must be a positive number of tokens, or None for no window, got 0"),
        (lambda: GrowingCache(True), "window must be a positive number of tokens, .* got True"),
        (lambda: GrowingCache(2.5), "window must be a positive number of tokens, .* got 2.5"),
        (lambda: StaticCache(0, 2, 3, 4), "rows must be positive, got 0"),
        (lambda: StaticCache(1, 2, 3, 4, 0), "value_size must be positive, got 0"),
        (lambda: StaticCache(1, 2, -3, 4), "max_length must be positive, got -3"),
        (lambda: static().reorder([0, 1]), "a static cache of 3 rows keeps its number, got 2 rows to take"),
        (lambda: static().reorder(torch.tensor([0.0, 1.0])), r"rows must be integers \[n\], got torch.float32"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
