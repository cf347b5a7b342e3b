"""The fused functions against their formulas: values, gradients, what is kept, and when they step aside."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmtune.adapters import DoRALinear, LoRA, LoRALinear, attach, lora_linear
from llmtune.adapters.fused import lora_added
from llmtune.adapters.products import times
from llmtune.adapters.seeded_dropout import seeded_dropout
from llmtune.testing.models import tiny_llama

IN, OUT, R = 11, 7, 3


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(dtype=torch.float64):
    """x, weight, bias, A, B, magnitude, norm"""
    shapes = ((2, 5, IN), (OUT, IN), (OUT,), (R, IN), (OUT, R), (OUT,))
    leaves = [draw(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    return *leaves, draw(OUT, seed=9, dtype=dtype).abs() + 1.0


def call(x, weight, a, b, bias=None, magnitude=None, norm=None, p=0.3):
    return lora_linear(
        x, weight, bias, a, b, scaling=1.7, dropout_p=p, seed=5, magnitude=magnitude, norm=norm
    )  # fmt: skip


@pytest.mark.parametrize(("with_bias", "dora", "p"), itertools.product([False, True], [False, True], [0.0, 0.3]))
def test_values_and_all_gradients_are_those_of_the_formula(with_bias, dora, p):
    x, weight, bias, a, b, m, norm = tensors()
    knobs = {"bias": bias if with_bias else None, "p": p}
    leaves = [x, weight, a, b, *([bias] if with_bias else []), *([m] if dora else [])]
    if dora:
        knobs |= {"magnitude": m, "norm": norm}
    dropped = seeded_dropout(x, p, 5)
    low_rank = 1.7 * dropped @ a.T @ b.T
    plain = x @ weight.T
    truth = (m / norm) * (plain + low_rank) if dora else plain + low_rank
    truth = truth + bias if with_bias else truth
    out = call(x, weight, a, b, **knobs)
    torch.testing.assert_close(out, truth, rtol=1e-13, atol=1e-13)
    pull = draw(*out.shape, seed=20)
    for got, want in zip(torch.autograd.grad(out, leaves, pull), torch.autograd.grad(truth, leaves, pull), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_once_and_twice(p):
    x, weight, bias, a, b, m, norm = tensors()

    def dora(x, weight, bias, a, b, m):
        return call(x, weight, a, b, bias, m, norm, p)

    assert torch.autograd.gradcheck(dora, (x, weight, bias, a, b, m), fast_mode=True)
    assert torch.autograd.gradgradcheck(dora, (x, weight, bias, a, b, m), fast_mode=True)

    def added(result, x, a, b):
        return lora_added(result, x, a, b, scaling=0.7, dropout_p=p, seed=4)

    result = draw(2, 5, OUT, seed=30).requires_grad_()
    assert torch.autograd.gradcheck(added, (result, x, a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(added, (result, x, a, b), fast_mode=True)


@pytest.mark.parametrize("wanted", range(1, 8))
def test_any_subset_may_want_a_gradient(wanted):
    x, weight, _, a, b, _, _ = (t.detach() for t in tensors())
    leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate((x, a, b))]
    call(leaves[0], weight, leaves[1], leaves[2]).sum().backward()
    assert [t.grad is not None for t in leaves] == [t.requires_grad for t in leaves]


def kept(make):
    """The storages kept for the backward pass, parameters left out: {address: bytes}."""
    module, x = make()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return [size for _, size in found.values()], x.untyped_storage().nbytes()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_nothing_is_kept_but_the_input(dropout):
    def make():
        base = nn.Linear(IN, OUT, dtype=torch.bfloat16).requires_grad_(False)
        return LoRALinear(base, rank=R, alpha=2, dropout=dropout), draw(5, IN, seed=1, dtype=torch.bfloat16)

    sizes, of_x = kept(make)
    assert sizes == [of_x]


def test_dropout_is_a_function_of_the_seed_with_an_exact_mean():
    x = torch.ones(1009, 31)
    assert seeded_dropout(x, 0.0, 3) is x
    for p in (0.1, 0.5, 0.9):
        out = seeded_dropout(x, p, 3)
        assert torch.equal(out, seeded_dropout(x, p, 3))
        assert not torch.equal(out, seeded_dropout(x, p, 4))
        assert abs(float((out == 0).double().mean()) - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-5
        step = round(p * 2**16)
        torch.testing.assert_close(out.unique(), torch.tensor([0.0, 2**16 / (2**16 - step)]))
    columns = seeded_dropout(x, 0.5, 3).reshape(-1)[: 31 * 1008].view(-1, 4) == 0  # four entries share one draw
    table = torch.corrcoef(columns.T.double())
    assert float((table - torch.eye(4)).abs().max()) < 0.03


def test_a_layer_draws_other_dropout_each_time_from_torchs_own_state():
    layer = LoRALinear(nn.Linear(IN, OUT), rank=R, alpha=2, dropout=0.5)
    nn.init.normal_(layer.lora_b)
    x = draw(5, IN, seed=1, dtype=torch.float32)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_hooks_and_modules_of_ones_own_are_not_passed_by():
    seen = []
    base = nn.Linear(IN, OUT)
    layer = LoRALinear(base, rank=R, alpha=2)
    x = draw(5, IN, seed=1, dtype=torch.float32)
    plain = layer(x)
    handle = base.register_forward_hook(lambda module, args, out: seen.append(out))
    assert torch.equal(layer(x), plain)
    assert len(seen) == 1
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = Doubled(IN, OUT)
    assert torch.equal(LoRALinear(other, rank=R, alpha=2)(x), other(x))


def test_torch_func_and_compile_take_the_formula():
    x, weight, bias, a, b, m, norm = (t.detach() for t in tensors())
    truth = torch.stack([call(row, weight, a, b, bias, m, norm, 0.0) for row in x])
    mapped = torch.func.vmap(lambda row: call(row, weight, a, b, bias, m, norm, 0.0))(x)
    torch.testing.assert_close(mapped, truth)

    def total(a):
        return call(x, weight, a, b, bias, m, norm, 0.0).square().sum()

    leaf = a.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(a), torch.autograd.grad(total(leaf), leaf)[0])
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf), torch.autograd.grad(total(leaf), leaf))


def test_autocast_computes_in_its_dtype_as_the_formula_does():
    layer = LoRALinear(nn.Linear(IN, OUT), rank=R, alpha=2)
    nn.init.normal_(layer.lora_b)
    x = draw(5, IN, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        truth = F.linear(x, layer.weight, layer.bias) + layer.scaling * F.linear(
            F.linear(x, layer.lora_a), layer.lora_b
        )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, truth, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert layer.lora_a.grad.dtype == torch.float32


def test_checkpointing_gives_the_same_gradients():
    models = [tiny_llama().train() for _ in range(2)]
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    attach(models[0], LoRA(rank=3, alpha=5, dropout=0.3))
    for layer in models[0].modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_b)
    models[1] = copy.deepcopy(models[0])
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    for model in models:
        torch.manual_seed(7)
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, p), (_, q) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (2, 5)}, r"got \(2, 5\), \(7, 11\), \(3, 11\) and \(7, 3\)"),
        ({"a": (4, IN)}, r"\(4, 11\) and \(7, 3\)"),
        ({"bias": (3,)}, r"bias must be \[out\] = \[7\], got \(3,\)"),
        ({"magnitude": (OUT,)}, "DoRA needs both magnitude and norm"),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(changes, message):
    shapes = {"x": (2, IN), "weight": (OUT, IN), "a": (R, IN), "b": (OUT, R)} | changes
    with pytest.raises(ValueError, match=message):
        call(**{name: torch.zeros(shape) for name, shape in shapes.items()})


def test_dropout_out_of_range_and_two_dtypes_are_told():
    x, weight, _, a, b, _, _ = (t.detach() for t in tensors())
    with pytest.raises(ValueError, match=r"dropout_p must be a probability from 0 to below 1, got 1\.0"):
        call(x, weight, a, b, p=1.0)
    with pytest.raises(ValueError, match=r"x and weight must have one dtype, got torch\.float32 and torch\.float64"):
        call(x.float(), weight, a, b)


@pytest.mark.parametrize("layout", ["plain", "one number everywhere", "turned"])
@pytest.mark.parametrize("shape", [(2, 131, 257), (0, 257), (257,)])
def test_the_fast_product_is_a_product(shape, layout):
    x, matrix = draw(*shape, seed=1, dtype=torch.float32), draw(257, 263, seed=2, dtype=torch.float32)
    if layout == "one number everywhere":  # the gradient of a sum
        x = torch.ones(()).expand(shape)
    if layout == "turned":
        x, matrix = x.mT.contiguous().mT if x.ndim > 1 else x, matrix.mT.contiguous().mT
    found, truth = times(x, matrix), x.double() @ matrix.double()
    assert found.shape == truth.shape
    if truth.numel():
        assert float((found - truth).abs().max() / truth.abs().max()) < 2e-6
        assert float((found - x @ matrix).abs().max() / truth.abs().max()) < 2e-6


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_layer_applied_twice_can_be_differentiated_twice(kind, hooked):
    """Its second input is made from its first, so a derivative that is total instead of partial counts twice."""
    base = nn.Linear(IN, IN, dtype=torch.float64).requires_grad_(False)
    if hooked:
        base.register_forward_hook(lambda module, args, out: None)
    layer = kind(base, rank=R, alpha=2, dtype=torch.float64)
    nn.init.normal_(layer.lora_b)
    x = draw(5, IN, seed=1)
    leaves = [layer.lora_a, layer.lora_b]
    once, again = (
        torch.autograd.grad(layer(layer(x)).square().sum(), leaves, create_graph=graph) for graph in (False, True)
    )
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_forward_put_onto_the_base_is_called():
    base = nn.Linear(IN, OUT)
    base.forward = lambda x: 2 * F.linear(x, base.weight, base.bias)  # as accelerate puts its hooks
    x = draw(5, IN, seed=1, dtype=torch.float32)
    for kind in (LoRALinear, DoRALinear):
        assert torch.equal(kind(base, rank=R, alpha=2)(x), base(x))


def test_no_gradient_goes_through_the_norm_on_any_way():
    x, weight, _, a, b, m, _ = (t.detach() for t in tensors())

    def total(a):
        norm = torch.linalg.vector_norm(weight + b @ a, dim=1)
        return call(x, weight, a, b, magnitude=m, norm=norm, p=0.0).square().sum()

    leaf = a.clone().requires_grad_()
    truth = torch.autograd.grad(total(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(total)(a), truth)
    torch.testing.assert_close(torch.autograd.grad(total(leaf), leaf, create_graph=True)[0], truth)


def test_backward_may_run_inside_autocast():
    layer = LoRALinear(nn.Linear(131, 127).requires_grad_(False), rank=R, alpha=2)
    x = draw(257, 131, seed=1, dtype=torch.float32).requires_grad_()
    out = layer(x).square().sum()
    truth = torch.autograd.grad(out, x, retain_graph=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.autograd.grad(out, x)[0], truth)


@pytest.mark.parametrize(("p", "seed", "message"), [(-0.5, 1, "dropout_p must be"), (0.5, -3, "seed must be from 0")])
def test_dropout_that_means_nothing_is_told(p, seed, message):
    x, weight, _, a, b, _, _ = (t.detach() for t in tensors())
    with pytest.raises(ValueError, match=message):
        lora_linear(x, weight, None, a, b, scaling=1.0, dropout_p=p, seed=seed)
    with pytest.raises(ValueError, match=message):
        lora_added(x @ weight.T, x, a, b, scaling=1.0, dropout_p=p, seed=seed)


def test_dropout_next_to_0_and_1_acts():
    assert int((seeded_dropout(torch.ones(1_000_003), 1e-9, 3) == 0).sum()) < 60
    assert bool(seeded_dropout(torch.ones(101), 1 - 1e-9, 3).isfinite().all())
    with pytest.raises(ValueError, match="dropout must be a probability"):
        LoRALinear(nn.Linear(IN, OUT), rank=R, alpha=2, dropout=1.0)
