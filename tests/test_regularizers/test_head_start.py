"""Heads from frozen embeddings: distances by loops, the prototypical loss, and the optimality of the probe."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from llmtune.regularizers import linear_probe, nearest_mean_head
from llmtune.testing import assert_close

N, E, C = 23, 7, 5


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(11)
    embeddings = torch.randn(N, E, dtype=torch.float64, generator=generator)
    return embeddings, torch.arange(N) % C


def means_of(embeddings, labels):
    return [
        sum(x for x, y in zip(embeddings, labels, strict=True) if y == c) / int((labels == c).sum()) for c in range(C)
    ]


def test_euclidean_logits_are_minus_squared_distances(rows):
    embeddings, labels = rows
    weight, bias = nearest_mean_head(embeddings, labels, temperature=3.0)
    assert (weight.shape, bias.shape, weight.dtype) == ((C, E), (C,), torch.float64)
    x = embeddings[2]
    distances = torch.stack([-sum((a - b) ** 2 for a, b in zip(x, m, strict=True)) for m in means_of(*rows)])
    assert_close(weight @ x + bias - x.square().sum() / 3.0, distances / 3.0)


def test_cosine_logits_are_cosines_for_rows_of_mean_length(rows):
    embeddings, labels = rows
    weight, bias = nearest_mean_head(embeddings, labels, distance="cosine", temperature=0.1)
    x, length = embeddings[3], sum(e.square().sum().sqrt() for e in embeddings) / N
    cosines = torch.stack([x @ m / (x.norm() * m.norm()) for m in means_of(*rows)])
    assert_close(weight @ (x / x.norm() * length) + bias, cosines / 0.1)
    assert (weight @ x + bias).argmax() == cosines.argmax()
    assert not bias.any()


def test_ignored_rows_change_nothing_not_even_by_nan(rows):
    embeddings, labels = rows
    spoiled = torch.cat([embeddings, torch.full((2, E), math.nan, dtype=torch.float64)])
    ignored = torch.cat([labels, torch.tensor([-100, -100])])
    for make in (nearest_mean_head, linear_probe):
        for one, other in zip(make(embeddings, labels), make(spoiled, ignored), strict=True):
            assert torch.equal(one, other)


def test_the_probe_of_two_points_is_the_closed_form():
    # x = (1, -1) for classes (1, 0): V = (-w, w), so the loss is log(1 + exp(-2 w)) + decay w^2, least where
    # decay = 1 / (w (1 + exp(2 w))); the mean length is 1
    wanted = 0.7
    decay = 1 / (wanted * (1 + math.exp(2 * wanted)))
    weight, bias = linear_probe(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]), decay=decay)
    assert_close(weight, torch.tensor([[-wanted], [wanted]]), rtol=1e-5)
    assert bias.abs().max() < 1e-6


def test_the_probe_is_where_the_objective_is_flat_whatever_the_length(rows):
    embeddings, labels = rows
    for scale in (1.0, 31.0):
        x = scale * embeddings
        weight, bias = linear_probe(x, labels, decay=1e-3)
        length = x.norm(dim=1).mean()
        v, b = (weight * length).requires_grad_(), bias.requires_grad_()
        loss = F.cross_entropy(x / length @ v.T + b, labels) + 1e-3 / 2 * v.square().sum()
        for gradient in torch.autograd.grad(loss, (v, b)):
            assert gradient.abs().max() < 1e-6
        assert_close(bias.sum(), torch.zeros((), dtype=torch.float64), rtol=1e-9)
        logits = x @ weight.T + bias
    assert_close(embeddings @ linear_probe(embeddings, labels, decay=1e-3)[0].T + bias, logits, rtol=1e-5)


def test_the_order_of_rows_changes_nothing_and_half_precision_comes_back_as_float32(rows):
    embeddings, labels = rows
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    for make in (nearest_mean_head, linear_probe):
        for one, other in zip(make(embeddings, labels), make(embeddings[order], labels[order]), strict=True):
            assert_close(one, other, rtol=1e-5)
        assert {t.dtype for t in make(embeddings.bfloat16(), labels)} == {torch.float32}
        assert make(embeddings, labels)[0].requires_grad is False


def test_random_state_is_left_alone(rows):
    before = torch.get_rng_state()
    linear_probe(*rows)
    nearest_mean_head(*rows)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"labels": torch.zeros(N)}, TypeError, "labels of integers; got torch.float64, torch.float32"),
        ({"labels": torch.zeros(N - 1, dtype=torch.long)}, ValueError, "got [23, 7] and [22]"),
        ({"labels": torch.full((N,), -100)}, ValueError, "all 23 are -100"),
        ({"classes": C + 2}, ValueError, "these have none: [5, 6]"),
        ({"classes": 3}, ValueError, "labels must be from 0 to 2, or -100; got 0 to 4"),
        ({"embeddings": torch.full((N, E), math.inf)}, ValueError, "an embedding is not finite"),
    ],
)
def test_errors(rows, change, error, text):
    embeddings, labels = rows
    given = {"embeddings": embeddings, "labels": labels} | change
    for make in (nearest_mean_head, linear_probe):
        with pytest.raises(error, match=re.escape(text)):
            make(given.pop("embeddings", embeddings), **{"labels": labels} | given)
        given = {"embeddings": embeddings, "labels": labels} | change


def test_errors_of_knobs(rows):
    for make, knobs, text in (
        (nearest_mean_head, {"distance": "manhattan"}, 'distance must be "euclidean" or "cosine"; got \'manhattan\''),
        (nearest_mean_head, {"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        (linear_probe, {"decay": 0.0}, "decay must be above 0; got 0.0"),
        (linear_probe, {"max_steps": 0}, "max_steps must be 1 or more; got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            make(*rows, **knobs)
