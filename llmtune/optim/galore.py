"""GaLore: AdamW on gradients that are projected to a low rank, which keeps its moments small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def gradient_basis(gradient: Tensor, rank: int) -> Tensor:
    """Return the leading singular vectors of a gradient on its shorter side.

    Args:
        gradient: [rows, columns], finite.
        rank: r, at least 1 and at most the shorter side.

    Returns:
        P, [shorter, r], orthonormal columns: left singular vectors where rows <= columns, else right ones. In at least
        float32, in which the decomposition is made.

    Example:
        >>> gradient_basis(torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]]), 1).abs()
        tensor([[0.],
                [1.]])
    """
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return torch.linalg.svd(_lying(wide), full_matrices=False)[0][:, :rank].contiguous()


def rotate_moments(first: Tensor, second: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return Adam's moments of projected gradients, taken from one basis to another: C M and (C * C) V, C = P'^T P.

    The first is exact for what both bases span. The second is the mean of squares where the entries of a projected
    gradient's column do not go together, exact where P' is P with other signs or in another order.

    Args:
        first: M, [r, longer].
        second: V, [r, longer], at least 0.
        old: P, [shorter, r].
        new: P', [shorter, r].

    Returns:
        (M', V'), each [r, longer].
    """
    turn = new.T @ old
    return turn @ first, turn.square() @ second


class GaLore(torch.optim.Optimizer):
    """AdamW whose matrices' moments are those of low-rank gradients.

    Every `update_every` steps P = the r leading singular vectors of the gradient G on its shorter side, and each step

    R = P^T G,  M = b1 M + (1 - b1) R,  V = b2 V + (1 - b2) R^2
    W = (1 - lr * weight_decay) W - lr * scale * P (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)

    with G and W transposed where W has more rows than columns. A matrix whose shorter side is at most r, and whatever
    is no matrix, is updated by AdamW as it is, without the scale: there is nothing to save.

    All of it is in at least float32, with one rounding to the weight's dtype at the end. The state is tensors alone,
    and comes back bit for bit: "step", "exp_avg", "exp_avg_sq" and, for what is projected, "basis".

    Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (2024), algorithm 2. Their
    code keeps the moments as they are when P changes, so that a row of M goes on as if it were of another direction,
    and even of the same one with the other sign, which a decomposition chooses freely; here they go along (see
    `rotate_moments`), as in Robert et al., "LDAdam" (2024); `rotate=False` keeps them. Their P and moments have the
    gradient's dtype, and a Python object is in the state, which torch's loading of weights only refuses.

    Args:
        params: parameters, or groups of them, as for any torch optimizer. A group may have its own "rank" (None for
            plain AdamW, as for embeddings), "update_every", "scale" and so on.
        lr: the learning rate, at least 0.
        rank: r, at least 1, or None.
        update_every: steps between two bases, at least 1.
        scale: alpha of the paper, above 0.
        betas: b1 and b2, at least 0 and below 1.
        eps: at least 0.
        weight_decay: decoupled, at least 0.
        rotate: whether moments go along when P changes.

    Raises:
        TypeError: a parameter is spread over processes, or complex.
        ValueError: a number is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(5, 7))
        >>> optimizer = GaLore([weight], lr=0.1, rank=2)
        >>> weight.grad = torch.outer(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), torch.ones(7))
        >>> optimizer.step()
        >>> round(weight[1, 0].item(), 6), optimizer.state[weight]["exp_avg"].shape
        (-0.025, torch.Size([2, 7]))
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int | None,
        update_every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rotate: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "rank": rank, "update_every": update_every, "scale": scale, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "rotate": rotate,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do, or refuse it before anything is added.

        Raises:
            TypeError: a parameter is spread over processes, or complex.
            ValueError: a number is out of its range.
        """
        _check({**self.defaults, **param_group})
        given = param_group["params"]
        param_group = {**param_group, "params": [given] if isinstance(given, Tensor) else list(given)}
        for entry in param_group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if hasattr(parameter, "device_mesh"):
                raise TypeError(
                    "GaLore needs whole gradients, and a parameter is spread over processes: train data-parallel, "
                    "without sharding, or with another optimizer"
                )
            if isinstance(parameter, Tensor) and parameter.is_complex():
                raise TypeError(f"GaLore trains real numbers; a parameter is {parameter.dtype}: train it by AdamW")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and return the closure's loss, None without one.

        Args:
            closure: computes the loss, a scalar, and its gradients.

        Raises:
            ValueError: a gradient of which a basis is to be taken is not finite; no weight has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, group in pairs:
            if self._is_due(parameter, group) and not bool(parameter.grad.isfinite().all()):
                raise ValueError("a gradient is not finite, so it has no basis: look at the loss before the step")
        for parameter, group in pairs:
            self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, in its own dtype: torch would round moments to the parameters'."""
        super().load_state_dict(dict(state_dict))
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                device = value.device if name == "step" else parameter.device
                self.state[parameter][name] = value.to(device, copy=True)

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state, rank = self.state[parameter], group["rank"]
        gradient: Any = parameter.grad
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        projected = _is_projected(parameter, rank)
        if projected:
            gradient = _lying(gradient)
            if self._is_due(parameter, group) and not self._refresh(state, gradient, group):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                return
            gradient = state["basis"].T @ gradient
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        step = state["step"] = state.get("step", torch.tensor(0)) + 1
        first, second = state["exp_avg"], state["exp_avg_sq"]
        b1, b2 = group["betas"]
        first.lerp_(gradient, 1 - b1)
        second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        change = (first / (1 - b1 ** int(step))) / ((second / (1 - b2 ** int(step))).sqrt() + group["eps"])
        if projected:
            change = state["basis"] @ change * group["scale"]
            change = change.T if parameter.shape[0] > parameter.shape[1] else change
        decayed = parameter.to(change.dtype) * (1 - group["lr"] * group["weight_decay"])
        parameter.copy_(decayed - group["lr"] * change)

    def _is_due(self, parameter: Tensor, group: Mapping[str, Any]) -> bool:
        """Return whether a basis is to be taken of a gradient: it is time, or there is none."""
        state = self.state[parameter]
        overdue = "basis" not in state or int(state["step"]) % group["update_every"] == 0
        return overdue and _is_projected(parameter, group["rank"])

    def _refresh(self, state: dict[str, Any], gradient: Tensor, group: Mapping[str, Any]) -> bool:
        """Take a new basis and return whether there is one. Zeros have none to offer."""
        old = state.get("basis")
        if not bool(gradient.any()):
            return old is not None
        state["basis"] = gradient_basis(gradient, group["rank"])
        if old is not None and group["rotate"]:
            first, second = state["exp_avg"], state["exp_avg_sq"]
            state["exp_avg"], state["exp_avg_sq"] = rotate_moments(first, second, old, state["basis"])
        return True


def _is_projected(parameter: Tensor, rank: int | None) -> bool:
    return rank is not None and parameter.ndim == 2 and min(parameter.shape) > rank


def _lying(matrix: Tensor) -> Tensor:
    """Return the matrix with its shorter side first."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _check(group: Mapping[str, Any]) -> None:
    for name, least in (("rank", 1), ("update_every", 1)):
        value = group[name]
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not (name == "rank" and value is None):
            more = ", or None for plain AdamW" if name == "rank" else ""
            raise ValueError(f"{name} must be a whole number of at least {least}{more}; got {value!r}")
    for name in ("lr", "eps", "weight_decay", "scale"):
        value = group[name]
        if not isinstance(value, int | float) or not 0 <= value < float("inf") or (name == "scale" and value == 0):
            raise ValueError(
                f"{name} must be a number {'above' if name == 'scale' else 'of at least'} 0; got {value!r}"
            )
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers, at least 0 and below 1; got {group['betas']!r}")
