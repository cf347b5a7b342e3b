"""A product's factors kept in its place: the same gradients to the bit without memory of their own."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmtune.adapters import LoRALinear, lora_linear
from llmtune.adapters.kept import made, makings
from llmtune.testing.models import tiny_llama


def held(out):
    """The storages that the graph behind `out` holds."""
    seen, todo, found = set(), [out.grad_fn], {}

    def add(value):
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, tuple | list):
            for part in value:
                add(part)

    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        add([getattr(node, name) for name in dir(node) if name.startswith("_saved_")])
        add(getattr(node, "saved_tensors", ()))
        todo += [behind for behind, _ in node.next_functions]
    return found


def gated(dtype=torch.float32):
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 11, dtype=dtype).requires_grad_() for _ in range(2))
    weight, a, b = torch.randn(7, 11, dtype=dtype), torch.randn(3, 11, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    return gate, up, weight, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradients_are_the_same_to_the_bit(dtype, p):
    gate, up, weight, a, b = gated(dtype)
    found = []
    for kept in (True, False):
        product = F.silu(gate) * up
        x = product if kept else product.view(5, 11)  # a view is kept as it is
        out = lora_linear(x, weight, None, a, b, scaling=0.7, dropout_p=p, seed=3)
        assert (product.untyped_storage().data_ptr() in held(out)) is not kept
        found.append((out, *torch.autograd.grad(out.square().sum(), (gate, up, a, b))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_product_over_a_base_of_another_kind_is_not_kept_either():
    gate, up, *_ = gated()
    layer = LoRALinear(LoRALinear(torch.nn.Linear(11, 7), rank=2, alpha=3), rank=3, alpha=5)
    product = F.silu(gate) * up
    assert product.untyped_storage().data_ptr() not in held(layer(product))


def test_derivatives_of_derivatives_go_through_the_factors():
    gate, up, weight, a, b = gated(torch.float64)

    def function(gate, up, a, b):
        return lora_linear(F.silu(gate) * up, weight, None, a, b, scaling=0.7)

    assert torch.autograd.gradcheck(function, (gate, up, a, b))
    assert torch.autograd.gradgradcheck(function, (gate, up, a, b))


def test_a_factor_that_was_changed_in_place_is_autograds_error():
    gate, up, weight, a, b = gated()
    left, right = gate.tanh(), up.tanh()
    out = lora_linear(left * right, weight, None, a, b, scaling=0.7)
    with torch.no_grad():
        left.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_no_product_of_its_own_shape_is_kept_as_it_is():
    x, row = torch.randn(5, 11, requires_grad=True), torch.randn(11, requires_grad=True)
    for came in (x, x + 1, x * 2, x * row, (x * x).float().view(11, 5), x.bfloat16() * x):
        kept = makings(came)
        assert kept[0] is came
        assert kept[1] is None
    product = (x + 1) * x
    assert torch.equal(made(*makings(product)), product)
    with torch.no_grad():
        assert makings(x * x)[1] is None


def test_a_product_whose_graph_is_gone_can_still_be_read():
    gate, up, weight, a, b = gated()
    product = F.silu(gate) * up
    product.sum().backward()
    expected = F.linear(product, weight) + 0.7 * product @ a.T @ b.T
    torch.testing.assert_close(lora_linear(product, weight, None, a, b, scaling=0.7), expected)
    left = gate.tanh()
    product = left * up.tanh()
    with torch.no_grad():
        left.mul_(2)
    lora_linear(product, weight, None, a, b, scaling=0.7)


def test_behind_hooks_the_input_itself_is_kept():
    gate, up, weight, a, b = gated()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        product = F.silu(gate) * up
        lora_linear(product, weight, None, a, b, scaling=0.7)
    assert any(tensor is product for tensor in packed)

    def block(gate, up):
        return lora_linear(F.silu(gate) * up, weight, None, a, b, scaling=0.7)

    plain = torch.autograd.grad(block(gate, up).square().sum(), (gate, up, a, b))
    again = torch.autograd.grad(
        checkpoint(block, gate, up, use_reentrant=False).square().sum(), (gate, up, a, b)
    )  # fmt: skip
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_a_llama_holds_no_product_of_its_gates():
    from llmtune.adapters import LoRA, attach

    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    shapes = [t.shape for t in held(model(torch.arange(3, 14)[None]).logits).values()]
    assert shapes.count((1, 11, 37)) == 3 * 2  # gate, silu(gate) and up, in two layers
