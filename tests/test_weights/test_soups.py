"""Soups: means against float64, and the greedy recipe followed by hand."""

import math

import pytest
import torch

from llmtune.weights import greedy_soup, uniform_soup


def states(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [
        {"a": torch.randn(7, 11, generator=generator).to(dtype), "b": torch.randn(5, generator=generator).to(dtype)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_mean_is_rounded_once(dtype, count):
    given = states(count, dtype)
    found = uniform_soup(given)
    for name in "ab":
        exact = sum(state[name].double() for state in given) / count
        assert torch.equal(found[name], exact.to(dtype))


@pytest.mark.parametrize("count", [3, 7, 49])
def test_models_that_agree_give_themselves(count):
    (state,) = states(1)
    found = uniform_soup([state] * count)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    naive = sum(state["a"] * (1 / count) for _ in range(count))
    assert not torch.equal(naive, state["a"]), "v / n added up in float32 is not v"


def test_integers_are_the_first_states_and_ties_stay():
    weight, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    found = uniform_soup(
        [{"in": weight, "out": weight, "n": torch.tensor(5)}, {"in": other, "out": other, "n": torch.tensor(6)}]
    )
    assert found["in"] is found["out"]
    assert found["in"].tolist() == [2.0, 2.0]
    assert found["n"].item() == 5


def scored(values):
    """Return a score that knows means of the states 0, 1, 2 ... by their sum of powers of 2."""

    def score(state):
        seen = state["w"].item()
        for key, value in values.items():
            members = [int(letter) for letter in key]
            if seen == pytest.approx(sum(2.0**m for m in members) / len(members)):
                return value
        raise AssertionError(f"an unexpected soup: {seen}")

    return score


def test_the_greedy_recipe_step_by_step():
    given = [{"w": torch.tensor(2.0**index)} for index in range(4)]
    # ordered 2, 0, 3, 1: 2 and 0 are as good as 2 alone, with 3 it is worse, with 1 better
    values = {"0": 0.7, "1": 0.5, "2": 0.8, "3": 0.6, "20": 0.8, "203": 0.79, "201": 0.9}
    soup = greedy_soup(given, scored(values))
    assert soup.members == (2, 0, 1)
    assert soup.score == 0.9
    assert soup.scores == (0.7, 0.5, 0.8, 0.6)
    assert soup.state["w"].item() == pytest.approx((4 + 1 + 2) / 3)


def test_a_soup_is_never_worse_than_the_best_alone():
    given = [{"w": torch.tensor(2.0**index)} for index in range(3)]
    soup = greedy_soup(given, scored({"0": 0.5, "1": 0.5, "2": 0.4, "01": 0.3, "02": 0.4}))
    assert soup.members == (0,), "the first of equal ones, and nothing that makes it worse"
    assert (soup.score, soup.state["w"].item()) == (0.5, 1.0)


def test_bad_input():
    with pytest.raises(ValueError, match="there are no states: give at least one"):
        uniform_soup([])
    with pytest.raises(TypeError, match="states must be a list of state dicts; got a dict"):
        uniform_soup({"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"w is \[2\] of torch.float32 in states\[0\] and \[3\] of .* in states\[1\]"):
        uniform_soup([{"w": torch.ones(2)}, {"w": torch.ones(3)}])
    with pytest.raises(ValueError, match="w would not be finite"):
        uniform_soup([{"w": torch.ones(2)}, {"w": torch.full((2,), math.nan)}])
    with pytest.raises(ValueError, match=r"the score of states\[0\] is NaN"):
        greedy_soup([{"w": torch.ones(2)}], lambda state: math.nan)
    with pytest.raises(ValueError, match=r"the score of the soup with states\[1\] is NaN"):
        greedy_soup([{"w": torch.zeros(1)}, {"w": torch.ones(1)}], lambda s: math.nan if 0 < s["w"].item() < 1 else 1.0)
