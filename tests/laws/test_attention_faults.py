"""Every law of attention and of masks catches the fault it is there for."""

import pytest
import torch
import torch.nn.functional as F

from llmtune.attention import Causal, Documents, Intersection, Mask, Padding, scaled_dot_product_attention
from llmtune.errors import LawBroken
from llmtune.testing.attention import check_attention
from llmtune.testing.masks import check_mask


def right(query, key, value, *, mask=None):
    return scaled_dot_product_attention(query, key, value, mask=mask)


def table_of(query, key, mask):
    """[B, H, T, S] booleans."""
    (B, H, T, _), S = query.shape, key.shape[2]
    table = torch.ones(T, S, dtype=torch.bool) if mask is None else mask.dense(T, S)
    return table.expand(B, H, T, S)


def with_table(query, key, value, table, *, empty=0.0, scale=None):
    """Attention by hand under a table of booleans."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~table, float("-inf")).softmax(dim=-1)
    return weights.masked_fill(~table.any(dim=-1, keepdim=True), empty) @ value


def ignores_the_mask(query, key, value, *, mask=None):
    return right(query, key, value)


def aligns_causal_to_the_first_key(query, key, value, *, mask=None):
    mask = Causal(0) if isinstance(mask, Causal) and mask.offset is None else mask
    return right(query, key, value, mask=mask)


def sees_one_key_too_many(query, key, value, *, mask=None):
    table = table_of(query, key, mask)
    return with_table(query, key, value, table | F.pad(table, (1, 0))[..., :-1])


def sees_one_key_too_few(query, key, value, *, mask=None):
    table = table_of(query, key, mask).clone()
    if mask is not None and table.shape[-1] > 3:
        table[..., 3] &= ~table[..., 4:].any(dim=-1)  # key 3 is hidden from queries that see later ones
    return with_table(query, key, value, table)


def gives_nan_on_empty_rows(query, key, value, *, mask=None):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(
        ~table_of(query, key, mask), float("-inf")
    )
    return scores.softmax(dim=-1) @ value


def gives_the_mean_on_empty_rows(query, key, value, *, mask=None):
    return with_table(query, key, value, table_of(query, key, mask), empty=1 / key.shape[2])


def zeroes_nan_after_the_fact(query, key, value, *, mask=None):
    return gives_nan_on_empty_rows(query, key, value, mask=mask).nan_to_num(0.0)  # its gradient is NaN still


def interleaves_grouped_heads(query, key, value, *, mask=None):
    groups = query.shape[1] // key.shape[1]
    return right(query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1), mask=mask)


def forgets_the_gradient_of_the_keys(query, key, value, *, mask=None):
    return right(query, key.detach(), value, mask=mask)


def carries_no_gradient(query, key, value, *, mask=None):
    return right(query, key, value, mask=mask).detach()


def scales_by_the_head_size(query, key, value, *, mask=None):
    return with_table(query, key, value, table_of(query, key, mask), scale=1 / query.shape[-1])


def scales_the_query_in_place(query, key, value, *, mask=None):
    out = right(query, key, value, mask=mask)
    query.data.mul_(0.5)
    return out


def takes_the_first_rows_mask_for_all(query, key, value, *, mask=None):
    table = table_of(query, key, mask)
    return with_table(query, key, value, table[:1].expand_as(table))


def rounds_float64(query, key, value, *, mask=None):
    return right(query.float(), key.float(), value.float(), mask=mask).to(query.dtype)


def answers_in_float32(query, key, value, *, mask=None):
    return right(query.float(), key.float(), value.float(), mask=mask)


def rounds_the_weights(query, key, value, *, mask=None):
    """What a kernel loses that keeps scores and weights in bfloat16, beyond torch's that keeps them in float32."""
    if query.dtype != torch.bfloat16:
        return right(query, key, value, mask=mask)
    noisy = (query.float() * 64).to(torch.float8_e4m3fn).float().div(64).to(query.dtype)
    return right(query + (noisy - query).detach(), key, value, mask=mask)


def reads_memory_instead_of_strides(query, key, value, *, mask=None):
    flat = torch.as_strided(query, (query.numel(),), (1,)).view(query.shape) if query.storage_offset() == 0 else query
    return right(flat, key, value, mask=mask)


def mixes_up_the_batch(query, key, value, *, mask=None):
    return right(query, key, value.roll(1, dims=0), mask=mask)


def ignores_the_mask_for_one_query(query, key, value, *, mask=None):
    return right(query, key, value, mask=mask if query.shape[2] > 1 else None)


def answers_wrongly_for_one_query(query, key, value, *, mask=None):
    return right(query, key, value, mask=Causal(0) if query.shape[2] == 1 and key.shape[2] > 1 else mask)


def leaks_across_documents(query, key, value, *, mask=None):
    parts = getattr(mask, "parts", ())
    return right(query, key, value, mask=Causal() if any(isinstance(part, Documents) for part in parts) else mask)


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        (ignores_the_mask, "no future token is seen"),
        (aligns_causal_to_the_first_key, "a single query is the last"),
        (sees_one_key_too_many, "no future token is seen"),
        (sees_one_key_too_few, "packed, padded and single documents agree"),
        (gives_nan_on_empty_rows, "a query without keys gives 0"),
        (gives_the_mean_on_empty_rows, "a query without keys gives 0"),
        (zeroes_nan_after_the_fact, "a query without keys gives 0"),
        (interleaves_grouped_heads, "grouped heads equal repeated heads"),
        (forgets_the_gradient_of_the_keys, "equal to the formula.*gradient of key"),
        (carries_no_gradient, "differentiable"),
        (scales_by_the_head_size, r'equal to the formula" \(no mask'),
        (scales_the_query_in_place, "inputs left alone.*written into query"),
        (takes_the_first_rows_mask_for_all, "packed, padded and single|permuting|without keys"),
        (rounds_float64, r"equal to the formula.*\(no mask.*float64"),
        (answers_in_float32, "shape and dtype"),
        (rounds_the_weights, "as exact as torch in a narrow dtype"),
        (reads_memory_instead_of_strides, "any strides"),
        (mixes_up_the_batch, r'equal to the formula" \(no mask'),
        (ignores_the_mask_for_one_query, r'equal to the formula" \(a single query'),
        (answers_wrongly_for_one_query, "a single query is the last|packed"),
        (leaks_across_documents, "packed, padded and single documents agree.*packed"),
    ],
)
def test_attention_that_is_wrong_breaks_a_law(fault, law):
    with pytest.raises(LawBroken, match=law):
        check_attention(fault)


def test_attention_of_a_wrong_shape_or_kind_breaks_a_law():
    with pytest.raises(LawBroken, match=r"expected \(2, 6, 7, 13\)"):
        check_attention(lambda q, k, v, *, mask=None: right(q, k, v, mask=mask).transpose(1, 2))
    with pytest.raises(LawBroken, match="expected a tensor, got tuple"):
        check_attention(lambda q, k, v, *, mask=None: (right(q, k, v, mask=mask), None))


def test_attention_may_be_checked_in_fewer_dtypes():
    check_attention(rounds_float64, dtypes=[torch.float32, torch.bfloat16])


class ReturnsNumbers(Mask):
    def dense(self, T, S, *, device=None):
        return torch.ones(T, S, device=device)


class ReturnsOneRow(Mask):
    def dense(self, T, S, *, device=None):
        return torch.ones(1, S, dtype=torch.bool, device=device)


class ChangesItsMind(Mask):
    def dense(self, T, S, *, device=None):
        return torch.rand(T, S, device=device) > 0.5


class JoinsByUnion(Causal):
    def __and__(self, other):
        class Union(Mask):
            def dense(_, T, S, *, device=None):
                return self.dense(T, S, device=device) | other.dense(T, S, device=device)

        return Union()


class AddsSomethingElse(Causal):
    def additive(self, T, S, *, dtype, device):
        return Causal(0).additive(T, S, dtype=dtype, device=device)


class HidesEmptyRows(Padding):
    def additive(self, T, S, *, dtype, device):
        return super().additive(T, S, dtype=dtype, device=device)[0], None


class IsTakenForAnother(Causal):
    """Its table is not what its class and offset say, and a backend that reads those believes them."""

    def dense(self, T, S, *, device=None):
        return Causal(self.offset).dense(T, S, device=device).flip(0)

    tile, span, sees_all = Mask.tile, Mask.span, Mask.sees_all


class TakesAnySize(Padding):
    def check(self, *, B, H, T, S, device):
        pass


class CountsQueriesFromTheTile(Causal):
    def tile(self, queries, keys, T, S, *, device=None):
        return super().tile(range(len(queries)), keys, T, S, device=device)


class CountsKeysFromTheTile(Padding):
    def tile(self, queries, keys, T, S, *, device=None):
        return super().tile(queries, range(len(keys)), T, S, device=device)


class HasATableOfItsOwn(Causal):
    def dense(self, T, S, *, device=None):
        return Causal(self.offset).dense(T, S, device=device)


class TileOfOneQuery(HasATableOfItsOwn):
    def tile(self, queries, keys, T, S, *, device=None):
        return super().tile(queries, keys, T, S, device=device)[:1]


class TileOfEachKeyHead(HasATableOfItsOwn):
    def tile(self, queries, keys, T, S, *, device=None):
        return super().tile(queries, keys, T, S, device=device).expand(1, 2, -1, -1)


class TileOfNumbers(HasATableOfItsOwn):
    def tile(self, queries, keys, T, S, *, device=None):
        return super().tile(queries, keys, T, S, device=device).float()


class SpansToTheFirstQuery(Causal):
    def span(self, queries, T, S):
        return super().span(queries[:1], T, S)


class SpansTheFirstRow(Padding):
    def span(self, queries, T, S):
        return range(self.key_lengths[0])


class SpansASlice(Causal):
    def span(self, queries, T, S):
        return slice(0, S)


class SpansBeyondTheKeys(Causal):
    def span(self, queries, T, S):
        return range(queries.stop + S)


class SaysAllIsSeen(Causal):
    def sees_all(self, queries, keys, T, S):
        return True


class AsksTheLastQuery(Causal):
    def sees_all(self, queries, keys, T, S):
        return len(queries) > 0 and keys.stop <= queries.stop + S - T


class JoinsTilesByUnion(Causal):
    def __and__(self, other):
        class Joined(Intersection):
            def tile(_, queries, keys, T, S, *, device=None):
                return self.tile(queries, keys, T, S, device=device) | other.tile(queries, keys, T, S, device=device)

        return Joined((self, other))


@pytest.mark.parametrize(
    ("mask", "law"),
    [
        (ReturnsNumbers(), "dense.* is a boolean table.*float32"),
        (ReturnsOneRow(), r"dense.* is a boolean table.*\(1, 11\)"),
        (ChangesItsMind(), "dense.* is a boolean table.*second call"),
        (JoinsByUnion(), "& is the intersection"),
        (AddsSomethingElse(), "additive"),
        (HidesEmptyRows([3, 0]), "additive.*wrong about which queries have a key"),
        (IsTakenForAnother(0), "attention under the mask is attention under its table"),
        (TakesAnySize([3, 0]), "other sizes raise ValueError.*B=3 went through"),
        (CountsQueriesFromTheTile(), "tile is a part of dense.*it is not that part of the table"),
        (CountsKeysFromTheTile([3, 5]), "tile is a part of dense.*it is not that part of the table"),
        (TileOfOneQuery(), r"tile is a part of dense.*got shape \(1, 0\) for 3 queries and 0 keys"),
        (TileOfEachKeyHead(), r"tile is a part of dense.*got shape \(1, 2, 0, 0\)"),
        (TileOfNumbers(), "tile is a part of dense.*expected booleans, got torch.float32"),
        (SpansToTheFirstQuery(), r"span leaves out no key.*got range\(0, 5\), but a query sees a key outside of it"),
        (SpansTheFirstRow([3, 5]), r"span leaves out no key.*got range\(0, 3\), but a query sees"),
        (SpansASlice(), r"span leaves out no key.*expected a range of step 1 within 0 ... 11, got slice"),
        (SpansBeyondTheKeys(), r"span leaves out no key.*within 0 ... 11, got range\(0, 12\)"),
        (SaysAllIsSeen(), "sees_all is True only where no key is hidden.*a query does not see a key"),
        (AsksTheLastQuery(), "sees_all is True only where no key is hidden"),
        (JoinsTilesByUnion(-2), r"tile is a part of dense.*of mask & Causal\(\): it is not that part"),
    ],
)
def test_a_mask_that_breaks_its_word_is_caught(mask, law):
    with pytest.raises(LawBroken, match=law):
        check_mask(mask)
