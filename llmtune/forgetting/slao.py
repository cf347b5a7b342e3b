"""SLAO: one LoRA for all tasks. Each is trained from a basis of the last one's A, and merged into what there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import record_of
from llmtune.adapters.config import LoRA
from llmtune.adapters.layer import adapter_chain, named_places, wide
from llmtune.adapters.lora import LowRankLayer
from llmtune.errors import CheckpointError, check_state
from llmtune.modules import unwrap
from llmtune.types import Callback


@torch.no_grad()
def orthonormal_start(lora_a: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows of A, from which the next task's A starts.

    A^T = Q R, the diagonal of R positive;   the start is Q^T

    With that sign Q is unique, the same on every device, where A has full rank.

    Args:
        lora_a: A, [r, n], r at most n, finite.

    Returns:
        [r, n] in A's dtype, the rows orthonormal to its rounding.

    Raises:
        ValueError: there are more rows than columns, or an entry is not finite.

    Example:
        >>> orthonormal_start(torch.tensor([[3.0, 0.0, 0.0], [1.0, -2.0, 0.0]]))
        tensor([[ 1.,  0.,  0.],
                [ 0., -1.,  0.]])
    """
    if lora_a.ndim != 2 or lora_a.shape[0] > lora_a.shape[1]:
        raise ValueError(f"A must be [r, n] with r at most n to have an orthonormal basis; got {[*lora_a.shape]}")
    if not bool(lora_a.isfinite().all()):
        raise ValueError("A is not finite: it has no basis")
    q, r = torch.linalg.qr(wide(lora_a).T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    return (q * signs).T.to(lora_a.dtype) + 0.0  # no -0


def merged_b(merged: Tensor, tuned: Tensor, task: int) -> Tensor:
    """Return the B of all tasks so far: what there was, moved towards the newest task's by 1 / sqrt(task).

    merged + (tuned - merged) / sqrt(task)

    Args:
        merged: [rows, r], of the tasks before.
        tuned: [rows, r], as the newest task has trained it.
        task: the newest task's number, from 1; on the first the outcome is `tuned`.

    Returns:
        [rows, r] in their dtype, computed in at least float32.

    Raises:
        ValueError: the shapes differ, or the number is no whole number of at least 1.

    Example:
        >>> merged_b(torch.zeros(2, 1), torch.full((2, 1), 6.0), 4)
        tensor([[3.],
                [3.]])
    """
    if merged.shape != tuned.shape:
        raise ValueError(f"B of the tasks before is {[*merged.shape]}, that of the newest {[*tuned.shape]}")
    if isinstance(task, bool) or not isinstance(task, int) or task < 1:
        raise ValueError(f"task is a whole number from 1; got {task!r}")
    if task == 1:
        return tuned.clone()
    before = wide(merged)
    return (before + (wide(tuned) - before) / task**0.5).to(tuned.dtype)


class SLAO(Callback):
    """One adapter for a sequence of tasks in constant memory: each task is trained apart and merged into it.

    start_task    from the second on: A = `orthonormal_start` of the last task's A; B = the last task's, unmerged
    finish_task   B = `merged_b` of what there was and the task's; A = the task's

    Between `finish_task` and `start_task` the model holds the merge, to evaluate, save and use. Beside the adapter one
    B a module is kept: while a task is trained the merged one, between tasks the unmerged one. Give the object to the
    loop as a callback: a checkpoint then has it.

    The start of a task is no function the model had before: B meets Q^T, not the A it was trained with; nor is the
    merge an average of changes B A, as it pairs a mean of Bs with the newest A. That is the method. Where we differ:
    public code starts from the merged B, where the paper's start is the task's own; and leaves rows of zeros where the
    diagonal of R is 0. What the adapter trains beside A and B (biases, whole modules, rows of new tokens) is not
    merged: it goes on from task to task.

    Args:
        model: with the adapter.
        name: the adapter's name: a LoRA.

    Attributes:
        tasks: how many tasks are finished.
        training: whether a task is started and not finished.

    Raises:
        ValueError: there is no such adapter; it is no plain LoRA, starts from the weights, trains biases beside B, is
            merged into the weights, or has more ranks than a module has inputs.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> _ = attach(model, LoRA(rank=4, alpha=8))
        >>> slao = SLAO(model)
        >>> for task in ("maths", "french"):
        ...     slao.start_task()  # then train, with callbacks=[slao]
        ...     slao.finish_task()  # then evaluate
        >>> slao.tasks
        2

    Reference:
        Qiao and Mahdavi 2025, "Merge before Forget: A Single LoRA Continual Learning via Continual Merging" (arXiv
        2512.23017), the method's section; the formulas as reviews of the paper and public code quote them.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.model, self.name = model, name
        self.tasks = 0
        self.training = False
        self._other: dict[str, Tensor] = {}  # while training the merged B by place, between tasks the unmerged one
        self._layers()

    @torch.no_grad()
    def start_task(self) -> None:
        """Put the start of the next task into the adapter; on the first task leave it as it is.

        Raises:
            ValueError: a task is started already; or as when the object is made.
        """
        if self.training:
            raise ValueError(f"task {self.tasks + 1} is started already: finish_task() first")
        layers = self._layers()
        starts = {place: orthonormal_start(layer.lora_a) for place, layer in layers.items() if self.tasks}
        for place, layer in layers.items() if self.tasks else ():
            tuned, self._other[place] = self._other[place], layer.lora_b.detach().clone()
            layer.lora_b.copy_(tuned)
            layer.lora_a.copy_(starts[place])
        self.training = True

    @torch.no_grad()
    def finish_task(self) -> None:
        """Merge what the task has trained, and put the merge into the adapter.

        Raises:
            ValueError: no task is started, or an entry of A or B is not finite; or as when the object is made.
        """
        if not self.training:
            raise ValueError("no task is started: start_task() before training")
        layers = self._layers()
        for place, layer in layers.items():
            if not bool(layer.lora_a.isfinite().all()) or not bool(layer.lora_b.isfinite().all()):
                raise ValueError(f"the LoRA at {place} is not finite: nothing has been merged")
        for place, layer in layers.items():
            tuned = layer.lora_b.detach().clone()
            before = self._other.get(place, tuned).to(tuned.device)
            self._other[place] = tuned
            layer.lora_b.copy_(merged_b(before, tuned, self.tasks + 1))
        self.tasks, self.training = self.tasks + 1, False

    def on_fit_start(self, loop: Any) -> None:
        """Refuse to train on the merge itself: start_task() comes first; see `Callback`.

        Raises:
            ValueError: no task is started.
        """
        if not self.training:
            raise ValueError("SLAO trains each task from its own start: call start_task() before fit()")

    def state_dict(self) -> dict[str, Any]:
        """Return the number of tasks and the B that is not in the adapter; save the adapter beside it."""
        other = {place: b.clone() for place, b in self._other.items()}
        return {"tasks": self.tasks, "training": self.training, "b": other}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; the adapter is loaded by itself.

        Raises:
            CheckpointError: a B is missing or has another shape: the state is another adapter's.
        """
        check_state(state, ("tasks", "training", "b"), "SLAO")
        layers, other = self._layers(), dict(state["b"])
        needed = layers if state["tasks"] else {}
        for place in (*needed, *other):
            found = other.get(place)
            if place not in layers or found is None or found.shape != layers[place].lora_b.shape:
                raise CheckpointError(
                    f'the saved SLAO state does not fit adapter "{self.name}" at {place}: is it another adapter\'s?'
                )
        self._other = {place: b.detach().clone().to(layers[place].lora_b) for place, b in other.items()}
        self.tasks, self.training = int(state["tasks"]), bool(state["training"])

    def _layers(self) -> dict[str, LowRankLayer]:
        """Return the adapter's layers by the bare name of the module, checked."""
        model, name = unwrap(self.model), self.name
        record = record_of(model, name)
        config = record.configs[name]
        if not isinstance(config, LoRA) or config.decomposes:
            raise ValueError(f'adapter "{name}" is {type(config).__name__}: SLAO merges the A and B of a plain LoRA')
        if config.target_parameters or config.lora_bias:
            what = "target_parameters" if config.target_parameters else "lora_bias"
            raise ValueError(f'adapter "{name}" has {what}, which SLAO does not merge: leave it out')
        if name in record.merged:
            raise ValueError(f'adapter "{name}" is merged into the weights: unmerge it first')
        found = {
            place: layer
            for place, module in named_places(model)
            for layer in adapter_chain(module)
            if layer.adapter_name == name and isinstance(layer, LowRankLayer)
        }
        if not found:
            raise ValueError(f'adapter "{name}" adapts no module by LoRA: there is nothing to merge')
        for place, layer in found.items():
            if layer.start_a is not None:
                raise ValueError(f'adapter "{name}" starts from the weights: use initialise="kaiming"')
            if layer.lora_a.shape[0] > layer.lora_a.shape[1]:
                raise ValueError(f"the rank at {place} is above its inputs' {layer.lora_a.shape[1]}: take a lower one")
        return found
