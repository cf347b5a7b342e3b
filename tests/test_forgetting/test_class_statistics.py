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
    means, middle = torch.stack([x[labels == c].mean(0) for c in range(CLASSES)]), x.mean(0)
    apart = x - means[labels]
    covariance = sum(row[:, None] * row[None, :] for row in apart) / len(x)
    shrunk = (1 - shrinkage) * covariance + shrinkage * torch.eye(WIDTH).double() * covariance.diagonal().mean()
    inverse = torch.linalg.inv(shrunk)
    bias = [-0.5 * (m - middle) @ inverse @ (m - middle) - (m - middle) @ inverse @ middle for m in means]
    return (means - middle) @ inverse, torch.stack(bias)


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
    some = torch.arange(ROWS) > 9 * labels  # fewer of the later classes, for the prior
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.add(embeddings[some], labels[some])
    weight, bias = statistics.head(shrinkage=0.3, prior=True)
    x, y = embeddings[some].double(), labels[some]
    means = torch.stack([x[y == c].mean(0) for c in range(CLASSES)])
    covariance = (x - means[y]).T @ (x - means[y]) / len(y)
    covariance = 0.7 * covariance + 0.3 * covariance.trace() / WIDTH * torch.eye(WIDTH).double()
    share = torch.bincount(y) / len(y)
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
    assert bias[3] < NEVER
    assert not weight[3].any()
    assert torch.equal(weight, without.head()[0])
    assert statistics.counts.tolist() == [21, 20, 20, 0, 20]


@pytest.mark.parametrize("prior", [False, True])
def test_a_class_without_rows_is_never_chosen_where_the_classes_are_tight_and_the_embedding_is_far(prior):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(ROWS) % (CLASSES - 1)
    centres = 50 + 10 * torch.randn(CLASSES, WIDTH, generator=generator)
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.add(centres[labels] + 0.01 * torch.randn(ROWS, WIDTH, generator=generator), labels)
    weight, bias = statistics.head(prior=prior)
    anywhere = 10 ** torch.linspace(-3, 3, 211)[:, None] * torch.randn(211, WIDTH, generator=generator)
    equal = torch.linalg.lstsq((weight[:3] - weight[3]).double(), (bias[3] - bias[:3]).double()[:, None]).solution.T
    for dtype in (torch.float32, torch.bfloat16):
        head = weight.to(dtype).double(), bias.to(dtype).double()
        logits = torch.cat([anywhere.double(), equal]) @ head[0].T + head[1]
        assert logits[-1, :4].max() < NEVER  # where all are equal: a fixed number would not do
        assert (logits.argmax(1) < 4).all()


def test_one_class_alone_is_chosen():
    embeddings, _ = rows()
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.add(embeddings, torch.full((ROWS,), 2))
    weight, bias = statistics.head()
    assert ((embeddings @ weight.T + bias).argmax(1) == 2).all()


def test_what_all_embeddings_share_costs_no_digits_in_half_precision():
    """As an encoder gives them: a mean far longer than what tells classes apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(211) % CLASSES
    shared = 20 * torch.randn(WIDTH, generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    embeddings = (shared + centres[labels] + 0.1 * torch.randn(211, WIDTH, generator=generator)).bfloat16()
    statistics = ClassStatistics(CLASSES, WIDTH)
    statistics.add(embeddings, labels)
    weight, bias = statistics.head()
    exact = embeddings.double() @ weight.double().T + bias.double()
    rounded = embeddings.double() @ weight.bfloat16().double().T + bias.bfloat16().double()
    assert (rounded - exact).abs().max() < 0.03 * exact.abs().max()


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
    torch.testing.assert_close(far.head()[0], near.head()[0], rtol=1e-3, atol=1e-4)


def test_the_state_goes_round():
    embeddings, labels = rows()
    first, second, whole = (ClassStatistics(CLASSES, WIDTH) for _ in range(3))
    whole.add(embeddings, labels)
    first.add(embeddings[:50], labels[:50])
    state = first.state_dict()
    first.add(embeddings[:9], labels[:9])  # the state is a copy
    second.load_state_dict(state)
    second.add(embeddings[50:], labels[50:])
    assert torch.equal(second.counts, whole.counts)
    torch.testing.assert_close(second.sums, whole.sums, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(second.moment, whole.moment, rtol=1e-12, atol=1e-9)
    kept = ClassStatistics(CLASSES, WIDTH)
    kept.load_state_dict(state)  # and so is what is loaded
    assert int(kept.counts.sum()) == 50
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
    with pytest.raises(ValueError, match="none of 5 classes has one"):
        statistics.head()
    with pytest.raises(ValueError, match="shrinkage"):
        statistics.head(shrinkage=0.0)
    with pytest.raises(ValueError, match="two classes"):
        ClassStatistics(1, WIDTH)
    with pytest.raises(ValueError, match="two classes"):
        ClassStatistics(5.0, WIDTH)
