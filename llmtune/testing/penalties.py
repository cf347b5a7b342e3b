"""The laws of a penalty: a term of the loss that depends on the model alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.errors import LawBroken
from llmtune.testing.close import assert_close
from llmtune.testing.small import SmallModel, moved, trainable
from llmtune.types import Penalty

MakePenalty = Callable[[nn.Module], Penalty]
ClosedForm = Callable[[nn.Module, nn.Module], Tensor | float]
STEP = 1e-5


def check_penalty(make: MakePenalty, *, model: nn.Module | None = None, closed_form: ClosedForm | None = None) -> None:
    """Check the laws of a penalty.

    - no trace: calling it changes no weight, flag, mode, gradient or random state;
    - same twice: two calls give the same bits;
    - zero at the anchor: on the model it was made for it is 0, a scalar, with gradient 0;
    - numeric gradient: moved away, its gradient is the slope of its value, in float64;
    - closed form: moved away, it has the value of the plain formula, where one is offered;
    - anchors are copies: training the model on, in place, does not move what it is held to;
    - state round-trips: where it has a state, another one made in the same way takes it and gives the same value, and
      shares no memory with it.

    Args:
        make: `make(model) -> penalty`, a penalty anchored at the model as it is then; the same for the same model.
        model: what to make it for, in float64, with at least one parameter that requires a gradient; left out, a
            small network with tied weights and a frozen parameter. It is copied, never changed.
        closed_form: `closed_form(moved, anchor) -> value`, the plain formula, given the model moved away and the model
            as it was when the penalty was made.

    Raises:
        LawBroken: names the law and by how much it is broken.

    Example:
        >>> def make(model):
        ...     start = {name: p.detach().clone() for name, p in model.named_parameters()}
        ...     return lambda m: sum((p - start[name]).square().sum() for name, p in m.named_parameters())
        >>> check_penalty(make)
    """
    model = SmallModel() if model is None else model
    penalty_leaves_no_trace(make, model)
    penalty_is_the_same_twice(make, model)
    penalty_is_zero_at_the_anchor(make, model)
    penalty_has_its_gradient(make, model)
    if closed_form is not None:
        penalty_equals_the_closed_form(make, model, closed_form)
    penalty_keeps_copies(make, model)
    penalty_state_round_trips(make, model)


def penalty_is_zero_at_the_anchor(make: MakePenalty, model: nn.Module) -> None:
    """Check that a penalty is a scalar 0, with gradient 0, on the model it was made for.

    Args:
        make: makes the penalty.
        model: float64; it is copied.

    Raises:
        LawBroken: it is not.
    """
    model = copy.deepcopy(model)
    value, gradients = _value_and_gradients(make(model), model)
    if float(value) != 0.0:
        raise LawBroken(f"zero at the anchor: the penalty is {float(value):.3g} on the model it was made for")
    for name, gradient in gradients.items():
        if bool((gradient != 0).any()):
            raise LawBroken(
                f"zero at the anchor: the gradient of {name} is up to {float(gradient.abs().max()):.3g} there"
            )


def penalty_has_its_gradient(make: MakePenalty, model: nn.Module, *, directions: int = 3) -> None:
    """Check that, on a moved model, the gradient is the slope of the value, for each parameter in some directions.

    Args:
        make: makes the penalty.
        model: float64; it is copied.
        directions: how many random directions to try in each parameter.

    Raises:
        LawBroken: it is not, or the penalty does not react to any parameter.
    """
    model = copy.deepcopy(model)
    penalty = make(model)
    _, gradients = _value_and_gradients(penalty, moved(model))
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    if largest == 0.0:
        raise LawBroken("numeric gradient: on a moved model the gradient is 0 everywhere: the penalty holds nothing")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(model).items():
        for _ in range(directions):
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            expected = _slope(penalty, model, parameter, direction)
            got = float((gradients[name].double() * direction).sum())
            allowed = 1e-6 * max(abs(expected), largest)
            if not abs(got - expected) <= allowed:
                raise LawBroken(
                    f"numeric gradient: along {name} the slope is {expected:.9g}, the gradient says {got:.9g}"
                )


def penalty_equals_the_closed_form(make: MakePenalty, model: nn.Module, closed_form: ClosedForm) -> None:
    """Check that, on a moved model, the value is that of the plain formula, to 1e-6 of it.

    Args:
        make: makes the penalty.
        model: float64; it is copied.
        closed_form: `closed_form(moved, anchor) -> value`.

    Raises:
        LawBroken: it is not.
    """
    anchor, model = copy.deepcopy(model), copy.deepcopy(model)
    penalty = make(model)
    expected = torch.as_tensor(closed_form(moved(model), anchor), dtype=torch.float64).detach()
    assert_close(
        penalty(model).detach().double(), expected, rtol=1e-6, what="closed form: the penalty of a moved model"
    )


def penalty_keeps_copies(make: MakePenalty, model: nn.Module) -> None:
    """Check that a model trained on, in place, has the penalty of one that was made for another copy of the model.

    Args:
        make: makes the penalty.
        model: float64; it is copied.

    Raises:
        LawBroken: the penalty's own anchor has moved with the model.
    """
    model = copy.deepcopy(model)
    apart = make(copy.deepcopy(model))  # nothing that happens to `model` can reach this one's anchor
    penalty = make(model)
    moved(model)
    expected = float(apart(model).detach())
    got = float(penalty(model).detach())
    if not abs(got - expected) <= 1e-9 * abs(expected):
        raise LawBroken(
            f"anchors are copies: after the model has moved in place the penalty is {got:.9g}; one whose anchor cannot "
            f"have moved gives {expected:.9g}"
        )


def penalty_leaves_no_trace(make: MakePenalty, model: nn.Module) -> None:
    """Check that calling a penalty changes nothing of the model: weights, flags, modes, gradients, random state.

    Args:
        make: makes the penalty.
        model: float64; it is copied.

    Raises:
        LawBroken: something has changed; says what.
    """
    model = copy.deepcopy(model)
    penalty = make(model)
    moved(model)
    for training in (True, False):
        model.train(training)
        for index, parameter in enumerate(trainable(model).values()):
            parameter.grad = None if index == 0 else torch.full_like(parameter, 0.5)
        before = _everything(model)
        penalty(model)
        after = _everything(model)
        for name in (*before, *after):
            if name not in after or name not in before or not _same(before[name], after[name]):
                raise LawBroken(f"no trace: calling the penalty changes the model's {name}")


def penalty_is_the_same_twice(make: MakePenalty, model: nn.Module) -> None:
    """Check that two calls on one model give the same bits, value and gradient.

    Args:
        make: makes the penalty.
        model: float64; it is copied.

    Raises:
        LawBroken: they differ.
    """
    model = copy.deepcopy(model)
    penalty = make(model)
    moved(model)
    value, gradients = _value_and_gradients(penalty, model)
    again, gradients_again = _value_and_gradients(penalty, model)
    if float(value) != float(again):
        raise LawBroken(f"same twice: the first call gives {float(value):.17g}, the second {float(again):.17g}")
    for name, gradient in gradients.items():
        if not torch.equal(gradient, gradients_again[name]):
            raise LawBroken(f"same twice: the gradient of {name} differs from call to call")


def penalty_state_round_trips(make: MakePenalty, model: nn.Module) -> None:
    """Check that a penalty's state is tensors and JSON values, and makes another one, made in the same way, equal to
    it.

    Args:
        make: makes the penalty; without `state_dict` and `load_state_dict` there is nothing to check.
        model: float64; it is copied.

    Raises:
        LawBroken: the state holds something else, is not taken, or still belongs to one of the two.
    """
    model, pristine = copy.deepcopy(model), copy.deepcopy(model)
    penalty, other = make(model), make(pristine)
    if not (hasattr(penalty, "state_dict") and hasattr(other, "load_state_dict")):
        return
    moved(model)
    expected = penalty(model).detach()  # used once, so that what it remembers of its use is in the state
    state = penalty.state_dict()
    saved = _stored(state, "state")
    other.load_state_dict(saved)
    assert_close(other(model).detach(), penalty(model).detach(), rtol=1e-12, what="state round-trips: the penalty")
    for tensor in [*_tensors(state), *_tensors(saved)]:
        tensor.detach().fill_(7)
    assert_close(
        penalty(model).detach(),
        expected,
        rtol=1e-12,
        what="state round-trips: after the state is written to, the penalty",
    )
    assert_close(
        other(model).detach(), expected, rtol=1e-12, what="state round-trips: after the state is written to, the other"
    )


def _value_and_gradients(penalty: Penalty, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    value = penalty(model)
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise LawBroken(
            f"a penalty returns a scalar tensor; got {[*value.shape] if isinstance(value, Tensor) else value!r}"
        )
    named = trainable(model)
    if not value.requires_grad:
        raise LawBroken("the penalty carries no gradient to any parameter")
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return value.detach(), {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }


def _slope(penalty: Penalty, model: nn.Module, parameter: nn.Parameter, direction: Tensor) -> float:
    start = parameter.detach().clone()
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            parameter.copy_(start + sign * STEP * direction)
        values.append(float(penalty(model).detach()))
    with torch.no_grad():
        parameter.copy_(start)
    return (values[0] - values[1]) / (2 * STEP)


def _everything(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"random state": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        found[f"weight {name}"] = parameter.detach().clone()
        found[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"requires_grad flag of {name}"] = parameter.requires_grad
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = buffer.clone()
    return found | {f"mode of {name or 'the root'}": module.training for name, module in model.named_modules()}


def _same(value: Any, other: Any) -> bool:
    return torch.equal(value, other) if isinstance(value, Tensor) and isinstance(other, Tensor) else value is other


def _stored(value: Any, path: str) -> Any:
    """Return a state as it comes back from a file: tensors copied, everything else through JSON."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise LawBroken(f"state round-trips: keys must be strings; {path} has {wrong[0]!r}")
        return {key: _stored(entry, f"{path}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_stored(entry, f"{path}.{index}") for index, entry in enumerate(value)]
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise LawBroken(f"state round-trips: {path} is a {type(value).__name__}, neither a tensor nor JSON") from None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for entry in entries for tensor in _tensors(entry)]
