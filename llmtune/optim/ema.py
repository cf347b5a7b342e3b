"""A running average of what is trained: exponential (EMA), or with equal weights (SWA)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.errors import did_you_mean


def newest_weight(updates: int, decay: float | None) -> float:
    """Return which weight the newest of `updates` values has in their average.

    (1 - decay) / (1 - decay^n), so that a value of age a has a weight in proportion to decay^a; 1 / n for decay None.

    Args:
        updates: n, how many values there are with the newest, at least 1.
        decay: above 0 and below 1; None for equal weights, which is the limit as decay goes to 1.

    Example:
        >>> [round(newest_weight(n, 0.5), 3) for n in (1, 2, 3)], newest_weight(4, None)
        ([1.0, 0.667, 0.571], 0.25)
    """
    if decay is None or updates == 1:  # the first is all there is, where the quotient below may round to less
        return 1 / updates
    return (1 - decay) / -math.expm1(updates * math.log(decay))


@torch.no_grad()
def update_averages(
    averages: Mapping[str, Tensor], values: Mapping[str, Tensor], *, updates: int, decay: float | None
) -> None:
    """Take one more value into running averages, in place: average += w (value - average), w by `newest_weight`.

    Args:
        averages: by name, of any shapes, in at least float32: in bfloat16 a step of 1e-3 is lost to rounding.
        values: by the same names, of the same shapes.
        updates: how many values there are with these, at least 1; the first replaces what stands there.
        decay: above 0 and below 1, or None for equal weights.
    """
    weight = newest_weight(updates, decay)
    for name, average in averages.items():
        value = values[name].detach().to(average.device, average.dtype)  # the model may have moved since
        average.copy_(value) if weight == 1 else average.lerp_(value, weight)


class EMA:
    """A running average of the trainable parameters, in at least float32.

    average_n = sum_k decay^(n-k) theta_k / sum_k decay^(n-k),  k = 1 ... n;  the mean of all theta_k for decay None

    A frozen parameter has no average, so under adapters theirs alone are kept. Buffers have none either. The first
    update counts like every other: at the start the average is the plain mean of what came, and it forgets later
    (Adam's bias correction, Kingma and Ba, "Adam" (2014), section 3). `torch.optim.swa_utils` starts at the first
    weights and gives them decay^(n-1) for good: of decay 0.999 after 1000 updates that is 37 %; TensorFlow shortens the
    memory instead, to min(decay, (1+n)/(10+n)). There the average has the parameters' dtype, and in bfloat16 stands
    still: 1e-3 of a difference is less than half a unit in the last place.

    The average of A and of B is not the average of LoRA's change B A: they differ by the covariance of the two. To
    average the change itself, take snapshots by `combine` and combine those with weights 1 / k: exact, in rank k r.

    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992); Izmailov et al., "Averaging
    Weights Leads to Wider Optima and Better Generalization" (2018), for the mean (SWA).

    Args:
        parameters: a model, whose parameters that require a gradient now are averaged; or parameters.
        decay: above 0 and below 1; None for equal weights.

    Raises:
        TypeError: `parameters` is neither a model nor parameters.
        ValueError: `decay` is out of its range; or no parameter requires a gradient.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> ema = EMA(model, decay=None)
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     ema.update()
        >>> with ema.averaged():
        ...     print(model.weight.data)
        tensor([[3., 3.]])
        >>> model.weight.data
        tensor([[6., 6.]])
    """

    def __init__(self, parameters: nn.Module | Iterable[nn.Parameter], *, decay: float | None = 0.999) -> None:
        check_decay(decay)
        self.decay, self.updates = decay, 0
        self._parameters = _trained(parameters)
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in self._parameters.items()
        }
        self._inside = False

    def update(self) -> None:
        """Take the present weights into the average.

        Raises:
            RuntimeError: inside of `averaged`, where the present weights are the average.
        """
        if self._inside:
            raise RuntimeError("the model holds the averaged weights: leave the block of averaged() before update()")
        self.updates += 1
        update_averages(self.averages, self._parameters, updates=self.updates, decay=self.decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model hold the averaged weights inside the block, to evaluate or save them; see `apply`.

        Afterwards the weights of before are back, bit for bit, also where the block raises.

        Raises:
            RuntimeError: there has been no update yet; or the block is inside of another one.
        """
        if self._inside:
            raise RuntimeError("the model holds the averaged weights already: averaged() cannot be nested")
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.apply()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._put(trained)

    def apply(self) -> None:
        """Put the averaged weights into the model for good, rounded once to its dtype.

        Raises:
            RuntimeError: there has been no update yet.
        """
        if not self.updates:
            raise RuntimeError("there is no average before the first update()")
        self._put(self.averages)

    def state_dict(self) -> dict[str, Any]:
        """Return {"updates": int64 scalar, "averages": tensors by name}: tensors alone, not copied."""
        return {"updates": torch.tensor(self.updates), "averages": dict(self.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, bit for bit.

        Raises:
            ValueError: it is of other parameters, or of another shape or dtype; names the first.
        """
        saved = state["averages"]
        odd = sorted(saved.keys() ^ self.averages.keys())
        if odd:
            there = "average" if odd[0] in saved else "model"
            raise ValueError(
                f"{odd[0]} is in the {there} only: load it for the parameters it was made of."
                + did_you_mean(odd[0], self.averages if there == "average" else saved)
            )
        for name, own in self.averages.items():
            if (saved[name].shape, saved[name].dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"the average of {name} must be {tuple(own.shape)} in {own.dtype}; it is "
                    f"{tuple(saved[name].shape)} in {saved[name].dtype}"
                )
        with torch.no_grad():
            for name, own in self.averages.items():
                own.copy_(saved[name])
        self.updates = int(state["updates"])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def check_decay(decay: float | None) -> None:
    """Raise ValueError where `decay` is neither None nor above 0 and below 1."""
    if decay is not None and (isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay < 1):
        raise ValueError(f"decay must be above 0 and below 1, or None for equal weights; got {decay!r}")


def _trained(parameters: nn.Module | Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    if isinstance(parameters, nn.Module):
        named = dict(parameters.named_parameters())
    else:
        if isinstance(parameters, Tensor | str) or not isinstance(parameters, Iterable):
            raise TypeError(f"a model or its parameters are expected; got a {type(parameters).__name__}")
        named = {str(place): parameter for place, parameter in enumerate(parameters)}
        if other := next((p for p in named.values() if not isinstance(p, Tensor)), None):
            raise TypeError(f"a model or its parameters are expected; got a {type(other).__name__} among them")
    found = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not found:
        raise ValueError("no parameter requires a gradient, so none changes: average what is trained")
    return found
