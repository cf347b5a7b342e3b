"""TransformerBlock: where its norms stand, the laws it keeps, and that adapters, caches and the compiler take it."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, attach, detach
from llmtune.attention import Causal, Padding, RelativePositionBias
from llmtune.attention.cache import GrowingCache
from llmtune.attention.positions import RotaryEmbedding
from llmtune.layers import FeedForward, MultiHeadAttention, TransformerBlock
from llmtune.testing import LawBroken, check_causal

B, T, S, E = 2, 5, 7, 22
ORDERS = ("pre", "post", "sandwich", "output", "parallel", "parallel_shared")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(order="pre", *, cross=False, dropout=0.0):
    block = TransformerBlock(
        MultiHeadAttention(E, 4, key_heads=2, head_size=6, rotary=RotaryEmbedding(4)),
        FeedForward(E, 13, activation="swiglu"),
        norm=partial(nn.RMSNorm, eps=1e-2),
        order=order,
        cross_attention=MultiHeadAttention(E, 2, context_width=17) if cross else None,
        dropout=dropout,
    )
    for seed, parameter in enumerate(block.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=seed + 10) * 0.5)
    return block


def formula(block, x):
    """The six orders, written out."""
    f, g = partial(block.attention, mask=Causal()), block.feed_forward
    n, m = block.attention_norm, block.feed_forward_norm
    n_out, m_out = block.attention_output_norm, block.feed_forward_output_norm
    if block.order == "pre":
        x = x + f(n(x))
        return x + g(m(x))
    if block.order == "post":
        x = n(x + f(x))
        return m(x + g(x))
    if block.order == "sandwich":
        x = x + n_out(f(n(x)))
        return x + m_out(g(m(x)))
    if block.order == "output":
        x = x + n_out(f(x))
        return x + m_out(g(x))
    return x + f(n(x)) + g(n(x) if block.order == "parallel_shared" else m(x))


@pytest.mark.parametrize("order", ORDERS)
def test_each_order_is_its_formula(order):
    block, hidden = make(order), draw(B, T, E)
    assert torch.equal(block(hidden, mask=Causal()), formula(block, hidden))
    norms = {name for name, part in block.named_children() if name.endswith("norm") and part is not None}
    assert len(norms) == {"sandwich": 4, "parallel_shared": 1}.get(order, 2)


@pytest.mark.parametrize(("order", "norms"), [("pre", 3), ("post", 3), ("sandwich", 6), ("output", 3)])
def test_a_cross_attention_stands_between_the_two(order, norms):
    block, hidden, context = make(order, cross=True), draw(B, T, E), draw(B, S, 17, seed=1)
    mask = Padding([7, 3])
    got = block(hidden, mask=Causal(), context=context, context_mask=mask)
    sub = copy.deepcopy(block)  # the same block in steps: each part alone, the others silenced
    x = hidden
    for name, call in (
        ("attention", lambda x: sub.attention(x, mask=Causal())),
        ("cross_attention", lambda x: sub.cross_attention(x, context=context, mask=mask)),
        ("feed_forward", sub.feed_forward),
    ):
        before, after = getattr(sub, f"{name}_norm"), getattr(sub, f"{name}_output_norm")
        if order == "post":
            x = before(x + call(x))
        else:
            made = call(x if order == "output" else before(x))
            x = x + (after(made) if order in ("sandwich", "output") else made)
    assert torch.equal(got, x)
    assert sum("norm." in name for name, _ in block.named_parameters()) == norms
    other = context.clone()
    other[1, 3:] += 1.0
    assert torch.equal(block(hidden, mask=Causal(), context=other, context_mask=mask), got)


@pytest.mark.parametrize("order", ORDERS)
def test_dropout_drops_what_is_added(order):
    block, hidden = make(order, dropout=1.0), draw(B, T, E)
    wanted = block.feed_forward_norm(block.attention_norm(hidden)) if order == "post" else hidden
    assert torch.equal(block(hidden), wanted)
    assert not torch.equal(block.eval()(hidden), wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_a_causal_block_does_not_look_ahead(order):
    block = make(order)
    check_causal(partial(block, mask=Causal()), draw(B, 7, E))
    with pytest.raises(LawBroken, match="other inputs after position 0"):
        check_causal(block, draw(B, 7, E))


@pytest.mark.parametrize("order", ORDERS)
def test_a_padded_row_gives_what_it_gives_alone(order):
    block, lengths = make(order), (5, 2, 3)
    rows = [draw(1, n, E, seed=n) for n in lengths]
    padded = torch.cat([nn.functional.pad(row, (0, 0, 0, 5 - row.shape[1]), value=9.0) for row in rows])
    out = block(padded, mask=Padding(lengths))
    for i, row in enumerate(rows):
        torch.testing.assert_close(out[i : i + 1, : row.shape[1]], block(row), rtol=1e-5, atol=1e-5)


def test_decoding_token_by_token_gives_what_the_whole_gives():
    blocks = nn.ModuleList([make(cross=True).double() for _ in range(2)])
    blocks[1].load_state_dict({name: value.flip(0) for name, value in blocks[0].state_dict().items()})
    bias = RelativePositionBias(4, 5, 7, bidirectional=False).double()
    bias.weight.data.copy_(draw(5, 4, seed=3))
    hidden, context = draw(B, 11, E).double(), draw(B, S, 17, seed=1).double()
    shared = {"mask": Causal(), "bias": bias, "context": context, "context_mask": Padding([7, 3])}
    caches = [{"cache": GrowingCache(), "context_cache": GrowingCache()} for _ in blocks]
    with torch.no_grad():
        whole, pieces = hidden, []
        for block in blocks:
            whole = block(whole, **shared)
        for piece in hidden.split([3, *[1] * 8], dim=1):
            for block, cache in zip(blocks, caches, strict=True):
                piece = block(piece, **shared, **cache)
            shared["context"] = None  # the caches hold its keys and values from now on
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


def test_the_positions_reach_the_attention():
    block, hidden, positions = make("parallel_shared"), draw(B, T, E), torch.tensor([[3, 1, 4, 1, 5]])
    normed = block.attention_norm(hidden)
    wanted = hidden + block.attention(normed, position_ids=positions) + block.feed_forward(normed)
    assert torch.equal(block(hidden, position_ids=positions), wanted)
    assert not torch.allclose(block(hidden), wanted)


class Stack(nn.Module):
    """Two decoder layers, and the way a model would call them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([make(cross=True), make("parallel")])

    def forward(self, hidden, context):
        hidden = self.layers[0](hidden, mask=Causal(), context=context)
        return self.layers[1](hidden, mask=Causal())


def test_lora_finds_its_targets_trains_and_leaves():
    stack, hidden, context = Stack(), draw(B, T, E), draw(B, S, 17, seed=1)
    before, start = copy.deepcopy(stack.state_dict()), stack(hidden, context)
    attach(stack, LoRA(rank=2, alpha=4, targets=["query", "value", "down"]))
    assert torch.equal(stack(hidden, context), start)
    trained = {name: parameter for name, parameter in stack.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * (3 * 2 + 2)  # A and B: three attentions' query and value, two downs
    optimizer = torch.optim.AdamW(trained.values(), lr=0.03)
    losses = []
    for _ in range(4):
        loss = (stack(hidden, context) - 1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    detach(stack)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.state_dict().items())
    assert torch.equal(stack(hidden, context), start)


def test_a_state_dict_goes_round():
    first, second = make("sandwich", cross=True), make("sandwich", cross=True)
    for parameter in second.parameters():
        parameter.data.zero_()
    second.load_state_dict(first.state_dict())
    inputs = {"mask": Causal(), "context": draw(B, S, 17)}
    assert torch.equal(first(draw(B, T, E), **inputs), second(draw(B, T, E), **inputs))
    names = {name.rsplit(".", 1)[0] for name in first.state_dict()}
    parts = ("query", "key", "value", "output")
    assert names == {
        *(f"{attention}.{part}" for attention in ("attention", "cross_attention") for part in parts),
        *(f"feed_forward.{part}" for part in ("gate", "up", "down")),
        *(f"{part}{out}_norm" for part in ("attention", "cross_attention", "feed_forward") for out in ("", "_output")),
    }


def test_the_compiler_takes_it_whole():
    stack, hidden, context = Stack(), draw(B, T, E).requires_grad_(), draw(B, S, 17, seed=1)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    weights = draw(B, T, E, seed=2)
    out, wanted = compiled(hidden, context), stack(hidden, context)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        *(torch.autograd.grad(o, [hidden, *stack.parameters()], weights) for o in (out, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_under_autocast_and_by_itself():
    block, hidden = make("pre", cross=True), draw(B, T, E)
    inputs = {"mask": Causal(), "context": draw(B, S, 17, seed=1)}
    wanted = block(hidden, **inputs).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(block(hidden, **inputs), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
    narrow = block.bfloat16()(hidden.bfloat16(), mask=Causal(), context=inputs["context"].bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))


def test_parts_that_do_not_fit_are_refused():
    attention, feed_forward = MultiHeadAttention(E, 2), FeedForward(E, 13)
    cross = MultiHeadAttention(E, 2, context_width=17)
    for parts, knobs, sentence in (
        ((attention, feed_forward), {"order": "paralel"}, r'no order "paralel", only "pre".* Did you mean "parallel"'),
        ((attention, feed_forward), {"order": "parallel", "cross_attention": cross}, "has no place for a cross_att"),
        ((attention, feed_forward), {"dropout": 2.0}, "dropout must be between 0 and 1, got 2.0"),
        ((attention, FeedForward(13, E)), {}, "attention has a width of 22, feed_forward of 13; they must be the same"),
        (
            (attention, feed_forward),
            {"cross_attention": MultiHeadAttention(17, 1, context_width=E)},
            "attention has a width of 22, cross_attention of 17",
        ),
        ((attention, feed_forward), {"cross_attention": MultiHeadAttention(E, 2)}, "must be made with context_width"),
        ((cross, feed_forward), {}, "attention must be a self-attention; one with context_width goes in as cross"),
        ((nn.Identity(), feed_forward), {}, "attention must have a width.* Identity has none"),
    ):
        with pytest.raises(ValueError, match=sentence):
            TransformerBlock(*parts, **knobs)


def test_arguments_without_effect_are_refused():
    block, hidden = make(), draw(B, T, E)
    for argument in (
        {"context": draw(B, S, 17)}, {"context_mask": Padding([7, 3])}, {"context_cache": GrowingCache()}
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(argument))} has no effect without cross_attention"):
            block(hidden, **argument)
    with pytest.raises(ValueError, match=r"hidden must be \[B, T, 22\], got shape \(2, 5, 17\)"):
        block(draw(B, T, 17))
    with pytest.raises(ValueError, match=r"a cross-attention needs context, \[B, S, 17\], got none"):
        make(cross=True)(hidden)


def test_any_module_may_be_the_feed_forward():
    block, hidden = TransformerBlock(MultiHeadAttention(E, 2), nn.Linear(E, E)), draw(B, T, E)
    attended = hidden + block.attention(block.attention_norm(hidden))
    assert torch.equal(block(hidden), attended + block.feed_forward(block.feed_forward_norm(attended)))


def test_a_norm_already_made_is_refused():
    with pytest.raises(ValueError, match=r"norm makes a norm of a width.* got a LayerNorm already made"):
        TransformerBlock(MultiHeadAttention(12, 4), FeedForward(12, 31), norm=nn.LayerNorm(12))
