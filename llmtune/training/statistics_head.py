"""A classifier's head out of class statistics, task after task, over a body that stands still."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import adapter_chain
from llmtune.adapters.trained_copy import TrainedCopy, running
from llmtune.errors import check_state
from llmtune.forgetting.class_statistics import ClassStatistics
from llmtune.losses.head import model_inputs
from llmtune.modules import reference_pass, unwrap
from llmtune.regularizers.hooked import hooked
from llmtune.training.sequence_task import TaskMethod, TaskRun
from llmtune.types import Batch


class HeadFromStatistics(TaskMethod):
    """Nothing is trained after the first task, and nothing forgotten: each task adds to the sums that make the head.

    After each task the embeddings of its rows go into a `ClassStatistics`, and the head's weight and bias are those of
    linear discriminant analysis over all classes so far. No row is kept. All classes are numbered through, one head
    over all of them. In an adapter's `train_modules` it is the copy in use that is set.

    Nothing else may change the body between tasks: sums of embeddings of two bodies are of neither. Methods that take
    something from a task's training (`EWCPerTask`, `SynapticIntelligence`) find none, and raise.

    Args:
        head: the name of the linear head in the model without adapters, as "classifier" (BERT), "classifier.out_proj"
            (RoBERTa), "score" (Llama, GPT-2). It needs a bias, which those two lack: `model.score = nn.Linear(E, C)`
            gives them one.
        adapt_first: train on the first task as it is arranged, by the loop, and freeze the model then; else it is
            frozen from the start, and stays as it was pretrained.
        shrinkage: of the covariance, as in `ClassStatistics.head`.
        embed: a function of (model, batch) that returns [B, E], what enters the head; left out, what does enter it in a
            forward pass, in eval mode. Give one where the head is called on every token (Llama and GPT-2 classifiers).

    Attributes:
        statistics: the sums; None before the first task has ended.

    Raises:
        ValueError: the shrinkage is out of range.
        TypeError: head is no name, or embed cannot be called.

    Example:
        >>> from llmtune.testing.models import tiny_bert
        >>> from llmtune.data import collate_padded
        >>> from llmtune.losses import classification_loss
        >>> from llmtune.training import LoopSettings, Task, TaskSequence
        >>> def rows(*classes):
        ...     return [{"input_ids": [5, 20 + label, 7 + n], "labels": label} for n in range(5) for label in classes]
        >>> tasks = [Task("first", rows(0, 1), rows(0, 1)), Task("second", rows(2, 3), rows(2, 3))]
        >>> history = TaskSequence(
        ...     tiny_bert(labels=4), tasks, settings=LoopSettings(max_steps=1, progress=False), score="accuracy",
        ...     methods=[HeadFromStatistics("classifier")], loss=classification_loss, collate=collate_padded,
        ... ).run()
        >>> [len(steps) for steps in history.loops]  # no step was taken
        [0, 0]

    Hayes and Kanan 2020 (`ClassStatistics`) for the head; that the body is adapted on the first task alone is Panos et
    al., "First Session Adaptation: A Strong Replay-Free Baseline for Class-Incremental Learning" (2023).
    """

    def __init__(
        self,
        head: str,
        *,
        adapt_first: bool = False,
        shrinkage: float = 0.1,
        embed: Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> None:
        if not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage must be above 0 and at most 1; got {shrinkage!r}")
        if not isinstance(head, str) or not (embed is None or callable(embed)):
            raise TypeError(f"head is a module's name, embed a function of (model, batch); got {head!r} and {embed!r}")
        self.head, self.adapt_first, self.shrinkage, self.embed = head, adapt_first, shrinkage, embed
        self.statistics: ClassStatistics | None = None

    def before_task(self, run: TaskRun) -> None:
        """Freeze the model, but for a first task it is adapted to.

        Raises:
            ValueError: the model has no such head, it is no linear layer with a bias, or an adapter changes what it
                gives.
        """
        self._linear(run.model)
        if run.index or not self.adapt_first:
            run.model.requires_grad_(False)
            run.train = False

    def after_task(self, run: TaskRun) -> None:
        """Add the task's rows to the sums, and set the head.

        Raises:
            ValueError: a batch has no labels, what enters the head is not one vector a row, the head has another shape
                than before or too few digits for its numbers, or as `ClassStatistics.add`. Nothing was done.
            TypeError: as `ClassStatistics.add`.
        """
        place, linear = self._linear(run.model)
        statistics = ClassStatistics(*linear.weight.shape)
        if self.statistics is not None:
            statistics.load_state_dict(self.statistics.state_dict())
        model = unwrap(run.model)
        device = next(model.parameters()).device
        with reference_pass(model):
            for batch in run.batches():
                labels = batch.get("labels")
                if not isinstance(labels, Tensor):
                    raise ValueError(f'a batch must have "labels", a tensor [B] of classes; got {labels!r}')
                held = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
                statistics.add(self._embeddings(model, place, held), labels)
            weight, bias = (new.to(linear.weight.dtype) for new in statistics.head(shrinkage=self.shrinkage))
            if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                raise ValueError(
                    f"the head's numbers are too large for {weight.dtype}: load the model in float32 or bfloat16, or "
                    "give a larger shrinkage"
                )
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        self.statistics = statistics

    def state_dict(self) -> dict[str, Any]:
        """Return the sums; nothing before the first task has ended."""
        return {} if self.statistics is None else self.statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.statistics = None
        if state:
            check_state(state, ("sums",), "HeadFromStatistics")
            self.statistics = ClassStatistics(*state["sums"].shape)
            self.statistics.load_state_dict(state)

    def _embeddings(self, model: nn.Module, place: nn.Module, batch: Batch) -> Tensor:
        if self.embed is not None:
            return self.embed(model, batch)
        seen: list[Any] = []
        with hooked([(place, "before", lambda _, args, kwargs: seen.extend(args[:1]))]):
            model(**model_inputs(model, batch))
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim != 2:
            came = [list(one.shape) if isinstance(one, Tensor) else one for one in seen]
            raise ValueError(
                f"{self.head} must be given one vector a row, [B, E], once; it was given {came}: say what enters it by "
                "embed=, as in lambda model, batch: sentence_embeddings(model, batch, pooling=...)"
            )
        return seen[0]

    def _linear(self, model: nn.Module) -> tuple[Any, Any]:
        """Return the module at the head's place, which is called, and the linear layer that runs there."""
        try:
            found = unwrap(unwrap(model).get_submodule(self.head))  # through adapters' copies, which hand on names
        except AttributeError:
            found = None
        chain = adapter_chain(found) if found is not None else []
        for layer in chain:
            if layer.takes_part and not isinstance(layer, TrainedCopy):
                raise ValueError(
                    f'adapter "{layer.adapter_name}" changes what "{self.head}" gives, so that no head could be set '
                    "there: leave it out of the adapter's targets, or name it in train_modules instead"
                )
        linear: Any = None if found is None else unwrap(running(found))
        own = isinstance(linear, nn.Linear) and isinstance(linear.weight, nn.Parameter)  # weight norm computes one
        if not (own and linear.weight.is_floating_point() and isinstance(linear.bias, nn.Parameter)):
            raise ValueError(
                f'"{self.head}" must be a linear head of the model (nn.Linear), with a weight [C, E] and a bias of its '
                f"own; found {'nothing of that name' if linear is None else type(linear).__name__}. Where the head has "
                "no bias (Llama, GPT-2), put one in its place that has: model.score = nn.Linear(E, C)"
            )
        return found, linear
