"""The update stays orthogonal to directions over all parameters as one vector."""

import pytest
import torch
from torch import nn

from llmtune.optim import JointProjection, project_jointly
from llmtune.optim.joint_projection import joint_products

COUNT = 3


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


def directions_of(model, seed=1, count=COUNT):
    """Return directions that are orthonormal as whole vectors, and not parameter by parameter."""
    sizes = [p.numel() for p in model.parameters()]
    flat = torch.linalg.qr(torch.randn(sum(sizes), count, generator=torch.Generator().manual_seed(seed))).Q.T
    return {
        p: part.reshape(count, *p.shape) for p, part in zip(model.parameters(), flat.split(sizes, dim=1), strict=True)
    }


def whole(values):
    return torch.cat([value.detach().double().flatten() for value in values])


def test_it_is_the_projection_of_the_whole_vector():
    model = model_of()
    directions = directions_of(model)
    changes = {p: torch.randn_like(p) for p in model.parameters()}
    matrix = torch.stack([whole(d[i] for d in directions.values()) for i in range(COUNT)])
    x = whole(changes.values())
    torch.testing.assert_close(joint_products(changes, directions).double(), matrix @ x, atol=1e-5, rtol=1e-5)
    projected = whole(project_jointly(changes, directions).values())
    torch.testing.assert_close(projected, x - matrix.T @ (matrix @ x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gradients", [True, False])
def test_under_adamw_decay_and_clipping_the_change_has_no_part_in_it(gradients):
    model = model_of()
    directions, before = directions_of(model), whole(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    JointProjection(optimizer, directions, gradients=gradients)
    for _ in range(100):
        optimizer.zero_grad()
        x = torch.randn(11, 7)
        (model(x) - x[:, :2]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    change = whole(model.parameters()) - before
    parts = torch.stack([whole(d[i] for d in directions.values()) for i in range(COUNT)]) @ change
    assert float(parts.norm() / change.norm()) < 1e-5
    assert float(change.norm()) > 0.1


def test_parameters_left_out_train_freely():
    model = model_of()
    first = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = torch.zeros(1, *first.shape)
    alone[0, 2, 3] = 1.0
    JointProjection(optimizer, {first: alone})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(3, 7)).square().sum().backward()
    wanted = {name: before[name] - 0.1 * p.grad for name, p in model.named_parameters()}
    wanted["0.weight"][2, 3] = before["0.weight"][2, 3]
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, wanted[name])


def spoiled(case):
    model = model_of()
    directions = directions_of(model)
    first = next(iter(directions))
    if case == "one by one":
        return {p: torch.linalg.qr(d.flatten(1).T).Q.T[:1].reshape(1, *p.shape) for p, d in directions.items()}, model
    if case == "empty":
        return {p: d[:0] for p, d in directions.items()}, model
    if case == "nan":
        directions[first] = directions[first] / 0
    if case == "count":
        directions[first] = torch.cat([directions[first], directions[first]])
    if case == "shape":
        directions[first] = directions[first].mT
    if case == "list":
        directions[first] = [1.0]
    return ([] if case == "pairs" else {} if case == "none" else directions), model


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("one by one", ValueError, "the 1 directions must be orthonormal as vectors over all parameters.*by 3"),
        ("empty", ValueError, "with one k of at least 1 for all"),
        ("nan", ValueError, "are not finite"),
        ("count", ValueError, r"got \[3, 5\], where the first has k = 6"),
        ("shape", ValueError, r"directions of a parameter \[5, 7\] must be \[k, \*shape\].*got \[3, 7, 5\]"),
        ("list", TypeError, "must be a tensor of floats"),
        ("pairs", TypeError, "must be a dict"),
        ("none", ValueError, "is given no parameter"),
    ],
)
def test_bad_input(case, error, text):
    directions, model = spoiled(case)
    with pytest.raises(error, match=text):
        JointProjection(torch.optim.SGD(model.parameters(), lr=0.1), directions)
