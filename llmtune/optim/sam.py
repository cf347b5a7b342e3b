"""Sharpness-aware minimization: the gradient is taken where the loss nearby is highest, and applied where one is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.errors import NonFiniteError
from llmtune.modules import check_module
from llmtune.optim.draws import random_states, set_random_states

ETA = 0.01  # what T is at a weight of 0


@contextmanager
def perturbed(model: nn.Module, rho: float, *, adaptive: bool = False, eta: float = ETA) -> Iterator[float]:
    """Move the weights uphill by rho along the present gradient for the length of a block.

    SAM:   w + rho * g / ||g||
    ASAM:  w + rho * T^2 g / ||T g||,  T = |w| + eta, entry by entry

    g is the `.grad` of all trainable parameters together, so the norm is one, over all of them. On leaving the block,
    also by an exception, every weight is what it was, bit for bit: copies are kept, which is one copy of what is
    trained. `.grad` stays as it is: whoever runs the second pass drops it first and finds the new gradient there.
    Where the gradient is zero or not finite it has no direction, and nothing moves.

    The move depends on the direction of g alone, so a gradient scaled by a `GradScaler` gives the same one. It must be
    the gradient of a whole step: inside a loop, of all micro-batches and processes. Under LoRA it is A and B that move,
    within a ball around (A, B); that is another neighbourhood than one around the weights W + s B A, and at the start,
    where B = 0, A has no gradient and B alone moves.

    Where we differ: the authors' and most later programs subtract the move again, which returns to within rounding, or
    leave parameters moved that have no gradient in the second pass. The authors of ASAM have T = 1 for whatever has no
    "weight" in its name, here T is that of the formula for all, as LoRA's A and B have none; `davda54/sam` leaves eta
    out. In bfloat16 most entries of the move are below half a step of the format and get lost: train float32 weights
    under autocast. Running statistics, such as BatchNorm's, are updated by both passes.

    Args:
        model: any module, with `.grad` where a backward pass left them.
        rho: how far to move, above 0; 0.05 is common, for ASAM ten times that.
        adaptive: whether to move large weights further than small ones (ASAM).
        eta: what T is at a weight of 0, at least 0; for ASAM alone.

    Yields:
        The norm ||g||, for ASAM ||T g||; nothing has moved where it is 0 or not finite.

    Raises:
        ValueError: rho or eta is out of its range, or eta without effect; or no trainable parameter has a gradient.
        TypeError: `model` is no module.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> model(torch.tensor([[3.0, 4.0]])).backward()
        >>> with perturbed(model, rho=0.5) as norm:
        ...     print(norm, model.weight.data)
        5.0 tensor([[1.3000, 1.4000]])
        >>> model.weight.data
        tensor([[1., 1.]])

    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization" (2021), equation 2. Kwon et
    al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks" (2021),
    algorithm 1.
    """
    check_module(model)
    check_rho(rho, eta, adaptive=adaptive)
    with _moved([p for p in model.parameters() if p.requires_grad], rho, adaptive=adaptive, eta=eta) as norm:
        yield norm


class SAM:
    """Sharpness-aware steps of any torch optimizer in a plain loop: its own step, with the gradient from uphill.

    `step(closure)` calls the closure at w and at w + rho * g / ||g||, each time with gradients dropped and with the
    same random state, so that both passes draw the same dropout masks; then it lets the optimizer step from w. See
    `perturbed` for the move. The closure may accumulate over micro-batches: it is the gradient it leaves that counts.

    The optimizer stays the one that was given: schedules, `GradScaler` and checkpoints take `sam.optimizer`.
    `state_dict` is the optimizer's; there is nothing to save beside it.

    Where we differ: `davda54/sam` keeps a copy of every weight ("old_p") in its state and so in every checkpoint, while
    the moments of the optimizer inside are in none; puts weights back by exchanging `.data`; and draws other dropout
    masks in the second pass. With a `GradScaler` it has no way to unscale twice a step.

    Args:
        optimizer: any torch optimizer.
        rho: how far to move, above 0.
        adaptive: ASAM in place of SAM.
        eta: what ASAM's T is at a weight of 0, at least 0; for ASAM alone.
        before_step: called once a step when the gradient from uphill is there, unscaled, and before it is applied: the
            place for gradient clipping. (Of the first gradient only the direction counts, which clipping keeps.)

    Raises:
        TypeError: `optimizer` is no torch optimizer.
        ValueError: rho or eta is out of its range, or eta without effect.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> inner = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer = SAM(inner, rho=0.05, before_step=clip)
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.optimizer, 0.9)
        >>> x, y = torch.randn(7, 2), torch.randn(7, 1)
        >>> def closure():
        ...     loss = (model(x) - y).square().mean()
        ...     loss.backward()
        ...     return loss.detach()
        >>> losses = [float(optimizer.step(closure)) for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = ETA,
        before_step: Callable[[], Any] | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"SAM takes a torch optimizer that has been made; got {optimizer!r}")
        check_rho(rho, eta, adaptive=adaptive)
        self.optimizer, self.rho, self.adaptive, self.eta = optimizer, rho, adaptive, eta
        self.before_step = before_step

    def step(self, closure: Callable[[], Any], *, scaler: torch.amp.GradScaler | None = None) -> Any:
        """Take one step and return what the closure gave at w, its loss.

        Args:
            closure: computes the loss, runs backward, and returns the loss; called twice. Zeroing the gradients in it
                does no harm.
            scaler: the `GradScaler` whose `scale` the closure calls before `backward`; `scaler.update()` stays to be
                called after the step. A step that overflows is passed over, as without SAM.

        Raises:
            NonFiniteError: the gradient at w or uphill is not finite, and there is no scaler; no weight has changed.
            ValueError: the closure leaves no gradient on a parameter of the optimizer.
            TypeError: there is no closure.
        """
        if not callable(closure):
            raise TypeError(
                "SAM needs the gradient twice a step: call step(closure) with a function that computes the loss, runs "
                f"backward and returns the loss; got {closure!r}"
            )
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        before = random_states(parameters)
        loss = self._fresh(closure)
        with _moved(parameters, self.rho, adaptive=self.adaptive, eta=self.eta) as norm:
            if scaler is None and not math.isfinite(norm):
                raise NonFiniteError(f"the norm of the gradient is {norm}; no weight has been changed by this step")
            set_random_states(before)
            self._fresh(closure)
            if scaler is None and not math.isfinite(norm := _norm(_with_gradients(parameters), None)):
                raise NonFiniteError(
                    f"the norm of the gradient uphill is {norm}; no weight has been changed by this step"
                )
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.before_step is not None:
            self.before_step()
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        return loss

    @torch.enable_grad()
    def _fresh(self, closure: Callable[[], Any]) -> Any:
        self.optimizer.zero_grad()
        return closure()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The optimizer's state by parameter."""
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the optimizer a further group."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state; SAM has none of its own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the optimizer its state back."""
        self.optimizer.load_state_dict(state_dict)


def check_rho(rho: float, eta: float, *, adaptive: bool) -> None:
    """Raise ValueError where rho is no finite number above 0, or eta none of at least 0 or without effect."""
    for name, value, fits, wanted in (
        ("rho", rho, lambda number: number > 0, "above 0"), ("eta", eta, lambda number: number >= 0, "of at least 0")
    ):  # fmt: skip
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not fits(value) or math.isinf(value):
            raise ValueError(f"{name} must be a number {wanted}; got {value!r}")
    if eta != ETA and not adaptive:
        raise ValueError(f"eta={eta} has no effect without adaptive=True: it is ASAM's")


@contextmanager
def _moved(parameters: Sequence[Tensor], rho: float, *, adaptive: bool, eta: float) -> Iterator[float]:
    """See `perturbed`; parameters of any shape."""
    pairs = _with_gradients(parameters)
    if not pairs:
        raise ValueError("no trainable parameter has a gradient to move along: run the backward pass first")
    with torch.no_grad():
        norm = _norm(pairs, eta if adaptive else None)
        kept = [p.detach().clone() for p, _ in pairs]
    try:
        if 0 < norm < math.inf:
            with torch.no_grad():
                for p, g in pairs:
                    _move(_local(p), _local(g), rho / norm, eta if adaptive else None)
        yield norm
    finally:
        with torch.no_grad():
            for (p, _), value in zip(pairs, kept, strict=True):
                p.copy_(value)


def _with_gradients(parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters, of any shape, that have a gradient, each with it."""
    return [(p, p.grad) for p in parameters if p.grad is not None]


def _norm(pairs: Sequence[tuple[Tensor, Tensor]], eta: float | None) -> float:
    """Return ||g||, or ||T g|| where there is an eta; of tensors spread over processes that of the whole."""
    if not pairs:
        return 0.0
    norms = []
    for p, g in pairs:
        wide = torch.promote_types(g.dtype, torch.float32)
        stretched = g if eta is None else (p.to(wide).abs() + eta) * g
        norm: Any = torch.linalg.vector_norm(stretched, dtype=wide)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])))


def _move(p: Tensor, g: Tensor, size: float, eta: float | None) -> None:
    """Add size * g, or size * T^2 g, in float32 at least and with one rounding."""
    wide = torch.promote_types(p.dtype, torch.float32)
    move = g.to(wide) * size
    if eta is not None:
        move *= (p.to(wide).abs() + eta).square()
    p.copy_(move.add_(p))


def _local(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor: of one that is spread over processes its shard."""
    return tensor.to_local() if hasattr(tensor, "full_tensor") else tensor
