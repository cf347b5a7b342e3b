"""Penalties, losses and weights over a sequence of tasks, each a few lines around a part that works alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from llmtune.adapters.anchor import check_strength
from llmtune.adapters.attach import adapter_names
from llmtune.adapters.effective import anchor_of, choose_parameters
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import check_kind, diagonal_fisher
from llmtune.forgetting.importance import check_storage
from llmtune.losses.classification import classification_loss
from llmtune.losses.own_classes import OwnClassesLoss
from llmtune.modules import unwrap
from llmtune.regularizers.l2sp import L2SP
from llmtune.training.part_trains import check_whole
from llmtune.training.sequence_task import TaskMethod, TaskRun, labels_of
from llmtune.types import Callback
from llmtune.weights.interpolation import interpolate


class EWCPerTask(TaskMethod):
    """Elastic weight consolidation with a penalty for every earlier task, each task's Fisher information and anchor
    kept.

    The loss of task t plus strength / 2 * sum over tasks k < t of sum_i F_ki (theta_i - anchor_ki)^2. Memory and cost
    grow with the number of tasks: each keeps two tensors the size of what is trained.

    Args:
        strength: 0 or more, the same for all tasks.
        kind: of the Fisher information, as in `diagonal_fisher`.
        unit: as in `diagonal_fisher`.
        examples: of how many of a task's rows it is taken, drawn at random; None for all.
        parameters: bare names, or a function of one, that says what is held; left out, all that the task trains, as
            the methods before this one have arranged it.
        dtype, device: what is held is rounded to and where it stays, as in `EWC`.

    Raises:
        ValueError: strength is negative or not finite, `examples` is no whole number of at least 1, kind or unit is
            unknown, or `dtype` is none of floats.

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", equation 3; that old tasks'
        penalties are summed rather than replaced is said in section 2.1 there. Huszar 2018 shows that this counts early
        tasks too often; one running penalty is `OnlineEWC`'s.
    """

    def __init__(
        self,
        strength: float,
        *,
        kind: Literal["sampled", "exact", "empirical"] = "sampled",
        unit: Literal["sequence", "token"] = "sequence",
        examples: int | None = None,
        parameters: Collection[str] | Callable[[str], bool] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.strength, self.dtype, self.device = check_storage(strength, dtype, device)
        if examples is not None:
            check_whole("examples", examples)
        check_kind(kind, unit)
        self.kind, self.unit = kind, unit
        self.examples, self.parameters = examples, parameters
        self.held: dict[str, dict[str, Mapping[str, Any]]] = {}  # by task: "fisher" and "anchor"
        self._chosen: list[str] = []

    def before_task(self, run: TaskRun) -> None:
        """Add a penalty for each earlier task, and note what this one trains."""
        self._chosen = list(choose_parameters(run.model, self.parameters))
        run.penalties += [self._penalty(past["fisher"], past["anchor"]) for past in self.held.values()]

    def after_task(self, run: TaskRun) -> None:
        """Take the Fisher information and the anchor of the trained task."""
        fisher = diagonal_fisher(
            run.model, run.batches(self.examples), kind=self.kind, unit=self.unit, parameters=self._chosen
        )
        made = self._penalty(fisher, anchor_of(run.model, self._chosen))  # rounds, and takes them where they stay
        self.held[run.task.name] = {"fisher": made.fisher, "anchor": {n: a.base for n, a in made.anchors.items()}}

    def _penalty(self, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> EWC:
        return EWC(fisher, anchor, self.strength, dtype=self.dtype, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return each finished task's Fisher information and anchor."""
        return {"tasks": list(self.held), "held": list(self.held.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.held = dict(zip(state["tasks"], state["held"], strict=True))


class L2SPToLast(TaskMethod):
    """Holds each task but the first to the weights that the one before left: `L2SP` with a new anchor every task.

    Args:
        strength: 0 or more.
        new: names of parameters, or a function of one, that are not held, as in `L2SP`: those of a head.

    Raises:
        ValueError: strength is negative or not finite.
    """

    def __init__(self, strength: float, *, new: Collection[str] | Callable[[str], bool] | None = None) -> None:
        check_strength("strength", strength)
        self.strength, self.new = float(strength), new

    def before_task(self, run: TaskRun) -> None:
        """Add the penalty, anchored at the model as it is."""
        if run.index:
            run.penalties.append(L2SP(run.model, self.strength, new=self.new))


class InterpolatePerTask(TaskMethod):
    """After each task but the first the weights go back some of the way to where the task began: WiSE-FT, each time.

    theta = before + alpha (after - before)

    It is of what the task has trained, and of parameters alone: running statistics stay those of the task's end. A copy
    of what goes back is held while a task runs. A method that learns from the task's end (a Fisher information) stands
    after this one, to see the weights that are left.

    Args:
        alpha: 0 (the task leaves no trace in the weights) to 1 (all of it stays).
        parameters: bare names, or a function of one, that says what goes back; left out, all that the task trains. A
            head whose rows are the task's own is best left out: `lambda name: "classifier" not in name`.

    Raises:
        ValueError: alpha is out of range; before a task, `parameters` chooses nothing, or the model has adapters: the
            line between two states of A and B is none of their products.

    Example:
        >>> method = InterpolatePerTask(0.7, parameters=lambda name: "classifier" not in name)

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"; see `interpolate`.
    """

    def __init__(self, alpha: float, *, parameters: Collection[str] | Callable[[str], bool] | None = None) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be a number from 0 to 1, the share of the task's way; got {alpha!r}")
        self.alpha, self.parameters = float(alpha), parameters
        self._before: dict[str, Tensor] = {}

    def before_task(self, run: TaskRun) -> None:
        """Keep where the task begins.

        Raises:
            ValueError: `parameters` chooses nothing, or a name is not the model's.
        """
        idle = not run.train or not any(parameter.requires_grad for parameter in run.model.parameters())
        chosen = {} if idle else choose_parameters(run.model, self.parameters)
        self._before = {n: entry.parameter.detach().clone() for n, entry in chosen.items() if run.index}
        run.callbacks.append(_RefusesAdapters())

    @torch.no_grad()
    def after_task(self, run: TaskRun) -> None:
        """Go back.

        Raises:
            ValueError: a weight is not finite.
        """
        if not self._before:
            return
        now = {name: entry.parameter for name, entry in choose_parameters(run.model, list(self._before)).items()}
        for name, value in interpolate(self._before, {n: p.detach() for n, p in now.items()}, self.alpha).items():
            now[name].copy_(value)
        self._before = {}


class _RefusesAdapters(Callback):
    def on_fit_start(self, loop: Any) -> None:
        """Raise before the first step, whichever method has attached them."""
        if there := adapter_names(unwrap(loop.model)):
            raise ValueError(
                f"InterpolatePerTask goes back with plain weights, and the model has the adapters {', '.join(there)}: "
                "leave it out, and scale an adapter by interpolated() after training"
            )


class OwnClasses(TaskMethod):
    """Each task's rows are told apart among the task's own classes: `OwnClassesLoss`, of the labels of its rows.

    For a head over the classes of all tasks. It stands in the place of `classification_loss`, so before the methods
    that put something around the loss; rows that a buffer replays are told from all classes.
    """

    def before_task(self, run: TaskRun) -> None:
        """Set the loss.

        Raises:
            ValueError: a row has no labels, the rows are of fewer than two classes, or the loss is another one, which
                would be lost.
            TypeError: the labels are no integers.
        """
        if run.loss != classification_loss:
            raise ValueError(
                f"OwnClasses stands in the place of classification_loss, and the loss here is {run.loss!r:.80}, which "
                "would be lost: give the sequence loss=classification_loss, and put OwnClasses before the methods that "
                "put something around the loss"
            )
        labels = labels_of(run.task)
        if len(labels) < 2:
            raise ValueError(
                f'OwnClasses tells two or more classes apart, and the rows of task "{run.task.name}" are of '
                f"{list(labels)}: leave the method out, or give a task more classes"
            )
        run.loss = OwnClassesLoss(labels)


class OverTasks(TaskMethod):
    """One part for all tasks that learns from each: a penalty or a callback that is told when a task ends.

    Args:
        part: a `Penalty`, which may be a `Callback` too, or a `Callback` that is none; with `state_dict` and
            `load_state_dict`.
        finish: called after each task with the part and the `TaskRun`: what the part takes from the trained task, as in
            `lambda part, run: part.finish_task(run.model, run.batches(100))`.
        start: called before each task with the same; left out, the part needs no telling.

    Raises:
        TypeError: the part is neither, or has no state to save; or `finish` or `start` cannot be called.

    Example:
        >>> class Count:
        ...     seen = 0
        ...     def __call__(self, model):
        ...         return 0.0 * sum(parameter.sum() for parameter in model.parameters())
        ...     def finish_task(self, batches):
        ...         self.seen += sum(len(batch["labels"]) for batch in batches)
        ...     def state_dict(self):
        ...         return {"seen": self.seen}
        ...     def load_state_dict(self, state):
        ...         self.seen = state["seen"]
        >>> method = OverTasks(Count(), lambda part, run: part.finish_task(run.batches()))
    """

    def __init__(
        self, part: Any, finish: Callable[[Any, TaskRun], Any], *, start: Callable[[Any, TaskRun], Any] | None = None
    ) -> None:
        if isinstance(part, type) or (not callable(part) and not isinstance(part, Callback)):
            raise TypeError(f"a penalty, called with the model, or a Callback is expected; got {part!r}")
        if not callable(finish) or not (start is None or callable(start)):
            raise TypeError(f"finish and start are called with the part and the run; got {finish!r} and {start!r}")
        for name in ("state_dict", "load_state_dict"):
            if not callable(getattr(part, name, None)):
                raise TypeError(f"the part must have state_dict and load_state_dict; {part!r} has no {name}")
        self.part, self.finish, self.start = part, finish, start

    def before_task(self, run: TaskRun) -> None:
        """Give the part to the task's loop."""
        if self.start is not None:
            self.start(self.part, run)
        (run.penalties if callable(self.part) else run.callbacks).append(self.part)

    def after_task(self, run: TaskRun) -> None:
        """Tell the part that the task has ended."""
        self.finish(self.part, run)

    def state_dict(self) -> dict[str, Any]:
        """Return the part's state."""
        return dict(self.part.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give it back."""
        self.part.load_state_dict(state)
