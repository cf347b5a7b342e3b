"""Where a penalty pulls a parameter back to, without a second copy of a weight that is frozen there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.effective import EffectiveParameter
from llmtune.weights.quadratic import Factors, low_rank_quadratic, quadratic

BLOCK = 2**20
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError where anchors cannot be kept in a dtype; None is for no rounding."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, or None; got {dtype}")


def check_strength(what: str, strength: Any) -> None:
    """Raise ValueError where a strength is no finite number, 0 or more, and TypeError where it is no number."""
    try:
        number = None if isinstance(strength, str) else float(strength)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None:
        raise TypeError(f"{what} must be a finite number, 0 or more; got {strength!r:.60}")
    if not 0 <= number < math.inf:
        raise ValueError(f"{what} must be a finite number, 0 or more; got {strength}")


def fingerprint(tensor: Tensor) -> str:
    """Return a checksum of a tensor's type, shape and every bit, the same on every device.

    A sum modulo 2^64 of each entry's bits times its odd-numbered place: enough to notice any change that is not made to
    deceive.
    """
    bits = tensor.detach().contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])
    total = 0
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK].long()
        places = torch.arange(start, start + len(block), device=block.device) * 2 + 1
        total += int((block * places).sum())
    return f"{tensor.dtype}{[*tensor.shape]}:{total % 2**64:016x}"


@dataclass
class Pin:
    """A frozen parameter that stands for its own copy, as long as no bit of it changes.

    A write that torch counts (an optimizer, `copy_`, a merge) is noticed, and so is another tensor in its place; then
    every bit is compared by checksum. A write through `.data` goes past torch's count and is not noticed.
    """

    mark: str
    parameter: nn.Parameter | None  # None until a pin that comes out of a saved state first meets it
    version: int = -1
    pointer: int = 0

    @classmethod
    def at(cls, parameter: nn.Parameter, mark: str | None = None) -> Pin:
        """Return a pin at the parameter as it is now."""
        mark = fingerprint(parameter) if mark is None else mark
        return cls(mark, parameter, parameter._version, parameter.data_ptr())

    def holds(self, parameter: nn.Parameter) -> bool:
        """Return whether `parameter` still has the pinned values, and follow it where it has been moved or replaced."""
        if (parameter is self.parameter) and (parameter._version, parameter.data_ptr()) == (self.version, self.pointer):
            return True
        if fingerprint(parameter) != self.mark:
            return False
        self.parameter, self.version, self.pointer = parameter, parameter._version, parameter.data_ptr()
        return True


class Anchor:
    """The value that one effective parameter had: a copy of it, or a pinned weight plus copies of low-rank factors.

    Args:
        name: the parameter's bare name, for messages.
        copy: the value, owned by the anchor from now on; or None with `pin`.
        pin: the frozen weight that the value is, apart from `factors`.
        factors: what active low-rank adapters added at the time; copies.
        dtype: what the copy is rounded to, and any that is made later; None for the value's own.
        device: where the copy stays; None for the parameter's.

    Raises:
        ValueError: the value overflows in `dtype`.
    """

    def __init__(
        self, name: str, *, copy: Tensor | None = None, pin: Pin | None = None, factors: tuple[Factors, ...] = (),
        dtype: torch.dtype | None = None, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.name, self.factors, self.dtype, self.device = name, factors, dtype, device
        self.base: Tensor | Pin = pin if copy is None else self._kept(copy)  # type: ignore[assignment]
        self._mark: str | None = None
        self._compared = False

    @classmethod
    def of(
        cls, entry: EffectiveParameter, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Anchor:
        """Return the anchor at the entry's present value; dtype and device as the class has them."""
        if entry.parameter.requires_grad or entry.dense():
            return cls(entry.name, copy=entry.value().detach().clone(), dtype=dtype, device=device)
        added = [(left.detach().clone(), right.detach().clone(), scaling) for left, right, scaling in entry.factors()]
        nonzero = tuple(factors for factors in added if bool(factors[0].any()) and bool(factors[1].any()))
        return cls(entry.name, pin=Pin.at(entry.parameter), factors=nonzero, dtype=dtype, device=device)

    @classmethod
    def from_state(
        cls, name: str, state: Mapping[str, Any], *, dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Anchor:  # fmt: skip
        """Return the anchor that `state` gave, which shares no memory with it; dtype and device as the class has them.

        A weight that stood for its own copy does so again as soon as `against` is given it.
        """
        factors = tuple((left.clone(), right.clone(), float(scaling)) for left, right, scaling in state["factors"])
        copy = state["copy"]
        anchor = cls(name, factors=factors, dtype=dtype, device=device)
        anchor.base = Pin(state["pinned"], None) if copy is None else anchor._kept(copy.clone())
        return anchor

    def state(self) -> dict[str, Any]:
        """Return copies of the tensors, and the checksum of a weight that stands for its own copy."""
        pinned = self.base.mark if isinstance(self.base, Pin) else None
        copy = None if isinstance(self.base, Pin) else self.base.clone()
        return {
            "copy": copy,
            "pinned": pinned,
            "factors": [[left.clone(), right.clone(), scaling] for left, right, scaling in self.factors],
        }

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape; of an anchor out of a saved state that has not met its parameter, unknown: []."""
        held = self.base.parameter if isinstance(self.base, Pin) else self.base
        return torch.Size() if held is None else held.shape

    def holds(self, parameter: nn.Parameter) -> bool:
        """Return whether the value is still known: a weight that stands for its own copy has not changed."""
        return not isinstance(self.base, Pin) or self.base.holds(parameter)

    @torch.no_grad()
    def change(self, entry: EffectiveParameter) -> Tensor:
        """Return theta - anchor as one tensor of the parameter's shape, in at least float32, without gradient.

        Raises:
            ValueError: the parameter stood for its own copy and has changed since.
        """
        target = self.against(entry.parameter)
        if target is None:
            value = entry.added()
        else:
            value = entry.value()
            value = value.to(torch.promote_types(value.dtype, torch.float32)) - target.to(value.device)
        for left, right, scaling in self.factors:
            value = value - scaling * left @ right
        return value

    def mark(self) -> str:
        """Return a checksum of the value as it was given, whatever has become of the copy since."""
        if self._mark is None:
            base = self.base.mark if isinstance(self.base, Pin) else fingerprint(self.base)
            self._mark = "+".join(
                [base, *(f"{s}*{fingerprint(left)}@{fingerprint(right)}" for left, right, s in self.factors)]
            )
        return self._mark

    def against(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the value to subtract from the bare parameter; None where the two are equal and the parameter is
        frozen.

        Raises:
            ValueError: the parameter stood for its own copy and has changed since.
        """
        device = parameter.device
        self.factors = tuple((left.to(device), right.to(device), s) for left, right, s in self.factors)
        if isinstance(self.base, Tensor):
            self.base = self.base.to(self.device or device)
            if parameter.requires_grad or self._compared:
                return self.base
            self._compared = True
            if not torch.equal(self.base, parameter.detach().to(self.base)):
                return self.base
            self.mark()  # of the copy, before it goes
            self.base = Pin.at(parameter)
        elif not self.base.holds(parameter):
            raise ValueError(
                f"{self.name} was frozen and stood for its own anchor, but has changed since (merged, or trained?): "
                "undo that, or make the penalty anew with the anchor as tensors; an adapter that is merged at the end "
                "of its task is merged before the penalty's finish_task"
            )
        if not parameter.requires_grad:
            return None
        self.mark()
        self.base = self._kept(parameter.detach().clone())  # it will be trained, and the value needs its own tensor
        return self.base

    def _kept(self, copy: Tensor) -> Tensor:
        kept = copy.to(self.device or copy.device, self.dtype or copy.dtype)
        if kept.dtype != copy.dtype and not bool(kept.isfinite().all()):
            raise ValueError(f"the anchor of {self.name} overflows in {kept.dtype}: use torch.bfloat16")
        return kept


def anchored_quadratic(
    entry: EffectiveParameter, anchor: Anchor, target: Tensor | None, fisher: Tensor | None = None
) -> Tensor:
    """Return 1/2 sum fisher * (theta - anchor)^2 of one effective parameter, a scalar in at least float32.

    Args:
        entry: the parameter, of any shape.
        anchor: where it is pulled to.
        target: what `anchor.against(entry.parameter)` gave.
        fisher: of the parameter's shape; None for 1 everywhere.
    """
    parameter = entry.parameter
    if entry.dense():
        base = parameter.detach() if target is None else target.to(parameter.device)
        for left, right, scaling in anchor.factors:
            base = base + scaling * left @ right
        return quadratic(entry.value(), fisher, base)
    factors = [*entry.factors(), *((left, right, -scaling) for left, right, scaling in anchor.factors)]
    if target is None:
        zero = parameter.new_zeros((), dtype=torch.promote_types(parameter.dtype, torch.float32))
        return low_rank_quadratic(factors, fisher) if factors else zero
    if factors:
        return low_rank_quadratic(factors, fisher, weight=parameter, anchor=target)
    return quadratic(parameter, fisher, target)
