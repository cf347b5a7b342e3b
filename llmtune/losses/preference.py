"""Learning from preferences: of two answers the preferred one shall gain more over a reference than the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.rows import Reduction, check_reduction, reduced
from llmtune.losses.sequence import sequence_log_probabilities
from llmtune.modules import reference_pass, unwrap
from llmtune.types import Batch

Kind = Literal["sigmoid", "ipo"]
KINDS = ("sigmoid", "ipo")
REFERENCE = ("reference_chosen", "reference_rejected")


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the loss of direct preference optimization, from the log-probabilities of pairs of answers.

    h       = (chosen - reference_chosen) - (rejected - reference_rejected)
    sigmoid: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
    ipo:     (h - 1 / (2 beta))^2

    "sigmoid" is DPO (Rafailov et al. 2023, equation 7); with label smoothing e it is conservative DPO, which takes it
    that a share e of the preferences is the wrong way round (Mitchell 2023, equation 3). Its slope ends where beta h =
    log((1 - e) / e); without smoothing it never does. "ipo" (Azar et al. 2024, equation 17, with beta for tau) pulls
    the gap to 1 / (2 beta) and no further.

    Where we differ: for "ipo" the paper has log p of whole answers. TRL divides each answer's log-ratio by its length
    first, by which 1 / (2 beta) means another gap. Here h is made of what is given: sums give the paper's loss,
    `sequence_log_probabilities(..., per_token=True)` TRL's. TRL's `loss_type="robust"` is another smoothing, unbiased
    and unbounded below (Chowdhury et al. 2024); it is not this one.

    Args:
        chosen: [B], log-probabilities of the preferred answers under the model.
        rejected: [B], of the others.
        reference_chosen: [B], of the preferred answers under the reference.
        reference_rejected: [B], of the others.
        beta: larger than 0; how dear it is to leave the reference.
        kind: "sigmoid" or "ipo".
        label_smoothing: e, 0 to below 0.5; for "sigmoid" only.
        reduction: "mean" over pairs, "sum", or "none": [B].

    Returns:
        A scalar, or [B] for "none"; in at least float32. Gradient flows to all that ask for one.

    Raises:
        ValueError: shapes differ, an option is out of range or without effect, or there are no pairs and the mean is
            asked for.

    Example:
        >>> import torch
        >>> chosen, rejected = torch.tensor([-3.0]), torch.tensor([-5.0])
        >>> round(dpo_loss(chosen, rejected, chosen, rejected).item(), 4)  # no gain yet: log 2
        0.6931
    """
    _check_options(beta, kind, label_smoothing)
    check_reduction(reduction)
    four = (chosen, rejected, reference_chosen, reference_rejected)
    if chosen.ndim != 1 or any(given.shape != chosen.shape for given in four):
        raise ValueError(
            "chosen, rejected and the reference's two must be log-probabilities [B], one a pair; got shapes "
            f"{', '.join(str([*given.shape]) for given in four)}"
        )
    if reduction == "mean" and len(chosen) == 0:
        raise ValueError("the mean needs at least one pair; got none")
    chosen, rejected, reference_chosen, reference_rejected = (at_least_float32(given) for given in four)
    gap = (chosen - reference_chosen) - (rejected - reference_rejected)
    if kind == "ipo":
        losses = (gap - 1 / (2 * beta)).square()
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * gap)
        if label_smoothing:
            losses = losses - label_smoothing * F.logsigmoid(-beta * gap)
    return reduced(losses, None, losses.shape, reduction)


@dataclass(frozen=True)
class DPOLoss:
    """Mean over pairs of `dpo_loss`; a batch holds each pair's two answers behind each other.

    `llmtune.data.collate_preferences` makes the batches: rows 2i and 2i + 1 are pair i's preferred and other answer, in
    one forward pass. The reference is either the model itself under `reference`, most simply with its adapters off, so
    that no second model is held; or numbers in the batch, "reference_chosen" and "reference_rejected", computed before
    training by `sequence_log_probabilities`.

    Where we differ: under `reference` the model is in eval mode, without gradient, and the random state is as before
    afterwards, so that dropout neither blurs the reference nor changes with its presence. The policy keeps its dropout.
    TRL instead sets every dropout of the model to 0 unless told not to, and if told so, runs an adapter model's
    reference with dropout. The logits [2B, T, V] are never held.

    Attributes:
        beta: larger than 0; how dear it is to leave the reference.
        kind: "sigmoid" (DPO) or "ipo"; see `dpo_loss`.
        label_smoothing: share of preferences taken to be wrong, 0 to below 0.5; for "sigmoid" only.
        per_token: divide each answer's log-probability by its number of labels. With "ipo" that is TRL's form, with
            "sigmoid" the length-normalised DPO of Tulu 3 (Lambert et al. 2024). Off is the papers' form.
            Precomputed references must have been computed alike.
        reference: `reference(model)` is a context manager under which the model is the reference:
            `llmtune.adapters.disabled`, or `lambda model: active(model, ["sft"])` for one with adapters of its own.

    Raises:
        ValueError: an option is out of range or without effect.
        TypeError: the reference is no function.

    Example:
        >>> import torch
        >>> from llmtune.adapters import LoRA, attach, disabled
        >>> from llmtune.data import collate_preferences
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> _ = attach(model, LoRA(rank=4, alpha=8))
        >>> batch = collate_preferences([{"prompt": [5, 7], "chosen": [11, 2], "rejected": [13, 17, 2]}])
        >>> loss, parts = DPOLoss(reference=disabled)(model, batch)
        >>> round(loss.item(), 4)
        0.6931
    """

    beta: float = 0.1
    kind: Kind = "sigmoid"
    label_smoothing: float = 0.0
    per_token: bool = False
    reference: Callable[[nn.Module], AbstractContextManager[Any]] | None = None

    def __post_init__(self) -> None:
        _check_options(self.beta, self.kind, self.label_smoothing)
        if self.reference is not None and not callable(self.reference):
            raise TypeError(
                "reference must be a function that takes the model and gives a context manager, such as "
                f"llmtune.adapters.disabled; got {self.reference!r}"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (mean loss over pairs, parts), scalars.

        The parts, means over pairs, are "reward_chosen" and "reward_rejected", beta (log p - reference log p);
        "reward_margin", their difference; and "reward_accuracy", the share of pairs whose margin is above 0.

        Args:
            model: a causal language model or an encoder-decoder, wrapped or not.
            batch: from `collate_preferences`; what stands in it beside "labels" [2B, T], "chosen" [2B] and the
                reference's numbers [B] goes to the model.

        Raises:
            ValueError: the batch is not one of pairs, has no reference where the loss has none, or has one where the
                loss has one too; a row has no label; or the model's head cannot be found.
        """
        pairs = self.count_targets(batch)
        given = self._given_reference(batch, pairs)
        inputs = {name: value for name, value in batch.items() if name not in ("chosen", *REFERENCE)}
        if given is None:
            assert self.reference is not None
            inner = unwrap(model)
            with self.reference(inner), reference_pass(inner):
                fixed = sequence_log_probabilities(inner, inputs, per_token=self.per_token)
            given = (fixed[::2], fixed[1::2])
        policy = sequence_log_probabilities(model, inputs, per_token=self.per_token)
        sides = (policy[::2], policy[1::2])
        loss = dpo_loss(*sides, *given, beta=self.beta, kind=self.kind, label_smoothing=self.label_smoothing)
        won, lost = (self.beta * (p.detach() - r) for p, r in zip(sides, given, strict=True))
        margin = won - lost
        return loss, {
            "reward_chosen": won.mean(),
            "reward_rejected": lost.mean(),
            "reward_margin": margin.mean(),
            "reward_accuracy": (margin > 0).to(margin.dtype).mean(),
        }

    def count_targets(self, batch: Batch) -> int:
        """Return the number of pairs.

        Raises:
            ValueError: the batch's "chosen" is not True and False in turns.
        """
        marks = batch.get("chosen")
        if isinstance(marks, Tensor) and marks.ndim == 1 and marks.dtype == torch.bool and len(marks) % 2 == 0:
            if bool(marks[::2].all()) and not bool(marks[1::2].any()):
                return len(marks) // 2
        came = "none" if marks is None else f"{marks.dtype} {[*marks.shape]}" if isinstance(marks, Tensor) else marks
        raise ValueError(
            'a batch of pairs is expected, with "chosen" [2B] True and False in turns; got '
            f"{came}. Make it by llmtune.data.collate_preferences"
        )

    def _given_reference(self, batch: Batch, pairs: int) -> tuple[Tensor, Tensor] | None:
        """Return the batch's own reference log-probabilities ([B], [B]), None where the model is to give them."""
        given = [batch[name] for name in REFERENCE if name in batch]
        if bool(given) == (self.reference is not None) or len(given) == 1:
            came = "neither" if not given else "both" if len(given) == 2 else "only one of the two numbers"
            raise ValueError(
                "DPO needs one reference: either DPOLoss(reference=llmtune.adapters.disabled), or numbers "
                f'"reference_chosen" and "reference_rejected" in the batch; got {came}'
            )
        if not given:
            return None
        for name, value in zip(REFERENCE, given, strict=True):
            if not isinstance(value, Tensor) or value.shape != (pairs,) or not value.is_floating_point():
                came = f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f'"{name}" must be log-probabilities [{pairs}], one a pair; got {came}')
        return given[0].detach(), given[1].detach()


def _check_options(beta: float, kind: str, label_smoothing: float) -> None:
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a finite number larger than 0; got {beta}")
    if kind not in KINDS:
        raise ValueError(f'kind must be "sigmoid" or "ipo"; got {kind!r}')
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be 0 or more and below 0.5; got {label_smoothing}")
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f'label_smoothing has no effect on kind="{kind}": leave it out, or take "sigmoid"')
