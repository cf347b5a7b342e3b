"""The optimizer's update kept out of directions over all parameters together, such as gradients of old examples."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from llmtune.optim.changed_update import ChangedUpdate, full_float32, wide
from llmtune.optim.update_projection import OFF

Key = TypeVar("Key", bound=Hashable)


def joint_products(changes: Mapping[Key, Tensor], directions: Mapping[Key, Tensor]) -> Tensor:
    """Return [k], the inner product of a change of several parameters with each of k directions over all of them.

    Args:
        changes: {key: tensor}, of any shapes.
        directions: {key: [k, *shape]}; keys that `changes` has not count as unchanged.
    """
    shared = [key for key in directions if key in changes]
    parts = [directions[key].flatten(1) @ changes[key].to(directions[key].dtype).flatten() for key in shared]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum(0)


def project_jointly(changes: Mapping[Key, Tensor], directions: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Return changes of several parameters without their joint part in a span of directions.

    x - sum_i <x, d_i> d_i,  where x and d_i are all parameters as one vector

    Args:
        changes: {key: tensor}, of any shapes.
        directions: {key: [k, *shape]}, orthonormal as whole vectors (not checked), on their changes' devices; keys that
            are left out are 0 in all directions.

    Returns:
        {key: tensor} for all of `changes`; those with directions in the dtype of these.

    Example:
        >>> directions = {"a": torch.tensor([[0.6, 0.0]]), "b": torch.tensor([[0.8]])}
        >>> project_jointly({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([0.5])}, directions)
        {'a': tensor([0.4000, 5.0000]), 'b': tensor([-0.3000])}
    """
    products = joint_products(changes, directions)
    return {key: _without(change, products, directions[key]) if key in directions else change
            for key, change in changes.items()}  # fmt: skip


class JointProjection(ChangedUpdate):
    """Keeps each step's change orthogonal to directions over all parameters as one vector, after the optimizer's step.

    theta_new = theta + P(theta_optimizer - theta),    P(x) = x - sum_i <x, d_i> d_i

    With gradients of old outputs as directions (`llmtune.forgetting.gradient_directions`) it is orthogonal gradient
    descent that holds under Adam: to first order those outputs stay. It costs k times the parameters' memory, and two
    passes over that a step. See `ChangedUpdate` for schedules, `GradScaler`, `TrainingLoop` and `Trainer`;
    `UpdateProjection` is the cheaper form for subspaces of each weight's inputs.

    Where we differ: OGD projects the gradient, which Adam and weight decay undo; here the update is projected, and the
    gradient too, so that Adam's moments are those of what is followed. It is the vector of all parameters that is
    projected, so one without a gradient can move. TRACE's `OGD.py` keeps one buffer under many names, so that its
    basis is one gradient and rounding.

    Args:
        optimizer: any torch optimizer that has been made.
        directions: {parameter: [k, *shape]}, the same k for all, orthonormal as whole vectors; parameters left out
            train freely. Kept in at least float32, and not copied where they are that.
        gradients: whether to project gradients too, in place; those that a closure makes within the step are not.

    Raises:
        ValueError: there are no parameters, or one is not the optimizer's or projected already; directions are empty,
            of another shape or number, not finite, or not orthonormal together.
        TypeError: `optimizer` is no torch optimizer, a parameter is no tensor of floats or spread over processes, or
            directions are no tensor of floats.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        >>> directions = {layer.weight: torch.tensor([[[0.6, 0.0]]]), layer.bias: torch.tensor([[0.8]])}
        >>> projection = JointProjection(optimizer, directions)
        >>> weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        >>> layer(torch.tensor([[1.0, 3.0]])).sum().backward()
        >>> optimizer.step()
        >>> moved = 0.6 * (layer.weight - weight)[0, 0] + 0.8 * (layer.bias - bias)[0]
        >>> bool(moved.abs() < 1e-6), bool((layer.bias != bias).all())
        (True, True)

    Farajtabar et al. 2020, "Orthogonal gradient descent for continual learning", algorithm 1.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, directions: Mapping[nn.Parameter, Tensor], *, gradients: bool = True
    ) -> None:
        if not isinstance(directions, Mapping):
            raise TypeError(f"directions must be a dict {{parameter: directions}}; got a {type(directions).__name__}")
        counts = [len(given) for given in directions.values() if isinstance(given, Tensor) and given.ndim]
        for parameter, given in directions.items():
            if isinstance(parameter, Tensor):
                _check_shape(given, parameter, counts[0] if counts else 0)
        check_joint(directions)
        super().__init__(optimizer, list(directions))
        self._directions: dict[Tensor, Tensor] = {
            parameter: wide(given.detach()) for parameter, given in directions.items()
        }
        self.gradients = gradients

    def prepare(self) -> None:
        """Project the gradients, where that is wanted; see `ChangedUpdate.prepare`."""
        own = self._directions = {p: given.to(p.device) for p, given in self._directions.items()}
        gradients = {p: p.grad for p in self.parameters if p.grad is not None}
        if not self.gradients or not gradients:
            return
        products = joint_products(gradients, own)
        for parameter, gradient in gradients.items():
            gradient.copy_(_without(gradient, products, own[parameter]))

    def after(self, before: dict[Tensor, Tensor]) -> None:
        """Take the joint part in the directions out of the change; see `ChangedUpdate.after`.

        Args:
            before: what each parameter was, of its shape.
        """
        own = self._directions
        parts = [joint_products({p: wide(p) - old}, {p: own[p]}) for p, old in before.items()]
        products = torch.stack([part.to(parts[0].device) for part in parts]).sum(0)
        for parameter, old in before.items():
            change = _without(wide(parameter) - old, products, own[parameter])
            parameter.copy_(change.add_(old))


def _without(change: Tensor, products: Tensor, directions: Tensor) -> Tensor:
    """Return change - sum_i products[i] * directions[i], in the directions' dtype."""
    return change.to(directions.dtype) - torch.tensordot(products.to(directions), directions, 1)


def check_joint(directions: Mapping[Key, Tensor]) -> None:
    """Raise where directions are not orthonormal as whole vectors.

    Args:
        directions: {key: [k, *shape]}, the same k for all.

    Raises:
        ValueError: they are not finite, or not orthonormal together.
    """
    gram: Tensor | None = None
    for value in directions.values():
        if not bool(value.isfinite().all()):
            raise ValueError(f"directions {[*value.shape]} are not finite: they hold NaN or infinity")
        rows = wide(value.detach()).flatten(1)
        with full_float32(rows.device):
            part = (rows @ rows.T).to("cpu", torch.float64)
        gram = part if gram is None else gram + part
    if gram is None:
        return
    off = float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())
    if off > OFF:
        raise ValueError(
            f"the {len(gram)} directions must be orthonormal as vectors over all parameters, and their products are "
            f"off the identity by {off:.2g}: orthonormalise them together, not parameter by parameter"
        )


def _check_shape(given: Tensor, parameter: Tensor, count: int) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(f"directions must be a tensor of floats [k, *shape]; got {given!r:.60}")
    if count < 1 or given.shape != (count, *parameter.shape):
        raise ValueError(
            f"directions of a parameter {[*parameter.shape]} must be [k, *shape], with one k of at least 1 for all; "
            f"got {[*given.shape]}, where the first has k = {count}"
        )
