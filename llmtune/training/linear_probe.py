"""LP-FT: the head is trained first, on what the model gives as it is, and then everything."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from torch import nn

from llmtune.adapters.targets import ends_in
from llmtune.errors import did_you_mean
from llmtune.modules import unwrap
from llmtune.training.part_trains import PartTrains, check_whole


class LinearProbeFirst(PartTrains):
    """Train the head alone for `steps` steps with the model in eval mode, then everything, with a new optimizer state.

    A head that starts at random sends random gradients into a body that is good already; a head that has been trained
    first sends none of them. While it trains, dropout is off in the whole model, so that it is fitted to the features
    that the model gives. At the switch the optimizer's state is dropped: moments of the head alone are no moments of
    the whole. The learning-rate schedule runs over both parts.

    Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution" (2022), section 4.

    Args:
        steps: optimizer steps of the head alone, at least 1.
        head: names of the head's modules, whole or their last parts; left out, what a Hugging Face model has beside
            its `base_model`.
        rate_factor: how many times the schedule's learning rate the head has while it trains alone, above 0; the
            history's "learning_rate" is that.

    Raises:
        ValueError: a number is out of its range.
        TypeError: `head` is no list of names.
    """

    def __init__(self, steps: int, *, head: Sequence[str] | None = None, rate_factor: float = 1.0) -> None:
        super().__init__()
        check_whole("steps", steps)
        number = isinstance(rate_factor, int | float) and not isinstance(rate_factor, bool)
        if not number or not 0 < rate_factor < float("inf"):
            raise ValueError(f"rate_factor must be a number above 0; got {rate_factor!r}")
        if isinstance(head, str) or not all(isinstance(name, str) for name in head or ()):
            raise TypeError(f'head must be a list of names of modules, such as ["classifier"]; got {head!r}')
        self.steps, self.head, self.rate_factor = steps, head, rate_factor
        self._modes: dict[nn.Module, bool] = {}
        self._rates: list[float] = []
        self._hook: Any = None

    def on_fit_start(self, loop: Any) -> None:
        """Have the optimizer made.

        Raises:
            ValueError: the model does not tell its head, or has no module of such a name; or the run is not longer than
                the linear probe.
        """
        super().on_fit_start(loop)
        head_parameters(unwrap(loop.model), self.head)
        if self.steps >= loop.total_steps:
            raise ValueError(
                f"the head trains alone for {self.steps} steps, and the run has {loop.total_steps}: set steps lower, "
                "or freeze everything but the head"
            )

    def awake(self, loop: Any) -> Set[str]:
        """Return the head's parameters, or all."""
        return head_parameters(unwrap(loop.model), self.head) if loop.step < self.steps else set(self.trained)

    def on_step_start(self, loop: Any) -> None:
        """Prepare a step of the head alone, or the switch."""
        super().on_step_start(loop)
        if loop.step < self.steps:
            self._modes = {module: module.training for module in loop.model.modules()}
            loop.model.eval()
        elif loop.step == self.steps:
            loop.optimizer.state.clear()

    def on_before_optimizer_step(self, loop: Any) -> None:
        """Raise the learning rate for the update, and for nothing else: a schedule may go by what it finds."""
        super().on_before_optimizer_step(loop)
        if loop.step < self.steps and self.rate_factor != 1:
            self._rates = [group["lr"] for group in loop.optimizer.param_groups]
            for group in loop.optimizer.param_groups:
                group["lr"] *= self.rate_factor
            self._hook = loop.optimizer.register_step_post_hook(lambda *_: self._rates_back(loop))

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Put back the modes, and the learning rate where the update was passed over."""
        super().on_step_end(loop, metrics)
        if self._modes and "learning_rate" in metrics:
            metrics["learning_rate"] *= self.rate_factor
        for module, mode in self._modes.items():
            module.training = mode
        self._end(loop)

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Put back the learning rate, where a step has failed; the loop has put back the modes of before `fit`."""
        super().on_exception(loop, error)
        self._end(loop)

    def _end(self, loop: Any) -> None:
        self._modes = {}
        self._rates_back(loop)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _rates_back(self, loop: Any) -> None:
        if self._rates:
            for group, rate in zip(loop.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = []


def head_parameters(model: nn.Module, head: Sequence[str] | None = None) -> set[str]:
    """Return the names of the head's parameters.

    Args:
        model: the bare model, with or without adapters.
        head: names of modules, whole or their last parts; None for what a Hugging Face model has beside its
            `base_model`.

    Raises:
        ValueError: the model does not tell, or there is no module of such a name.
    """
    if head is None:
        body = getattr(model, "base_model", None)
        inside = {id(p) for p in body.parameters()} if isinstance(body, nn.Module) else set()
        found = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
        if not inside or not found:
            why = "has no head of its own beside its body" if inside else "does not tell its body from its head"
            raise ValueError(
                f"{type(model).__name__} {why}: name the head's modules in head=, such as head=['lm_head']"
            )
        return found
    chosen: set[int] = set()
    for wanted in head:
        modules = [module for name, module in model.named_modules() if name and ends_in(name, wanted)]
        if not modules:
            near = did_you_mean(wanted, [name for name, _ in model.named_modules()])
            raise ValueError(f'no module of {type(model).__name__} is called "{wanted}", so it has no such head.{near}')
        chosen |= {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
