"""The masks: their tables written out, their errors, their joins."""

import pytest
import torch

from llmtune.attention import Causal, Dense, Documents, Mask, Padding

CPU = torch.device("cpu")


def table(rows: str) -> torch.Tensor:
    """ "10 11" -> [[True, False], [True, True]]"""
    return torch.tensor([[c == "1" for c in row] for row in rows.split()])


@pytest.mark.parametrize(
    ("mask", "T", "S", "expected"),
    [
        (Causal(), 3, 3, "100 110 111"),
        (Causal(), 2, 5, "11110 11111"),
        (Causal(), 3, 2, "00 10 11"),
        (Causal(0), 2, 5, "10000 11000"),
        (Causal(-1), 3, 3, "000 100 110"),
        (Causal(torch.tensor(1)), 2, 3, "110 111"),
        (Documents([0, 2, 3]), 3, 3, "110 110 001"),
        (Documents([0, 2, 2, 3]), 3, 3, "110 110 001"),
        (Documents(torch.tensor([0, 2, 3], dtype=torch.int32)), 3, 3, "110 110 001"),
        (Documents([0, 1, 3], [0, 3, 5]), 3, 5, "11100 00011 00011"),
        (Documents([0, 0, 2, 3, 3]), 3, 3, "110 110 001"),
        (Documents([0, 1, 3], [0, 0, 2]), 3, 2, "00 11 11"),
        (Causal(7), 2, 3, "111 111"),
        (Causal(-5), 2, 3, "000 000"),
        (Documents.from_lengths([2, 1], [0, 2]), 3, 2, "00 00 11"),
        (Documents.from_lengths(torch.tensor([1, 2])), 3, 3, "100 011 011"),
        (Dense(table("10 01 11")), 3, 2, "10 01 11"),
        (Causal() & Documents([0, 2, 3]), 3, 3, "100 110 001"),
    ],
)
def test_a_mask_shared_by_all_rows_is_this_table(mask, T, S, expected):
    assert torch.equal(mask.dense(T, S), table(expected))


@pytest.mark.parametrize(
    ("mask", "T", "S", "expected"),
    [
        (Causal([0, 2]), 2, 3, ["100 110", "111 111"]),
        (Causal(torch.tensor([-1, 0])), 2, 2, ["00 10", "10 11"]),
        (Padding([0, 2]), 2, 3, ["000 000", "110 110"]),
        (Padding(torch.tensor([1, 3])), 1, 3, ["100", "111"]),
        (Padding.from_attention_mask(torch.tensor([[0, 1, 1], [1, 1, 0]])), 2, 3, ["011 011", "110 110"]),
        (Padding.from_attention_mask(torch.tensor([[0.0, 1.0]])), 2, 2, ["01 01"]),
        (Documents.from_ids(torch.tensor([[5, 5, 2], [1, 2, 1]])), 3, 3, ["110 110 001", "101 010 101"]),
        (Documents.from_ids(torch.tensor([[1, 2]]), torch.tensor([[2, 2, 1]])), 2, 3, ["001 110"]),
        (Dense(table("10 01")[None, None].expand(2, 1, 2, 2)), 2, 2, ["10 01", "10 01"]),
        (Dense(torch.tensor([[[[True, False]]]])), 2, 2, ["10 10"]),
        (Causal() & Padding([2, 1]), 2, 2, ["10 11", "10 10"]),
    ],
)
def test_a_mask_with_rows_of_its_own_is_these_tables(mask, T, S, expected):
    assert torch.equal(mask.dense(T, S), torch.stack([table(rows) for rows in expected])[:, None])


def test_a_dense_mask_may_have_tables_for_each_head():
    heads = torch.rand(1, 3, 5, 7) > 0.5
    assert torch.equal(Dense(heads).dense(5, 7), heads)


def test_joining_flattens_and_does_not_depend_on_grouping():
    a, b, c = Causal(), Padding([2, 3]), Documents([0, 1, 3])
    left, right = (a & b) & c, a & (b & c)
    assert [type(part) for part in left.parts] == [type(part) for part in right.parts] == [Causal, Padding, Documents]
    assert torch.equal(left.dense(3, 3), right.dense(3, 3))


def test_masks_are_frozen():
    for mask in (Causal(), Padding([1]), Documents([0, 1]), Dense(torch.ones(1, 1, dtype=torch.bool))):
        with pytest.raises(AttributeError):
            mask.offset = 3


def test_causal_masks_compare_by_value():
    assert Causal() == Causal()
    assert Causal(2) != Causal(3)


def test_a_mask_of_ones_own_needs_only_its_table():
    class Even(Mask):
        def dense(self, T, S, *, device=None):
            return (torch.arange(S, device=device) % 2 == 0).expand(T, S)

    assert torch.equal((Even() & Causal()).dense(3, 3), table("100 100 101"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Documents([1, 3]), r"cu_seqlens must start at 0 .* got \[1, 3\]"),
        (lambda: Documents([0]), r"cu_seqlens must start at 0 and then hold the end of every document, got \[0\]"),
        (lambda: Documents([0, 5, 3]), "cu_seqlens must be ascending, but entry 2 is 3 after 5"),
        (lambda: Documents([0, 3], [0, 2, 4]), "cu_seqlens cuts 1 documents, key_cu_seqlens 2"),
        (lambda: Documents(torch.tensor([0.0, 3.0])), r"cu_seqlens must be integers \[n\], got torch.float32"),
        (lambda: Documents(), "Documents takes cu_seqlens, or ids"),
        (lambda: Documents.from_ids(torch.zeros(3, dtype=torch.long)), r"query_ids must be integers, a row each"),
        (lambda: Documents.from_ids(torch.zeros(2, 3)), "query_ids must be integers"),
        (lambda: Documents.from_ids(torch.zeros(2, 3).long(), torch.zeros(1, 3).long()), "2 rows, key_ids 1"),
        (lambda: Padding([3, -1]), r"key_lengths must not be negative, got \[3, -1\]"),
        (lambda: Padding(), "Padding takes key_lengths"),
        (lambda: Padding.from_attention_mask(torch.ones(3)), r"must be \[B, S\], got shape \(3,\)"),
        (lambda: Padding.from_attention_mask(torch.tensor([[0.0, -1e9]])), "only 0 and 1; an additive mask is a bias"),
        (lambda: Dense(torch.zeros(3, 3)), "boolean tensor, got torch.float32; pass an additive mask as bias"),
        (lambda: Dense([[True]]), "boolean tensor, got list"),
        (lambda: Dense(torch.ones(2, 3, 3).bool()), r"got shape \(2, 3, 3\); make it \[B, 1, T, S\]"),
        (lambda: Causal(torch.tensor(1.0)), r"offset must be integers \[n\], got torch.float32"),
        (lambda: Padding([1, 2]) & Causal([0, 0, 0]), r"Causal is made for 3 rows in the batch \(B\).* 2"),
    ],
)
def test_a_mask_that_cannot_be_says_why_when_it_is_made(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Causal(1.5), "offset must be an integer, got 1.5"),
        (lambda: Causal(True), "offset must be an integer, got True"),
        (lambda: Causal("12"), "offset must be an integer, got '12'"),
        (lambda: Causal([1, 2.0]), "offset must be an integer, got 2.0"),
        (lambda: Padding([True, False]), "key_lengths must be an integer, got True"),
        (lambda: Padding(3), r"key_lengths must be integers \[n\], got 3"),
        (lambda: Documents([0, 2.5]), "cu_seqlens must be an integer, got 2.5"),
        (lambda: Documents.from_lengths(5), r"lengths must be integers \[n\], got 5"),
    ],
)
def test_numbers_that_are_no_integers_are_a_type_error(make, sentence):
    with pytest.raises(TypeError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("mask", "T", "S", "sentence"),
    [
        (Documents([0, 2, 5]), 7, 7, r"Documents covers 5 queries, but there are 7 \(T\): cu_seqlens must end at T"),
        (Documents([0, 2, 5]), 5, 7, r"covers 5 keys, but there are 7 \(S\): where T and S differ, give the documents"),
        (Documents([0, 2], [0, 3]), 2, 5, r"covers 3 keys, but there are 5 \(S\): cu_seqlens must end"),
        (Documents.from_ids(torch.zeros(1, 3).long()), 3, 4, "where T and S differ"),
        (Documents.from_ids(torch.zeros(1, 3).long()), 2, 3, "there must be an id for every token"),
        (Padding([3, 8]), 2, 7, r"key_lengths are \[3, 8\], but there are only 7 keys"),
        (Padding.from_attention_mask(torch.ones(1, 3)), 3, 4, r"Padding is made for 3 keys \(S\), but .* have 4"),
        (Dense(torch.ones(3, 5).bool()), 3, 7, r"Dense is made for 5 keys \(S\), but the inputs have 7"),
        (Causal() & Dense(torch.ones(3, 5).bool()), 2, 5, r"Dense is made for 3 queries \(T\), but the inputs have 2"),
    ],
)
def test_a_mask_of_the_wrong_size_is_refused_with_the_numbers(mask, T, S, sentence):
    with pytest.raises(ValueError, match=sentence):
        mask.dense(T, S)
    with pytest.raises(ValueError, match=sentence):
        mask.check(B=1, H=1, T=T, S=S, device=CPU)


def test_a_mask_for_another_batch_or_number_of_heads_is_refused():
    with pytest.raises(ValueError, match=r"Padding is made for 2 rows in the batch \(B\), but the inputs have 3"):
        Padding([1, 2]).check(B=3, H=5, T=7, S=7, device=CPU)
    with pytest.raises(ValueError, match=r"Dense is made for 3 query heads \(H\), but the inputs have 5"):
        Dense(torch.ones(1, 3, 7, 7).bool()).check(B=2, H=5, T=7, S=7, device=CPU)


def test_a_mask_on_another_device_is_refused():
    with pytest.raises(ValueError, match="the mask Dense is on meta, the query on cpu"):
        Dense(torch.ones(3, 3, dtype=torch.bool, device="meta")).check(B=1, H=1, T=3, S=3, device=CPU)


def test_joining_with_something_else_is_a_type_error():
    with pytest.raises(TypeError, match=r"a mask joins with a mask, got Tensor: wrap a boolean tensor in Dense"):
        Causal() & torch.ones(3, 3).bool()


def test_additive_numbers_are_made_once_and_kept_small():
    padding = Padding([2, 0])
    values, seen = padding.additive(5, 3, dtype=torch.float32, device=CPU)
    assert values.shape == (2, 1, 1, 3)  # the same for every query: not [2, 1, 5, 3]
    assert values[0, 0, 0].tolist() == [0.0, 0.0, float("-inf")]
    assert values[1, 0, 0].tolist() == [0.0, 0.0, 0.0]  # a row of -inf would be NaN in some kernels
    assert seen[:, 0, 0, 0].tolist() == [True, False]
    assert padding.additive(5, 3, dtype=torch.float32, device=CPU)[0] is values
    assert padding.additive(5, 3, dtype=torch.float64, device=CPU)[0].dtype == torch.float64
    assert padding.additive(5, 4, dtype=torch.float64, device=CPU)[0].shape[-1] == 4


def test_additive_numbers_say_nothing_of_empty_rows_where_there_are_none():
    assert Causal().additive(3, 3, dtype=torch.float32, device=CPU)[1] is None


class EveryOtherKey(Mask):
    def dense(self, T, S, *, device=None):
        return (torch.arange(S, device=device) % 2 == 0).expand(T, S)


IDS = torch.tensor([[3, 3, 1, 1, 1, 8, 8], [1, 1, 1, 1, 1, 8, 3]])
PARTS = [range(a, b) for a in range(8) for b in range(a, 8)]
LEFT = Padding.from_attention_mask(torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]]))


@pytest.mark.parametrize(
    "mask",
    [
        Causal(), Causal(-3), Causal([2, -1]), Padding([5, 3]), LEFT, Documents([0, 2, 2, 6, 7]),
        Documents([0, 0, 3, 7, 7], [0, 2, 2, 5, 7]), Documents.from_ids(IDS), Documents.from_ids(IDS, IDS.flip(1)),
        Dense(Causal().dense(7, 7)), Dense(LEFT.dense(1, 7)),
    ],
)  # fmt: skip
def test_span_and_sees_all_are_exact_where_keys_have_no_gaps(mask):
    """Both are what the table says, for every part, so that backends skip all that can be skipped."""
    table = mask.dense(7, 7).expand(2, 1, 7, 7)
    for queries in PARTS:
        rows = table[..., queries.start : queries.stop, :]
        seen = rows.flatten(0, 2).any(0).nonzero()[:, 0].tolist()
        if len(queries):
            assert mask.span(queries, 7, 7) == (range(seen[0], seen[-1] + 1) if seen else range(0))
            for keys in filter(len, PARTS):
                assert mask.sees_all(queries, keys, 7, 7) == bool(rows[..., keys.start : keys.stop].all())


def test_an_intersection_spans_what_all_parts_span():
    mask = Causal() & Documents([0, 3, 7]) & Padding([7, 6])
    assert mask.span(range(4, 6), 7, 7) == range(3, 6)
    assert mask.span(range(6, 7), 7, 7) == range(3, 7)
    assert mask.sees_all(range(5, 7), range(3, 6), 7, 7)
    assert not mask.sees_all(range(5, 7), range(2, 6), 7, 7)  # another document
    assert not mask.sees_all(range(5, 7), range(3, 7), 7, 7)  # the future, and padding
    nothing = (Causal(-5) & LEFT).span(range(2, 4), 7, 7)
    assert nothing == range(0)
    assert nothing.start <= nothing.stop  # so that it may be sliced with


def test_gaps_make_span_wider_and_sees_all_false():
    gap = Padding.from_attention_mask(torch.tensor([[1, 0, 1, 1, 0]]))
    assert gap.span(range(3), 3, 5) == range(4)
    assert not gap.sees_all(range(3), range(2, 4), 3, 5)  # it is so, but a row with gaps is not looked into
    assert not gap.sees_all(range(3), range(4), 3, 5)
    back = Documents.from_ids(torch.tensor([[1, 2, 2, 1, 2]]))
    assert back.span(range(1), 5, 5) == range(4)
    assert not back.sees_all(range(1), range(4), 5, 5)


def test_a_mask_of_ones_own_is_cut_and_looked_at_in_full():
    mask = EveryOtherKey()
    assert torch.equal(mask.tile(range(1, 3), range(1, 5), 3, 5), table("0101 0101"))
    assert mask.span(range(1), 3, 5) == range(5)
    assert not mask.sees_all(range(1), range(1), 3, 5)
    assert torch.equal((mask & Causal()).tile(range(1, 2), range(2, 5), 3, 5), table("100"))


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Causal([0, 3]),
        Padding([10**7, 3]),
        Documents([0, 5, 10**7]),
        Padding.from_attention_mask(torch.ones(1, 10**7, dtype=torch.bool)),
        Documents.from_ids(torch.ones(1, 10**7, dtype=torch.int8)),
    ],
)
def test_a_tile_is_made_without_the_table(mask):
    n = 10**7  # a table of 100 TB
    tile = mask.tile(range(n - 3, n), range(n - 5, n), n, n)
    assert tile.shape[-2:] == (3, 5)
    assert tile[0, ..., -1, :].all() if tile.ndim == 4 else tile[-1].all()


@pytest.mark.parametrize("mask", [LEFT, Documents.from_ids(IDS), Dense(Causal().dense(7, 7).clone())])
def test_tensors_are_read_once(mask, monkeypatch):
    def refuse(*_):
        raise AssertionError("read again")

    span = mask.span(range(2, 3), 7, 7)
    for name in ("tolist", "item", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert mask.span(range(2, 3), 7, 7) == span
    assert mask.sees_all(range(2, 4), range(2, 3), 7, 7)
    assert mask.span(range(7), 7, 7).stop == 7


def test_tensors_that_cannot_be_read_are_not():
    ids = Documents.from_ids(torch.zeros(2, 7, dtype=torch.long, device="meta"))
    assert ids.span(range(2, 3), 7, 7) == range(7)
    assert not ids.sees_all(range(2, 3), range(2, 3), 7, 7)
    assert ids.tile(range(2, 3), range(5), 7, 7).shape == (2, 1, 1, 5)


@pytest.mark.parametrize("mask", [LEFT, Causal() & LEFT, Dense(Causal().dense(7, 7)), Documents.from_ids(IDS)])
def test_a_traced_graph_reads_no_tensor(mask):
    def count(x):
        return x + len(mask.span(range(2), 7, 7)) + mask.sees_all(range(1), range(1), 7, 7)

    compiled = torch.compile(count, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) >= len(mask.span(range(2), 7, 7))


@pytest.mark.parametrize(
    "mask",
    [Causal() & Documents([0, 3, 3, 7]), Causal([0, 2]) & Padding([3, 7]), Documents.from_ids(IDS), LEFT],
)
def test_a_traced_graph_makes_tiles_and_the_table(mask):
    def parts(x):
        queries = range(2, 5)
        tile = mask.tile(queries, mask.span(queries, 7, 7), 7, 7)
        return x + mask.dense(7, 7).sum(), x + tile.sum()

    whole, part = torch.compile(parts, backend="eager", fullgraph=True)(torch.zeros(()))
    assert whole == mask.dense(7, 7).sum()
    assert part == mask.dense(7, 7)[..., 2:5, :].sum()


def test_tables_without_rows_or_keys():
    assert Dense(torch.ones(3, 0, dtype=torch.bool)).span(range(3), 3, 0) == range(0)
    assert Padding.from_attention_mask(torch.ones(2, 0)).span(range(3), 3, 0) == range(0)
    assert Documents.from_ids(torch.zeros(2, 3).long(), torch.zeros(2, 0).long()).span(range(3), 3, 0) == range(0)
    assert Documents.from_ids(torch.zeros(2, 0).long(), torch.zeros(2, 3).long()).dense(0, 3).shape == (2, 1, 0, 3)
    assert Padding([0, 0]).span(range(3), 3, 5) == range(0)
    assert Causal().dense(0, 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: Documents.from_ids([[0, 1]]),
            TypeError,
            r"query_ids must be a tensor \[B, length\] of integers, got list",
        ),
        (lambda: Padding.from_attention_mask([[0, 1]]), TypeError, r"must be a tensor \[B, S\] of 0 and 1, got list"),
        (lambda: Padding(real=torch.ones(2, 3)), ValueError, r"real must be bool \[B, S\], got torch.float32 of shape"),
        (lambda: Padding(real=torch.ones(3, dtype=torch.bool)), ValueError, r"real must be bool \[B, S\]"),
        (lambda: Documents([0, 3, 7], key_ids=torch.ones(1, 7)), ValueError, "key_ids belongs to the other way"),
        (
            lambda: Documents(query_ids=torch.ones(1, 7).long(), key_cu_seqlens=[0, 7]),
            ValueError,
            "key_cu_seqlens belongs to the other way of giving documents",
        ),
    ],
)
def test_what_is_no_mask_is_told_when_it_is_made(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
