import pytest
import torch

from llmtune.testing.close import assert_close
from llmtune.weights import quadratic as module
from llmtune.weights.quadratic import low_rank_quadratic, quadratic


def draw(*shape, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def plain(factors, fisher, weight=None, anchor=None):
    e = sum(s * left @ right for left, right, s in factors)
    return 0.5 * (fisher * (e if weight is None else e + weight - anchor) ** 2).sum()


def inputs(adapters, *, dtype=torch.float64, dense=False):
    factors = [(draw(13, r, dtype=dtype, seed=r), draw(r, 7, dtype=dtype, seed=-r), 0.5 + r) for r in adapters]
    fisher = draw(13, 7, grad=False, seed=5).square().float()
    rest = (draw(13, 7, dtype=dtype, seed=8), draw(13, 7, dtype=dtype, seed=9, grad=False)) if dense else (None, None)
    return factors, fisher, *rest


def gradients(value, factors, weight):
    wanted = [t for left, right, _ in factors for t in (left, right)] + ([] if weight is None else [weight])
    return torch.autograd.grad(3.0 * value, wanted, create_graph=False)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("adapters", [(3,), (3, 2), (1, 5, 2)])
@pytest.mark.parametrize("chunk", [2**18, 20, 1])
def test_low_rank_equals_the_plain_formula(adapters, dense, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    factors, fisher, weight, anchor = inputs(adapters, dense=dense)
    value = low_rank_quadratic(factors, fisher, weight=weight, anchor=anchor)
    expected = plain(factors, fisher.double(), weight, anchor)
    assert_close(value, expected, rtol=1e-12)
    for got, want in zip(gradients(value, factors, weight), gradients(expected, factors, weight), strict=True):
        assert_close(got, want, rtol=1e-12)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("chunk", [2**18, 20])
def test_without_a_fisher_it_is_one_everywhere(dense, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    factors, _, weight, anchor = inputs((3, 2), dense=dense)
    value = low_rank_quadratic(factors, None, weight=weight, anchor=anchor)
    expected = plain(factors, 1.0, weight, anchor)
    assert_close(value, expected, rtol=1e-12)
    for got, want in zip(gradients(value, factors, weight), gradients(expected, factors, weight), strict=True):
        assert_close(got, want, rtol=1e-12)
    (left, right, s), other = factors
    assert torch.autograd.gradgradcheck(lambda a, b: low_rank_quadratic([(a, b, s), other], None), (left, right))
    if dense:
        assert_close(quadratic(weight, None, anchor), 0.5 * (weight - anchor).square().sum(), rtol=1e-12)
        assert_close(
            torch.autograd.grad(quadratic(weight, None, anchor), weight)[0], weight.detach() - anchor, rtol=1e-12
        )
        assert torch.autograd.gradgradcheck(lambda t: quadratic(t, None, anchor), (weight,))


def test_only_what_asks_gets_a_gradient():
    factors, fisher, weight, anchor = inputs((3, 2), dense=True)
    factors[0][0].requires_grad_(False)
    weight.requires_grad_(False)
    value = low_rank_quadratic(factors, fisher, weight=weight, anchor=anchor)
    value.backward()
    assert factors[0][0].grad is None
    assert weight.grad is None
    assert all(t.grad is not None for t in (factors[0][1], *factors[1][:2]))
    with torch.no_grad():
        assert not low_rank_quadratic(factors, fisher).requires_grad


def test_factors_that_share_a_tensor_get_each_gradient_once():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (2, 7)))
    left.requires_grad_()

    def gradients(value):
        (first,) = torch.autograd.grad(value, left, create_graph=True)
        return first, torch.autograd.grad(first.pow(3).sum(), left)[0]

    made = left[:2].T @ right  # a right factor that comes from the left one
    ours = gradients(low_rank_quadratic([(left, right, 0.5), (left, made, 2.0)], None))
    plain = gradients(0.5 * (0.5 * left @ right + 2.0 * left @ (left[:2].T @ right)).square().sum())
    for got, want in zip(ours, plain, strict=True):
        assert_close(got, want)


def test_gradcheck_to_the_second_derivative():
    factors, fisher, weight, anchor = inputs((2,), dense=True)
    (left, right, s), fisher = factors[0], fisher.double()

    def run(a, b, w):
        return low_rank_quadratic([(a, b, s)], fisher, weight=w, anchor=anchor)

    assert torch.autograd.gradcheck(run, (left, right, weight))
    assert torch.autograd.gradgradcheck(run, (left, right, weight))
    assert torch.autograd.gradcheck(lambda t: quadratic(t, fisher, anchor), (weight,))
    assert torch.autograd.gradgradcheck(lambda t: quadratic(t, fisher, anchor), (weight,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    factors, fisher, weight, anchor = inputs((3,), dtype=dtype, dense=True)
    value = low_rank_quadratic(factors, fisher, weight=weight, anchor=anchor)
    wide = [(left.detach().double(), right.detach().double(), s) for left, right, s in factors]
    expected = plain(wide, fisher.double(), weight.detach().double(), anchor.double())
    assert value.dtype == torch.float32
    assert_close(value, expected, rtol=1e-5)
    assert {g.dtype for g in gradients(value, factors, weight)} == {dtype}


def test_a_factor_and_its_copy_cancel_exactly():
    (factors, fisher, *_) = inputs((3,), dtype=torch.float32)
    (left, right, s) = factors[0]
    copy = (left.detach().clone(), right.detach().clone(), -s)
    value = low_rank_quadratic([(left, right, s), copy], fisher)
    assert value.item() == 0.0
    assert not any(g.any() for g in gradients(value, factors, None))


def test_the_backward_pass_holds_nothing_of_the_weights_size():
    """What the graph saves beside the tensors that exist anyway has at most r (rows + columns) entries."""
    left, right, fisher = draw(101, 2), draw(2, 103), draw(101, 103, grad=False).square()
    given = {t.data_ptr() for t in (left, right, fisher)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_rank_quadratic([(left, right, 2.0)], fisher)
    extra = sum(t.numel() for t in saved if t.data_ptr() not in given)
    assert 0 < extra <= 2 * (101 + 103)


@pytest.mark.parametrize("chunk", [2**18, 5])
def test_quadratic_equals_the_plain_formula(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    _, fisher, theta, anchor = inputs((1,), dense=True)
    value = quadratic(theta, fisher, anchor)
    assert_close(value, 0.5 * (fisher.double() * (theta - anchor) ** 2).sum(), rtol=1e-12)
    assert_close(torch.autograd.grad(value, theta)[0], (fisher.double() * (theta - anchor)).detach(), rtol=1e-12)
    scalar = torch.tensor(2.0, requires_grad=True)
    assert quadratic(scalar, torch.tensor(3.0), torch.tensor(1.0)).item() == 1.5
