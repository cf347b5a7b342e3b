"""The update stays out of a subspace whatever the optimizer does; the gradient's projection alone does not do that."""

import copy
import weakref

import pytest
import torch
from torch import nn

from llmtune.optim import Directions, JointProjection, Together, UpdateProjection, project_change
from llmtune.optim.changed_update import full_float32
from llmtune.regularizers import DecoupledL2SP

IN, OUT, KEPT = 29, 13, 5
MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def basis_of(n=IN, k=KEPT, seed=1):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).Q


def share(parameter, before, basis, dim=-1):
    change = (parameter.detach().double() - before.double()).movedim(dim, -1)
    return float((change @ basis.double()).norm() / change.norm())


def walk(layer, step, *, steps=200, seed=2, clip=None, project=None):
    """Train on inputs with parts in all directions, of unequal size."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(IN, generator=draw))
    for _ in range(steps):
        layer.zero_grad()
        x = torch.randn(17, IN, generator=draw) * sizes
        (layer(x) - x[:, :OUT]).square().mean().backward()
        if project is not None:
            layer.weight.grad = project_change(layer.weight.grad, project)
        if clip is not None:
            nn.utils.clip_grad_norm_(layer.parameters(), clip)
        step()


def layer_of(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT, **options)


def test_by_hand_and_along_any_dimension():
    change = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    basis = torch.tensor([[0.6], [0.8]])
    # row (1, 2): 1 * .6 + 2 * .8 = 2.2, less 2.2 * (.6, .8); row (3, 4): 5, less (3, 4)
    assert torch.allclose(project_change(change, basis), torch.tensor([[-0.32, 0.24], [0.0, 0.0]]), atol=1e-6)
    assert torch.equal(project_change(change.T, basis, dim=0), project_change(change, basis).T)
    assert torch.allclose(project_change(change[1], basis), torch.zeros(2), atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_left_in_the_subspace_is_rounding(name):
    basis, layer = basis_of(), layer_of()
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    projection = UpdateProjection(MAKERS[name](layer.parameters()), {layer.weight: basis, layer.bias: None})
    walk(layer, projection.step, clip=1.0)
    assert share(layer.weight, before, basis) < 1e-5
    assert torch.equal(layer.bias, bias)
    assert float((layer.weight - before).norm()) > 0.1
    old = basis @ torch.randn(KEPT, 7)  # any input in the span
    assert float(((layer.weight - before) @ old).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_projecting_the_gradient_alone_leaves_a_part(name):
    basis, layer = basis_of(), layer_of(bias=False)
    before, optimizer = layer.weight.detach().clone(), MAKERS[name](layer.parameters())
    walk(layer, optimizer.step, project=basis)
    assert share(layer.weight, before, basis) > 0.05


def test_by_plain_sgd_it_is_the_gradient_s_projection():
    basis, one, other = basis_of(), layer_of(bias=False), layer_of(bias=False)
    walk(one, UpdateProjection(torch.optim.SGD(one.parameters(), lr=0.01), {one.weight: basis}).step, steps=5)
    walk(other, torch.optim.SGD(other.parameters(), lr=0.01).step, steps=5, project=basis)
    torch.testing.assert_close(one.weight, other.weight)


def test_old_outputs_stay_and_new_ones_are_learned():
    basis, layer = basis_of(), layer_of()
    old, new = (basis @ torch.randn(KEPT, 11)).T, torch.randn(19, IN)
    new -= new @ basis @ basis.T  # what a new input adds to the old
    target, before = torch.randn(19, OUT), layer(old).detach()
    projection = UpdateProjection(
        torch.optim.AdamW(layer.parameters(), lr=0.01), {layer.weight: basis, layer.bias: None}
    )
    first = None
    for _ in range(600):
        projection.zero_grad()
        loss = (layer(new) - target).square().mean()
        first = float(loss) if first is None else first
        loss.backward()
        projection.step()
    assert float(loss) < 1e-3 * first
    torch.testing.assert_close(layer(old), before, atol=1e-5, rtol=0)


def test_a_weight_that_has_its_inputs_first():
    basis, weight = basis_of(7, 3), nn.Parameter(torch.randn(7, 11))
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=0.01)
    UpdateProjection(optimizer, {weight: Directions(basis, dim=0)})
    for _ in range(50):
        optimizer.zero_grad()
        (torch.randn(5, 7) @ weight).square().sum().backward()
        optimizer.step()
    assert share(weight, before, basis, dim=0) < 1e-5


def test_moments_are_those_of_projected_gradients_unless_asked_otherwise():
    basis = basis_of()
    for wanted in (True, False):
        layer = layer_of(bias=False)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        UpdateProjection(optimizer, {layer.weight: basis}, gradients=wanted)
        walk(layer, optimizer.step, steps=3)
        inside = float((optimizer.state[layer.weight]["exp_avg"] @ basis).abs().max())
        assert (inside < 1e-6) is wanted


def test_a_schedule_and_a_scaler_take_the_inner_optimizer_and_an_overflow_moves_nothing():
    basis, layer = basis_of(), layer_of(bias=False)
    before = layer.weight.detach().clone()
    projection = UpdateProjection(torch.optim.AdamW(layer.parameters(), lr=0.01), {layer.weight: basis})
    schedule = torch.optim.lr_scheduler.ExponentialLR(projection.optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    for step in range(12):
        projection.zero_grad()
        scaler.scale(layer(torch.randn(7, IN)).square().sum() * 2.0**10).backward()
        scaler.unscale_(projection.optimizer)
        scaler.step(projection.optimizer)
        scaler.update()
        schedule.step()
        if step == 0:
            assert torch.equal(layer.weight, before)
    assert scaler.get_scale() < 2.0**120
    assert projection.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**12)
    assert share(layer.weight, before, basis) < 1e-5


def test_a_closure_s_gradients_are_made_within_the_step():
    basis, layer = basis_of(), layer_of(bias=False)
    before = layer.weight.detach().clone()
    projection = UpdateProjection(torch.optim.LBFGS(layer.parameters(), max_iter=3), {layer.weight: basis})

    def closure():
        projection.zero_grad()
        loss = (layer(torch.ones(3, IN)) - 1).square().sum()
        loss.backward()
        return loss

    assert float(projection.step(closure)) > 0
    assert share(layer.weight, before, basis) < 1e-5


def test_several_optimizers_as_one():
    basis, layer = basis_of(), layer_of()
    before = layer.weight.detach().clone()
    parts = (torch.optim.Muon([layer.weight], lr=0.01), torch.optim.AdamW([layer.bias], lr=0.01))
    walk(layer, UpdateProjection(Together(*parts), {layer.weight: basis}).step, steps=5)
    assert share(layer.weight, before, basis) < 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_what_other_hooks_do_before_the_step_is_part_of_it(first):
    basis, layer = basis_of(), layer_of(bias=False)
    before, optimizer = layer.weight.detach().clone(), torch.optim.SGD(layer.parameters(), lr=0.1)
    pull = DecoupledL2SP({"weight": torch.zeros(OUT, IN)}, strength=1.0)
    if first:
        pull.attach(layer, optimizer)
    UpdateProjection(optimizer, {layer.weight: basis})
    if not first:
        pull.attach(layer, optimizer)
    walk(layer, optimizer.step, steps=3)
    assert share(layer.weight, before, basis) < 1e-5


def test_nothing_is_kept_between_steps_and_detaching_ends_it():
    basis, layer = basis_of(), layer_of(bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    projection = UpdateProjection(optimizer, {layer.weight: basis})
    copies = []
    after = projection.after
    projection.after = lambda before: (copies.extend(weakref.ref(v) for v in before.values()), after(before))
    walk(layer, optimizer.step, steps=1)
    assert len(copies) == 1
    assert copies[0]() is None
    projection.detach()
    projection.detach()
    before = layer.weight.detach().clone()
    walk(layer, optimizer.step, steps=1)
    assert share(layer.weight, before, basis) > 0.05


def test_a_frozen_or_unused_parameter_stays_to_the_bit():
    layer, unused = layer_of(bias=False), nn.Parameter(torch.randn(OUT, IN))
    before = unused.detach().clone()
    optimizer = torch.optim.AdamW([layer.weight, unused], lr=0.1, weight_decay=0.1)
    UpdateProjection(optimizer, {layer.weight: basis_of(), unused: basis_of()})
    walk(layer, optimizer.step, steps=2)
    assert torch.equal(unused, before)


def test_bfloat16_is_rounded_once():
    basis, weight = basis_of(), nn.Parameter(torch.randn(OUT, IN).bfloat16())
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    UpdateProjection(optimizer, {weight: basis}, gradients=False)
    weight.grad = torch.randn(OUT, IN).bfloat16()
    stepped = (before.float() - 0.5 * weight.grad.float()).bfloat16()
    optimizer.step()
    change = stepped.double() - before.double()
    wanted = before.double() + change - change @ basis.double() @ basis.double().T
    torch.testing.assert_close(weight.double(), wanted, rtol=2**-8, atol=1e-6)
    assert weight.dtype == torch.bfloat16


def test_lowered_precision_of_matrix_products_changes_nothing():
    basis, weight = basis_of(64, 9), torch.randn(31, 64)
    exact = project_change(weight, basis)
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert (weight @ basis).dtype == torch.bfloat16
            with full_float32(weight.device):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                assert torch.equal(project_change(weight, basis), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(was)


def test_a_saved_run_goes_on_bit_for_bit():
    def made():
        layer = layer_of()
        return layer, UpdateProjection(MAKERS["adamw"](layer.parameters()), {layer.weight: basis_of()})

    whole, projection = made()
    walk(whole, projection.step, steps=4)
    state = copy.deepcopy((whole.state_dict(), projection.state_dict()))
    walk(whole, projection.step, steps=3, seed=5)
    layer, again = made()
    layer.load_state_dict(state[0])
    again.load_state_dict(state[1])
    walk(layer, again.step, steps=3, seed=5)
    assert torch.equal(layer.weight, whole.weight)
    assert again.state[layer.weight]["step"] == 7


def made_badly(case):
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    good = basis_of()
    spoiled = good.clone()
    spoiled[3, 1] = torch.nan
    bases = {
        "size": {layer.weight: basis_of(IN + 2)},
        "conv": {layer.weight: basis_of(OUT, 3)},
        "empty": {layer.weight: good[:, :0]},
        "wide": {layer.weight: torch.randn(IN, IN + 1)},
        "nan": {layer.weight: spoiled},
        "scaled": {layer.weight: 1.01 * good},
        "skewed": {layer.weight: torch.cat([good[:, :1], good[:, :1]], 1)},
        "list": {layer.weight: [1.0]},
        "ints": {layer.weight: torch.eye(IN, dtype=torch.long)},
        "dim": {layer.weight: Directions(good, dim=2)},
        "none": {},
        "name": {"weight": good},
        "stranger": {nn.Parameter(torch.randn(OUT, IN)): good},
        "pairs": [(layer.weight, good)],
    }
    if case == "optimizer":
        return UpdateProjection("adam", {layer.weight: good})
    if case == "twice":
        UpdateProjection(optimizer, {layer.weight: good})
        return JointProjection(optimizer, {layer.bias: torch.eye(OUT)[:1], layer.weight: torch.zeros(1, OUT, IN)})
    return UpdateProjection(optimizer, bases[case])


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("size", ValueError, r"must be \[29, k\]; got \[31, 5\]: is it of another layer"),
        ("conv", ValueError, r"must be \[29, k\]; got \[13, 3\].*Directions\(basis, dim=0\)"),
        ("empty", ValueError, r"must have 1 to 29 columns; got \[29, 0\].*[Ll]eave the parameter out"),
        ("wide", ValueError, r"must have 1 to 29 columns; got \[29, 30\]"),
        ("nan", ValueError, "is not finite: it holds NaN or infinity"),
        ("scaled", ValueError, r"must be orthonormal.*off the identity by 0\.02.*torch.linalg.qr"),
        ("skewed", ValueError, "off the identity by 1"),
        ("list", TypeError, "must be a tensor of floats"),
        ("ints", TypeError, "must be a tensor of floats"),
        ("dim", ValueError, r"along dimension 2, and the parameter is \[13, 29\]"),
        ("none", ValueError, "is given no parameter"),
        ("name", TypeError, "by themselves and not by name; got 'weight'"),
        ("stranger", ValueError, r"a parameter of \[13, 29\] is none of the optimizer's"),
        ("pairs", TypeError, "must be a dict"),
        ("optimizer", TypeError, "takes a torch optimizer that has been made; got 'adam'"),
        ("twice", ValueError, r"the update of a parameter of \[13, 29\] is projected already"),
    ],
)
def test_bad_input(case, error, text):
    with pytest.raises(error, match=text):
        made_badly(case)
