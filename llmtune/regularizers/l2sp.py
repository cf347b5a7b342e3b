"""L2-SP: parameters are pulled back to where the pre-trained model had them, not to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import Anchor, anchored_quadratic, check_strength
from llmtune.adapters.autocast import no_autocast
from llmtune.adapters.effective import EffectiveParameter
from llmtune.errors import did_you_mean
from llmtune.regularizers.anchored import Anchored, Names, is_among
from llmtune.regularizers.products import difference, product_norms
from llmtune.weights.quadratic import Factors


class L2SP(Anchored):
    """A penalty that pulls parameters back to their pre-trained values, and new ones to zero.

    penalty(model) = strength / 2 * sum ||theta - anchor||^2 + new_strength / 2 * sum ||theta_new||^2

    theta is the *effective* parameter: under active adapters W + s B A (and whatever else they change). So A is never
    pulled to its random start, which would mean nothing. Where W is frozen and is its own anchor the first sum is
    ||s B A||_F^2, or that of several adapters' sum with all cross terms, computed through matrices of the rank's size:
    `product_norms`. No second copy of such a weight is kept, and a later change of it is noticed and raises.

    Through Adam this is not what it is in the paper, which trains by SGD: Adam divides the gradient of loss and penalty
    by its own size, so that a weight with a large gradient of the loss is hardly pulled at all, and one with none is
    pulled by a whole learning rate whatever the strength. `DecoupledL2SP` pulls by learning rate * strength.

    The anchor is copied: drop yours. The object is a `Callback` only so that a checkpoint carries a checksum of it
    (not the tensors), and a run resumed with another anchor is refused.

    Args:
        anchor: {bare name: tensor of the parameter's shape}, as `llmtune.forgetting.anchor_of` gives it; or the model
            itself: its effective parameters that are trained, as they are now, without ever copying a frozen weight.
        strength: the paper's alpha, 0 or more.
        new_strength: the paper's beta, 0 or more.
        new: bare names, or a function of one: what is new and has no pre-trained value, such as a classifier; it is not
            anchored. Left out, new is whatever is trained and has no name in the anchor.
        dtype: what the anchor is rounded to, to hold half as much; None for no rounding. The mathematics stay in at
            least float32. A trained parameter's anchor in bfloat16 is off by up to 1/512 of it, and pulls there.
        device: where the anchor stays, such as "cpu"; it comes over in pieces at each call. None for the parameters'.

    Raises:
        ValueError: the anchor is empty or not finite, or not in `dtype`; a strength is negative or not finite; or
            `dtype` is none of floats.
        TypeError: a value of the anchor is no tensor of floats, or `new` is one string.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> penalty = L2SP(model, strength=10.0)
        >>> penalty(model).item()
        0.0
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1.0)
        >>> round(penalty(model).item(), 4)
        10.0

    Reference:
        Li et al. 2018, "Explicit inductive bias for transfer learning with convolutional networks", section 3.
    """

    def __init__(
        self, anchor: Mapping[str, Tensor] | nn.Module, strength: float, *, new_strength: float = 0.0,
        new: Names = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        check_strength("new_strength", new_strength)
        super().__init__(anchor, strength, without=new, dtype=dtype, device=device)
        self.new_strength, self.new = float(new_strength), new

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar in at least float32 with gradient to the model's trainable parameters.

        Args:
            model: the model that the anchor belongs to, with or without adapters and wrappers.

        Raises:
            ValueError: the model lacks a parameter that the anchor or `new` names, or has it in another shape (names
                the first); none of them can be trained, or none that is new where `new_strength` asks for it; or a
                frozen weight that stood for its own anchor has changed.
        """
        entries = self.anchored(model)
        new = self._new(entries)
        device = next(iter(entries.values())).parameter.device
        products: list[list[Factors]] = []
        terms: list[Tensor] = []
        with no_autocast(device):
            for name, anchor in self.anchors.items():
                _add_distance(entries[name], anchor, products, terms)
            if products:
                terms.append(0.5 * product_norms(products))
            if torch.is_grad_enabled() and not any(term.requires_grad for term in terms):
                raise ValueError(
                    f"L2SP reaches no parameter that is trained: all {len(self.anchors)} that the anchor names are "
                    f"frozen, and so is any active adapter that changes one (the first: {next(iter(self.anchors))})"
                )
            value = self.strength * _sum(terms, device)
            if self.new_strength:
                value = value + self.new_strength * _sum(self._new_terms(new), device)
        return value

    def state_dict(self) -> dict[str, Any]:
        """Return what tells this penalty from another: its strengths, and checksums of the anchor."""
        return {"new_strength": self.new_strength, **super().state_dict()}

    def _new(self, entries: Mapping[str, EffectiveParameter]) -> list[EffectiveParameter]:
        """Return the new parameters: those that are meant by `new`, or trained and not anchored."""
        if self.new is None:
            return [e for name, e in entries.items() if e.parameter.requires_grad and name not in self.anchors]
        if callable(self.new):
            found = [entry for name, entry in entries.items() if is_among(name, self.new)]
            if not found:
                raise ValueError(f"new is true of none of the model's {len(entries)} parameters: leave it out")
            return found
        for name in self.new:
            if name not in entries:
                raise ValueError(f'new names "{name}", which the model has not.{did_you_mean(name, entries)}')
        return [entries[name] for name in self.new]

    def _new_terms(self, new: Sequence[EffectiveParameter]) -> list[Tensor]:
        """Return 1/2 ||theta||^2 of each new parameter."""
        terms = []
        for entry in new:
            entry.check()
            value = entry.value()
            terms.append(0.5 * value.to(torch.promote_types(value.dtype, torch.float32)).square().sum())
        if torch.is_grad_enabled() and not any(term.requires_grad for term in terms):
            raise ValueError(
                f"new_strength is {self.new_strength} and no trained parameter is new: name those that are by new=, or "
                "leave new_strength out"
            )
        return terms


def _add_distance(
    entry: EffectiveParameter, anchor: Anchor, products: list[list[Factors]], terms: list[Tensor]
) -> None:
    """Add what makes up ||theta - anchor||^2 of one parameter: its factors to `products`, or half of it to `terms`."""
    target = anchor.against(entry.parameter)
    if target is not None or entry.dense():
        terms.append(anchored_quadratic(entry, anchor, target))
    elif factors := difference(entry.factors(), anchor.factors):
        products.append(factors)


def _sum(terms: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack([term.to(device) for term in terms]).sum() if terms else torch.zeros((), device=device)
