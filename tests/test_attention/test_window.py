"""The sliding window and the prefix: their tables written out, their plans, their errors."""

import itertools

import pytest
import torch

from llmtune.attention import Causal, Documents, Padding, PrefixCausal, SlidingWindow

CPU = torch.device("cpu")


def table(rows: str) -> torch.Tensor:
    """ "10 11" -> [[True, False], [True, True]]"""
    return torch.tensor([[c == "1" for c in row] for row in rows.split()])


@pytest.mark.parametrize(
    ("mask", "T", "S", "expected"),
    [
        (SlidingWindow(1), 3, 3, "100 010 001"),
        (SlidingWindow(2), 3, 3, "110 111 011"),
        (SlidingWindow(2), 2, 5, "00111 00011"),
        (SlidingWindow(2), 3, 2, "10 11 11"),
        (SlidingWindow(2, offset=0), 2, 5, "11000 11100"),
        (SlidingWindow(2, offset=-2), 4, 3, "000 100 110 111"),
        (SlidingWindow(2, offset=4), 2, 5, "00011 00001"),
        (SlidingWindow(2, offset=9), 2, 5, "00000 00000"),
        (SlidingWindow(7), 2, 3, "111 111"),
        (SlidingWindow(torch.tensor(2), torch.tensor(0)), 1, 3, "110"),
        (SlidingWindow(2), 1, 5, "00011"),
        (SlidingWindow(2), 5, 1, "0 0 0 1 1"),
        (Causal() & SlidingWindow(2), 3, 3, "100 110 011"),
        (Causal() & SlidingWindow(2), 2, 5, "00110 00011"),
        (Causal() & SlidingWindow(2) & Documents([0, 2, 5]), 5, 5, "10000 11000 00100 00110 00011"),
        (PrefixCausal(0), 3, 3, "100 110 111"),
        (PrefixCausal(2), 3, 3, "110 110 111"),
        (PrefixCausal(3), 3, 3, "111 111 111"),
        (PrefixCausal(4), 2, 5, "11110 11111"),
        (PrefixCausal(5), 2, 5, "11111 11111"),
        (PrefixCausal(2, offset=0), 2, 5, "11000 11000"),
        (PrefixCausal(1, offset=-2), 3, 3, "100 100 100"),
        (PrefixCausal(1, offset=-3), 2, 3, "100 100"),
        (PrefixCausal(1, offset=7), 2, 3, "111 111"),
        (PrefixCausal(torch.tensor(1)), 3, 2, "10 10 11"),
        (PrefixCausal(1), 1, 3, "111"),
        (PrefixCausal(1), 3, 1, "1 1 1"),
    ],
)
def test_a_mask_shared_by_all_rows_is_this_table(mask, T, S, expected):
    assert torch.equal(mask.dense(T, S), table(expected))


@pytest.mark.parametrize(
    ("mask", "T", "S", "expected"),
    [
        (SlidingWindow(2, offset=[0, 3]), 2, 3, ["110 111", "001 000"]),
        (SlidingWindow(1, offset=torch.tensor([-1, 2])), 2, 3, ["000 100", "001 000"]),
        (SlidingWindow(2) & Padding([3, 1]), 2, 3, ["111 011", "100 000"]),
        (PrefixCausal([0, 2, 3]), 3, 3, ["100 110 111", "110 110 111", "111 111 111"]),
        (PrefixCausal([0, 2], offset=[1, -1]), 2, 3, ["110 111", "110 110"]),
        (PrefixCausal(1, offset=[-2, 2]), 2, 3, ["100 100", "111 111"]),
        (PrefixCausal(torch.tensor([1, 3], dtype=torch.int32)), 1, 3, ["111", "111"]),
        (PrefixCausal([2, 3]) & Padding([3, 1]), 2, 3, ["110 111", "100 100"]),
    ],
)
def test_a_mask_with_rows_of_its_own_is_these_tables(mask, T, S, expected):
    assert torch.equal(mask.dense(T, S), torch.stack([table(rows) for rows in expected])[:, None])


@pytest.mark.parametrize(("size", "T", "S"), [(1, 7, 7), (3, 11, 11), (5, 3, 13), (29, 7, 7)])
def test_the_causal_window_is_that_of_transformers(size, T, S):
    from transformers.masking_utils import sliding_window_causal_mask_function

    sees = sliding_window_causal_mask_function(size)
    wanted = [[bool(sees(0, 0, torch.tensor(t + S - T), torch.tensor(s))) for s in range(S)] for t in range(T)]
    assert torch.equal((Causal() & SlidingWindow(size)).dense(T, S), torch.tensor(wanted))


PARTS = [range(a, b) for a in range(8) for b in range(a, 8)]


@pytest.mark.parametrize(
    "mask",
    [
        *(SlidingWindow(size, offset) for size in (1, 3, 9) for offset in (None, -4, 2, 11, [1, -2])),
        *(PrefixCausal(n, offset) for n in (0, 3, 7, [5, 2]) for offset in (None, -9, 3, [2, -1])),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("T", "S"), [(7, 7), (5, 7)])
def test_span_and_sees_all_are_what_the_table_says(mask, T, S):
    whole = mask.dense(T, S).expand(2, 1, T, S)
    for queries in PARTS:
        if len(queries) == 0 or queries.stop > T:
            continue
        rows = whole[..., queries.start : queries.stop, :]
        seen = rows.flatten(0, 2).any(0).nonzero()[:, 0].tolist()
        span = mask.span(queries, T, S)
        assert set(seen) <= set(span)
        if seen and not isinstance(mask.offset, tuple):  # between the windows of rows far apart there may be a gap
            assert span == range(seen[0], seen[-1] + 1)
        for keys in filter(len, PARTS):
            assert mask.sees_all(queries, keys, T, S) == bool(rows[..., keys.start : keys.stop].all())


def test_a_window_that_lies_beside_the_keys_spans_none():
    for offset in (-20, 20):
        span = SlidingWindow(3, offset).span(range(5), 5, 7)
        assert span == range(0)
        assert 0 <= span.start <= span.stop <= 7
    assert SlidingWindow(3).span(range(2, 2), 5, 7) == range(0)


def test_a_tile_of_a_window_is_made_without_the_table():
    n = 10**7
    keys = (Causal() & SlidingWindow(3)).span(range(n - 2, n), n, n)
    assert keys == range(n - 4, n)
    tile = (Causal() & SlidingWindow(3)).tile(range(n - 2, n), keys, n, n)
    assert torch.equal(tile, table("1110 0111"))
    assert torch.equal(PrefixCausal(2).tile(range(1), range(4), n, n), table("1100"))


def test_windows_and_prefixes_compare_by_value_and_are_frozen():
    assert SlidingWindow(3, [1, 2]) == SlidingWindow(3, torch.tensor([1, 2])) != SlidingWindow(3)
    assert PrefixCausal([1, 2]) == PrefixCausal((1, 2)) != PrefixCausal(1)
    assert len({SlidingWindow(3), SlidingWindow(3), SlidingWindow(2)}) == 2
    for mask, name in itertools.product((SlidingWindow(3), PrefixCausal(3)), ("size", "lengths", "offset")):
        with pytest.raises(AttributeError):
            setattr(mask, name, 2)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: SlidingWindow(0), ValueError, "size must be at least 1, .* got 0"),
        (lambda: SlidingWindow(-3), ValueError, "size must be at least 1, .* got -3"),
        (lambda: SlidingWindow(True), TypeError, "size must be an integer, got True"),
        (lambda: SlidingWindow(3.0), TypeError, "size must be an integer, got 3.0"),
        (lambda: SlidingWindow(None), TypeError, "size must be an integer, got None"),
        (lambda: SlidingWindow([3]), TypeError, r"size must be an integer, got \[3\]"),
        (lambda: SlidingWindow(torch.tensor([3, 4])), TypeError, r"size must be an integer, got tensor\(\[3, 4\]\)"),
        (lambda: SlidingWindow(torch.tensor(3.0)), TypeError, r"size must be an integer, got tensor\(3.\)"),
        (lambda: SlidingWindow(torch.tensor(True)), TypeError, r"size must be an integer, got tensor\(True\)"),
        (lambda: SlidingWindow(3, 1.5), TypeError, "offset must be an integer, got 1.5"),
        (lambda: SlidingWindow(3, True), TypeError, "offset must be an integer, got True"),
        (lambda: SlidingWindow(3, torch.ones(2)), ValueError, r"offset must be integers \[n\], got torch.float32"),
        (lambda: PrefixCausal(-1), ValueError, "lengths must not be negative, got -1"),
        (lambda: PrefixCausal([2, -1]), ValueError, r"lengths must not be negative, got \(2, -1\)"),
        (lambda: PrefixCausal(False), TypeError, "lengths must be an integer, got False"),
        (lambda: PrefixCausal([1, True]), TypeError, "lengths must be an integer, got True"),
        (lambda: PrefixCausal(2.0), TypeError, "lengths must be an integer, got 2.0"),
        (lambda: PrefixCausal(None), TypeError, "lengths must be an integer, got None"),
        (lambda: PrefixCausal(torch.ones(2)), ValueError, r"lengths must be integers \[n\], got torch.float32"),
        (lambda: PrefixCausal(torch.ones(2).bool()), ValueError, r"lengths must be integers \[n\], got torch.bool"),
        (lambda: PrefixCausal(torch.ones(2, 2).long()), ValueError, r"lengths must be integers .* shape \(2, 2\)"),
        (lambda: PrefixCausal(1, offset="1"), TypeError, "offset must be an integer, got '1'"),
        (lambda: PrefixCausal([1, 2], [1, 2, 3]), ValueError, "lengths and offset must be as many, .* got 2 and 3"),
        (lambda: PrefixCausal([1, 2]) & SlidingWindow(2, [1, 2, 3]), ValueError, r"SlidingWindow is made for 3 rows"),
    ],
)
def test_a_mask_that_cannot_be_says_why_when_it_is_made(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


@pytest.mark.parametrize("mask", [PrefixCausal([3, 8]), Causal() & PrefixCausal([3, 8])])
def test_a_prefix_longer_than_the_keys_is_refused_with_the_numbers(mask):
    for use in (
        lambda: mask.dense(7, 7),
        lambda: mask.tile(range(1), range(1), 7, 7),
        lambda: mask.check(B=2, H=1, T=7, S=7, device=CPU),
    ):
        with pytest.raises(ValueError, match=r"the prefix lengths are \[3, 8\], but there are only 7 keys \(S\)"):
            use()


@pytest.mark.parametrize("mask", [SlidingWindow(3, [1, 2]), PrefixCausal([1, 2]), PrefixCausal(1, [1, 2])])
def test_a_mask_for_another_batch_is_refused(mask):
    mask.check(B=2, H=5, T=7, S=7, device=CPU)
    with pytest.raises(ValueError, match=r"is made for 2 rows in the batch \(B\), but the inputs have 3"):
        mask.check(B=3, H=5, T=7, S=7, device=CPU)
