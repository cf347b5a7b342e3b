"""Fisher-weighted merging against the formula in float64, and what happens where nothing is known."""

import math

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, adapter_parameters, attach
from llmtune.forgetting import anchor_of, diagonal_fisher
from llmtune.testing.models import tiny_gpt2
from llmtune.weights import fisher_merge, uniform_soup


def given(count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(13)
    shapes = {"a": (7, 11), "b": (5,)}
    draw = lambda make: [{k: make(s, generator=generator) for k, s in shapes.items()} for _ in range(count)]
    states = [{name: tensor.to(dtype) for name, tensor in state.items()} for state in draw(torch.randn)]
    return states, draw(torch.rand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0]])
def test_it_is_the_formula_rounded_once(dtype, weights):
    states, fishers = given(dtype=dtype)
    found = fisher_merge(states, fishers, weights)
    for name in "ab":
        shares = [w * f[name].double() for w, f in zip(weights or [1.0] * 3, fishers, strict=True)]
        total = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        assert torch.equal(found[name], (total / sum(shares)).to(dtype))


def test_where_no_model_knows_anything_it_is_the_mean_and_one_that_knows_decides():
    states = [{"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([4.0, 4.0, 4.0])}]
    fishers = [{"w": torch.tensor([0.0, 0.0, 1e-12])}, {"w": torch.tensor([0.0, 1e-30, 0.0])}]
    assert fisher_merge(states, fishers)["w"].tolist() == [2.5, 4.0, 1.0]
    assert fisher_merge(states, fishers, [3.0, 1.0])["w"].tolist() == [1.75, 4.0, 1.0]


def test_a_common_factor_changes_nothing_and_equal_information_is_the_mean():
    states, fishers = given()
    scaled = [{name: 2.0**-30 * tensor for name, tensor in fisher.items()} for fisher in fishers]
    one, other = fisher_merge(states, fishers), fisher_merge(states, scaled)
    assert all(torch.equal(one[name], other[name]) for name in one)
    ones = [{name: torch.full_like(tensor, 0.3) for name, tensor in fisher.items()} for fisher in fishers]
    same, mean = fisher_merge(states, ones), uniform_soup(states)
    assert all(torch.allclose(same[name], mean[name], rtol=1e-6) for name in mean)


def test_models_that_agree_stay_and_so_does_one_alone():
    (state, *_), fishers = given()
    for count in (1, 3):
        found = fisher_merge([state] * count, fishers[:count])
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_it_is_the_mode_of_the_product_of_the_posteriors():
    """A linear-Gaussian model: the merge of two fits of halves of the data is the fit of all of it."""
    generator = torch.Generator().manual_seed(17)
    x = torch.zeros(24, 3, dtype=torch.float64)
    x[torch.arange(24), torch.arange(24) % 3] = torch.rand(24, generator=generator, dtype=torch.float64) + 0.5
    y = torch.randn(24, generator=generator, dtype=torch.float64)
    fit = lambda x, y: torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    halves = [(x[:9], y[:9]), (x[9:], y[9:])]  # the columns are orthogonal: the information matrix is diagonal
    states = [{"w": fit(*half)} for half in halves]
    fishers = [{"w": half[0].square().sum(0)} for half in halves]
    torch.testing.assert_close(fisher_merge(states, fishers)["w"], fit(x, y))


def test_adapters_are_merged_as_effective_weights_and_tied_names_need_one_fisher():
    ids = torch.tensor([[5, 7, 11, 13, 17]])
    anchors, fishers = [], []
    for seed in (0, 1):
        model = tiny_gpt2()
        attach(model, LoRA(rank=2, alpha=4, targets=["c_attn"]))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for parameter in adapter_parameters(model).values():
                nn.init.normal_(parameter, std=0.1)
        anchors.append(anchor_of(model))
        fishers.append(diagonal_fisher(model, [{"input_ids": ids, "labels": ids}], kind="empirical"))
    found = fisher_merge(anchors, fishers)
    name = "transformer.h.1.attn.c_attn.weight"
    top = sum(f[name].double() * a[name].double() for f, a in zip(fishers, anchors, strict=True))
    bottom = sum(f[name].double() for f in fishers)
    torch.testing.assert_close(found[name].double(), top / bottom, rtol=1e-6, atol=1e-7)

    weight, other = torch.ones(2), torch.zeros(2)
    tied = [{"in": weight, "out": weight}, {"in": other, "out": other}]
    one = fisher_merge(tied, [{"out": torch.tensor([1.0, 3.0])}, {"out": torch.tensor([1.0, 1.0])}])
    assert one["in"] is one["out"]
    assert one["in"].tolist() == [0.5, 0.75]
    both = {"in": torch.ones(2), "out": torch.ones(2)}
    with pytest.raises(ValueError, match="in and out are one tied tensor: give its Fisher information by one name"):
        fisher_merge(tied, [both, both])


def test_what_has_no_information_must_be_the_same():
    states = [{"w": torch.ones(2), "frozen": torch.full((3,), 0.1), "n": torch.tensor(i)} for i in (4, 5)]
    fishers = [{"w": torch.ones(2)}] * 2
    found = fisher_merge(states, fishers)
    assert torch.equal(found["frozen"], states[0]["frozen"])
    assert found["n"].item() == 4
    states[1]["frozen"] = torch.zeros(3)
    with pytest.raises(ValueError, match="frozen differs between the states, and fishers do not name it"):
        fisher_merge(states, fishers)


W, ONES = [{"w": torch.zeros(2)}, {"w": torch.ones(2)}], [{"w": torch.ones(2)}] * 2


@pytest.mark.parametrize(
    ("states", "fishers", "weights", "error", "sentence"),
    [
        (W, ONES[:1], None, ValueError, "expected Fisher information of each of the 2 states; got 1"),
        (W, {"w": torch.ones(2)}, None, TypeError, "fishers must be a list with one dict for each state; got a dict"),
        (W, [{"v": torch.ones(2)}] * 2, None, ValueError, "v is in fishers.0. and not in the states: .* another model"),
        (W, [{"w": torch.ones(3)}] * 2, None, ValueError, r"w is \[3\] of torch.float32 in fishers\[0\] and \[2\]"),
        (W, [{"w": torch.ones(2)}, {}], None, ValueError, r"w is in fishers\[0\] and not in fishers\[1\]"),
        (W, [{"w": -torch.ones(2)}] * 2, None, ValueError, r"w in fishers\[0\] has entries that are negative or not"),
        (W, [{"w": torch.full((2,), math.nan)}] * 2, None, ValueError, "negative or not finite"),
        (W, ONES, [1.0], ValueError, "expected a weight for each of the 2 states; got 1"),
        (W, ONES, [1.0, -1.0], ValueError, "weights must be 0 or more, and not all 0"),
        (W, ONES, [0.0, 0.0], ValueError, "weights must be 0 or more, and not all 0"),
        ([], [], None, ValueError, "there are no states"),
    ],
)
def test_bad_input(states, fishers, weights, error, sentence):
    with pytest.raises(error, match=sentence):
        fisher_merge(states, fishers, weights)
