"""Noise on weights: once before training (NoisyTune), or for the length of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import bare_named_parameters
from llmtune.adapters.record import check_flag, check_positive

Kind = Literal["uniform", "gaussian"]


def weight_noise(
    weight: Tensor,
    scale: float,
    *,
    kind: Kind = "uniform",
    relative: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return noise for a weight, the noise alone.

    "uniform": uniform(-scale / 2, scale / 2), of variance scale^2 / 12; "gaussian": normal of mean 0 and standard
    deviation `scale`; where `relative`, times the standard deviation of the weight's own entries. The default is
    NoisyTune's formula.

    Where we differ: the deviation is that of the entries themselves (divided by n, not n - 1), so a weight of one entry
    gets no noise; by the paper's line of code it becomes NaN. A constant weight (a new bias, a norm's ones) gets none
    in either.

    Args:
        weight: any shape, floating.
        scale: above 0; lambda in the paper, 0.1 to 0.15 there.
        kind: of the noise.
        relative: whether the scale is a multiple of the weight's standard deviation.
        generator: of the draw; left out, torch's global random state.

    Returns:
        A tensor of the weight's shape and dtype, drawn in at least float32.

    Raises:
        ValueError: the scale is not above 0, or the kind is none of the two.
        TypeError: `relative` is no bool.

    Example:
        >>> bool(weight_noise(torch.ones(2, 3), 0.1, relative=False).abs().max() <= 0.05)
        True

    Wu et al., "NoisyTune: A Little Noise Can Help You Finetune Pretrained Language Models Better" (2022), section 2.
    """
    _check(scale, kind, relative)
    wide = torch.promote_types(weight.dtype, torch.float32)
    noise = torch.empty(weight.shape, dtype=wide, device=weight.device)
    noise = noise.uniform_(-0.5, 0.5, generator=generator) if kind == "uniform" else noise.normal_(generator=generator)
    size = weight.detach().to(wide).std(correction=0) * scale if relative else scale
    return (noise * size).to(weight.dtype)


@torch.no_grad()
def noisy_start(
    model: nn.Module,
    scale: float = 0.15,
    *,
    kind: Kind = "uniform",
    relative: bool = True,
    generator: torch.Generator | None = None,
) -> None:
    """Add `weight_noise` to a model's trained weights in place, once, before training: NoisyTune.

    Parameters that require a gradient are moved, a tied one once, and frozen ones are not: nothing would learn to live
    with their noise. Nor are adapters' own, which have no pretrained values. A loop's run that is resumed takes its
    weights from the checkpoint, so calling this again before `fit(resume=True)` does no harm.

    Args:
        model: any module, wrapped or not.
        scale: above 0; lambda in the paper.
        kind: "uniform" or "gaussian".
        relative: whether the scale is a multiple of each weight's standard deviation.
        generator: of the draws; left out, torch's global random state.

    Raises:
        ValueError: the scale or the kind is out of range, or no parameter of the bare model requires a gradient.
        TypeError: `relative` is no bool.

    Example:
        >>> model = nn.Linear(5, 3)
        >>> before = model.weight.detach().clone()
        >>> noisy_start(model, 0.15)
        >>> torch.equal(model.weight, before)
        False

    Wu et al., "NoisyTune" (2022), section 2.
    """
    _check(scale, kind, relative)
    for parameter in _trained(model):
        parameter.add_(weight_noise(parameter, scale, kind=kind, relative=relative, generator=generator))


@contextmanager
def noisy_weights(
    model: nn.Module,
    scale: float,
    *,
    kind: Kind = "gaussian",
    relative: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Put `weight_noise` on a model's trained weights while the block runs, and put them back bit for bit.

    A step of training on noisy weights takes its gradient at them and changes the clean ones:

        class Noisy(TrainingLoop):
            def accumulate_gradients(self, batches):
                with noisy_weights(self.model, 0.01):
                    return super().accumulate_gradients(batches)

    Which weights: those of `noisy_start`. Their copies take as many bytes as they do, while the block runs. The
    backward pass belongs into the block: outside of it autograd refuses, since the weights have changed.

    Args:
        model: any module, wrapped or not.
        scale: above 0.
        kind: "uniform" or "gaussian".
        relative: whether the scale is a multiple of each weight's standard deviation.
        generator: of the draws; left out, torch's global random state.

    Raises:
        ValueError: the scale or the kind is out of range, no parameter of the bare model requires a gradient, or
            something (an optimizer's step) has changed a weight inside the block: it is put back all the same.
        TypeError: `relative` is no bool.

    Example:
        >>> model = nn.Linear(5, 3)
        >>> before = model.weight.detach().clone()
        >>> with noisy_weights(model, 0.1):
        ...     model(torch.ones(2, 5)).sum().backward()
        >>> torch.equal(model.weight, before)
        True

    Murray and Edwards, "Enhanced MLP performance and fault tolerance resulting from synaptic weight noise during
    training" (1994).
    """
    _check(scale, kind, relative)
    clean = [(parameter, parameter.detach().clone()) for parameter in _trained(model)]
    try:
        with torch.no_grad():
            for parameter, value in clean:
                parameter.add_(weight_noise(value, scale, kind=kind, relative=relative, generator=generator))
        versions = [parameter._version for parameter, _ in clean]
        yield
        changed = versions != [parameter._version for parameter, _ in clean]
    finally:
        with torch.no_grad():
            for parameter, value in clean:
                parameter.copy_(value)
    if changed:
        raise ValueError(
            "a weight was changed inside noisy_weights, and has been put back: take the optimizer's step outside of it"
        )


def _check(scale: float, kind: str, relative: bool) -> None:
    check_positive("scale", scale)
    check_flag("relative", relative)
    if kind not in ("uniform", "gaussian"):
        raise ValueError(f'kind must be "uniform" or "gaussian"; got {kind!r}')


def _trained(model: nn.Module) -> list[nn.Parameter]:
    found = [parameter for _, parameter in bare_named_parameters(model) if parameter.requires_grad]
    if not found:
        raise ValueError(
            f"no weight of this {type(model).__name__} itself requires a gradient, so there is none to put noise on: "
            "under adapters the base is frozen"
        )
    return found
