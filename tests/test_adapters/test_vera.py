"""VeRA: its formula, its shared matrices, what it keeps for the backward pass, what it refuses."""

import copy
import gc
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmtune.adapters import (
    LoRA,
    SharedProjections,
    VeRA,
    VeRALinear,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    draw_projections,
    lora_linear,
    merge,
    unmerge,
    vera_linear,
)
from llmtune.forgetting import EWC
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conv1d(size, out):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, size)


def move(model, name="default"):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(adapter_parameters(model, name).items()):
            p.add_((0.2 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def moved(layer, seed=3):
    with torch.no_grad():
        for i, p in enumerate((layer.lambda_b, layer.lambda_d)):
            p.add_(draw(*p.shape, seed=seed + i).to(p.dtype))
    return layer


def output(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(layer, x, p=0.0):
    """The formula as it is written, by operations that autograd knows."""
    a = layer.projections.a[:, : layer.in_features]
    b = layer.projections.b[: layer.out_features]
    x_wide = F.dropout(x.to(a.dtype), p)
    result = layer.base(x)
    return (result + layer.lambda_b * F.linear(layer.lambda_d * F.linear(x_wide, a), b)).to(result.dtype)


# --- the matrices ---------------------------------------------------------------------------------------------------


def test_they_are_drawn_from_the_seed_alone_within_kaimings_bounds():
    state = torch.get_rng_state()
    a, b = draw_projections(13, 1009, 499, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = draw_projections(13, 1009, 499, seed=5), draw_projections(13, 1009, 499, seed=6)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    assert not torch.equal(a, other[0])
    for matrix, fan in ((a, 1009), (b, 13)):
        bound = math.sqrt(6 / fan)
        assert 0.99 * bound < float(matrix.abs().max()) <= bound
        assert abs(float(matrix.std()) / (bound / math.sqrt(3)) - 1) < 0.02
        assert abs(float(matrix.mean())) < 0.02 * bound


def test_they_are_drawn_on_the_cpu_whatever_the_context():
    with torch.device("meta"):
        a, _ = draw_projections(3, 5, 7)
    assert a.device.type == "cpu"


def test_a_model_has_them_once():
    model = tiny_llama()
    attach(model, VeRA(rank=5))
    layers = [layer for layer in model.modules() if isinstance(layer, VeRALinear)]
    assert len(layers) == 14
    assert len({id(layer.projections) for layer in layers}) == 1
    assert layers[0].projections.a.shape == (5, 56)
    assert layers[0].projections.b.shape == (56, 5)
    names = [name for name, buffer in model.named_buffers() if name.endswith(("projections.a", "projections.b"))]
    assert len(names) == 2
    assert not [name for name in model.state_dict() if "projections" in name]
    assert sum(p.numel() for p in adapter_parameters(model).values()) == sum(5 + layer.out_features for layer in layers)


def test_a_copy_has_its_own_and_all_move_together():
    model = tiny_llama()
    attach(model, VeRA(rank=5))
    move(model)
    other = copy.deepcopy(model)
    assert torch.equal(output(other), output(model))
    mine, theirs = (
        {id(m): m for m in root.modules() if isinstance(m, SharedProjections)} for root in (model, other)
    )  # fmt: skip
    assert len(mine) == len(theirs) == 1
    assert mine.keys().isdisjoint(theirs)
    (own,), (copied,) = mine.values(), theirs.values()
    assert own.a.data_ptr() != copied.a.data_ptr()
    expected = output(model)
    other.double()
    assert own.a.dtype == torch.float32
    assert copied.a.dtype == torch.float64
    torch.testing.assert_close(output(other).float(), expected, rtol=1e-4, atol=1e-4)
    state = model.state_dict()
    again = tiny_llama()
    attach(again, VeRA(rank=5))
    again.load_state_dict(state)
    assert torch.equal(output(again), expected)


def test_two_adapters_share_nothing_and_the_last_detached_leaves_nothing():
    model = tiny_llama()
    start, buffers = output(model), [name for name, _ in model.named_buffers()]
    attach(model, VeRA(rank=5, targets=["q_proj"]), "one")
    move(model, "one")
    alone = output(model)
    attach(model, VeRA(rank=5, targets=["q_proj", "up_proj"]), "two")
    assert torch.equal(output(model), alone)
    move(model, "two")
    found = {m.a.data_ptr() for m in model.modules() if isinstance(m, SharedProjections)}
    assert len(found) == 2
    both = output(model)
    merge(model, "one")
    merge(model, "two")
    torch.testing.assert_close(output(model), both, rtol=2e-5, atol=2e-5)
    unmerge(model, "two")
    unmerge(model, "one")
    detach(model, "one")
    detach(model, "two")
    assert torch.equal(output(model), start)
    assert [name for name, _ in model.named_buffers()] == buffers


def test_two_passes_before_one_backward_pass_under_distributed_data_parallel(tmp_path):
    model = nn.Sequential(nn.Linear(11, 7), nn.Linear(7, 5))
    attach(model, VeRA(rank=3))
    move(model)
    x = draw(13, 11, seed=0, dtype=torch.float32)
    (model(x) + model(2 * x)).square().sum().backward()
    truth = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    model.zero_grad()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        (wrapped(x) + wrapped(2 * x)).square().sum().backward()
        del wrapped  # while the process group stands: torch may wait for itself where the wrapper outlives the group
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
    for name, p in adapter_parameters(model).items():
        torch.testing.assert_close(p.grad, truth[name], rtol=1e-6, atol=1e-6)


# --- the formula ----------------------------------------------------------------------------------------------------


def test_the_function_is_the_closed_form_in_float64_with_its_gradients():
    x, weight, bias = draw(2, 5, 11, seed=0), draw(7, 11, seed=1), draw(7, seed=2)
    a, b = draw(3, 11, seed=3), draw(7, 3, seed=4)
    leaves = [x.requires_grad_(), draw(3, seed=5).requires_grad_(), draw(7, seed=6).requires_grad_()]
    _, d, lb = leaves
    truth = x @ (weight + torch.diag(lb) @ b @ torch.diag(d) @ a).T + bias
    got = vera_linear(x, weight, bias, a, b, d, lb)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    pull = draw(2, 5, 7, seed=7)
    for one, other in zip(
        torch.autograd.grad(got, leaves, pull), torch.autograd.grad(truth, leaves, pull), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(
        lambda x, d, lb: vera_linear(x, weight, bias, a, b, d, lb, dropout_p=0.4, seed=3), leaves
    )  # fmt: skip


@pytest.mark.parametrize("way", ["linear", "without bias", "hooked", "conv1d"])
def test_layers_take_their_parts_of_larger_matrices(way):
    base = (conv1d if way == "conv1d" else partial(nn.Linear, bias=way != "without bias"))(11, 7)
    base.double().requires_grad_(False)
    if way == "hooked":  # the way that calls the base
        base.register_forward_hook(lambda module, args, out: None)
    shared = SharedProjections(17, 13, 19, seed=3, dtype=torch.float64)
    layer = moved(VeRALinear(base, rank=17, projections=shared, dtype=torch.float64))
    x = draw(2, 5, 11, seed=0)
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-12, atol=1e-12)
    change = layer.lambda_b[:, None] * shared.b[:7] @ (layer.lambda_d[:, None] * shared.a[:, :11])
    change = change.T if way == "conv1d" else change
    torch.testing.assert_close(layer.deltas()["weight"], change, rtol=1e-12, atol=1e-12)
    left, right, scaling = layer.low_rank()
    torch.testing.assert_close(scaling * left @ right, change, rtol=1e-12, atol=1e-12)
    assert left.shape[1] == right.shape[0] == 17
    grads = torch.autograd.grad((left @ right).square().sum(), [layer.lambda_b, layer.lambda_d])
    truth = torch.autograd.grad(change.square().sum(), [layer.lambda_b, layer.lambda_d])
    for got, want in zip(grads, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_at_the_start_lambda_b_alone_learns_and_a_and_b_never():
    layer = VeRALinear(nn.Linear(11, 7).requires_grad_(False), rank=3, d_initial=0.5)
    x = draw(5, 11, seed=0, dtype=torch.float32)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).square().sum().backward()
    assert layer.lambda_b.grad.abs().min() > 0
    assert torch.equal(layer.lambda_d.grad, torch.zeros(3))
    assert torch.equal(layer.lambda_d.detach(), torch.full((3,), 0.5))
    assert not layer.projections.a.requires_grad
    assert layer.projections.a.grad is None


def test_dropout_is_on_the_way_to_a_and_in_training_alone():
    layer = moved(VeRALinear(nn.Linear(11, 7), rank=5, dropout=0.5))
    x = torch.ones(4001, 11)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), layer(x))
        expected, drawn = layer(x) - layer.base(x), layer.train()(x) - layer.base(x)
    assert not torch.equal(drawn[0], drawn[1])
    spread = float(drawn.std(0).max()) / math.sqrt(4001)
    assert float((drawn.mean(0) - expected[0]).abs().max()) < 5 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_base_rounds_once_and_a_checkpoint_changes_nothing(dtype):
    layer = moved(VeRALinear(nn.Linear(11, 7).to(dtype).requires_grad_(False), rank=3))
    x = draw(5, 11, seed=0, dtype=dtype).requires_grad_()
    assert layer(x).dtype == dtype
    change = layer.lambda_b * ((x.float() @ layer.projections.a.T * layer.lambda_d) @ layer.projections.b.T)
    torch.testing.assert_close(layer(x), (layer.base(x) + change).to(dtype), rtol=1e-6 if dtype != x.dtype else 8e-3,
                               atol=1e-6)  # fmt: skip
    leaves = [x, layer.lambda_b, layer.lambda_d]
    one = torch.autograd.grad(layer(x).float().square().sum(), leaves)
    other = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).float().square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_compiles_and_runs_under_autocast():
    layer = moved(VeRALinear(nn.Linear(11, 7), rank=3))
    x = draw(5, 11, seed=0, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).float(), layer(x.float()).float(), rtol=0.05, atol=0.05)


# --- what is kept for the backward pass -----------------------------------------------------------------------------


def kept_bytes(run, known):
    """Bytes of the storages that autograd keeps beside those of `known` tensors."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    known = {tensor.untyped_storage().data_ptr() for tensor in known}
    assert out.requires_grad
    return sum(size for storage, size in held.items() if storage not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_for_each_token(dtype):
    rank, size, out = 61, 101, 89
    layer = moved(VeRALinear(nn.Linear(size, out).to(dtype).requires_grad_(False), rank=rank, dropout=0.1))
    a, b = layer.parts()
    for rows in (251, 1009):
        x = draw(rows, size, seed=0, dtype=dtype).requires_grad_()
        known = [x, *layer.parameters(), *layer.buffers()]
        ours = kept_bytes(lambda: layer(x), known)  # noqa: B023
        assert ours == 4 * out * rank, "lambda_b B lambda_d and nothing else"
        assert ours < kept_bytes(lambda: plain(layer, x, 0.1), known) / 6  # noqa: B023
        products = (layer.lambda_d[:, None] * a, layer.lambda_b[:, None] * b)
        both = kept_bytes(
            lambda: lora_linear(x, layer.base.weight, layer.base.bias, *products, scaling=1.0),  # noqa: B023
            known,
        )
        assert both == 4 * rank * (out + size), "scaling A as well would keep more"
    layer.base.register_forward_hook(lambda module, args, out: None)
    assert kept_bytes(lambda: layer(x), known) == 4 * out * rank, "the way that calls the base"


# --- the record and what is refused ---------------------------------------------------------------------------------

vera = partial(VeRA, rank=2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VeRA(rank=0), ValueError, "rank must be a whole number of at least 1; got 0"),
        (lambda: vera(dropout=1.0), ValueError, "dropout must be a probability from 0 to below 1; got 1.0"),
        (lambda: vera(d_initial=0), ValueError, "d_initial must be a number other than 0; got 0"),
        (lambda: vera(d_initial=math.nan), ValueError, "d_initial must be a number other than 0; got nan"),
        (lambda: vera(seed=-1), ValueError, r"seed must be a whole number from 0 to 2\*\*63 - 1; got -1"),
        (lambda: vera(save_projection=1), TypeError, "save_projection must be True or False; got 1"),
        (lambda: vera(train_bias="lora_only"), ValueError, 'must be "none", "vera_only" or "all"; got \'lora_only\''),
        (lambda: vera(dtype=torch.int8), TypeError, "dtype must be a floating torch dtype"),
        (lambda: vera(targets=()), ValueError, "targets names no module"),
        (lambda: VeRALinear(nn.LayerNorm(5), rank=2), TypeError, "VeRALinear needs a module with .*; got LayerNorm"),
        (lambda: VeRALinear(nn.Linear(5, 3), rank=0), ValueError, "rank must be a whole number of at least 1"),
        (
            lambda: VeRALinear(nn.Linear(5, 3), rank=2, projections=SharedProjections(2, 5, 2)),
            ValueError,
            r"projections must be \[2, 5 or more\] and \[3 or more, 2\]; got \[2, 5\] and \[2, 2\]",
        ),
        (
            lambda: VeRALinear(nn.Linear(5, 3), rank=2, projections=SharedProjections(3, 5, 3)),
            ValueError,
            r"got \[3, 5\] and \[3, 3\]",
        ),
        (lambda: attach(tiny_llama(), vera(targets=["embed_tokens"])), TypeError, "VeRA goes to linear layers and Con"),
        (lambda: attach(tiny_llama(), vera(targets=["q_prj"])), ValueError, 'targets: "q_prj" matches no module'),
        (
            lambda: attach(nn.Sequential(nn.MultiheadAttention(8, 2)), vera(targets=["out_proj"])),
            TypeError,
            r"out_proj belongs to nn\.MultiheadAttention",
        ),
    ],
)
def test_what_is_not_possible_is_told(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_refusal_changes_nothing():
    model = tiny_llama()
    with pytest.raises(TypeError):
        attach(model, vera(targets=["q_proj", "embed_tokens"]))
    assert adapter_names(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_a_base_on_the_meta_device_can_be_attached_to():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(11, 7), nn.Linear(7, 5))
    attach(model, vera())
    assert {p.device.type for p in adapter_parameters(model).values()} == {"meta"}
    assert model[0].projections.a.device.type == "meta"
    model.to_empty(device="cpu")
    assert model[1].projections is model[0].projections
    assert model[0].projections.drawn_from(0)
    real = nn.Sequential(nn.Linear(11, 7), nn.Linear(7, 5))
    attach(real, vera(seed=0))
    move(real)
    model.load_state_dict(real.state_dict())
    x = draw(3, 11, seed=0, dtype=torch.float32)
    assert torch.equal(model(x), real(x))


def test_beside_lora_and_dora_and_under_a_penalty():
    model = tiny_gpt2()
    attach(model, LoRA(rank=2, alpha=3, targets=["c_attn"]), "lora")
    move(model, "lora")
    alone = output(model)
    attach(model, vera(targets=["c_attn"]), "vera")
    assert torch.equal(output(model), alone)
    name = "transformer.h.0.attn.c_attn.weight"
    layer = model.transformer.h[0].attn.c_attn
    anchor = {name: (layer.weight + layer.base.deltas()["weight"]).detach()}
    move(model, "vera")
    penalty = EWC({name: torch.ones_like(anchor[name])}, anchor, strength=2.0)
    truth = layer.deltas()["weight"].square().sum()
    torch.testing.assert_close(penalty(model), truth, rtol=1e-4, atol=1e-6)
    got = torch.autograd.grad(penalty(model), layer.lambda_b)[0]
    torch.testing.assert_close(got, torch.autograd.grad(truth, layer.lambda_b)[0], rtol=1e-4, atol=1e-5)


def test_biases_of_adapted_modules_are_trained_as_copies():
    model = tiny_bert()
    report = attach(model, VeRA(rank=3, targets=["query"], train_bias="vera_only"))
    assert len(report.biases) == 2
    assert {name.rsplit(".", 1)[1] for name in adapter_parameters(model)} == {"lambda_d", "lambda_b", "trained_bias"}
