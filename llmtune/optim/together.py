"""Several optimizers as one: for schedules, checkpoints and the training loop, which know one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Together(torch.optim.Optimizer):
    """One torch optimizer made of several, each with parameters of its own: Muon for some, AdamW for the rest.

    `step` lets each take its step. The groups are those of the optimizers, one after the other, and the same dicts: a
    schedule that writes rates into them writes them there, each group's in its own ratio. `state_dict` has the form of
    one optimizer's, so a checkpoint of the loop holds all of it. A `GradScaler` takes it as it takes one.

    Args:
        optimizers: two or more torch optimizers that have been made, no parameter in two of them.

    Raises:
        TypeError: one is no torch optimizer.
        ValueError: there are fewer than two; or a parameter is in two of them.

    Example:
        >>> matrix, vector = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(5))
        >>> optimizer = Together(torch.optim.Muon([matrix], lr=0.02), torch.optim.AdamW([vector], lr=1e-3))
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        >>> (matrix.square().sum() + vector.square().sum()).backward()
        >>> optimizer.step()
        >>> schedule.step()
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.01, 0.0005]
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"Together takes torch optimizers that have been made; got {optimizer!r}")
        if len(optimizers) < 2:
            raise ValueError(f"Together makes one optimizer of two or more; got {len(optimizers)}")
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Tensor, Any]:
        """The state of all parameters, {parameter of any shape: its state}: a view, changes are its optimizer's."""
        return _States(self.optimizers)

    @state.setter
    def state(self, value: Any) -> None:
        """Do nothing: torch's constructor sets an empty state."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each optimizer take its step; return what the closure gave, which is called once before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group of one of the optimizers, as the constructor does.

        Raises:
            ValueError: it is none of theirs.
        """
        if not any(param_group is own for optimizer in self.optimizers for own in optimizer.param_groups):
            raise ValueError("a further group must say whose it is: give it to an optimizer before Together is made")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each optimizer its part of what `state_dict` returned.

        Raises:
            ValueError: the groups are not as many or not as long as they were.
        """
        saved, own = state_dict["param_groups"], self.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
            raise ValueError(
                f"the state is of groups of {[len(group['params']) for group in saved]} parameters; here they have "
                f"{[len(group['params']) for group in own]}: make the optimizers as they were"
            )
        first = 0
        for optimizer in self.optimizers:
            groups = saved[first : first + len(optimizer.param_groups)]
            numbers = {number for group in groups for number in group["params"]}
            state = {number: entry for number, entry in state_dict["state"].items() if number in numbers}
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            first += len(groups)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __reduce__(self) -> Any:
        """Let copies be made of copies of the optimizers."""
        return type(self), self.optimizers


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers as one mapping, of which each parameter's stands in its own optimizer's."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._holding(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        owners = (o for o in self._optimizers if any(parameter is p for g in o.param_groups for p in g["params"]))
        next(owners).state[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._holding(parameter)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for optimizer in self._optimizers for parameter in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def _holding(self, parameter: Tensor) -> Any:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                return optimizer.state
        raise KeyError(parameter)
