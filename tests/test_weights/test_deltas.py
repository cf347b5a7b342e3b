"""Merging changes of weights: formulas written out entry by entry, and laws that hold for every method."""

import math

import pytest
import torch

from llmtune.weights import merge_deltas, trim

METHODS = {
    "average": {},
    "task": {},
    "ties": {"density": 0.4},
    "dare": {"density": 0.4},
}


def models(count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = {"a": (7, 11), "b": (5,), "c": (2, 3, 13)}
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def run(deltas, weights=None, *, method, seed=3, **options):
    options = METHODS[method] | options
    if method == "dare":
        options["generator"] = torch.Generator().manual_seed(seed)
    return merge_deltas(deltas, weights, method=method, **options)


def by_hand(values, weights, density, method):
    """One entry's values [models], already trimmed where the method trims."""
    values = [w * v for w, v in zip(weights, values, strict=True)]
    if method == "average":
        return sum(values) / sum(weights)
    if method == "task":
        return sum(values)
    total = sum(values)
    same = [v for v in values if v * total > 0]
    return sum(same) / len(same) if same else 0.0


@pytest.mark.parametrize("method", ["average", "task", "ties"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 3.0)])
def test_every_entry_is_the_formula(method, weights):
    deltas = models(dtype=torch.float64)
    density = 0.4 if method == "ties" else 1.0
    found = merge_deltas(deltas, weights, method=method, density=density)
    for name, merged in found.items():
        kept = []
        for delta in deltas:
            flat = delta[name].flatten().tolist()
            largest = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: math.floor(0.4 * len(flat))]
            kept.append([v if method != "ties" or i in largest else 0.0 for i, v in enumerate(flat)])
        expected = [by_hand(values, weights, density, method) for values in zip(*kept, strict=True)]
        assert merged.shape == deltas[0][name].shape
        torch.testing.assert_close(merged.flatten().tolist(), expected, rtol=1e-12, atol=1e-14)


def test_ties_on_paper():
    deltas = [{"w": torch.tensor([3.0, -1.0, 2.0, 0.1])}, {"w": torch.tensor([1.0, 4.0, -0.2, 0.3])}]
    # kept: [3, 0, 2, 0] and [1, 4, 0, 0]; elected signs +, +, +, none
    assert merge_deltas(deltas, method="ties", density=0.5)["w"].tolist() == [2.0, 4.0, 2.0, 0.0]
    # weighed by 2 and -1: [6, 0, 4, 0] and [-1, -4, 0, 0]; what is subtracted votes against
    assert merge_deltas(deltas, [2, -1], method="ties", density=0.5)["w"].tolist() == [6.0, -4.0, 4.0, 0.0]


def test_where_trimmed_entries_cancel_no_sign_is_elected():
    deltas = [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([-2.0, 1.0])}]
    assert merge_deltas(deltas, method="ties")["w"].tolist() == [0.0, 1.0]


def test_dare_drops_and_makes_up_for_it():
    delta = {"w": torch.full((401, 97), 3.0, dtype=torch.float64)}
    found = run([delta], method="dare", density=0.25)["w"]
    assert set(found.unique().tolist()) == {0.0, 12.0}
    share = (found != 0).double().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / found.numel()) ** 0.5
    both = run([delta, delta], method="dare", density=0.25)["w"]
    assert set(both.unique().tolist()) == {0.0, 12.0, 24.0}, "each model has draws of its own"


def test_dare_draws_from_its_generator_alone():
    deltas = models()
    state = torch.get_rng_state()
    one, same, other = (run(deltas, method="dare", seed=seed)["a"] for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# --- laws that hold for every method --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_model_that_keeps_everything_is_itself(method):
    (delta,) = models(1)
    found = run([delta], method=method, density=1.0)
    assert all(torch.equal(found[name], tensor) for name, tensor in delta.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_opposite_of_all_gives_the_opposite(method):
    deltas = models()
    opposite = [{name: -tensor for name, tensor in delta.items()} for delta in deltas]
    one, other = run(deltas, method=method), run(opposite, method=method)
    assert all(torch.equal(one[name], -other[name]) for name in one)


@pytest.mark.parametrize("method", ["average", "task", "ties"])
def test_the_order_of_the_models_does_not_matter(method):
    deltas, weights = models(dtype=torch.float64), [0.5, 2.0, 1.0]
    one = run(deltas, weights, method=method)
    other = run(deltas[::-1], weights[::-1], method=method)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_written_to(method):
    deltas = models()
    before = [{name: tensor.clone() for name, tensor in delta.items()} for delta in deltas]
    found = run(deltas, method=method, density=1.0)
    for delta, was in zip(deltas, before, strict=True):
        assert all(torch.equal(delta[name], was[name]) for name in was)
    own = {tensor.untyped_storage().data_ptr() for delta in deltas for tensor in delta.values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in found.values()}


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_rounded_once(method):
    deltas = models(dtype=torch.bfloat16)
    found = run(deltas, method=method)
    exact = run([{name: tensor.float() for name, tensor in delta.items()} for delta in deltas], method=method)
    for name in found:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], exact[name].bfloat16())


# --- trim -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "n", "kept"), [(0.29, 100, 29), (0.5, 7, 3), (0.01, 7, 1), (1.0, 7, 7)])
def test_trim_keeps_the_largest(density, n, kept):
    tensor = torch.randn(n, generator=torch.Generator().manual_seed(1))
    found = trim(tensor, density)
    largest = tensor.abs().argsort(descending=True)[:kept]
    assert set(found.nonzero().flatten().tolist()) == set(largest.tolist())
    assert torch.equal(found[largest], tensor[largest])


def test_among_equal_entries_the_first_stay():
    assert trim(torch.tensor([[1.0, -1.0], [2.0, 1.0]]), 0.5).tolist() == [[1.0, 0.0], [2.0, 0.0]]
    assert trim(torch.zeros(0), 0.5).shape == (0,)


# --- refusals -------------------------------------------------------------------------------------------------------

ONE = {"w": torch.ones(3)}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "there are no deltas to merge"),
        (([ONE, ONE], [1.0]), {}, "expected a weight for each of the 2 deltas; got 1"),
        (([ONE], [math.nan]), {}, r"weights must be finite numbers; got \[nan\]"),
        (([ONE, ONE], [1, -1]), {}, r'weights must not sum to 0, by which "average" divides.*use method="task"'),
        (([ONE],), {"method": "tie"}, r'method must be one of "average".*Did you mean "ties"\?'),
        (([ONE],), {"method": "ties", "density": 0}, "density is the share of entries to keep, above 0 and at most 1"),
        (([ONE],), {"method": "ties", "density": 1.5}, "density is the share of entries to keep"),
        (([ONE],), {"density": 0.5}, '"average" keeps every entry: density=0.5 is for "ties" and "dare"'),
        (([ONE],), {"generator": torch.Generator()}, '"average" draws nothing: a generator is for "dare"'),
        (([ONE, {}],), {}, r"w is in deltas\[0\] and not in deltas\[1\]: give zeros"),
        (([{}, ONE],), {}, r"w is in deltas\[1\] and not in deltas\[0\]: give zeros"),
        (([ONE, {"w": torch.ones(2)}],), {}, r"w is \(2,\) in deltas\[1\] and \(3,\) in deltas\[0\]"),
        (([{"w": torch.tensor([math.inf])}],), {}, r"w in deltas\[0\] has entries that are not finite"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        merge_deltas(*arguments, **options)


def test_a_change_is_floating():
    with pytest.raises(TypeError, match=r"w in deltas\[0\] is torch.int64: a change of weights is floating"):
        merge_deltas([{"w": torch.ones(3, dtype=torch.int64)}])


def test_dare_is_the_change_on_average():
    (delta,) = models(1, dtype=torch.float64)
    generator, runs, density = torch.Generator().manual_seed(19), 900, 0.4
    drawn = [merge_deltas([delta], method="dare", density=density, generator=generator)["a"] for _ in range(runs)]
    mean = torch.stack(drawn).mean(0)
    deviation = delta["a"].abs() * ((1 - density) / density / runs) ** 0.5  # of the mean of the runs
    assert ((mean - delta["a"]).abs() < 5 * deviation).all()
    assert (mean - delta["a"]).abs().max() > 0
