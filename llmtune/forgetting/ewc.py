"""Elastic weight consolidation: what mattered to an old task is held where it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import Anchor, anchored_quadratic, fingerprint
from llmtune.adapters.effective import EffectiveParameter, choose_parameters, effective_parameters
from llmtune.errors import CheckpointError, did_you_mean
from llmtune.modules import unwrap
from llmtune.types import Callback


class EWC(Callback):
    """A penalty that holds parameters near an anchor, each as strongly as its Fisher information says.

    penalty(model) = strength / 2 * sum_i F_i (theta_i - anchor_i)^2, over all parameters that `fisher` names. (Some
    public implementations leave out the 1/2: their strength is half of ours.)

    theta is the *effective* parameter: under active adapters W + s B A (and whatever else they change). A weight that
    is frozen and bit for bit its own anchor is then not kept twice: its copy is given up at the first call, and the
    penalty on s B A is computed a few rows at a time, so that no tensor of the weight's size is built or kept for the
    backward pass. It costs 6 r + 4 operations an entry of such a weight, in forward and backward together; a training
    step costs about 6 an entry *and token*. A later change of that weight is noticed and raises, unless it is made
    through `.data`.

    Fisher information and anchor are copied: drop yours. The object holds one old task and nothing that training
    changes, so there is no `finish_task`; for a further task make a new one, or use two, whose penalties add up. It is
    a `Callback` only so that a checkpoint carries checksums of both (not the tensors: save those once, as two files of
    tensors), and a run resumed with another Fisher information or anchor is refused.

    Args:
        fisher: {bare name: tensor of the parameter's shape}, 0 or more, as `diagonal_fisher` gives it.
        anchor: {bare name: tensor}, with at least the names of `fisher` (others are not used), as `anchor_of` gives it;
            or the model itself: its effective parameters as they are now, without ever copying a frozen weight.
        strength: 0 or more.

    Raises:
        ValueError: `fisher` is empty, negative or not finite; the anchor lacks one of its names or has another shape
            there; `strength` is negative or not finite. Names the first.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> fisher = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> penalty = EWC(fisher, model, strength=10.0)
        >>> penalty(model).item()
        0.0
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1.0)
        >>> round(penalty(model).item(), 4)
        10.0

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", equation 3.
    """

    def __init__(self, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor] | nn.Module, strength: float) -> None:
        if not (strength >= 0 and math.isfinite(strength)):
            raise ValueError(f"strength must be a finite number, 0 or more; got {strength}")
        if not fisher:
            raise ValueError("fisher names no parameter: there is nothing to hold")
        for name, value in fisher.items():
            _check_fisher(name, value)
        if isinstance(anchor, nn.Module):
            anchors = {name: Anchor.of(entry) for name, entry in choose_parameters(anchor, list(fisher)).items()}
        else:
            for name in fisher:
                if name not in anchor:
                    raise ValueError(f'the anchor has no "{name}", which fisher names.{did_you_mean(name, anchor)}')
            anchors = {name: Anchor(name, copy=anchor[name].detach().clone()) for name in fisher}
        for name, value in fisher.items():
            if value.shape != anchors[name].shape:
                raise ValueError(f"{name} is {[*value.shape]} in fisher and {[*anchors[name].shape]} in the anchor")
        self.strength = float(strength)
        self.fisher = {name: value.detach().clone() for name, value in fisher.items()}
        self.anchors = anchors
        self._marks: dict[str, str] | None = None

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar in at least float32 with gradient to the model's trainable parameters.

        Args:
            model: the model that anchor and Fisher information belong to, with or without adapters and wrappers.

        Raises:
            ValueError: the model lacks a parameter that fisher names, or has it in another shape (names the first);
                none of them can be trained; or a frozen weight that stood for its own anchor has changed.
        """
        entries = effective_parameters(unwrap(model))
        for name, value in self.fisher.items():
            if name not in entries:
                raise ValueError(f'fisher names "{name}", which the model has not.{did_you_mean(name, entries)}')
            entries[name].check()
            if entries[name].parameter.shape != value.shape:
                shape = [*entries[name].parameter.shape]
                raise ValueError(f"{name} is {shape} in the model and {[*value.shape]} in fisher: another model's?")
        device = next(iter(entries.values())).parameter.device
        with torch.autocast(device.type, enabled=False):
            terms = [self._term(entries[name]) for name in self.fisher]
        if torch.is_grad_enabled() and not any(term.requires_grad for term in terms):
            raise ValueError(
                f"EWC reaches no parameter that is trained: all {len(terms)} that fisher names are frozen, and so is "
                f"any active adapter that changes one (the first: {next(iter(self.fisher))}). Take the Fisher "
                "information of what you train"
            )
        return self.strength * torch.stack([term.to(device) for term in terms]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return what tells this penalty from another: the strength, and checksums of Fisher information and anchor."""
        if self._marks is None:
            self._marks = {name: fingerprint(value) for name, value in self.fisher.items()}
        anchors = {name: anchor.mark() for name, anchor in self.anchors.items()}
        return {"strength": self.strength, "fisher": self._marks, "anchor": anchors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a saved state is this penalty's own; there is nothing to take back.

        Raises:
            CheckpointError: the strength, the Fisher information or the anchor is another; names the first difference.
        """
        own = self.state_dict()
        if state["strength"] != own["strength"]:
            raise CheckpointError(f"the saved EWC had strength {state['strength']}; this one has {own['strength']}")
        for part, what in (("fisher", "Fisher information"), ("anchor", "anchor")):
            for name in (*own[part], *state[part]):
                if own[part].get(name) != state[part].get(name):
                    raise CheckpointError(
                        f"the saved EWC had another {what} of {name}: make this one of the same tensors (save them "
                        "once, rather than computing them anew)"
                    )

    def _term(self, entry: EffectiveParameter) -> Tensor:
        """Return 1/2 sum F (theta - anchor)^2 of one parameter."""
        parameter, name = entry.parameter, entry.name
        fisher = self.fisher[name] = self.fisher[name].to(parameter.device)
        anchor = self.anchors[name]
        return anchored_quadratic(entry, anchor, anchor.against(parameter), fisher)


def _check_fisher(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"the Fisher information of {name} must be a tensor of floats; got {value!r:.60}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"the Fisher information of {name} is not finite")
    if bool((value < 0).any()):
        raise ValueError(
            f"the Fisher information of {name} is negative, down to {value.min().item():.3g}: it is a mean of squares"
        )
