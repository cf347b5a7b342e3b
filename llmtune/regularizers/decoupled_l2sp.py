"""L2-SP beside the optimizer, as AdamW's weight decay is: theta <- theta - lr * strength * (theta - anchor)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.optim.wrapped import inner_optimizer
from llmtune.regularizers.anchored import Anchored


@torch.no_grad()
def pull_back(parameters: Sequence[Tensor], anchors: Sequence[Tensor], rate: float) -> None:
    """Move parameters towards their anchors, in place: theta <- theta - rate * (theta - anchor).

    Args:
        parameters: of any shapes.
        anchors: of the same shapes, dtypes and devices.
        rate: from 0, which moves nothing, to 1, which puts the anchors in place.

    Raises:
        ValueError: the rate is not in 0 ... 1.

    Example:
        >>> theta = torch.tensor([4.0, 0.0])
        >>> pull_back([theta], [torch.tensor([0.0, 2.0])], 0.25)
        >>> theta
        tensor([3.0000, 0.5000])
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"the rate, learning rate * strength, must be in 0 ... 1; got {rate:g}: it would overshoot")
    if parameters:
        torch._foreach_lerp_(list(parameters), list(anchors), rate)


class DecoupledL2SP(Anchored):
    """L2-SP decoupled from the gradient: before each step theta <- theta - lr * strength * (theta - anchor).

    The pull is what AdamW's weight decay is, but to the anchor: it uses the present learning rate of the parameter's
    group, goes before the optimizer's own update, and neither passes through Adam's moments nor counts in the norm that
    is clipped. By plain SGD it is the penalty `L2SP` exactly. It happens where the optimizer steps, so a step that the
    loop passes over pulls nothing. Weight decay of the same parameters pulls them to zero meanwhile: set it to 0.

    For parameters that are trained as they are; frozen ones are left out. A weight under an adapter has no tensor that
    could be pulled, and is refused: there the optimizer's own weight_decay = strength / 2 on A and B does it, as that
    takes B A to (1 - lr * strength / 2)^2 B A, and so W + s B A towards W.

    RecAdam (Chen et al. 2020) pulls after the update, with the moved theta, and not at all with
    `anneal_fun="constant"`, where its factor is 0.

    Args:
        anchor: {bare name: tensor of the parameter's shape}; or the model itself, for what is trained, as it is now.
        strength: 0 or more; learning rate * strength may be at most 1.

    Raises:
        ValueError: the anchor is empty or not finite, or `strength` is negative or not finite.
        TypeError: a value of the anchor is no tensor of floats.

    Example:
        >>> model = nn.Linear(3, 2, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pull = DecoupledL2SP({"weight": torch.zeros(2, 3)}, strength=5.0)
        >>> pull.attach(model, optimizer)  # a TrainingLoop with callbacks=[pull] does that by itself
        >>> before = model.weight.detach().clone()
        >>> optimizer.step()
        >>> torch.allclose(model.weight, before / 2)
        True
        >>> pull.detach()

    Reference:
        Li et al. 2018, section 3, decoupled as in Loshchilov and Hutter 2019, "Decoupled weight decay regularization",
        algorithm 2.
    """

    def __init__(self, anchor: Mapping[str, Tensor] | nn.Module, strength: float) -> None:
        super().__init__(anchor, strength)
        self._held: dict[int, tuple[list[nn.Parameter], list[Tensor]]] = {}  # by number of the optimizer's group
        self._hook: Any = None

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Pull the model's parameters at every step of the optimizer from now on.

        Args:
            model: the model that the anchor belongs to.
            optimizer: of its parameters.

        Raises:
            ValueError: it is attached already; the model lacks a parameter that the anchor names, or has it in another
                shape or under an adapter; none of them is trained; one that is is not the optimizer's; or was spread
                over processes since the anchor was taken.
        """
        if self._hook is not None:
            raise ValueError("this DecoupledL2SP is attached already: detach it first, or make another one")
        optimizer = inner_optimizer(optimizer)
        groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        held: dict[int, tuple[list[nn.Parameter], list[Tensor]]] = {}
        entries = self.anchored(model)
        for name, anchor in self.anchors.items():
            entry = entries[name]
            if entry.layers:
                raise ValueError(
                    f'{name} is changed by adapter "{entry.layers[0].adapter_name}", and there is no tensor to pull: '
                    "leave it out and give the optimizer weight_decay = strength / 2, or use L2SP or DeltaNorm"
                )
            if not entry.parameter.requires_grad:
                continue
            if id(entry.parameter) not in groups:
                raise ValueError(
                    f"{name} is trained, and not one of the optimizer's parameters: is it another model's?"
                )
            value = _value(anchor.against(entry.parameter), entry.parameter)
            if hasattr(entry.parameter, "device_mesh") != hasattr(value, "device_mesh"):
                raise ValueError(
                    f"{name} is spread over processes and its anchor is not, or the other way round: make the anchor "
                    "of the model as it is trained, after it has been spread (shard)"
                )
            parameters, values = held.setdefault(groups[id(entry.parameter)], ([], []))
            parameters.append(entry.parameter)
            values.append(value)
        if not held:
            raise ValueError(f"DecoupledL2SP reaches no trained parameter: all {len(self.anchors)} anchored are frozen")
        self._held = held
        self._hook = optimizer.register_step_pre_hook(self._pull)

    def detach(self) -> None:
        """Pull no more; nothing where it is not attached."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._held = None, {}

    def on_fit_start(self, loop: Any) -> None:
        """Attach to the loop's model and optimizer."""
        self.attach(loop.model, loop.optimizer)

    def on_fit_end(self, loop: Any) -> None:
        """Detach."""
        self.detach()

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Detach."""
        self.detach()

    def _pull(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups  # other ones once the optimizer has loaded a state
        for number, (parameters, values) in self._held.items():
            pull_back(parameters, values, float(groups[number]["lr"]) * self.strength)


def _value(anchor: Tensor | None, parameter: nn.Parameter) -> Tensor:
    assert anchor is not None  # the parameter is trained
    return anchor.to(parameter.dtype)
