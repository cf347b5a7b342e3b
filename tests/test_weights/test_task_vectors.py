"""Task vectors: tuned - base and back again."""

import pytest
import torch

from llmtune.testing.models import tiny_gpt2
from llmtune.weights import apply_task_vector, interpolate, merge_deltas, task_vector


def two(dtype=torch.float32):
    generator = torch.Generator().manual_seed(11)
    base = {"a": torch.randn(7, 11, generator=generator).to(dtype), "n": torch.tensor(3)}
    tuned = {"a": (base["a"] + 0.1 * torch.randn(7, 11, generator=generator)).to(dtype), "n": torch.tensor(5)}
    return base, tuned


def test_it_is_the_difference_and_goes_back():
    base, tuned = two()
    vector = task_vector(base, tuned)
    assert list(vector) == ["a"]
    torch.testing.assert_close(vector["a"].double(), tuned["a"].double() - base["a"].double(), rtol=1e-6, atol=1e-8)
    found = apply_task_vector(base, vector)
    torch.testing.assert_close(found["a"], tuned["a"])
    assert found["n"].item() == 3


def test_in_half_precision_base_plus_vector_is_the_tuned_model_to_the_bit():
    base, tuned = two(torch.bfloat16)
    vector = task_vector(base, tuned)
    assert vector["a"].dtype == torch.float32
    assert torch.equal(apply_task_vector(base, vector)["a"], tuned["a"])
    narrow = {"a": tuned["a"] - base["a"]}
    assert not torch.equal(apply_task_vector(base, narrow)["a"], tuned["a"]), "a vector in bfloat16 does not go back"


@pytest.mark.parametrize("scale", [-1, 0.3, 2])
def test_a_scaled_vector_is_a_point_on_the_line(scale):
    base, tuned = two()
    found = apply_task_vector(base, task_vector(base, tuned), scale)
    torch.testing.assert_close(found["a"], interpolate(base, tuned, scale)["a"])


def test_what_is_not_changed_stays_to_the_bit():
    base, _ = two()
    base["b"] = torch.tensor([-0.0, 1.0])
    for vector, scale in (({}, 1.0), ({"b": torch.zeros(2)}, 1.0), ({"b": torch.ones(2)}, 0)):
        found = apply_task_vector(base, vector, scale)
        assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
        assert found["b"].signbit().tolist() == [True, False]
        assert found["b"].data_ptr() != base["b"].data_ptr()


def test_arithmetic_of_two_tasks():
    base, one = two()
    other = {"a": base["a"] + 2.0, "n": base["n"]}
    vectors = [task_vector(base, state) for state in (one, other)]
    found = apply_task_vector(base, merge_deltas(vectors, [0.5, -1.0], method="task"))["a"]
    torch.testing.assert_close(found, base["a"] + 0.5 * (one["a"] - base["a"]) - 2.0)


def test_tied_tensors_stay_tied():
    base, tuned = tiny_gpt2(), tiny_gpt2(1)
    vector = task_vector(base.state_dict(), tuned.state_dict())
    assert vector["transformer.wte.weight"] is vector["lm_head.weight"]
    for names in (list(vector), [name for name in vector if name != "lm_head.weight"]):
        found = apply_task_vector(base.state_dict(), {name: vector[name] for name in names})
        assert found["transformer.wte.weight"] is found["lm_head.weight"]
        torch.testing.assert_close(found["lm_head.weight"], tuned.lm_head.weight.detach())
    vector["lm_head.weight"] = torch.zeros_like(vector["lm_head.weight"])
    with pytest.raises(ValueError, match="are one tied tensor in base_state, and vector changes them apart"):
        apply_task_vector(base.state_dict(), vector)


W = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("base", "vector", "scale", "error", "sentence"),
    [
        ({"w": W}, {"v": W}, 1, ValueError, "v is in vector and not in base_state"),
        ({"head": W}, {"heed": W}, 1, ValueError, 'heed is in vector and not in base_state. Did you mean "head"?'),
        ({"w": W}, {"w": W[:1]}, 1, ValueError, r"w is \[1\] in vector and \[2\] in base_state"),
        ({"w": W.long()}, {"w": W}, 1, TypeError, "w is torch.int64 in base_state: a change of weights is floating"),
        ({"w": W}, {"w": W.long()}, 1, TypeError, "w is torch.int64 in vector: a change of weights is floating"),
        ({"w": W}, {"w": W}, float("inf"), ValueError, "scale must be a finite number; got inf"),
        ({"w": W}, {"w": W / 0}, 1, ValueError, "w would not be finite"),
        ({"w": W}, W, 1, TypeError, "vector must be a state dict"),
    ],
)
def test_bad_input(base, vector, scale, error, sentence):
    with pytest.raises(error, match=sentence):
        apply_task_vector(base, vector, scale)


def test_bad_states():
    with pytest.raises(ValueError, match="v is in tuned_state and not in base_state"):
        task_vector({"w": W}, {"w": W, "v": W})
    with pytest.raises(ValueError, match="w would not be finite"):
        task_vector({"w": W}, {"w": W / 0})
    with pytest.raises(ValueError, match=r"w is torch\.int8 and differs"):
        task_vector({"w": W.to(torch.int8)}, {"w": W.to(torch.int8) + 1})
