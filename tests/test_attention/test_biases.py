"""The biases: slopes and buckets in closed form and as transformers has them, tables written out, gradients, errors."""

import math

import pytest
import torch

from llmtune.attention import ALiBi, RelativeBias, RelativePositionBias, scaled_dot_product_attention
from llmtune.attention.biases import alibi_slopes, distance_buckets

SIZES = [(5, 7, None), (7, 5, None), (7, 7, 3), (5, 11, -4), (3, 5, 17), (1, 13, None), (13, 1, None), (1, 1, None)]


def each_pair(value, T, S, offset):
    """[..., T, S] of value(d), one pair of query and key at a time."""
    offset = S - T if offset is None else offset
    return torch.stack([torch.stack([value(t + offset - s) for s in range(S)], -1) for t in range(T)], -2)


def filled(**knobs):
    """A learned bias in float64 with random weights."""
    bias = RelativePositionBias(**knobs).double()
    torch.nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(0))
    return bias


def test_slopes_of_a_power_of_two_are_the_papers():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(1) == [1 / 256]
    assert alibi_slopes(16) == pytest.approx([math.sqrt(0.5) ** h for h in range(1, 17)], rel=1e-15)


def test_slopes_between_powers_of_two_are_completed_from_twice_as_many():
    assert alibi_slopes(3) == [1 / 16, 1 / 256, 1 / 4]
    assert alibi_slopes(5) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2]
    assert alibi_slopes(12) == pytest.approx([2.0**-h for h in range(1, 9)] + [2.0 ** -(h / 2) for h in (1, 3, 5, 7)])


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 12, 16, 23, 32, 71])
def test_slopes_are_those_of_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32).view(heads, 2)[:, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs)


@pytest.mark.parametrize(("T", "S", "offset"), SIZES)
def test_alibi_is_minus_slope_times_distance(T, S, offset):
    slopes = torch.tensor([1 / 16, 1 / 256, 1 / 4], dtype=torch.float64)
    wanted = each_pair(lambda d: -slopes * abs(d), T, S, offset)
    made = ALiBi(3, offset).dense(T, S, dtype=torch.float64)
    assert made.shape == (1, 3, T, S)
    assert torch.equal(made[0], wanted)
    assert ALiBi(3, offset).dense(T, S).dtype == torch.float32
    assert torch.equal(ALiBi(3, offset).dense(T, S, dtype=torch.bfloat16)[0], wanted.bfloat16())


def test_alibi_is_a_frozen_record_without_parameters():
    assert ALiBi(3) == ALiBi(3) != ALiBi(3, offset=2)
    assert list(ALiBi(3).parameters()) == []
    with pytest.raises(AttributeError):
        ALiBi(3).heads = 5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000), (12, 7), (4, 3)])
def test_buckets_are_those_of_transformers(buckets, max_distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-20011, 20011)
    ours = distance_buckets(distances, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    theirs = T5Attention._relative_position_bucket(-distances, bidirectional, buckets, max_distance)
    assert torch.equal(ours, theirs)
    assert (ours.min(), ours.max()) == (0, buckets - 1)


def test_buckets_written_out():
    both = distance_buckets(torch.arange(-9, 10), buckets=8, max_distance=8, bidirectional=True)
    assert both.tolist() == [7, 7, 7, 7, 7, 7, 6, 6, 5, 0, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    one = distance_buckets(torch.arange(-3, 20), buckets=8, max_distance=16, bidirectional=False)
    assert one.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("T", "S", "offset"), SIZES)
def test_the_learned_bias_is_a_row_of_weight_for_each_pair(T, S, offset, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    bias = filled(heads=3, buckets=8, max_distance=11, bidirectional=bidirectional, offset=offset)
    bucket = each_pair(
        lambda d: T5Attention._relative_position_bucket(torch.tensor(-d), bidirectional, 8, 11), T, S, offset
    )
    made = bias.dense(T, S, dtype=torch.float64)
    assert made.shape == (1, 3, T, S)
    assert torch.equal(made[0], bias.weight[bucket].permute(2, 0, 1))

    upstream = torch.randn(1, 3, T, S, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(made, bias.weight, upstream)
    wanted = torch.zeros(8, 3, dtype=torch.float64)
    for t in range(T):
        for s in range(S):
            wanted[bucket[t, s]] += upstream[0, :, t, s]
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_the_learned_bias_is_that_of_a_t5(is_decoder):
    import transformers as hf
    from transformers.models.t5.modeling_t5 import T5Attention

    config = hf.T5Config(
        d_model=20, d_kv=4, num_heads=5, relative_attention_num_buckets=12, relative_attention_max_distance=17,
        is_decoder=is_decoder,
    )  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True)
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    ours = RelativePositionBias(5, buckets=12, max_distance=17, bidirectional=not is_decoder)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    assert torch.equal(ours.dense(29, 29), theirs.compute_bias(29, 29))
    assert torch.equal(ours.dense(1, 29), theirs.compute_bias(29, 29)[:, :, -1:])  # decoding with a cache


def test_the_learned_bias_starts_at_nothing_and_is_a_parameter():
    bias = RelativePositionBias(3, buckets=8)
    assert list(bias.state_dict()) == ["weight"]
    assert [parameter.shape for parameter in bias.parameters()] == [(8, 3)]
    assert isinstance(bias, RelativeBias)
    assert not bias.weight.any()
    assert bias.dense(5, 7).dtype == torch.float32
    assert bias.bfloat16().by_distance(torch.arange(3)).dtype == torch.bfloat16
    assert bias.double().by_distance(torch.arange(3)).dtype == torch.float64
    assert bias.to("meta").dense(5, 7).device.type == "meta"
    assert repr(bias) == ("RelativePositionBias(heads=3, buckets=8, max_distance=128, bidirectional=True, offset=None)")


def test_the_gradient_of_the_learned_bias_is_right_twice():
    bias = filled(heads=2, buckets=4, max_distance=5)

    def through(weight):
        made = torch.func.functional_call(Dense(bias), {"bias.weight": weight}, (3, 5))
        return made.tanh()

    weight = bias.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(through, weight)
    assert torch.autograd.gradgradcheck(through, weight)


class Dense(torch.nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def forward(self, T, S):
        return self.bias.dense(T, S, dtype=torch.float64)


class Counted(RelativeBias):
    """A bias of one's own: d itself, and d squared."""

    heads = 2
    asked = 0

    def by_distance(self, distances):
        self.asked += distances.numel()
        assert distances.dtype == torch.int64
        return torch.stack([distances, distances**2]).double()


def test_a_bias_of_ones_own_needs_only_heads_and_by_distance():
    bias = Counted()
    made = bias.dense(5, 7, dtype=torch.float64)
    assert torch.equal(made[0], each_pair(lambda d: torch.tensor([d, d * d], dtype=torch.float64), 5, 7, None))
    assert bias.asked == 5 + 7 - 1  # not once for each pair
    assert list(bias.parameters()) == []
    with pytest.raises(NotImplementedError, match=r"RelativeBias has no by_distance\(distances\)"):
        RelativeBias().by_distance(torch.arange(3))


@pytest.mark.parametrize("bias", [ALiBi(3), ALiBi(3, -4), RelativePositionBias(3), Counted()])
@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0), (0, 0)])
def test_a_table_without_queries_or_keys_is_empty(bias, T, S):
    assert bias.dense(T, S).shape == (1, bias.heads, T, S)


def test_attention_takes_the_table_of_a_bias():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 5, dtype=torch.float64, generator=g) for n in (7, 11, 11))
    slopes = torch.tensor([1 / 16, 1 / 256, 1 / 4], dtype=torch.float64)
    scores = query @ key.mT / 5**0.5 + each_pair(lambda d: -slopes * abs(d), 7, 11, None)
    out = scaled_dot_product_attention(query, key, value, bias=ALiBi(3).dense(7, 11, dtype=torch.float64))
    torch.testing.assert_close(out, scores.softmax(-1) @ value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: ALiBi(0), ValueError, "heads must be at least 1, got 0"),
        (lambda: ALiBi(2.0), TypeError, "heads must be an integer, got 2.0"),
        (lambda: ALiBi(True), TypeError, "heads must be an integer, got True"),
        (lambda: ALiBi(3, offset=1.0), TypeError, "offset must be an integer, got 1.0"),
        (lambda: ALiBi(3, offset=[1, 2]), TypeError, r"offset must be an integer, got \[1, 2\]"),
        (lambda: RelativePositionBias(-1), ValueError, "heads must be at least 1, got -1"),
        (lambda: RelativePositionBias(3, buckets=2), ValueError, "buckets must be at least 4, got 2"),
        (lambda: RelativePositionBias(3, buckets=1, bidirectional=False), ValueError, "buckets must be at least 2"),
        (lambda: RelativePositionBias(3, buckets=9), ValueError, "buckets must be even where each direction .* got 9"),
        (lambda: RelativePositionBias(3, max_distance=8), ValueError, "max_distance must be at least 9, got 8"),
        (
            lambda: RelativePositionBias(3, max_distance=16, bidirectional=False),
            ValueError,
            "max_distance must be at least 17, got 16",
        ),
        (lambda: RelativePositionBias(3, buckets=8.0), TypeError, "buckets must be an integer, got 8.0"),
        (lambda: RelativePositionBias(3, bidirectional=1), TypeError, "bidirectional must be True or False, got 1"),
        (lambda: RelativePositionBias(3, offset=True), TypeError, "offset must be an integer, got True"),
    ],
)
def test_a_bias_that_cannot_be_says_why(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()
