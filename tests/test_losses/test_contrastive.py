from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.contrastive import info_nce_loss, prototypical_loss, supervised_contrastive_loss
from llmtune.testing.close import assert_close


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def on_circle(*degrees: float) -> Tensor:
    """Vectors in the plane of lengths 1, 2, 3 ...: the cosine of two is that of the difference of their angles."""
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_supervised_contrastive_by_hand() -> None:
    rows, labels = on_circle(0, 60, 90, 180), torch.tensor([7, 7, 7, 3])
    half, root = 0.5, math.sqrt(3) / 2
    cosines = [[half, 0.0, -1.0], [half, root, -half], [0.0, root, 0.0]]  # to the two classmates, then the stranger
    below = [math.log(sum(math.exp(c / 0.4) for c in row)) for row in cosines]
    each = [lse - (row[0] + row[1]) / 2 / 0.4 for row, lse in zip(cosines, below, strict=True)]
    found = supervised_contrastive_loss(rows, labels, temperature=0.4, reduction="none")
    assert_close(found, torch.tensor([*each, 0.0], dtype=torch.float64), rtol=1e-12)
    assert_close(supervised_contrastive_loss(rows, labels, temperature=0.4), torch.tensor(sum(each) / 3), rtol=1e-6)


def test_the_mean_of_the_logarithms_and_not_the_logarithm_of_the_mean() -> None:
    """Khosla et al. have two forms; the sum stands outside the logarithm, and is the larger of the two."""
    rows, labels = drawn(7, 5), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    z = F.normalize(rows) @ F.normalize(rows).T / 0.1
    z = z.masked_fill(torch.eye(7, dtype=torch.bool), -torch.inf)
    mates = (labels[:, None] == labels) & ~torch.eye(7, dtype=torch.bool)
    inside = -(z.softmax(1) * mates).sum(1).div(mates.sum(1)).log().mean()
    assert supervised_contrastive_loss(rows, labels) > inside


def test_rows_without_a_classmate_are_left_out_of_the_mean_and_not_of_the_others() -> None:
    rows, labels = drawn(5, 3), torch.tensor([0, 1, 1, 2, 1])
    each = supervised_contrastive_loss(rows, labels, reduction="none")
    assert each[0] == each[3] == 0
    assert_close(supervised_contrastive_loss(rows, labels), each[[1, 2, 4]].mean(), rtol=1e-12)
    alone = supervised_contrastive_loss(rows[[1, 2, 4]], labels[[1, 2, 4]])
    assert supervised_contrastive_loss(rows, labels) > alone + 0.1
    wanted = rows.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(supervised_contrastive_loss(wanted, labels), wanted)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[0] != 0).any())  # as a negative it is pushed


def test_the_length_of_an_embedding_and_the_numbers_of_classes_change_nothing() -> None:
    rows, labels = drawn(7, 5), torch.tensor([0, 1, 1, 0, 2, 2, 2])
    expected = supervised_contrastive_loss(rows, labels)
    lengths = torch.tensor([0.01, 3.0, 70.0, 1.0, 5.0, 0.3, 11.0])[:, None]
    assert_close(supervised_contrastive_loss(rows * lengths, labels), expected, rtol=1e-10)
    assert_close(supervised_contrastive_loss(rows, 50 - 7 * labels), expected, rtol=1e-12)


def test_no_pairs_at_all() -> None:
    rows, labels = drawn(3, 5).requires_grad_(), torch.tensor([0, 1, -100])
    message = r"none of the 2 labelled rows \(of 3\) has a classmate"
    with pytest.raises(ValueError, match=message):
        supervised_contrastive_loss(rows, labels)
    for n in (1, 3):
        nothing = supervised_contrastive_loss(rows[:n], labels[:n], reduction="sum")
        assert nothing.item() == 0.0
        assert bool((torch.autograd.grad(nothing, rows)[0] == 0).all())
    assert supervised_contrastive_loss(rows, labels, reduction="none").tolist() == [0.0] * 3


def test_a_small_temperature_stays_finite() -> None:
    rows = on_circle(0, 180, 1, 179).float().requires_grad_()
    loss = supervised_contrastive_loss(rows, torch.tensor([0, 0, 1, 1]), temperature=1e-3)
    assert_close(loss, torch.tensor(2000.0), rtol=2e-3)
    assert bool(torch.autograd.grad(loss, rows)[0].isfinite().all())


@pytest.mark.parametrize("name", ["supervised", "info_nce", "euclidean", "cosine"])
def test_half_precision_and_autocast_compute_in_float32(name: str) -> None:
    rows, other, labels = drawn(7, 5).bfloat16(), drawn(7, 5, seed=1).bfloat16(), torch.tensor([0, 1, 1, 0, 2, 2, 2])

    def loss(a: Tensor, b: Tensor) -> Tensor:
        if name == "supervised":
            return supervised_contrastive_loss(a, labels)
        if name == "info_nce":
            return info_nce_loss(a, b)
        return prototypical_loss(b, labels, a, labels, distance=name, temperature=0.3)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(rows, other)
    assert found.dtype == torch.float32
    assert_close(found, loss(rows.double(), other.double()), rtol=1e-5)


def test_info_nce_by_hand() -> None:
    queries, keys = on_circle(0, 90), on_circle(60, 60, 180)
    scores = torch.tensor([[0.5, 0.5, -1.0], [math.sqrt(3) / 2, math.sqrt(3) / 2, 0.0]], dtype=torch.float64) / 0.5
    expected = scores.logsumexp(1) - scores[:, 0]
    assert_close(info_nce_loss(queries, keys, temperature=0.5, reduction="none"), expected, rtol=1e-12)
    shared = scores[:, [0, 2]].logsumexp(1) - scores[:, 0]  # the two queries have one key: it is no negative
    ids = torch.tensor([4, 4, 9])
    assert_close(info_nce_loss(queries, keys, temperature=0.5, ids=ids), shared.mean(), rtol=1e-12)
    assert_close(info_nce_loss(queries, keys, temperature=0.5, reduction="sum"), expected.sum(), rtol=1e-12)


def test_prototypes_by_hand() -> None:
    support = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    labels = torch.tensor([4, 4, 9, -100])
    queries = torch.tensor([[1.0, 2.0], [5.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    squared = torch.tensor([[1.0, 20.0], [26.0, 1.0]], dtype=torch.float64) / 7  # to (0, 2) and (5, 0)
    expected = torch.stack([squared[0, 0] + (-squared[0]).logsumexp(0), squared[1, 1] + (-squared[1]).logsumexp(0)])
    asked = torch.tensor([4, 9, -100])
    found = prototypical_loss(support, labels, queries, asked, temperature=7.0, reduction="none")
    assert_close(found, torch.cat([expected, torch.zeros(1)]), rtol=1e-12)
    assert_close(prototypical_loss(support, labels, queries, asked, temperature=7.0), expected.mean(), rtol=1e-12)
    root = torch.tensor([1.0, math.sqrt(20.0)], dtype=torch.float64) / 7
    not_squared = root[0] + (-root).logsumexp(0)
    assert abs(found[0] - not_squared) > 1e-2
    cosines = torch.tensor([2 / math.sqrt(5), 1 / math.sqrt(5)], dtype=torch.float64) / 0.2
    by_cosine = prototypical_loss(
        support, labels, queries[:1], asked[:1], distance="cosine", temperature=0.2, reduction="sum"
    )
    assert_close(by_cosine, cosines.logsumexp(0) - cosines[0], rtol=1e-12)


def test_prototypical_gradient_reaches_support_and_queries() -> None:
    support, queries = drawn(5, 3).requires_grad_(), drawn(2, 3, seed=1).requires_grad_()
    of, asked = torch.tensor([8, 3, 8, 3, 3]), torch.tensor([3, 8])
    for distance in ("euclidean", "cosine"):
        assert torch.autograd.gradcheck(
            lambda s, q, d=distance: prototypical_loss(s, of, q, asked, distance=d), (support, queries)
        )


ROWS, LABELS = torch.ones(3, 2), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integer_type(kind: torch.dtype) -> None:
    """In uint8 the class 156 is no -100; support and queries may differ in their types."""
    rows, labels = drawn(7, 5), torch.tensor([3, 100, 100, 3, 3, 100, 3])
    if kind == torch.uint8:
        labels = torch.where(labels == 100, 156, labels)
    assert torch.equal(supervised_contrastive_loss(rows, labels.to(kind)), supervised_contrastive_loss(rows, labels))
    other = prototypical_loss(rows, labels, rows, labels.to(kind))
    assert torch.equal(other, prototypical_loss(rows, labels, rows, labels))


def test_rows_of_two_types_are_compared_in_the_wider() -> None:
    rows, keys = drawn(3, 5), drawn(5, 5, seed=1)
    assert_close(info_nce_loss(rows.float().double(), keys), info_nce_loss(rows.float(), keys), rtol=1e-7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: supervised_contrastive_loss(ROWS, LABELS[:2]), ValueError, r"expected embeddings \[N, E\] and their"),
        (lambda: supervised_contrastive_loss(ROWS, LABELS.float()), TypeError, "labels of embeddings must be integers"),
        (lambda: supervised_contrastive_loss(ROWS, LABELS, temperature=0.0), ValueError, "larger than 0; got 0.0"),
        (lambda: supervised_contrastive_loss(ROWS, LABELS, reduction="max"), ValueError, "reduction must be .* got 'm"),
        (lambda: info_nce_loss(ROWS, ROWS[:2]), ValueError, r"with 0 < N <= M; got \[3, 2\] and \[2, 2\]"),
        (lambda: info_nce_loss(ROWS, ROWS, temperature=math.inf), ValueError, "a finite number larger than 0; got inf"),
        (lambda: info_nce_loss(ROWS[:1], ROWS[:1]), ValueError, "one key leaves nothing to pick from"),
        (lambda: info_nce_loss(ROWS, ROWS, ids=LABELS[:2]), ValueError, r"expected ids \[3\], one for each key; got"),
        (
            lambda: prototypical_loss(ROWS, LABELS, ROWS, torch.tensor([1, 5, 0])),
            ValueError,
            r"class 5 of a query has no example in the support, whose classes are \[0, 1\]",
        ),
        (
            lambda: prototypical_loss(ROWS, 0 * LABELS, ROWS, 0 * LABELS),
            ValueError,
            r"examples of two classes or more, or there is nothing to tell apart; got classes \[0\]",
        ),
        (lambda: prototypical_loss(ROWS, LABELS, ROWS, LABELS * 0 - 100), ValueError, "all 3 are ignored"),
        (lambda: prototypical_loss(ROWS, LABELS, ROWS[:, :1], LABELS), ValueError, "need one width E; got"),
        (lambda: prototypical_loss(ROWS, LABELS, ROWS, LABELS, distance="l1"), ValueError, "distance must be .* 'l1'"),
    ],
)
def test_what_does_not_fit_is_an_error(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
