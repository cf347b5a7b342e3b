"""Online EWC: one Fisher information and one anchor for however many tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.effective import Choice
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.forgetting.importance import ImportancePenalty, check_covers
from llmtune.forgetting.likelihood import Kind, Unit
from llmtune.gradients.per_example import Method
from llmtune.types import Batch


class OnlineEWC(ImportancePenalty):
    """EWC for a sequence of tasks, with the memory of one.

    penalty(model) = strength / 2 * sum_i F~_i (theta_i - anchor_i)^2,   F~ <- gamma F~ + F of the task just finished

    The anchor is where the model was at the end of the latest task; before the first is finished the penalty is 0.
    theta is the effective parameter, as in `EWC`: under LoRA W + s B A, with the frozen W as its own anchor. (A and B
    apart would not do: the Fisher information of A is exactly 0 while B = 0.) Merge an adapter before `finish_task`,
    not after: the anchor's frozen weight would have changed, which raises. Say by `parameters` what it had changed, for
    without the adapter all weights count as trained and would be held.

    All of it, tensors included, is in `state_dict`, and so in every checkpoint of a run. It has no hooks: it works in
    `TrainingLoop`, in a plain loop (`(loss + penalty(model)).backward()`, once a step) and in Hugging Face's Trainer.

    Args:
        strength: 0 or more.
        gamma: how much of the earlier tasks' information is kept at each new one, above 0 and at most 1; with 1 it is
            the sum over tasks.
        parameters: bare names, or a function of one; left out, what is trained, or changed by an active adapter, when a
            task is finished. What is held once stays held.
        dtype: as in `EWC`; sums over tasks are made in float32 before they are rounded.
        device: as in `EWC`.

    Raises:
        ValueError: a number is out of its range.
        TypeError: `parameters` is one string.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> penalty = OnlineEWC(strength=10.0, gamma=0.9)
        >>> batches = [(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
        >>> penalty(model).item()
        0.0
        >>> penalty.finish_task(model, batches, kind="exact")
        >>> penalty.tasks, penalty(model).item()
        (1, 0.0)

    Reference:
        Schwarz et al. 2018, "Progress & compress", online EWC; Huszar 2018, "Note on the quadratic penalties in elastic
        weight consolidation". The paper's penalty has gamma F~, so its strength times gamma is ours, and scales each
        task's Fisher information to one size; here F is as it is, so that a task's weight follows from its data.
        mammoth leaves out the 1/2, weights each squared gradient by the label's probability, and divides by a count
        that is off in the last batch.
    """

    source = "fisher"

    def __init__(
        self, strength: float, *, gamma: float = 1.0, parameters: Choice = None, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(strength, parameters=parameters, dtype=dtype, device=device)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1; got {gamma}")
        self.gamma = float(gamma)

    def finish_task(
        self,
        model: nn.Module,
        batches: Iterable[Batch | tuple[Tensor, Tensor]] | None = None,
        *,
        fisher: Mapping[str, Tensor] | None = None,
        kind: Kind = "sampled",
        unit: Unit = "sequence",
        method: Method = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        """Take in the Fisher information of the task just learned, and hold the model where it is now.

        Args:
            model: as it is at the end of the task.
            batches: of that task, as `diagonal_fisher` takes them; or None with `fisher`.
            fisher: {bare name: tensor of the parameter's shape}, 0 or more, of all parameters that are to be held.
            kind: as in `diagonal_fisher`, and so the others; they have no meaning beside `fisher`.
            unit: "sequence" or "token".
            method: "auto", "loop" or "hooks".
            generator: draws the targets of "sampled".

        Raises:
            ValueError: not one of batches and fisher is given; no example has a target; or the Fisher information is
                negative, not finite, another model's, or lacks a parameter that is held. Nothing has changed then.
        """
        if (batches is None) == (fisher is None):
            raise ValueError("finish_task needs the task's batches, or its fisher, and not both")
        if fisher is None:
            assert batches is not None
            fisher = diagonal_fisher(
                model, batches, kind=kind, unit=unit, parameters=self._names(model), method=method, generator=generator
            )
        elif not fisher:
            raise ValueError("fisher names no parameter: there is nothing to hold")
        check_covers(fisher, self.importance, what="Fisher information")
        self._hold(model, fisher, keep=self.gamma, what="Fisher information")

    def _numbers(self) -> dict[str, Any]:
        return {**super()._numbers(), "gamma": self.gamma}
