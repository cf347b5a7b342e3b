"""What EWC and its kin share: parameters held near an anchor, each as strongly as its importance says."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import Anchor, anchored_quadratic, check_dtype, check_strength
from llmtune.adapters.autocast import no_autocast
from llmtune.adapters.effective import Choice, choose_parameters, effective_parameters
from llmtune.errors import CheckpointError, check_state, did_you_mean
from llmtune.modules import unwrap
from llmtune.types import Callback


def importance_penalty(
    model: nn.Module, importance: MutableMapping[str, Tensor], anchors: Mapping[str, Anchor], *, kind: str, source: str
) -> Tensor:
    """Return 1/2 sum importance * (theta - anchor)^2 over effective parameters, a scalar in at least float32.

    Args:
        model: with or without adapters and wrappers.
        importance: {bare name: tensor of the parameter's shape}; where the anchor names no device of its own, the
            tensors move to the parameters' devices and stay there.
        anchors: one for each of these names.
        kind: the penalty's name, for messages.
        source: what names the parameters, for messages.

    Raises:
        ValueError: the model lacks one of the parameters or has it in another shape; none of them can be trained; or a
            frozen weight that stood for its own anchor has changed. Names the first.
    """
    entries = effective_parameters(unwrap(model))
    for name, value in importance.items():
        if name not in entries:
            raise ValueError(f'{source} names "{name}", which the model has not.{did_you_mean(name, entries)}')
        entries[name].check()
        if entries[name].parameter.shape != value.shape:
            shape = [*entries[name].parameter.shape]
            raise ValueError(f"{name} is {shape} in the model and {[*value.shape]} in {source}: another model's?")
    terms = []
    device = next(iter(entries.values())).parameter.device
    with no_autocast(device):
        for name in importance:
            parameter, anchor = entries[name].parameter, anchors[name]
            if anchor.device is None:
                importance[name] = importance[name].to(parameter.device)
            terms.append(anchored_quadratic(entries[name], anchor, anchor.against(parameter), importance[name]))
    if torch.is_grad_enabled() and not any(term.requires_grad for term in terms):
        raise ValueError(
            f"{kind} reaches no parameter that is trained: all {len(terms)} that {source} names are frozen, and so is "
            f"any active adapter that changes one (the first: {next(iter(importance))}). Unfreeze what was frozen "
            "since the anchor was taken, or take the importance of what you train"
        )
    return torch.stack([term.to(device) for term in terms]).sum()


def check_importance(name: str, value: Any, *, what: str) -> None:
    """Raise ValueError where one parameter's importance is no tensor of floats, negative, or not finite."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"the {what} of {name} must be a tensor of floats; got {value!r:.60}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"the {what} of {name} is not finite")
    if bool((value < 0).any()):
        raise ValueError(
            f"the {what} of {name} is negative, down to {value.min().item():.3g}: it would push away from the anchor"
        )


def kept_importance(
    name: str, value: Any, *, what: str, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Return a copy of one parameter's importance, in another dtype or on another device where that is asked for.

    Args:
        name: of the parameter.
        value: floats, 0 or more, of any shape.
        what: its name in messages.
        dtype: to round to, or None.
        device: to copy to, or None.

    Raises:
        ValueError: it is no tensor of floats, is negative or not finite, or does not survive the rounding.
    """
    check_importance(name, value, what=what)
    value = value.detach()
    kept = value.to(device or value.device, dtype or value.dtype, copy=True)
    if kept.dtype != value.dtype:
        total, left = (float(tensor.sum(dtype=torch.float64)) for tensor in (value, kept))
        if not abs(left - total) <= 0.02 * total:
            raise ValueError(
                f"the {what} of {name}, up to {float(value.max()):.3g}, overflows or rounds to 0 in {kept.dtype}: use "
                "torch.bfloat16, which has float32's range"
            )
    return kept


def check_storage(
    strength: float, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[float, torch.dtype | None, torch.device | None]:
    """Return strength, dtype and device as a penalty keeps them.

    Raises:
        ValueError: the strength is negative or not finite, or the dtype is none of floats.
        TypeError: the strength is no number.
    """
    check_strength("strength", strength)
    check_dtype(dtype)
    return float(strength), dtype, None if device is None else torch.device(device)


class ImportancePenalty(Callback):
    """A penalty whose importances grow with every finished task: strength / 2 * sum importance * (theta - anchor)^2.

    Before the first task is finished it is 0. What a subclass adds is where the importance of a task comes from.

    Args:
        strength: 0 or more.
        parameters: bare names, or a function of one; None for what is trained when it is asked for.
        dtype: what importances and anchors are rounded to; None for no rounding.
        device: where they stay; None for the parameters' own.

    Raises:
        ValueError: the strength is negative or not finite, or the dtype is none of floats.
        TypeError: `parameters` is one string.
    """

    source = "the importance"

    def __init__(
        self, strength: float, *, parameters: Choice = None, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        self.strength, self.dtype, self.device = check_storage(strength, dtype, device)
        if isinstance(parameters, str):
            raise TypeError(f"parameters must be names, or a function of one; got the one string {parameters!r}")
        self.parameters = parameters
        self.importance: dict[str, Tensor] = {}
        self.anchors: dict[str, Anchor] = {}
        self.tasks = 0

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar in at least float32 with gradient to the model's trainable parameters.

        Args:
            model: the model whose tasks were finished, with or without adapters and wrappers.

        Raises:
            ValueError: the model lacks a parameter that is held, or has it in another shape (names the first); none of
                them can be trained; or a frozen weight that stood for its own anchor has changed.
        """
        if not self.importance:
            device = next(model.parameters()).device
            return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        return self.strength * importance_penalty(
            model, self.importance, self.anchors, kind=type(self).__name__, source=self.source
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all it has learned: importances and anchors (tensors), and the numbers it was made with."""
        return {
            "numbers": self._numbers(),
            "tasks": self.tasks,
            "importance": {name: value.clone() for name, value in self.importance.items()},
            "anchors": {name: anchor.state() for name, anchor in self.anchors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, bit for bit; the tensors are copied.

        Raises:
            CheckpointError: the strength or another number was another one, or it is no such state.
        """
        check_state(state, self.state_dict(), type(self).__name__)
        for key, own in self._numbers().items():
            if state["numbers"].get(key) != own:
                raise CheckpointError(
                    f"the saved {type(self).__name__} had {key} {state['numbers'].get(key)}; this one has {own}"
                )
        self.tasks = int(state["tasks"])
        self.importance = {
            name: value.to(self.device or value.device, copy=True) for name, value in state["importance"].items()
        }
        self.anchors = {
            name: Anchor.from_state(name, value, dtype=self.dtype, device=self.device)
            for name, value in state["anchors"].items()
        }

    def _numbers(self) -> dict[str, Any]:
        return {"strength": self.strength, "dtype": None if self.dtype is None else str(self.dtype)}

    def _names(self, model: nn.Module) -> list[str]:
        """Return what is held after this task: what was held before, and what is chosen now."""
        return list(dict.fromkeys([*self.importance, *choose_parameters(model, self.parameters)]))

    def _hold(self, model: nn.Module, found: Mapping[str, Tensor], *, keep: float = 1.0, what: str) -> None:
        """Add a task's importances to `keep` times the earlier ones, and put the anchors where the model is now."""
        entries = choose_parameters(model, list(found))
        importance = {}
        for name, value in found.items():
            check_importance(name, value, what=what)
            shape = entries[name].parameter.shape
            if value.shape != shape:
                raise ValueError(
                    f"{name} is {[*shape]} in the model and {[*value.shape]} in the {what}: another model's?"
                )
            total = value.to(torch.promote_types(value.dtype, torch.float32))
            if name in self.importance:
                total = keep * self.importance[name].to(total) + total
            importance[name] = kept_importance(name, total, what=what, dtype=self.dtype, device=self.device)
        self.anchors = {n: Anchor.of(entries[n], dtype=self.dtype, device=self.device) for n in importance}
        self.importance = importance
        self.tasks += 1


def check_covers(found: Collection[str], held: Collection[str], *, what: str) -> None:
    """Raise ValueError where importances that a caller gives lack a parameter that is held since an earlier task."""
    for name in held:
        if name not in found:
            raise ValueError(
                f'the {what} lacks "{name}", which is held since an earlier task: compute it with '
                f"parameters=list(penalty.importance), a frozen parameter too.{did_you_mean(name, found)}"
            )
