"""Let only a part of what is trained train in a step, and all of it be there before and after the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from typing import Any

from torch import Tensor, nn

from llmtune.modules import unwrap
from llmtune.types import Callback


class PartTrains(Callback, ABC):
    """In each step only what `awake` names trains; subclass it and write that one method.

    The rest requires no gradient while that of the loss is computed, so it has none, and an optimizer of torch leaves
    it as it is: no update, no weight decay, no moments. From `on_task_gradients` on everything that is trained requires
    a gradient again. So penalties are of all of it, though what they give to those asleep is dropped; the optimizer,
    which is made before the first step, holds all of it, and so do checkpoints, evaluations and copies; a resumed run
    needs to know the step alone.

    Attributes:
        trained: the names of the parameters that required a gradient at the start of `fit`, in the model's order.
    """

    trained: Sequence[str] = ()

    def __init__(self) -> None:
        self._asleep: list[nn.Parameter] = []
        self._hooks: list[Any] = []

    @abstractmethod
    def awake(self, loop: Any) -> Set[str]:
        """Return the names of the parameters that train in step `loop.step`, from 0: a function of that alone."""

    def on_fit_start(self, loop: Any) -> None:
        """Have the optimizer made, which takes what requires a gradient then."""
        self._wake()
        self.trained = [name for name, p in unwrap(loop.model).named_parameters() if p.requires_grad]
        _ = loop.optimizer

    def on_step_start(self, loop: Any) -> None:
        """Send to sleep what does not train in this step.

        Raises:
            ValueError: that is everything.
        """
        awake = self.awake(loop)
        started = set(self.trained)  # a weight that a penalty lets have a gradient for a step is not among them
        every = unwrap(loop.model).named_parameters()
        trained = {name: p for name, p in every if p.requires_grad and name in started}
        if not awake & trained.keys():
            raise ValueError(
                f"step {loop.step + 1}: {type(self).__name__} leaves nothing to train: of what it would train nothing "
                "requires a gradient"
            )
        self._asleep = [parameter for name, parameter in trained.items() if name not in awake]
        for parameter in self._asleep:
            parameter.requires_grad_(False)

    def on_task_gradients(self, loop: Any) -> None:
        """Let the penalties see all that is trained; a gradient they give to those asleep goes as soon as it is there.

        A penalty on adapters alone would otherwise be told, while the head trains alone, that all of them are frozen.
        """
        for parameter in self._asleep:
            parameter.requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))

    def on_before_optimizer_step(self, loop: Any) -> None:
        """Wake all: the gradients are there."""
        self._wake()

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Wake all, where a step has been taken in another way."""
        self._wake()

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Wake all, where a step has failed."""
        self._wake()

    def _wake(self) -> None:
        for parameter in self._asleep:
            parameter.requires_grad_(True)
        for hook in self._hooks:
            hook.remove()
        self._asleep, self._hooks = [], []


def _drop_gradient(parameter: Tensor) -> None:
    """Drop a parameter's gradient; of any shape."""
    parameter.grad = None


def check_whole(name: str, value: Any) -> None:
    """Raise ValueError where `value` is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
