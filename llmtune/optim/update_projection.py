"""The optimizer's update kept out of a subspace of each weight's inputs, whatever the optimizer does to gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.optim.changed_update import ChangedUpdate, full_float32, wide

OFF = 1e-4  # how far from the identity U^T U may be, entry by entry; a basis rounded to bfloat16 is 1e-3 and more off


@dataclass(frozen=True)
class Directions:
    """Directions in which a parameter must not change, along one of its dimensions.

    Attributes:
        basis: [n, k], orthonormal columns; n is the size of the parameter in dimension `dim`.
        dim: the dimension that runs over inputs: the last of a linear weight [out, in], 0 of GPT-2's Conv1D [in, out].
    """

    basis: Tensor
    dim: int = -1


def project_change(change: Tensor, basis: Tensor, *, dim: int = -1) -> Tensor:
    """Return a change without its part in a subspace.

    change - (change @ U) @ U^T, U = basis, along the last dimension or another.

    Args:
        change: [..., n] for dim=-1; any tensor with n entries in dimension `dim`.
        basis: [n, k], orthonormal columns (not checked).
        dim: which dimension of the change the subspace is in.

    Returns:
        A new tensor of the change's shape, in at least float32.

    Example:
        >>> change = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> project_change(change, torch.tensor([[0.0], [1.0], [0.0]]))
        tensor([[1., 0., 3.],
                [4., 0., 6.]])
    """
    moved = wide(change).movedim(dim, -1)
    basis = basis.to(moved)
    return (moved - (moved @ basis) @ basis.T).movedim(-1, dim)


class UpdateProjection(ChangedUpdate):
    """Keeps each step's change of a weight out of a subspace: change @ basis == 0, after whatever the optimizer does.

    W_new = W + P(W_optimizer - W),    P(X) = X - (X @ U) @ U^T

    So for every input x in the span of U a linear layer's output W x stays what it was. The change is the whole of it:
    momentum, Adam's preconditioning, decoupled weight decay and clipping are in it, and none can break what is kept.
    See `ChangedUpdate` for what it costs, and for schedules, `GradScaler`, `TrainingLoop` and `Trainer`.

    Where we differ: OGD, GPM and PEFT's OSF project the gradient. By SGD without decay that is the same. Adam divides
    entry by entry and so takes the update into the subspace again, and decay was never out of it: with features of
    unequal size about a quarter of the norm of the whole change is left there, where this leaves less than 1e-6
    (`benchmarks/results/projection.json`: AdamW, rate 1e-3). The gradient is projected here as well, before the step.
    What is kept is the same without, but then Adam's moments are those of gradients that are never followed: after as
    many steps the loss is at 0.96 of its start, and with it at 0.63.

    Rounding: the sum is rounded once to the parameter's dtype, and that is all that is left in the subspace, at random
    from step to step. In float32 it matters where steps are tiny beside the weights: at a rate of 1e-5 and weights of
    0.1 the share left is 1e-5 after 200 steps and 5e-6 after 2000. In bfloat16 a step is often smaller than a weight's
    last bit, rounding decides, and a tenth is left: train float32 weights under autocast.

    A bias has no inputs: W x + b stays only where b does, so give it None. For LoRA see
    `llmtune.forgetting.protected_parameters`.

    Args:
        optimizer: any torch optimizer that has been made.
        bases: {parameter: basis}; a basis is [in, k] with orthonormal columns for a weight [out, in], `Directions` for
            a weight that has its inputs elsewhere, or None to hold the parameter as it is. Parameters that are left out
            train freely. Bases are kept in at least float32, and not copied where they are that.
        gradients: whether to project gradients too, in place; those that a closure makes within the step are not.

    Raises:
        ValueError: there are no parameters, or one is not the optimizer's or projected already; a basis is empty, of
            another size, not finite, or its columns are not orthonormal.
        TypeError: `optimizer` is no torch optimizer, a parameter is no tensor of floats or spread over processes, or a
            basis is no tensor of floats.

    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        >>> old = torch.tensor([[0.0], [0.6], [0.8]])
        >>> projection = UpdateProjection(optimizer, {layer.weight: old})
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(5, 3)).square().sum().backward()
        >>> projection.step()  # or optimizer.step()
        >>> bool(((layer.weight - before) @ old).abs().max() < 1e-6), bool((layer.weight != before).any())
        (True, True)

    The subspaces: Farajtabar et al. 2020, "Orthogonal gradient descent for continual learning"; Saha et al. 2021,
    "Gradient projection memory for continual learning", equation 6.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, bases: Mapping[nn.Parameter, Tensor | Directions | None], *,
        gradients: bool = True,
    ) -> None:  # fmt: skip
        if not isinstance(bases, Mapping):
            raise TypeError(f"bases must be a dict {{parameter: basis}}; got a {type(bases).__name__}")
        self._directions: dict[Tensor, Directions | None] = {}
        for parameter, given in bases.items():
            if given is None or not isinstance(parameter, Tensor):
                self._directions[parameter] = None
                continue
            directions = given if isinstance(given, Directions) else Directions(given)
            check_basis(directions.basis, parameter.shape, dim=directions.dim)
            self._directions[parameter] = Directions(wide(directions.basis.detach()), directions.dim)
        super().__init__(optimizer, list(bases))
        self.gradients = gradients

    def prepare(self) -> None:
        """Project the gradients, where that is wanted; see `ChangedUpdate.prepare`."""
        for parameter in self.parameters if self.gradients else ():
            directions = self._placed(parameter)
            if parameter.grad is not None and directions is not None:
                parameter.grad.copy_(project_change(parameter.grad, directions.basis, dim=directions.dim))

    def after(self, before: dict[Tensor, Tensor]) -> None:
        """Take the part in the subspace out of each parameter's change; see `ChangedUpdate.after`.

        Args:
            before: what each parameter was, of its shape.
        """
        for parameter in self.parameters:
            old, directions = before.pop(parameter), self._placed(parameter)
            if directions is None:
                parameter.copy_(old)
                continue
            change = wide(parameter) - old
            parameter.copy_(project_change(change, directions.basis, dim=directions.dim).add_(old))

    def _placed(self, parameter: Tensor) -> Directions | None:
        """Return a parameter's directions on its device."""
        directions = self._directions[parameter]
        if directions is not None and directions.basis.device != parameter.device:
            directions = Directions(directions.basis.to(parameter.device), directions.dim)
            self._directions[parameter] = directions
        return directions


def check_basis(basis: Any, shape: torch.Size, *, dim: int = -1, what: str = "a basis") -> None:
    """Raise where a basis does not fit a parameter's dimension, or is none.

    Args:
        basis: what should be [n, k], orthonormal columns.
        shape: the parameter's.
        dim: the dimension of it with n entries.
        what: what the sentences call it.

    Raises:
        TypeError: it is no tensor of floats.
        ValueError: it is empty, of another size, not finite, or its columns are not orthonormal.
    """
    if not isinstance(basis, Tensor) or not basis.is_floating_point():
        raise TypeError(f"{what} must be a tensor of floats [in, k]; got {basis!r:.60}")
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"{what} is along dimension {dim}, and the parameter is {[*shape]}")
    n, came = shape[dim], [*basis.shape]
    if basis.ndim != 2 or basis.shape[0] != n:
        raise ValueError(
            f"{what} for dimension {dim} of a parameter {[*shape]} must be [{n}, k]; got {came}: is it of another "
            "layer, or is the weight [in, out] (then give Directions(basis, dim=0))?"
        )
    if not 1 <= basis.shape[1] <= n:
        raise ValueError(
            f"{what} must have 1 to {n} columns; got {came}. Leave the parameter out where nothing is to be protected"
        )
    if not bool(basis.isfinite().all()):
        raise ValueError(f"{what} {came} is not finite: it holds NaN or infinity")
    exact = wide(basis.detach())
    with full_float32(exact.device):
        off = float((exact.T @ exact - torch.eye(exact.shape[1]).to(exact)).abs().max())
    if off > OFF:
        raise ValueError(
            f"the columns of {what} {came} must be orthonormal, and basis.T @ basis is off the identity by {off:.2g}: "
            "give torch.linalg.qr(basis).Q, in float32"
        )
