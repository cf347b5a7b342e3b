"""Operations counted against closed forms."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmtune.adapters import LoRA, attach
from llmtune.testing.models import tiny_gpt2
from llmtune.training.flops import count_flops

SIZES = (5, 7, 11, 13)


def stack():
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(SIZES)))


def products(*layers):
    return sum(SIZES[layer] * SIZES[layer + 1] for layer in layers)


def test_six_operations_a_weight_and_token_where_all_is_trained():
    model, x = stack(), torch.randn(17, 5)
    weights = products(0, 1, 2)
    assert weights == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    # forward and the weights' gradients everywhere, the input's gradient nowhere but above the first layer
    wanted = 6 * 17 * weights - 2 * 17 * products(0)
    assert count_flops(lambda: model(x).square().sum(), model.parameters()) == wanted
    x = x.requires_grad_()  # as below an embedding
    assert count_flops(lambda: model(x).square().sum(), [*model.parameters(), x]) == 6 * 17 * weights


def test_four_where_the_base_is_frozen():
    model, x = stack().requires_grad_(False), torch.randn(17, 5).requires_grad_()
    assert count_flops(lambda: model(x).square().sum(), [x]) == 4 * 17 * products(0, 1, 2)
    model[2].weight.requires_grad_(True)
    x = x.detach()  # the gradient has to go no deeper than the last layer's weight
    assert count_flops(lambda: model(x).square().sum(), model.parameters()) == 17 * (
        2 * products(0, 1) + 4 * products(2)
    )


def test_a_model_with_lora_and_attention():
    """Base: forward and input gradient; LoRA: all three, and x A anew; attention: 2 products forward, 5 backward."""
    rank, rows, tokens = 3, 2, 11
    model = tiny_gpt2()
    attach(model, LoRA(rank=rank, alpha=3))
    batch = {"input_ids": torch.randint(3, 97, (rows, tokens))}

    def loss():
        return model(**batch, use_cache=False).logits.float().square().mean()

    E, F, V, layers = 26, 31, 97, 2
    linear = {(E, 3 * E): 1, (E, E): 1, (E, F): 1, (F, E): 1}
    n = rows * tokens
    base = 4 * n * layers * sum(i * o * count for (i, o), count in linear.items()) + 4 * n * E * V
    lora = n * layers * sum(rank * (6 * (i + o) + 2 * i) * count for (i, o), count in linear.items())
    attention = layers * 7 * 2 * rows * tokens * tokens * E
    first = 2 * n * (E * 3 * E + E * rank)  # what the first adapted layer spares: no gradient for its input
    assert count_flops(loss, model.parameters()) == base + lora + attention - first


def test_counting_leaves_no_gradient():
    model, x = stack(), torch.randn(17, 5)
    model[0].weight.grad = torch.ones(7, 5)
    count_flops(lambda: model(x).sum(), model.parameters())
    assert torch.equal(model[0].weight.grad, torch.ones(7, 5))
    assert model[1].weight.grad is None


@pytest.mark.parametrize("rows", [7, 257])
def test_lora_on_linear_layers_whatever_kernel_takes_them(rows):
    """The fused layer multiplies in place, and many rows through oneDNN where the CPU has it."""
    rank, sizes = 3, (131, 257, 127)
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(sizes)))
    attach(model, LoRA(rank=rank, alpha=3))
    x = torch.randn(rows, sizes[0])
    (i1, o1), (i2, o2) = itertools.pairwise(sizes)
    base = i1 * o1 + 2 * i2 * o2  # forward, and the gradient of the second layer's input
    lora = rank * (3 * (i1 + o1) + 4 * i2 + 3 * o2)  # each forward, backward twice and x A anew; no gradient of x
    assert count_flops(lambda: model(x).square().sum(), model.parameters()) == 2 * rows * (base + lora)


def test_what_is_computed_anew_counts_again():
    model, x = stack(), torch.randn(17, 5)
    plain = count_flops(lambda: model(x).sum(), model.parameters())
    again = count_flops(lambda: checkpoint(model, x, use_reentrant=False).sum(), model.parameters())
    # the last layer's product is not made anew: nothing after it asks for its result
    assert again == plain + 2 * 17 * products(0, 1)
