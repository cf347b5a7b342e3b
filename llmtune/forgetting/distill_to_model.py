"""Distillation from a second model: learning without forgetting, where the old model is kept as it was."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llmtune.forgetting.distillation import Distillation
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.modules import check_module, reference_pass, unwrap
from llmtune.types import LossFunction


@dataclass(frozen=True)
class DistillToModel(Distillation):
    """A loss plus the divergence of the model's predictions from a teacher model's: learning without forgetting.

    loss(model, batch) + strength * temperature^2 * KL(teacher || student), a mean over the batch's targets. The teacher
    is a second model: for full fine-tuning a frozen copy from before the task, `copy.deepcopy(model)`. It runs in eval
    mode, without gradients, whatever its own state. (Under LoRA, `DistillToBase` needs no copy; `with_teacher` and
    `DistillFromCache` need none either, and run the teacher once.)

    Attributes:
        teacher: a model of the same tokens as the student, on the same device, with no parameter that is trained.
        loss: as in `DistillToBase`.
        strength: factor of the divergence, 0 or more.
        temperature: both sides' logits are divided by it, larger than 0; Li and Hoiem take 2.
        classes: of a classifier, the classes that are compared, each side's softmax being over these alone: how many
            from the first, or their numbers. None for all, which both must have. (Where the head has grown for new
            classes, those that the teacher knows.)

    Raises:
        ValueError: strength, temperature or classes is out of range.
        TypeError: the teacher is no module, or the loss has no `count_targets`.

    Example:
        >>> import torch
        >>> from copy import deepcopy
        >>> from llmtune.testing.models import tiny_llama
        >>> model, ids = tiny_llama(), torch.tensor([[5, 7, 11, 13]])
        >>> loss, parts = DistillToModel(deepcopy(model), strength=1.0)(model, {"input_ids": ids, "labels": ids})
        >>> parts["distillation"].item()
        0.0

    Reference:
        Li and Hoiem 2016, "Learning without forgetting", section 3. avalanche and mammoth leave out temperature^2;
        TRACE hands `F.kl_div` its arguments in the wrong order, so that it computes the other direction.
    """

    teacher: nn.Module
    loss: LossFunction = causal_lm_loss
    strength: float = field(kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    classes: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_module(self.teacher)
        self._check()
        object.__setattr__(self, "classes", checked_classes(self.classes))

    def _teacher_of(self, inner: nn.Module) -> nn.Module:
        teacher = unwrap(self.teacher)
        trained = {id(parameter) for parameter in inner.parameters() if parameter.requires_grad}
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError(
                "the teacher has parameters that are trained with the student, so there is nothing to hold to: give a "
                "copy of the model, copy.deepcopy(model), made before training"
            )
        return teacher

    def _as_teacher(self, inner: nn.Module) -> AbstractContextManager[Any]:
        return reference_pass(unwrap(self.teacher))


def checked_classes(classes: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """Return the classes as an int, a tuple or None; raise ValueError where they are none, or one comes twice."""
    if classes is None or (isinstance(classes, int) and not isinstance(classes, bool) and classes >= 2):
        return classes
    found = tuple(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    if len(found) < 2 or len(set(found)) < len(found) or any(not isinstance(at, int) or at < 0 for at in found):
        raise ValueError(
            "classes must be how many are compared from the first, 2 or more, or their numbers, each once; got "
            f"{classes!r}"
        )
    return found
