"""A head out of sums over classes: the formula in float64, whatever the order, and what it refuses."""

import pytest
import torch

from llmtune.errors import CheckpointError
from llmtune.forgetting.class_statistics import NEVER, ClassStatistics
from llmtune.regularizers.head_start import nearest_mean_head

ROWS, CLASSES, WIDTH = 101, 5, 7


def rows(seed=0, count=ROWS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    mixed = torch.randn(WIDTH, WIDTH, generator=generator)
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=generator)
    return (centres[labels] + torch.randn(count, WIDTH, generator=generator) @ mixed).to(dtype), labels


def by_hand(embeddings, labels, shrinkage):
    """The log posterior's linear part, class by class, in float64."""
    x = embeddings.double()
    means = torch.stack([x[labels == c].mean(0) for c in range(CLASSES)])
    apart = x - means[labels]
    covariance = sum(row[:, None] * row[None, :] for row in apart) / len(x)
    shrunk = (1 - shrinkage) * covariance + shrinkage * torch.eye(WIDTH).double() * covariance.diagonal().mean()
    inverse = torch.linalg.inv(shrunk)
    return means @ inverse, torch.stack([-0.5 * m @ inverse @ m for m in means])


def test_it_is_linear_discriminant_analysis():
    embeddings, labels = rows()
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.add(embeddings, labels)
    for shrinkage in (0.05, 0.6, 1.0):
        found, wanted = statistics.head(shrinkage=shrinkage), by_hand(embeddings, labels, shrinkage)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)


def test_it_is_the_most_probable_class_of_gaussians():
    embeddings, labels = rows(1)
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.add(embeddings[:60], labels[:60])
    weight, bias = statistics.head(shrinkage=0.3, prior=True)
    x = embeddings[:60].double()
    means = torch.stack([x[labels[:60] == c].mean(0) for c in range(CLASSES)])
    covariance = (x - means[labels[:60]]).T @ (x - means[labels[:60]]) / 60
    covariance = 0.7 * covariance + 0.3 * covariance.trace() / WIDTH * torch.eye(WIDTH).double()
    share = torch.bincount(labels[:60]) / 60
    log = torch.stack([
        torch.distributions.MultivariateNormal(mean, covariance).log_prob(embeddings.double()) for mean in means
    ], 1) + share.log()  # fmt: skip
    torch.testing.assert_close((embeddings @ weight.T + bias).softmax(1).double(), log.softmax(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3, ROWS])
def test_order_and_parts_change_nothing(parts):
    embeddings, labels = rows()
    whole, apart = ClassStatistics(CLASSES, WIDTH), ClassStatistics(CLASSES, WIDTH)
    whole.add(embeddings, labels)
    by_class = labels.argsort(stable=True)  # class after class, the worst order for what is trained
    for some in by_class.chunk(parts):
        apart.add(embeddings[some], labels[some])
    for ours, theirs in zip(whole.head(), apart.head(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_full_shrinkage_is_the_nearest_mean():
    embeddings, labels = rows()
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.add(embeddings, labels)
    weight, bias = statistics.head(shrinkage=1.0)
    nearest = nearest_mean_head(embeddings, labels)
    assert torch.equal((embeddings @ weight.T + bias).argmax(1), (embeddings @ nearest[0].T + nearest[1]).argmax(1))


def test_a_class_without_rows_is_never_chosen_and_ignored_rows_count_for_nothing():
    embeddings, labels = rows()
    labels = torch.where(labels == 3, -100, labels)
    statistics, without = ClassStatistics(CLASSES, WIDTH), ClassStatistics(CLASSES, WIDTH)
    statistics.add(embeddings, labels)
    without.add(embeddings[labels != -100], labels[labels != -100])
    weight, bias = statistics.head()
    assert bias[3] == NEVER
    assert not weight[3].any()
    assert torch.equal(weight, without.head()[0])
    assert statistics.counts.tolist() == [21, 20, 20, 0, 20]


def test_one_row_a_class_is_the_nearest_row():
    embeddings, labels = rows(count=CLASSES)
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.add(embeddings, labels)
    weight, bias = statistics.head()
    assert torch.equal((embeddings @ weight.T + bias).argmax(1), labels)


def test_far_from_the_origin_nothing_is_lost():
    embeddings, labels = rows(dtype=torch.float64)
    near, far = ClassStatistics(CLASSES, WIDTH), ClassStatistics(CLASSES, WIDTH)
    near.add(embeddings, labels)
    far.add(embeddings + 1000, labels)
    torch.testing.assert_close(
        far.head()[0] - far.head()[0][0], near.head()[0] - near.head()[0][0], rtol=1e-3, atol=1e-4
    )


def test_the_state_goes_round():
    embeddings, labels = rows()
    first, second, whole = (ClassStatistics(CLASSES, WIDTH) for _ in range(3))
    whole.add(embeddings, labels)
    first.add(embeddings[:50], labels[:50])
    second.load_state_dict(first.state_dict())
    second.add(embeddings[50:], labels[50:])
    first.add(embeddings[:9], labels[:9])  # the state is a copy
    torch.testing.assert_close(second.moment, whole.moment, rtol=1e-12, atol=1e-9)
    with pytest.raises(ValueError, match=r"sums must be \[5, 8\]; the saved one is \[5, 7\]"):
        ClassStatistics(CLASSES, WIDTH + 1).load_state_dict(second.state_dict())
    with pytest.raises(CheckpointError, match="counts"):
        first.load_state_dict({})


@pytest.mark.parametrize(("change", "error", "words"), [
    (lambda x, y: (x[:, :3], y), ValueError, r"embeddings \[N, 7\]"),
    (lambda x, y: (x, y[:4]), ValueError, r"and \[4\]"),
    (lambda x, y: (x, y + 1), ValueError, "from 0 to 4"),
    (lambda x, y: (x, y.float()), TypeError, "labels of integers"),
    (lambda x, y: (x.where(x < 1, torch.nan), y), ValueError, "not finite"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_added(change, error, words):
    statistics = ClassStatistics(CLASSES, WIDTH)
    with pytest.raises(error, match=words):
        statistics.add(*change(*rows()))
    assert not statistics.counts.any()
    assert not statistics.moment.any()


def test_a_head_of_nothing_is_refused():
    statistics = ClassStatistics(CLASSES, WIDTH)
    with pytest.raises(ValueError, match="two classes"):
        statistics.head()
    with pytest.raises(ValueError, match="shrinkage"):
        statistics.head(shrinkage=0.0)
    with pytest.raises(ValueError, match="two classes"):
        ClassStatistics(1, WIDTH)
