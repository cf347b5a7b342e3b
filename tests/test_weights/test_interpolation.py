"""WiSE-FT: the straight line against float64, and its two ends to the bit."""

import copy
import math

import pytest
import torch
from torch import nn

from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.weights import interpolate, interpolation_curve


def states(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (7, 11), "b": (5,), "c": (2, 3, 13)}
    base, tuned = (
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()} for _ in range(2)
    )
    base["steps"], tuned["steps"] = torch.tensor(3), torch.tensor(10)
    base["frozen"] = tuned["frozen"] = torch.full((3,), 0.1, dtype=dtype)
    base["mask"] = tuned["mask"] = torch.tensor([-math.inf, 0.0]).to(dtype)
    return base, tuned


@pytest.mark.parametrize("alpha", [-0.5, 0.25, 0.5, 0.7, 1.3, 2])
def test_it_is_the_formula(alpha):
    base, tuned = states()
    found = interpolate(base, tuned, alpha)
    for name in "abc":
        expected = (1 - alpha) * base[name].double() + alpha * tuned[name].double()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_are_the_models_to_the_bit(dtype):
    base, tuned = states(dtype)
    base["b"][:2] = torch.tensor([-0.0, math.inf])
    tuned["b"][:2] = 2.0
    for alpha, state in ((0, base), (1, tuned)):
        found = interpolate(base, tuned, alpha)
        for name in ("a", "b", "c", "frozen", "mask"):
            assert torch.equal(found[name], state[name])
            assert torch.equal(found[name].signbit(), state[name].signbit())
            assert found[name].data_ptr() != state[name].data_ptr(), "a copy"


def test_what_agrees_stays_and_integers_are_the_tuned_models():
    base, tuned = states()
    for alpha in (0.0, 0.1, 0.3, 0.7, 1.9):
        found = interpolate(base, tuned, alpha)
        assert torch.equal(found["frozen"], base["frozen"])
        assert torch.equal(found["mask"], base["mask"])
        assert found["steps"].item() == 10
        assert found["steps"].dtype == torch.int64


def test_half_precision_is_rounded_once():
    base, tuned = states(torch.bfloat16)
    found = interpolate(base, tuned, 0.3)["a"]
    exact = 0.7 * base["a"].double() + 0.3 * tuned["a"].double()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.float().bfloat16())
    thrice = (1 - 0.3) * base["a"] + 0.3 * tuned["a"]
    assert not torch.equal(thrice, found), "in bfloat16 itself it is rounded three times"


def test_the_wider_dtype_of_the_two_is_kept():
    base, tuned = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}, {"w": torch.tensor([1.0 + 2**-20])}
    assert interpolate(base, tuned, 1)["w"].item() == 1 + 2**-20
    assert interpolate(base, tuned, 0)["w"].dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: tiny_llama(tied=True), tiny_gpt2])
def test_tied_tensors_stay_tied(make):
    base, tuned = make(), make()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.5)
    found = interpolate(base.state_dict(), tuned.state_dict(), 0.5)
    embedding = tuned.get_input_embeddings().weight
    tied = [name for name, tensor in tuned.state_dict().items() if tensor.data_ptr() == embedding.data_ptr()]
    assert len(tied) == 2
    assert found[tied[0]] is found[tied[1]]
    copy.deepcopy(base).load_state_dict(found)
    torch.testing.assert_close(found[tied[0]], base.get_input_embeddings().weight + 0.25)


def test_a_state_in_which_a_tied_tensor_was_saved_twice_fits_one_in_which_it_is_one():
    weight, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    twice, once = {"in": weight, "out": weight.clone()}, {"in": other, "out": other}
    for base, tuned in ((twice, once), (once, twice)):
        found = interpolate(base, tuned, 0.5)
        assert found["in"] is found["out"]
        assert found["in"].tolist() == [2.0, 2.0]
    twice["out"] = torch.zeros(2)
    with pytest.raises(ValueError, match="out and in are one tied tensor in one state and differ in base_state"):
        interpolate(twice, once, 0.5)


def test_a_model_halfway_is_that_of_the_state():
    base, tuned = nn.Linear(3, 5), nn.Linear(3, 5)
    x = torch.randn(7, 3)
    middle = nn.Linear(3, 5)
    middle.load_state_dict(interpolate(base.state_dict(), tuned.state_dict(), 0.25))
    torch.testing.assert_close(middle(x), 0.75 * base(x) + 0.25 * tuned(x))
    assert not any(tensor.requires_grad for tensor in interpolate(base.state_dict(), tuned.state_dict(), 0.5).values())


def test_a_curve_is_a_score_by_alpha():
    base, tuned = {"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([2.0, 0.0])}
    found = interpolation_curve(base, tuned, lambda state: state["w"].tolist(), alphas=(1, 0.5, -1))
    assert found == {1.0: [2.0, 0.0], 0.5: [1.0, 2.0], -1.0: [-2.0, 8.0]}
    assert len(interpolation_curve(base, tuned, len)) == 11
    with pytest.raises(ValueError, match="a curve needs at least one alpha"):
        interpolation_curve(base, tuned, len, alphas=())


W = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("base", "tuned", "alpha", "error", "sentence"),
    [
        ({"w": W}, {"w": W}, math.nan, ValueError, "alpha must be a finite number; got nan"),
        ({"w": W}, {"w": W}, "half", TypeError, "alpha must be a number; got 'half'"),
        ({"w": W}, {"w": W}, True, TypeError, "alpha must be a number; got True"),
        (W, {"w": W}, 0.5, TypeError, "base_state must be a state dict, tensors by name; got a Tensor"),
        ({"w": 3}, {"w": W}, 0.5, TypeError, "w in base_state must be a real tensor; got a int: leave it out"),
        ({"w": W}, {"w": W * 1j}, 0.5, TypeError, "w in tuned_state must be a real tensor; got torch.complex64"),
        ({"w": W}, {"w": W.to("meta")}, 0.5, ValueError, "w in tuned_state lies on the meta device"),
        ({"w": W}, {"w": W[:1]}, 0.5, ValueError, r"w is \[2\] of torch.float32 in base_state and \[1\] of"),
        ({"w": W}, {"w": W.long()}, 0.5, ValueError, "in base_state and .* of torch.int64 in tuned_state"),
        ({"w": W}, {"w": W, "v": W}, 0.5, ValueError, "v is in tuned_state and not in base_state"),
        ({"head": W}, {"heed": W}, 0.5, ValueError, 'head is in base_state and not in tuned_state.* "heed"'),
        ({"w": W}, {"w": W / 0}, 0.5, ValueError, "w would not be finite in torch.float32"),
        ({"w": W.half()}, {"w": W.half() * 3e4}, 4, ValueError, "w would not be finite in torch.float16"),
        ({"w": W.byte()}, {"w": W.byte() + 1}, 0.5, ValueError, "w is torch.uint8 and differs .* de-quantise them"),
    ],
)
def test_bad_input(base, tuned, alpha, error, sentence):
    with pytest.raises(error, match=sentence):
        interpolate(base, tuned, alpha)
