"""Losses of logits as the `compute_loss_func` of Hugging Face's Trainer, which hands over outputs and labels alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.losses.causal_lm import CausalLMLoss
from llmtune.losses.classification import ClassificationLoss
from llmtune.losses.confidence import ConfidencePenaltyLoss
from llmtune.losses.focal import FocalLoss
from llmtune.losses.masked_lm import MaskedLMLoss
from llmtune.losses.own_classes import OwnClassesLoss
from llmtune.losses.sequence_to_sequence import SequenceToSequenceLoss
from llmtune.modules import check_module, unwrap
from llmtune.training.checks import loss_and_parts, targets_of
from llmtune.types import LossFunction

OF_LOGITS = (
    CausalLMLoss,
    ClassificationLoss,
    ConfidencePenaltyLoss,
    FocalLoss,
    MaskedLMLoss,
    OwnClassesLoss,
    SequenceToSequenceLoss,
)
"""Our losses that are a function of the labels and of the logits of one forward pass."""
OF_CONFIG = ("is_encoder_decoder", "output_router_logits", "problem_type")
"""What a loss of logits may ask of the model's configuration; how the logits are made is no longer its concern."""
ELSEWHERE = "llmtune.integrations.with_loss(Trainer, loss) serves every loss"


def trainer_loss(loss: LossFunction, model: nn.Module) -> Callable[..., Tensor]:
    """Return the loss as a `compute_loss_func`: a function (outputs, labels, num_items_in_batch) -> scalar.

        sum over the micro-batch's targets / number of targets of the whole optimizer step

    The Trainer runs the model and hands over its outputs and the labels, so this is for losses of the logits:
    `CausalLMLoss` (smoothing and z-loss after the shift), `MaskedLMLoss`, `SequenceToSequenceLoss`,
    `ClassificationLoss`, `OwnClassesLoss`, `FocalLoss` and `ConfidencePenaltyLoss`, and your own if it calls
    `model(...)` once and reads `.logits`. Losses that run the model several times, hook it or need more of the batch
    are refused: `with_loss` has them. Parts beside the loss are dropped, and the logits are all held, since the
    Trainer's forward pass has made them. The Trainer takes the labels out of the batch, so an encoder-decoder needs
    "decoder_input_ids" in it (`DataCollatorForSeq2Seq(model=model)` makes them).

    The number of targets is the Trainer's own count. Where that is not the loss's, no function of these arguments can
    give the exact mean, since the other micro-batches are not seen, and it raises. So it does for causal models whose
    first labels are not -100 and are counted: all of them before transformers #46204; since then those whose class name
    transformers maps to no causal loss (GPT2LMHeadModel). With average_tokens_across_devices=False the Trainer takes a
    mean of processes' means. In evaluation the Trainer averages over rows. It ignores its own label_smoothing_factor
    where it has a `compute_loss_func`: give label_smoothing to the loss.

    Args:
        loss: a `LossFunction` of logits.
        model: the model that the Trainer trains, wrapped or not; looked at, never called.

    Returns:
        A function of outputs with `logits` [B, ..., C], labels [B, ...] and the step's number of targets, a scalar;
        without that number it gives the batch's mean.

    Raises:
        TypeError: the loss has no `count_targets`, or needs more than the logits; or the model is no module.

    Example:
        >>> from llmtune.losses import CausalLMLoss
        >>> from llmtune.testing.models import tiny_llama
        >>> model, ids = tiny_llama(), torch.tensor([[5, 7, 11, 13]])
        >>> compute_loss = trainer_loss(CausalLMLoss(label_smoothing=0.1), model)
        >>> value = compute_loss(model(ids), ids, num_items_in_batch=torch.tensor(6))  # 3 of the step's 6 are here
        >>> torch.allclose(value, CausalLMLoss(label_smoothing=0.1)(model, {"input_ids": ids, "labels": ids}) / 2)
        True
    """
    check_loss_function(loss)
    check_module(model)
    kind = type(loss)
    if kind.__module__.startswith("llmtune.") and kind not in OF_LOGITS:
        raise TypeError(
            f"{kind.__name__} needs more than the outputs and labels that the Trainer hands to a compute_loss_func "
            f"(the model itself, or other entries of the batch): {ELSEWHERE}"
        )
    return _OfLogits(loss, unwrap(model), trainer_leaves_first_out(unwrap(model)))


def check_loss_function(loss: Any) -> None:
    """Raise TypeError where `loss` is no `LossFunction`."""
    if isinstance(loss, type) or not callable(loss) or not callable(getattr(loss, "count_targets", None)):
        raise TypeError(
            "a loss is expected, loss(model, batch) with a count_targets(batch) method, such as "
            f"llmtune.losses.causal_lm_loss; got {loss!r}"
        )


def trainer_leaves_first_out(model: nn.Module) -> bool:
    """Return whether the installed Trainer leaves each row's first label out of `num_items_in_batch` for this model."""
    from transformers import Trainer
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if "_loss_shifts_labels" not in inspect.unwrap(Trainer.__init__).__code__.co_names:
        return False  # before transformers #46204 it never did
    peft: Any = getattr(model, "get_base_model", None)
    inner: Any = peft() if callable(peft) else model
    config: Any = getattr(inner, "config", None)
    shifts = LOSS_MAPPING.get(getattr(inner, "loss_type", None) or "") is ForCausalLMLoss
    return shifts and not getattr(config, "is_encoder_decoder", False)


@dataclass(frozen=True)
class _OfLogits:
    """What `trainer_loss` returns."""

    loss: LossFunction
    model: nn.Module
    first_left_out: bool

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """Return the micro-batch's share of the step's mean loss, a scalar; see `trainer_loss`."""
        if not isinstance(labels, Tensor):
            raise ValueError(
                f'the loss needs a tensor "labels" in the batch, which the Trainer hands on; got {labels!r}. Name that '
                f"column of the data so; where there is none, {ELSEWHERE}"
            )
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        targets, counted = self._targets(labels)
        if num_items_in_batch is not None:
            step = torch.as_tensor(num_items_in_batch, device=logits.device)
            if step.numel() != 1:
                raise ValueError(
                    f"num_items_in_batch has {step.numel()} entries, as under torch's DataParallel, for which the "
                    "Trainer scales a compute_loss_func's loss once too often: start one process per device (torchrun)"
                )
            if targets and counted != targets and not labels.is_floating_point():
                raise ValueError(self._miscounted(targets, counted))
            if not targets:
                if counted or not bool(step):
                    raise ValueError(self._miscounted(0, counted) if counted else _NO_TARGET)
                return logits.flatten()[:0].float().sum()  # 0, and the backward pass still goes through the model
        mean, _ = loss_and_parts(self._mean(logits, labels), trained=False)
        return mean if num_items_in_batch is None else mean * counted / step.reshape(())

    def _targets(self, labels: Tensor) -> tuple[int, int]:
        """Return how many targets the loss takes its mean over, and how many labels the Trainer has counted."""
        try:
            targets = targets_of(self.loss, {"labels": labels})
        except (KeyError, ValueError) as error:
            name = type(self.loss).__name__
            raise ValueError(f"{name} cannot count its targets in the labels alone ({error}): {ELSEWHERE}") from error
        if labels.is_floating_point():
            return targets, labels.numel()  # the mean over rows is that over all entries
        counted = labels[..., 1:] if self.first_left_out else labels
        return targets, int((counted != -100).sum())

    def _mean(self, logits: Tensor, labels: Tensor) -> Any:
        kind = type(type(self.model).__name__, (_Answered,), {"__module__": __name__})  # errors name the model's class
        answered = kind(self.model, logits, type(self.loss).__name__)
        result = self.loss(answered, {"labels": labels})
        if not answered.asked:
            raise ValueError(f"{type(self.loss).__name__} does not run the model that it is given: {ELSEWHERE}")
        return result

    def _miscounted(self, targets: int, counted: int) -> str:
        return (
            f"the Trainer counts {counted} labels in this batch and {type(self.loss).__name__} takes its mean over "
            f"{targets} targets, so the mean of a step cannot be had from its count. Where the difference is each "
            f"row's first label, which nothing predicts, set it to -100 in the collator; else {ELSEWHERE}"
        )


_NO_TARGET = (
    "the step has no target to learn from: in all its micro-batches every label is ignored (-100). Check the labels, "
    "or drop such rows"
)


class _Answered(nn.Module):
    """In the place of a model that has run already: asked once, whatever with, it gives the logits that it gave."""

    def __init__(self, model: Any, logits: Tensor, who: str) -> None:
        super().__init__()
        self.logits, self.who, self.asked = logits, who, False
        self.training = model.training
        config = getattr(model, "config", None)
        self.config = SimpleNamespace(**{name: getattr(config, name, None) for name in OF_CONFIG})
        self.can_generate = getattr(model, "can_generate", None)
        find = getattr(model, "get_output_embeddings", None)
        self.head = nn.Identity() if callable(find) and isinstance(find(), nn.Module) else None

    def forward(self, **inputs: Any) -> _Logits:
        """Return the logits, through a head that changes nothing: what enters it are the logits themselves."""
        if self.asked:
            raise ValueError(f"{self.who} runs the model more than once, and here it has run already: {ELSEWHERE}")
        self.asked = True
        return _Logits(self.logits if self.head is None else self.head(self.logits), self.who)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        raise ValueError(f"{self.who} asks for the model's embeddings, and here it has run already: {ELSEWHERE}")

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return labels  # what the model is asked with is not looked at


class _Logits:
    """A model's output of which there are the logits alone."""

    def __init__(self, logits: Tensor, who: str) -> None:
        self.logits, self._who = logits, who

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(f"{self._who} reads {name} of the model's output, and only logits are here: {ELSEWHERE}")
