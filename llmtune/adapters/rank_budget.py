"""AdaLoRA's budget of ranks: after each optimizer step the triplets that matter least are switched off.

    importance of an entry    I = |w * gradient|,  sensitivity = ema(I),  uncertainty = ema(|I - sensitivity|)
    score of a triplet        s(E_i) + mean(s(A_i)) + mean(s(B_i)),  s = sensitivity * uncertainty
    triplets kept             target + (initial - target) * (1 - progress)^3, over all layers together

Zhang et al., "AdaLoRA" (2023), sections 3.2 and 3.3: equations 6 to 12.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.adalora import AdaLoRALinear
from llmtune.adapters.adalora_config import AdaLoRA, adalora_layers
from llmtune.adapters.adalora_orthogonality import AdaLoRAOrthogonality
from llmtune.adapters.attach import record_of
from llmtune.errors import CheckpointError
from llmtune.modules import unwrap
from llmtune.types import Callback


def kept_triplets(
    step: int, *, initial: int, target: int, total_steps: int, warmup_steps: int = 0, final_steps: int = 0
) -> int:
    """Return how many triplets are kept at a step: all, then fewer on a cubic curve, then the target.

    Args:
        step: optimizer steps done, from 1.
        initial: all of them.
        target: how many at the end.
        total_steps, warmup_steps, final_steps: of the whole training, before the curve, and after it.

    >>> from llmtune.adapters import kept_triplets
    >>> [kept_triplets(step, initial=12, target=4, total_steps=5, warmup_steps=1) for step in range(1, 6)]
    [12, 7, 5, 4, 4]
    """
    if step <= warmup_steps:
        return initial
    if step >= total_steps - final_steps:
        return target
    left = 1 - (step - warmup_steps) / (total_steps - final_steps - warmup_steps)
    return int((initial - target) * left**3 + target)


class RankBudget(Callback):
    """Cuts an AdaLoRA adapter's ranks as its record says, in a `TrainingLoop` or in a loop of one's own.

    As a callback it acts after every step: `TrainingLoop(..., callbacks=[RankBudget()], penalties=[
    AdaLoRAOrthogonality()])`. By hand, call `budget.update(model, step)` after `optimizer.step()` and before the
    gradients are dropped. Steps count from 1. Its state is tensors and numbers, so that a resumed run goes on the same.

    A triplet is switched off by setting its E to 0. Until the last cut it may come back: E goes on being trained. From
    then on what is off is set to 0 after every step. As in PEFT, whose `update_and_allocate` this equals, an importance
    is taken of the weight after the step, and of the gradient as it was used, clipped. `trim_ranks` drops what is off.

    Args:
        name: the adapter's name.

    Example:
        >>> from llmtune.adapters import AdaLoRA, RankBudget, attach
        >>> model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5))
        >>> _ = attach(model, AdaLoRA(initial_rank=4, target_rank=2, alpha=8, total_steps=3))
        >>> optimizer, budget = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), RankBudget()
        >>> kept = []
        >>> for step in (1, 2, 3):
        ...     model(torch.ones(2, 5)).square().sum().backward()
        ...     optimizer.step()
        ...     kept.append(budget.update(model, step))
        ...     optimizer.zero_grad()
        >>> kept
        [5, 4, 4]
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}  # of each layer, which triplets are on, [r]; filled by the last cut

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> int:
        """Take note of the gradients, switch off what the step's budget has no room for, and return that budget.

        Args:
            model: with the adapter, its parameters' gradients still there.
            step: optimizer steps done, from 1.

        Raises:
            ValueError: the adapter is no AdaLoRA; the step is not in the training; a parameter has no gradient; or the
                last cut comes before any step was taken note of.
        """
        record, layers = self._record(model), adalora_layers(unwrap(model), self.name)
        if not 1 <= step <= record.total_steps:
            raise ValueError(f"step must be from 1 to the record's total_steps {record.total_steps}; got {step}")
        last = record.total_steps - record.final_steps
        budget = kept_triplets(
            step, initial=sum(layer.rank for layer in layers.values()), target=record.target_rank * len(layers),
            total_steps=record.total_steps, warmup_steps=record.warmup_steps, final_steps=record.final_steps,
        )  # fmt: skip
        if step < last:
            for place, layer in layers.items():
                self._note(place, layer, record)
        if step == last or (record.warmup_steps < step < last and step % record.interval == 0):
            kept = self._choose(layers, budget)
        elif step > last:
            kept = self.kept
            if not kept:
                raise ValueError(f"the last cut, at step {last}, was not made: call update at every step")
        else:
            return budget
        for place, layer in layers.items():
            layer.lora_e.masked_fill_(~kept[place].to(layer.lora_e.device), 0.0)
        if step == last:
            self.sensitivity, self.uncertainty, self.kept = {}, {}, kept
        return budget

    def on_fit_start(self, loop: Any) -> None:
        """Check that the record fits the run.

        Raises:
            ValueError: total_steps is another than the loop's, or the record's penalty is not in the loop.
        """
        record = self._record(loop.model)
        if record.total_steps != loop.total_steps:
            raise ValueError(
                f'adapter "{self.name}" has total_steps={record.total_steps}, and the loop runs {loop.total_steps}: '
                "attach it with the loop's number"
            )
        held = any(isinstance(p, AdaLoRAOrthogonality) and p.name == self.name for p in loop.penalties)
        if record.orthogonality and not held:
            raise ValueError(
                f'adapter "{self.name}" has orthogonality={record.orthogonality}, and the loop has no penalty for it: '
                "add AdaLoRAOrthogonality() to penalties, or attach it with orthogonality=0"
            )

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Update after the loop's step, and add "rank_budget" to the metrics; a step that overflowed is no measure."""
        record = self._record(loop.model)
        if not metrics.get("overflow") or loop.step >= record.total_steps - record.final_steps:
            metrics["rank_budget"] = self.update(loop.model, loop.step)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that was taken note of."""
        return {
            part: {key: value.clone() for key, value in getattr(self, part).items()}
            for part in ("sensitivity", "uncertainty", "kept")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: the state is none of a RankBudget.
        """
        missing = [part for part in ("sensitivity", "uncertainty", "kept") if part not in state]
        if missing:
            raise CheckpointError(f"the saved state has no {missing[0]}: it is none of a RankBudget")
        for part in ("sensitivity", "uncertainty", "kept"):
            setattr(self, part, {key: value.clone() for key, value in state[part].items()})

    def _record(self, model: nn.Module) -> AdaLoRA:
        config = record_of(unwrap(model), self.name).configs[self.name]
        if not isinstance(config, AdaLoRA):
            raise ValueError(f'adapter "{self.name}" is {type(config).__name__}: a RankBudget cuts AdaLoRA')
        return config

    def _note(self, place: str, layer: AdaLoRALinear, record: AdaLoRA) -> None:
        for local in ("lora_a", "lora_e", "lora_b"):
            parameter, key = layer.get_parameter(local), f"{place}.{local}"
            if parameter.grad is None:
                raise ValueError(
                    f"{key} has no gradient: call update after backward and before the gradients are dropped"
                )
            now = (parameter * parameter.grad).abs()
            zero = torch.zeros_like(now)
            before = self.sensitivity.get(key, zero).to(now.device)
            smooth = record.beta1 * before + (1 - record.beta1) * now
            varies = self.uncertainty.get(key, zero).to(now.device)
            self.sensitivity[key] = smooth
            self.uncertainty[key] = record.beta2 * varies + (1 - record.beta2) * (now - smooth).abs()

    def _choose(self, layers: Mapping[str, AdaLoRALinear], budget: int) -> dict[str, Tensor]:
        """Return which triplets of each layer are above all that must go; of equal ones at the border all go."""
        if not self.sensitivity:
            raise ValueError("ranks are to be cut before any step was taken note of: call update at every step")
        scores = {place: self._score(place) for place in layers}
        device = next(iter(layers.values())).lora_e.device
        every = torch.cat([score.to(device) for score in scores.values()])
        gone = every.numel() - budget
        border = every.kthvalue(gone).values if gone > 0 else every.min() - 1
        return {place: score > border.to(score.device) for place, score in scores.items()}

    def _score(self, place: str) -> Tensor:
        def entries(local: str) -> Tensor:
            return self.sensitivity[f"{place}.{local}"] * self.uncertainty[f"{place}.{local}"]

        return entries("lora_e") + (entries("lora_a").mean(1) + entries("lora_b").mean(0))


@torch.no_grad()
def trim_ranks(model: nn.Module, name: str = "default") -> dict[str, int]:
    """Drop the triplets of an AdaLoRA adapter that are off, for good, after the training; the output stays the same.

    The files of the adapter are smaller for it, and say so as PEFT's do. Of a layer with none left one is kept, at 0.

    Args:
        model: a model with the adapter.
        name: the adapter's name.

    Returns:
        The rank that each layer has left, by the bare name of the module adapted.

    Raises:
        ValueError: there is no such adapter, it is no AdaLoRA, it is merged, or nothing of it is on.
    """
    model = unwrap(model)
    record = record_of(model, name)
    config, layers = record.configs[name], adalora_layers(model, name)
    if not isinstance(config, AdaLoRA):
        raise ValueError(f'adapter "{name}" is {type(config).__name__}: only AdaLoRA has ranks to trim')
    if name in record.merged:
        raise ValueError(f'adapter "{name}" is merged into the weights: unmerge it first')
    if not any(bool(layer.lora_e.any()) for layer in layers.values()):
        raise ValueError(f'adapter "{name}" is at 0 everywhere: train it before its ranks are trimmed')
    for layer in layers.values():
        on = layer.lora_e != 0
        on[0] |= ~on.any()
        for local, cut in (("lora_a", layer.lora_a[on]), ("lora_e", layer.lora_e[on]), ("lora_b", layer.lora_b[:, on])):
            flag = layer.get_parameter(local).requires_grad
            setattr(layer, local, nn.Parameter(cut.contiguous(), requires_grad=flag))
        layer.rank = int(on.sum())
    ranks = {place: layer.rank for place, layer in layers.items()}
    record.configs[name] = replace(config, kept_ranks=ranks)
    return ranks
