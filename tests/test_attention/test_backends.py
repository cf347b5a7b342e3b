"""Every knob in every backend that takes it, against the plain formula, with its gradients."""

import pytest
import torch

from llmtune.attention import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    Padding,
    PrefixCausal,
    RelativePositionBias,
    SlidingWindow,
    available_backends,
    merge_attention,
    scaled_dot_product_attention,
)  # fmt: skip

B, H, K, T, S, D, DV = 2, 6, 3, 211, 223, 5, 7
OTHERS = [name for name in available_backends() if name != "reference"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dv=DV, dtype=torch.float64):
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, dv))
    return [draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def hole(row):
    real = torch.ones(B, S, dtype=torch.bool)
    real[row, 3:50] = False
    return Padding.from_attention_mask(real)


def ids(cuts, n):
    found = torch.zeros(B, n, dtype=torch.long)
    for row, where in enumerate(cuts):
        for cut in where:
            found[row, cut:] += 1
    return found


MASKS = {
    "none": None,
    "causal": Causal(),
    "causal, first": Causal(0),
    "causal, behind": Causal(-37),
    "causal, each row": Causal([-5, 101]),
    "window": Causal() & SlidingWindow(31),
    "window, both sides": SlidingWindow(13),
    "window of one": SlidingWindow(1),
    "window, each row": Causal([3, 17]) & SlidingWindow(71, [3, 17]),
    "window elsewhere": Causal() & SlidingWindow(19, -150),
    "padding": Padding([0, 97]),
    "left padding": Causal() & Padding.from_attention_mask(torch.arange(S) >= torch.tensor([[181], [3]])),
    "padding in the middle": Causal() & hole(1),
    "documents": Documents([0, 1, 100, 100, 211], [0, 67, 70, 71, 223]),
    "documents of one length": Causal(0) & Documents([0, 53, 106, 159, 211], [0, 53, 106, 159, 223]),
    "documents by ids": Documents.from_ids(ids([[7, 70], [150, 151]], T), ids([[3, 90], [10, 222]], S)),
    "documents in pieces": Documents.from_ids(ids([[7], [9]], T) % 2, torch.arange(S).expand(B, S) % 2),
    "prefix": PrefixCausal([0, 113]),
    "prefix and window": PrefixCausal(101) & SlidingWindow(83) & Padding([223, 141]),
    "table": Dense(draw(B, 1, T, S) > 1.5),
    "table, heads": Causal() & Dense(draw(1, H, T, S) > 0.5),
}


def differences(backend, mask, tensors, *, leaves=(), lse=True, **knobs):
    """The largest differences of output, LSE and all gradients to the plain formula's."""
    results = []
    for name in ("reference", backend):
        out = scaled_dot_product_attention(*tensors, mask=mask, backend=name, return_lse=lse, **knobs)
        out, found = out if lse else (out, None)
        total = (out * draw(*out.shape, seed=7)).sum()
        if lse:
            finite = found.isfinite()
            total = total + (found.masked_fill(~finite, 0.0) * draw(*found.shape, seed=8)).sum()
        wanted = [tensor for tensor in (*tensors, *leaves) if tensor.requires_grad]
        results.append([out.detach(), *([found.detach()] if lse else []), *torch.autograd.grad(total, wanted)])
    return [
        (a.masked_fill(a.isinf(), -99.0) - b.masked_fill(b.isinf(), -99.0)).abs().max().item()
        for a, b in zip(*results, strict=True)
    ]


def takes(backend, mask, **knobs):
    try:
        scaled_dot_product_attention(*(x.detach() for x in inputs()), mask=mask, backend=backend, **knobs)
    except ValueError as refusal:
        if f'"{backend}" cannot take' not in str(refusal):
            raise
        return False
    return True


def refuses(backend, name, softcap=None):
    no_bands = name in ("padding in the middle", "documents in pieces", "table", "table, heads")
    return (
        (backend in ("packed", "windowed") and no_bands)
        or (backend == "packed" and "window" in name)
        or (backend == "sdpa" and softcap is not None)
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", OTHERS)
def test_every_mask_with_lse_and_all_gradients(backend, name, softcap):
    assert takes(backend, MASKS[name], softcap=softcap) is not refuses(backend, name, softcap)
    if refuses(backend, name, softcap):
        return
    dv = D if backend == "sdpa" else DV
    assert max(differences(backend, MASKS[name], inputs(dv), softcap=softcap)) < 1e-11
    assert max(differences(backend, MASKS[name], inputs(dv), softcap=softcap, lse=False)) < 1e-11


@pytest.mark.parametrize("name", ["none", "window", "padding", "left padding", "documents", "table"])
@pytest.mark.parametrize("backend", OTHERS)
def test_sinks(backend, name):
    if refuses(backend, name):
        return
    sinks = draw(H, seed=5).requires_grad_()
    dv = D if backend == "sdpa" else DV
    assert max(differences(backend, MASKS[name], inputs(dv), leaves=[sinks], sinks=sinks)) < 1e-11


SHAPES = [(T, S), (1, S), (T, 1), (B, H, T, S), (1, H, 1, S), (B, 1, T, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["none", "causal, each row", "window", "padding", "table, heads"])
def test_learned_bias_tensors(name, shape):
    bias = draw(*shape, seed=5).requires_grad_()
    knobs = {"bias": bias, "softcap": 2.0}
    assert max(differences("chunked", MASKS[name], inputs(), leaves=[bias], **knobs)) < 1e-11


@pytest.mark.parametrize("offset", [None, -41])
@pytest.mark.parametrize("name", ["none", "causal", "window", "padding", "documents", "table"])
def test_biases_by_distance(name, offset):
    learned = RelativePositionBias(H, buckets=14, max_distance=97, offset=offset).double()
    torch.nn.init.normal_(learned.weight, generator=torch.Generator().manual_seed(3))
    assert max(differences("chunked", MASKS[name], inputs(), leaves=[learned.weight], bias=learned)) < 1e-11
    assert max(differences("chunked", MASKS[name], inputs(), bias=ALiBi(H, offset))) < 1e-11


def test_a_bias_of_minus_infinity_leaves_rows_empty():
    bias = torch.zeros(T, S, dtype=torch.float64)
    bias[5:9] = float("-inf")
    bias.requires_grad_()
    assert max(differences("chunked", Causal(), inputs(), leaves=[bias], bias=bias)) < 1e-11


@pytest.mark.parametrize("backend", OTHERS)
def test_second_derivatives(backend):
    small = [x[:, :, :11].detach().requires_grad_() for x in inputs(D)]
    sinks = draw(H, seed=5).requires_grad_()

    def attend(query, key, value, sinks):
        return scaled_dot_product_attention(
            query, key, value, mask=Causal() & Padding([11, 3]), sinks=sinks, backend=backend
        )

    assert torch.autograd.gradcheck(attend, (*small, sinks), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (*small, sinks), fast_mode=True)


def test_second_derivatives_of_a_learned_bias():
    learned = RelativePositionBias(H, buckets=6, max_distance=7).double()
    query, key, value = (x[:, :, :11].detach().requires_grad_() for x in inputs())
    found = []
    for backend in ("chunked", "reference"):
        out = scaled_dot_product_attention(query, key, value, bias=learned, softcap=2.0, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), learned.weight, create_graph=True)
        found += torch.autograd.grad(first.square().sum(), query)
    assert bool(found[1].any())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["windowed", "chunked"])
@pytest.mark.parametrize("name", ["causal", "window", "padding"])
def test_dropout_is_the_same_in_both_passes(backend, name):
    """With one-hot values the output is the dropped weights: what was kept is read off, and the formula applied."""
    query, key, _ = inputs()
    value = torch.eye(S, dtype=torch.float64).expand(B, K, S, S).clone().requires_grad_()
    generator = torch.Generator().manual_seed(11)
    knobs = {"mask": MASKS[name], "dropout_p": 0.3, "backend": backend}
    out = scaled_dot_product_attention(query, key, value, generator=generator, **knobs)
    again = scaled_dot_product_attention(query, key, value, generator=generator.manual_seed(11), **knobs)
    assert torch.equal(out, again)
    other = scaled_dot_product_attention(query, key, value, generator=generator, **knobs)
    assert not torch.equal(out, other)
    weights = scaled_dot_product_attention(query, key, value, mask=MASKS[name], backend="reference")
    kept = (out.detach() != 0).double() / 0.7
    torch.testing.assert_close(out, weights * kept, rtol=0, atol=1e-13)
    share = float((out.detach() != 0).sum() / (weights.detach() != 0).sum())
    assert abs(share - 0.7) < 0.01
    # the same through the formula: P = softmax(scores), O = (P * kept) V
    pull = draw(*out.shape, seed=9)
    mine = torch.autograd.grad((out * pull).sum(), (query, key))
    truth = torch.autograd.grad((weights * kept * pull).sum(), (query, key))
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_everything_may_be_dropped():
    query, key, value = inputs()
    out = scaled_dot_product_attention(query, key, value, dropout_p=1.0, backend="chunked")
    assert not bool(out.any())
    assert not any(bool(g.any()) for g in torch.autograd.grad(out.sum(), (query, key, value)))


def test_a_second_derivative_through_dropout_is_refused():
    query, key, value = inputs()
    out = scaled_dot_product_attention(query, key, value, dropout_p=0.5, backend="chunked")
    with pytest.raises(ValueError, match=r'with dropout_p=0.5, which only backend="reference" can give'):
        torch.autograd.grad(out.sum(), query, create_graph=True)


@pytest.mark.parametrize("backend", OTHERS)
def test_split_keys_merge_to_the_whole(backend):
    tensors = inputs(D)
    query, key, value = tensors
    parts = [
        scaled_dot_product_attention(
            query, key[:, :, a:b], value[:, :, a:b], mask=Causal(S - T - a), return_lse=True, backend=backend
        )
        for a, b in ((0, 101), (101, S))
    ]
    out, lse = merge_attention(*parts[0], *parts[1])
    truth, true_lse = scaled_dot_product_attention(*tensors, mask=Causal(), return_lse=True, backend="reference")
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, true_lse, rtol=0, atol=1e-12)
    pull = draw(*out.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad((out * pull).sum() + lse.sum(), tensors),
        torch.autograd.grad((truth * pull).sum() + true_lse.sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", available_backends())
def test_huge_logits_in_bfloat16_do_not_overflow(backend):
    query, key, value = (x.detach() for x in inputs(D, torch.bfloat16))
    query = (query * 100).requires_grad_()
    key = (key * 100).requires_grad_()  # scores of +-1e4 and more
    out = scaled_dot_product_attention(query, key, value, mask=Causal(), scale=1.0, backend=backend)
    truth = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), mask=Causal(), scale=1.0, backend="reference"
    )
    assert (query @ key.repeat_interleave(2, 1).transpose(2, 3)).abs().max() > 1e4
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=0.04)
    for gradient in torch.autograd.grad(out.sum(), (query, key)):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize(("rows", "T", "S"), [(2, 0, 3), (2, 3, 0), (0, 3, 5), (2, 1, 1), (1, 0, 0)])
@pytest.mark.parametrize("knobs", [{}, {"return_lse": True}, {"sinks": torch.ones(4)}, {"bias": ALiBi(4)}])
def test_empty_and_single(backend, rows, T, S, knobs):
    if backend in ("packed", "windowed") and "bias" in knobs:
        return
    query, key = (draw(rows, 4, n, 5, seed=n).requires_grad_() for n in (T, S))
    by_ids = Documents.from_ids(*(torch.zeros(rows, n, dtype=torch.long) for n in (T, S)))
    for mask in (Causal(), None, by_ids, Causal() & by_ids):
        out = scaled_dot_product_attention(query, key, key, mask=mask, backend=backend, **knobs)
        out = out[0] if "return_lse" in knobs else out
        assert out.shape == (rows, 4, T, 5)
        assert S or not bool(out.any())
    for gradient in torch.autograd.grad(out.sum(), (query, key), allow_unused=True):
        assert gradient is None or bool(gradient.isfinite().all())


@pytest.mark.parametrize("backend", OTHERS)
def test_any_subset_of_the_inputs_and_the_bias_may_want_a_gradient(backend):
    truth = inputs(D)
    bias = draw(T, S, seed=4)
    knobs = {"bias": bias} if backend in ("sdpa", "chunked") else {}
    for wanted in range(1, 16 if backend == "chunked" else 8):
        leaves = [x.detach().clone().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate([*truth, bias])]
        if knobs:
            knobs["bias"] = leaves[3]
        pull = draw(B, H, T, D, seed=17)
        out = scaled_dot_product_attention(*leaves[:3], mask=Causal(), backend=backend, **knobs)
        out.backward(pull)
        assert [x.grad is not None for x in leaves] == [x.requires_grad for x in leaves]
        asked = [x for x in leaves if x.requires_grad]
        expected = scaled_dot_product_attention(*leaves[:3], mask=Causal(), backend="reference", **knobs)
        for x, wanted_gradient in zip(asked, torch.autograd.grad(expected, asked, pull), strict=True):
            torch.testing.assert_close(x.grad, wanted_gradient, rtol=0, atol=1e-11)


def test_a_mask_keeps_its_plan_and_notices_a_changed_table():
    mask = Causal() & Padding.from_attention_mask(torch.ones(B, S, dtype=torch.bool))
    tensors = inputs()
    before = scaled_dot_product_attention(*tensors, mask=mask, backend="packed")
    plan = mask.__dict__["_plan"]
    scaled_dot_product_attention(*tensors, mask=mask, backend="packed")
    assert mask.__dict__["_plan"] is plan
    mask.parts[1].real[:, :7] = False
    after = scaled_dot_product_attention(*tensors, mask=mask, backend="packed")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, scaled_dot_product_attention(*tensors, mask=mask, backend="reference"))


def turned(x):
    """The same numbers with a last dimension that is not contiguous."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("knobs", [{}, {"sinks": draw(H, seed=5)}])
@pytest.mark.parametrize("backend", OTHERS)
def test_any_strides_also_with_lse_and_sinks(backend, knobs):
    query, key, value = (x.detach() for x in inputs(D))
    truth = scaled_dot_product_attention(
        query, key, value, mask=Causal(), return_lse=True, backend="reference", **knobs
    )
    found = scaled_dot_product_attention(
        turned(query), turned(key), turned(value), mask=Causal(), return_lse=True, backend=backend, **knobs
    )
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "auto"])
def test_float64_beside_a_float32_bias(backend):
    bias = draw(T, S, seed=4, dtype=torch.float32)
    for mask in (None, Causal()):
        found = scaled_dot_product_attention(*inputs(D), mask=mask, bias=bias, backend=backend)
        truth = scaled_dot_product_attention(*inputs(D), mask=mask, bias=bias, backend="reference")
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("backend", [*OTHERS, "auto"])
def test_a_scale_of_zero_or_less(backend, scale):
    for mask in (Causal(), Causal(0)):
        found = scaled_dot_product_attention(*inputs(D), mask=mask, scale=scale, backend=backend)
        truth = scaled_dot_product_attention(*inputs(D), mask=mask, scale=scale, backend="reference")
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sinks", [None, draw(H, seed=5)])
@pytest.mark.parametrize("mask", [None, Causal(), Causal(-37), Padding([S, 3]), Padding([0, 97])])
@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
def test_a_bias_of_minus_infinity_empties_a_row_in_the_lse_too(backend, mask, sinks):
    bias = torch.zeros(T, S, dtype=torch.float64)
    bias[5:9], bias[:, :3] = float("-inf"), float("-inf")  # with Padding, the second row has no key left at all
    leaves = [] if sinks is None else [sinks.clone().requires_grad_()]
    knobs = {"bias": bias, "sinks": leaves[0] if leaves else None}
    assert max(differences(backend, mask, inputs(D), leaves=leaves, **knobs)) < 1e-11


TABLES = {
    "table": Dense,
    "padding": lambda table: Causal() & Padding.from_attention_mask(table[:, 0, 0].clone()),
    "ids": lambda table: Causal() & Documents.from_ids(table[:, 0, 0].long(), table[:, 0, 0].long()),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("backend", [*OTHERS, "auto"])
def test_a_mask_whose_tensor_is_changed_is_another_mask(backend, kind, inference):
    with torch.inference_mode(inference):
        query, key, value = (x.detach()[:, :, :T] for x in inputs(D))
        table = torch.ones(B, 1, T, T, dtype=torch.bool)
        mask = TABLES[kind](table)
        if backend in ("packed", "windowed") and kind == "table":
            return
        scaled_dot_product_attention(query, key, value, mask=mask, backend=backend)
        for tensor in mask.tensors():
            tensor[..., 40:] = 0
        found = scaled_dot_product_attention(query, key, value, mask=mask, backend=backend)
        truth = scaled_dot_product_attention(query, key, value, mask=mask, backend="reference")
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_a_mask_changed_before_the_backward_pass_is_noticed():
    table = torch.ones(T, S, dtype=torch.bool)
    out = scaled_dot_product_attention(*inputs(D), mask=Dense(table), backend="chunked")
    table[:, 40:] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_tensors_on_the_meta_device_give_shapes():
    query, key, value = (x.detach().to("meta") for x in inputs(D))
    assert scaled_dot_product_attention(query, key, value, mask=Causal()).shape == (B, H, T, D)


@pytest.mark.parametrize("backend", ["packed", "windowed", "chunked"])
def test_one_tensor_for_all_three_can_be_differentiated_twice(backend):
    x = draw(1, 2, 7, 5).requires_grad_()
    found = []
    for name in (backend, "reference"):
        out = scaled_dot_product_attention(x, x, x, mask=Causal(), backend=name)
        found += torch.autograd.grad(out.square().sum(), x, create_graph=True)
    torch.testing.assert_close(*found)


def test_torch_func_with_a_learned_bias():
    bias = draw(7, 7, seed=3).requires_grad_()
    query, key, value = (draw(1, 2, 7, 5, seed=i) for i in range(3))
    found = torch.func.grad(lambda q: scaled_dot_product_attention(q, key, value, bias=bias).sum())(query)
    leaf = query.clone().requires_grad_()
    out = scaled_dot_product_attention(leaf, key, value, bias=bias, backend="reference")
    torch.testing.assert_close(found, torch.autograd.grad(out.sum(), leaf)[0])
