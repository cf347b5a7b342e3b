"""MeZO: descent by two forward passes a step, without gradients and without memory beside the weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmtune.errors import NonFiniteError
from llmtune.optim.draws import random_states, set_random_states


def move_along(parameters: Iterable[Tensor], size: float, *, seed: int, step: int) -> None:
    """Add size * z to the parameters, in place; z is Gaussian, and a function of seed and step alone.

    z is drawn anew each time, parameter by parameter in their order, from a generator of its own for each device: so
    nothing is held but z of one parameter, and the global random state is not touched. It is drawn in float32 at least,
    and the sum is rounded once to the parameter's dtype.

    Args:
        parameters: of any shape and floating dtype, always the same in the same order.
        size: how far; -size goes back, to within rounding.
        seed: of a run.
        step: of a step in the run.

    Example:
        >>> weight = torch.zeros(3)
        >>> move_along([weight], 1e-3, seed=0, step=5)
        >>> move_along([weight], -1e-3, seed=0, step=5)
        >>> torch.allclose(weight, torch.zeros(3), atol=1e-9)
        True
    """
    for parameter, z in _directions(parameters, seed, step):
        _add(parameter, z, size)


class MeZO(torch.optim.Optimizer):
    """Memory-efficient zeroth-order descent: the slope along one random direction, from two losses.

    slope = (L(w + epsilon z) - L(w - epsilon z)) / (2 epsilon),   w <- w - rate (slope z + weight_decay w)

    In the mean over z, slope * z is the gradient. z comes out of (seed, step), see `move_along`, and is never held. The
    two losses are computed with the same random state, so dropout draws the same masks twice; the authors run without
    dropout, in eval mode, and so may the closure. There are no gradients to scale: a `GradScaler` has no place here.

    It is a torch optimizer, for schedules, for the groups of `parameter_groups`, and for checkpoints: the count of
    steps and the seed stand in its first group. `update` takes a step of a known slope without any loss, so the slopes
    and rates of a run are all it takes to make its weights again out of the first ones.

    Of several processes each must have the same seed, and the closure the same loss in all of them: their mean.

    Where we differ: the authors' program writes `param.data = param.data + ...`, which allocates every weight anew four
    times a step; seeds torch's global random state anew for each z, and with it all that is drawn later; and allows for
    no accumulation. Here weights are changed in place, the random state goes on as after one pass, and the closure may
    add up as many batches as it likes.

    Args:
        parameters: tensors, or groups with "params", "lr" and "weight_decay"; what requires a gradient is trained.
        learning_rate: of groups without one of their own, at least 0; for large models very small, 1e-6 in the paper.
        epsilon: how far to look, above 0.
        seed: of the directions, a whole number.
        exact: whether to keep a copy of the weights, so that they come back bit for bit from where the losses are
            taken. Without, they come back to within rounding, and in bfloat16 drift.
        weight_decay: decoupled, at least 0; of groups without one of their own.

    Raises:
        ValueError: a number is out of its range; no parameter requires a gradient; one is spread over processes.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = MeZO([weight], learning_rate=0.05)
        >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(200)]
        >>> losses[-1] < 1e-3 * losses[0]
        True

    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2023), algorithm 1.
    """

    def __init__(
        self,
        parameters: Any,
        learning_rate: float,
        epsilon: float = 1e-3,
        seed: int = 0,
        exact: bool = False,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            _check_rate(name, value)
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be a number above 0; got {epsilon!r}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed must be a whole number; got {seed!r}")
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})
        trained = list(self._trained())
        if not trained:
            raise ValueError("MeZO trains what requires a gradient, though it takes none, and no parameter given does")
        if any(hasattr(parameter, "full_tensor") for parameter in trained):
            raise ValueError(
                "MeZO moves whole parameters, and here are some that are spread over processes: train data-parallel, "
                "without sharding"
            )
        self.epsilon, self.exact, self.slope = epsilon, exact, math.nan
        self.param_groups[0].update(seed=seed, steps=0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do, or refuse it before anything is added.

        Raises:
            ValueError: its "lr" or "weight_decay" is out of its range.
        """
        for name in ("lr", "weight_decay"):
            _check_rate(name, param_group.get(name, 0.0))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> float:  # type: ignore[override]
        """Take one step and return the mean of the two losses; their slope is then in `slope`.

        Args:
            closure: returns the loss at the present weights, a number or a scalar; called twice, without gradients.

        Raises:
            NonFiniteError: a loss is not finite; the weights are back where they were, as `exact` says.
            TypeError: there is no closure.
        """
        if not callable(closure):
            raise TypeError(
                f"MeZO needs two losses a step: call step(closure), a function that returns the loss; got {closure!r}"
            )
        parameters = list(self._trained())
        kept = [parameter.clone() for parameter in parameters] if self.exact else []
        before = random_states(parameters)
        away = 0.0
        try:
            losses = []
            for place in (self.epsilon, -self.epsilon):
                if kept:
                    torch._foreach_copy_(parameters, kept)
                self._move(place if kept else place - away)
                away = place
                set_random_states(before)
                losses.append(float(closure()))
        finally:
            if kept:
                torch._foreach_copy_(parameters, kept)
            else:
                self._move(-away)
        above, below = losses
        slope = (above - below) / (2 * self.epsilon)
        if not math.isfinite(slope):
            raise NonFiniteError(
                f"the losses on both sides are {above} and {below}; the weights are back where they were"
            )
        self.update(slope)
        return (above + below) / 2

    @torch.no_grad()
    def update(self, slope: float) -> None:
        """Go down the direction of this step, whose slope is known, and count the step.

        So a run is made again from its slopes: from the same first weights, seed and rates, with `exact` bit for bit.

        Args:
            slope: what `slope` was after the step.
        """
        decay = {id(p): group for group in self.param_groups for p in group["params"]}
        for parameter, z in _directions(self._trained(), self.seed, self.steps):
            group = decay[id(parameter)]
            _add(parameter, z, -group["lr"] * slope, keep=1 - group["lr"] * group["weight_decay"])
        self.slope = slope
        self.param_groups[0]["steps"] += 1

    @property
    def seed(self) -> int:
        """The seed of all directions."""
        return int(self.param_groups[0]["seed"])

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return int(self.param_groups[0]["steps"])

    def _trained(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"] if p.requires_grad)

    def _move(self, size: float) -> None:
        move_along(self._trained(), size, seed=self.seed, step=self.steps)


def _check_rate(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least 0; got {value!r}")


def _directions(parameters: Iterable[Tensor], seed: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter with its z, of the same shape and at least float32."""
    digest = hashlib.sha256(f"mezo/{seed}/{step}".encode()).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in parameters:
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(number)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        generator = generators[parameter.device]
        yield parameter, torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=wide)


def _add(parameter: Tensor, z: Tensor, size: float, *, keep: float = 1.0) -> None:
    """Set parameter to keep * parameter + size * z, rounded once to its dtype; z is used up."""
    with torch.no_grad():
        if keep == 1 and z.dtype == parameter.dtype:
            parameter.add_(z, alpha=size)
        else:
            parameter.copy_(z.mul_(size).add_(parameter, alpha=keep))
