"""What an optimizer's step did to parameters, without the weight decay that it does beside its update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmtune.adapters.effective import EffectiveParameter

IN_THE_GRADIENT = (
    torch.optim.SGD, torch.optim.ASGD, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop,
    torch.optim.Rprop, torch.optim.Adamax,
)  # fmt: skip


def decay_rates(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, float]]:
    """Yield (parameter, rate) for what the next step multiplies by 1 - rate, beside its update: lr * weight_decay.

    Decay is decoupled where torch's group says so (`decoupled_weight_decay`: AdamW), and, in optimizers that say
    nothing, in all but torch's that add weight_decay * theta to the gradient.

    Args:
        optimizer: about to step. Parameters without a gradient are left out: it passes over them.
    """
    for group in optimizer.param_groups:
        rate = float(group["lr"]) * float(group.get("weight_decay") or 0.0)
        if rate and group.get("decoupled_weight_decay", not isinstance(optimizer, IN_THE_GRADIENT)):
            yield from ((parameter, rate) for parameter in group["params"] if parameter.grad is not None)


class StepChange:
    """Where effective parameters are before a step; made right before it, and asked once right after it.

    Args:
        optimizer: about to step.
        entries: the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, entries: Sequence[EffectiveParameter]) -> None:
        self.entries, self.rates = entries, {id(parameter): rate for parameter, rate in decay_rates(optimizer)}
        self.before = [_moving(entry) for entry in entries]
        parts = {id(p): p for entry in entries if entry.layers for p in trained_parts(entry) if id(p) in self.rates}
        self.decayed = [(parameter, self.rates[key], parameter.detach().clone()) for key, parameter in parts.items()]

    @torch.no_grad()
    def by_name(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, change in at least float32) of each parameter, its decoupled weight decay undone."""
        with self._without_decay():
            for entry, before in zip(self.entries, self.before, strict=True):
                rate = 0.0 if entry.layers else self.rates.get(id(entry.parameter), 0.0)
                now = _moving(entry)
                yield entry.name, now.to(torch.promote_types(now.dtype, torch.float32)).sub_(before, alpha=1.0 - rate)

    @contextmanager
    def _without_decay(self) -> Iterator[None]:
        """Let adapters' tensors be, for the block, where the step would have taken them without its weight decay."""
        after = [parameter.detach().clone() for parameter, *_ in self.decayed]
        try:
            for parameter, rate, before in self.decayed:
                parameter.add_(before, alpha=rate)
            yield
        finally:
            for (parameter, *_), value in zip(self.decayed, after, strict=True):
                parameter.copy_(value)


def trained_parts(entry: EffectiveParameter) -> list[nn.Parameter]:
    """Return the tensors that training moves a parameter by: itself, and those of the adapters that change it."""
    parts = [entry.parameter, *(p for layer in entry.layers for p in layer.parameters(recurse=False))]
    return [parameter for parameter in parts if parameter.requires_grad]


def _moving(entry: EffectiveParameter) -> Tensor:
    """Return a copy of what training may change of a parameter: what adapters add to a frozen one, or all of it."""
    return entry.added() if entry.layers and not entry.parameter.requires_grad else entry.value().detach().clone()
