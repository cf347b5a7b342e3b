"""Elastic weight consolidation: what mattered to an old task is held where it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import Anchor, fingerprint
from llmtune.adapters.effective import choose_parameters
from llmtune.errors import CheckpointError, did_you_mean
from llmtune.forgetting.importance import check_storage, importance_penalty, kept_importance
from llmtune.types import Callback


def check_anchor(name: str, value: Any) -> None:
    """Raise where what a parameter is to be held at is no tensor of finite floats."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"the anchor of {name} must be a tensor of floats; got {value!r:.60}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"the anchor of {name} is not finite")


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
        dtype: what Fisher information and anchor are rounded to, to hold half as much (`penalty_memory`); None for no
            rounding. The mathematics stay in at least float32. An anchor in bfloat16 is off by up to 1/512 of a trained
            parameter, and pulls there; a frozen weight is its own anchor, and exact.
        device: where both stay, such as "cpu"; they come over in pieces at each call. None for the parameters' device.

    Raises:
        ValueError: `fisher` is empty, negative or not finite, or overflows or vanishes in `dtype`; the anchor lacks one
            of its names, has another shape there or is not finite; `strength` is negative or not finite. Names the
            first.
        TypeError: `fisher` or the anchor is no dict of tensors of floats.

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

    def __init__(
        self, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor] | nn.Module, strength: float, *,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        self.strength, self.dtype, self.device = check_storage(strength, dtype, device)
        if not isinstance(fisher, Mapping) or not isinstance(anchor, Mapping | nn.Module):
            raise TypeError("fisher must be a dict of tensors by name, and anchor one too, or the model")
        if not fisher:
            raise ValueError("fisher names no parameter: there is nothing to hold")
        kept: Any = {"dtype": self.dtype, "device": self.device}
        self.fisher = {n: kept_importance(n, value, what="Fisher information", **kept) for n, value in fisher.items()}
        if isinstance(anchor, nn.Module):
            chosen = choose_parameters(anchor, list(fisher))
            anchors = {name: Anchor.of(entry, **kept) for name, entry in chosen.items()}
        else:
            for name in fisher:
                if name not in anchor:
                    raise ValueError(f'the anchor has no "{name}", which fisher names.{did_you_mean(name, anchor)}')
                check_anchor(name, anchor[name])
            anchors = {name: Anchor(name, copy=anchor[name].detach().clone(), **kept) for name in fisher}
        for name, value in fisher.items():
            if value.shape != anchors[name].shape:
                raise ValueError(f"{name} is {[*value.shape]} in fisher and {[*anchors[name].shape]} in the anchor")
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
        return self.strength * importance_penalty(model, self.fisher, self.anchors, kind="EWC", source="fisher")

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
