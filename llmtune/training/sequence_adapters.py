"""Adapters over a sequence of tasks: a new one for each, and what holds it apart from the earlier ones."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from llmtune.adapters.attach import active, adapter_names, set_active
from llmtune.adapters.layer import bare_named_parameters, named_places
from llmtune.adapters.merge import merge
from llmtune.adapters.record import AdapterConfig
from llmtune.adapters.stack import AdapterStack
from llmtune.adapters.targets import names as is_named
from llmtune.errors import did_you_mean
from llmtune.forgetting.inflora import inflora_start
from llmtune.forgetting.orthogonal import check_extent, input_basis
from llmtune.forgetting.orthogonal_lora import OrthogonalLoRA
from llmtune.modules import unwrap
from llmtune.training.part_trains import check_whole
from llmtune.training.sequence_task import Task, TaskMethod, TaskRun


class AdapterPerTask(TaskMethod):
    """A new adapter for each task, the earlier ones frozen and left on, or merged into the weights.

    It stands before the methods that hold or distil, which look at what is trained.

    Args:
        config: of every task's adapter: `LoRA(...)`, or another record.
        merge: fold each task's adapter into the weights for good when the task has ended, so that none is left between
            tasks. What holds the model then stands after this method, and sees it merged, all weights as trained as
            before the adapter: tell `OnlineEWC` and `MemoryAwareSynapses` by `parameters` which ones adapters change.
        also: beginnings of the bare names of parameters that are trained beside the adapters, as ("classifier",) for a
            head that goes on from task to task. An adapter that such a module has is frozen with its task.
        alone: each adapter is trained and scored alone, the others switched off: no task can change another, and none
            helps another, but for what `also` names, which they share. Which task a text is of must be known then.
            Penalties on effective weights have no place beside it: they would pull a task's adapter to the one before.

    Raises:
        TypeError: `also` is one string.
        ValueError: both `merge` and `alone`.
    """

    def __init__(
        self, config: AdapterConfig, *, merge: bool = False, also: Collection[str] = (), alone: bool = False
    ) -> None:
        if isinstance(also, str):
            raise TypeError(f"also must be a list of beginnings of names; got the one string {also!r}")
        if merge and alone:
            raise ValueError("a merged adapter cannot be switched off for another task: give merge or alone, not both")
        self.config, self.merge, self.also, self.alone = config, merge, tuple(also), alone

    def before_task(self, run: TaskRun) -> None:
        """Attach the task's adapter, under the task's name (`adapter_name`).

        Raises:
            ValueError: `also` names what the model has not, or what the adapter copies; and as `attach`.
        """
        model = unwrap(run.model)
        self._check_also(model)
        own = adapter_name(run.task.name)
        with active(model, ()) if self.alone else nullcontext():  # a head's copy is of the one in use: here the base's
            AdapterStack(model).start(self.config, own)
        if self.alone:
            set_active(model, own)
        for name, parameter in bare_named_parameters(model):
            if name.startswith(self.also):
                parameter.requires_grad_(True)

    def _check_also(self, model: nn.Module) -> None:
        """Raise where `also` names nothing, or what each adapter has a copy of."""
        known = [name for name, _ in bare_named_parameters(model)]
        copied = getattr(self.config, "train_modules", None) or ()
        places = [place for place, _ in named_places(model) if copied and is_named(copied, place)]
        for start in self.also:
            chosen = [name for name in known if name.startswith(start)]
            if not chosen:
                raise ValueError(f'no parameter of the model begins with "{start}".{did_you_mean(start, known)}')
            for place in places:
                if any(name.startswith(place + ".") for name in chosen):
                    raise ValueError(
                        f'also names "{start}", of which each task has a copy that runs in its place (train_modules of '
                        f'the adapter, "{place}"): name it in one of the two'
                    )

    def around_scoring(self, model: nn.Module, task: Task) -> AbstractContextManager[Any]:
        """With `alone`, switch to the task's own adapter; none before the task was trained."""
        if not self.alone:
            return nullcontext()
        return active(unwrap(model), [name for name in adapter_names(unwrap(model)) if name == adapter_name(task.name)])

    def after_task(self, run: TaskRun) -> None:
        """Merge the task's adapter, where that is asked for.

        Raises:
            ValueError: as `merge`.
        """
        if self.merge:
            merge(run.model, adapter_name(run.task.name), keep_base=False)

    def rebuild(self, model: nn.Module, finished: Sequence[Task]) -> None:
        """Attach the finished tasks' adapters, but for those that were merged."""
        for task in () if self.merge else finished:
            AdapterStack(unwrap(model)).start(self.config, adapter_name(task.name))


class OrthogonalLoRAPerTask(TaskMethod):
    """O-LoRA: each task's new LoRA is held orthogonal to those of the earlier tasks; after `AdapterPerTask`.

    The earlier ones must be there: not with `merge=True`, under which their A are gone.

    Args:
        strength: 0 or more.
        form: "normalised", "paper" or "code", as in `OrthogonalLoRA`.

    Raises:
        ValueError: the strength or the form is out of range; before a task, it has no adapter of its own, or an
            earlier task's is gone.

    Example:
        >>> from llmtune.adapters import LoRA
        >>> methods = [AdapterPerTask(LoRA(rank=8, alpha=16)), OrthogonalLoRAPerTask(0.5)]

    Reference:
        Wang et al. 2023, "Orthogonal subspace learning for language model continual learning".
    """

    def __init__(self, strength: float, *, form: str = "normalised") -> None:
        self.penalty = OrthogonalLoRA(strength, form=form)

    def before_task(self, run: TaskRun) -> None:
        """Add the penalty, from the second task on.

        Raises:
            ValueError: the task has no adapter, or an earlier one has none.
        """
        there = _check_adapter(run, "OrthogonalLoRAPerTask")
        if lacking := [task for task in run.tasks[: run.index] if adapter_name(task) not in there]:
            raise ValueError(
                f'the adapter of the earlier task "{lacking[0]}" is gone, so nothing would be held apart from it: '
                "OrthogonalLoRAPerTask needs AdapterPerTask without merge=True"
            )
        if run.index:
            run.penalties.append(self.penalty)


class InfLoRAPerTask(TaskMethod):
    """InfLoRA: each task's A is designed from its inputs, outside of what earlier tasks' inputs span, and frozen.

    It stands after `AdapterPerTask`. Of the LoRA B alone is trained, and what lies between tasks is a basis a module.

    Args:
        energy: which share of a task's inputs is protected when it has ended, above 0 to 1, as in `input_basis`.
        examples: of how many of a task's rows the inputs are taken, drawn at random; None for all.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> from llmtune.adapters import LoRA
        >>> methods = [AdapterPerTask(LoRA(rank=8, alpha=16)), InfLoRAPerTask(energy=0.95)]

    Reference:
        Liang and Li 2024, "InfLoRA: interference-free low-rank adaptation for continual learning".
    """

    def __init__(self, energy: float = 0.95, *, examples: int | None = 100) -> None:
        if examples is not None:
            check_whole("examples", examples)
        self.energy, self.examples = check_extent(energy, None), examples
        self.protected: dict[str, Tensor] = {}
        self._places: list[str] = []

    def before_task(self, run: TaskRun) -> None:
        """Set the new adapter's A.

        Raises:
            ValueError: as `inflora_start`; there is no adapter for the task.
        """
        _check_adapter(run, "InfLoRAPerTask")
        batches = run.batches(self.examples)
        report = inflora_start(run.model, adapter_name(run.task.name), batches, protected=self.protected or None)
        self._places = list(report.rows)

    def after_task(self, run: TaskRun) -> None:
        """Protect the task's inputs too."""
        self.protected = input_basis(
            run.model, run.batches(self.examples), energy=self.energy, modules=self._places, extend=self.protected
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the protected bases."""
        return {"protected": self.protected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.protected = dict(state["protected"])


def _check_adapter(run: TaskRun, who: str) -> list[str]:
    """Return the model's adapters; raise where the task has none of its own."""
    there, own = adapter_names(unwrap(run.model)), adapter_name(run.task.name)
    if own not in there:
        raise ValueError(
            f'task "{run.task.name}" needs an adapter "{own}" of its own, and the model has '
            f"{', '.join(there) or 'none'}: put AdapterPerTask(LoRA(...)) before {who}"
        )
    return there


def adapter_name(task: str) -> str:
    """Return what a task's adapter is called: the task's name; or, where no adapter may be called that, what of it may
    stand and a checksum, so that no two tasks share a name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", task).strip("-_")
    return plain if plain == task else f"{plain or 'task'}-{zlib.crc32(task.encode()):08x}"
