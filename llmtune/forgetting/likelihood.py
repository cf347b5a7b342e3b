"""What a model predicts for a batch of examples, and the likelihoods that Fisher information is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32, default_chunk_rows
from llmtune.losses.head import Head, hidden_before_head, model_inputs
from llmtune.losses.token_loss import head_cross_entropy
from llmtune.types import Batch

Kind = Literal["sampled", "exact", "empirical"]
Unit = Literal["sequence", "token"]
INPUTS = "inputs of a pair"  # the key under which (inputs, targets) pairs keep their inputs
IGNORED = -100
EXACT_PASSES = 4096


@dataclass(frozen=True)
class Predictions:
    """What is predicted at the m labelled places of n examples.

    Attributes:
        rows: [m, C] logits; or, where there is a head, [m, E] hidden states that enter it.
        head: a language model's head, whose logits are made in chunks; or None.
        owner: [m] which example a place belongs to, ascending.
        labels: [m] the given targets.
        examples: n.
    """

    rows: Tensor
    head: Head | None
    owner: Tensor
    labels: Tensor
    examples: int

    def logits(self, rows: Tensor) -> Tensor:
        """Return the logits [k, C], in at least float32, of some of the rows."""
        return at_least_float32(rows if self.head is None else self.head.logits(rows))

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """Return [m] targets drawn from the predicted distributions, without gradient."""
        size = 1024 if self.head is None else default_chunk_rows(self.rows.new_empty(self.head.classes, 0), buffers=2)
        drawn = []
        with torch.no_grad():
            for rows in self.rows.split(size):
                p = self.logits(rows).softmax(-1)
                if not bool(p.isfinite().all()):
                    raise ValueError("the model's predictions are not finite: its logits hold NaN or infinity")
                p = p if generator is None else p.to(generator.device)
                drawn.append(torch.multinomial(p, 1, generator=generator).squeeze(1))
        return torch.cat(drawn).to(self.rows.device)

    def log_likelihood(self, targets: Tensor) -> Tensor:
        """Return the sum over all places of log p(target), a scalar; a language model's logits are never all held."""
        if self.head is not None:
            return -head_cross_entropy(self.rows, self.head, targets) * len(targets)
        return -F.cross_entropy(self.logits(self.rows), targets, reduction="sum")


class GaussianPredictions(Predictions):
    """What a regressor predicts: the means [n, C] of normal distributions of variance 1; `labels` are [n, C] floats."""

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """Return [n, C] targets drawn from the predicted distributions, without gradient."""
        means = self.logits(self.rows).detach()
        place = means.device if generator is None else generator.device
        return means + torch.randn(means.shape, generator=generator, device=place, dtype=means.dtype).to(means.device)

    def log_likelihood(self, targets: Tensor) -> Tensor:
        """Return the sum over all places of log p(target) but for a constant: minus half of the squared error."""
        return -0.5 * (self.logits(self.rows) - targets).square().sum()


def has_target(model: nn.Module, batch: Batch) -> bool:
    """Return whether any label of the batch is predicted: a causal model's first label of a row is not.

    Raises:
        ValueError: the labels are missing, or are not integers [n] or [n, T].
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.is_floating_point():
        return True
    return bool((_targets(model, _labels(batch)) != IGNORED).any())


def predict(model: nn.Module, batch: Batch, *, whole_logits: bool = False, regress: bool = False) -> Predictions:
    """Run the model and return its predictions at the labelled places.

    Args:
        model: the bare module.
        batch: of examples that have targets; labels [n] of classes or [n, T] of tokens.
        whole_logits: run a language model's head as its module on the whole batch, for those who watch that module.
        regress: whether labels of floats may be given, one an output: [n], [n, 1] or [n, C].

    Raises:
        ValueError: the labels are missing, of floats that no output regresses on, or do not fit the logits.
    """
    given = batch.get("labels")
    if regress and isinstance(given, Tensor) and given.is_floating_point():
        return _of_numbers(model, batch, given)
    labels = _labels(batch)
    if labels.ndim == 1:
        return _of_classes(model, batch, labels)
    n, T = labels.shape
    targets = _targets(model, labels)
    batch = with_decoder_inputs(model, batch)
    head = None
    if has_head(model) and not whole_logits:
        outputs, head = hidden_before_head(model, batch)
    else:
        outputs = model(**model_inputs(model, batch)).logits
    if outputs.ndim != 3 or outputs.shape[0] != n or outputs.shape[1] < T:
        raise ValueError(f"labels {[*labels.shape]} need an output [{n}, {T}, ...]; the model gave {[*outputs.shape]}")
    outputs = outputs[:, -T:][:, : targets.shape[1]]  # from the end: virtual tokens stand before the first
    owner, place = torch.nonzero(targets != IGNORED, as_tuple=True)
    return _checked(Predictions(outputs[owner, place], head, owner, targets[owner, place], n))


def passes(
    predictions: Predictions, kind: Kind, unit: Unit, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
    """Yield (score, weights [n] or None for ones, whether another follows), so that the Fisher information of examples
    is

        sum over passes and n of weights[n] * (gradient of example n's part of the score)^2.

    "sequence": one pass, the log-likelihood of all of an example's targets. "token": one pass a place. "exact": one
    pass a place and class, weighted with its probability; since targets are drawn independently given the text, the
    squares of an example's places add up. Of a regressor "exact" is one pass an output: the squares of their gradients
    add up, as errors have variance 1.
    """
    if isinstance(predictions, GaussianPredictions) and kind == "exact":
        outputs = predictions.logits(predictions.rows).unbind(1)
        yield from ((output.sum(), None, at + 1 < len(outputs)) for at, output in enumerate(outputs))
        return
    if kind != "exact":
        targets = predictions.labels if kind == "empirical" else predictions.sample(generator)
        if unit == "sequence" or isinstance(predictions, GaussianPredictions):
            yield predictions.log_likelihood(targets), None, False
            return
    log_p = predictions.logits(predictions.rows).log_softmax(-1)
    places = _place_in_example(predictions)
    steps, C = int(places.max()) + 1, log_p.shape[1]
    if kind == "exact" and steps * C > EXACT_PASSES:
        raise ValueError(
            f'kind="exact" needs a backward pass for each of {C} classes at each of {steps} places, {steps * C} for '
            f'one example (at most {EXACT_PASSES} are run). Use kind="sampled"'
        )
    for step in range(steps):
        here = torch.nonzero(places == step).flatten()
        chosen = log_p[here] if kind == "exact" else log_p[here].gather(1, targets[here, None])
        for column in range(chosen.shape[1]):
            score = chosen[:, column]
            weights = torch.zeros(predictions.examples, device=score.device, dtype=score.dtype)
            weights[predictions.owner[here]] = score.detach().exp() if kind == "exact" else 1.0
            yield score.sum(), weights, step + 1 < steps or column + 1 < chosen.shape[1]


def predicts_next(model: nn.Module) -> bool:
    """Return whether token labels are one place ahead of the logits that predict them, as in causal language models.

    Encoder-decoders, masked language models and token classifiers predict where they stand. A module that is not
    Hugging Face's counts as causal where it has a head (`get_output_embeddings`).
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    generates = getattr(model, "can_generate", None)
    return bool(generates()) if callable(generates) else has_head(model)


def has_head(model: nn.Module) -> bool:
    """Return whether the model has a language-modelling head."""
    find = getattr(model, "get_output_embeddings", None)
    return callable(find) and isinstance(find(), nn.Module)


def head_of(model: Any) -> nn.Module:
    """Return the head of a model that has one."""
    head: nn.Module = model.get_output_embeddings()
    return head


def with_decoder_inputs(model: nn.Module, batch: Batch) -> Batch:
    """Return the batch with the "decoder_input_ids" [B, T] that an encoder-decoder makes of its labels."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not encoder_decoder or make is None or "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return batch
    return {**batch, "decoder_input_ids": make(labels=batch["labels"].long())}


def _labels(batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim not in (1, 2):
        came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(f"a likelihood needs integer labels, one a row [B] or one a token [B, T]; got {came}")
    if INPUTS in batch and labels.ndim != 1:
        raise ValueError(f"the targets of a pair (inputs, targets) must be classes [n]; got {[*labels.shape]}")
    return labels.long()  # in a narrower type a class may look like -100


def _targets(model: nn.Module, labels: Tensor) -> Tensor:
    """Return [n] or [n, T'], the label that each output is to predict: T' = T - 1 in a causal model."""
    return labels[:, 1:] if labels.ndim == 2 and predicts_next(model) else labels


def _of_classes(model: nn.Module, batch: Batch, labels: Tensor) -> Predictions:
    owner = torch.nonzero(labels != IGNORED).flatten()
    output: Any = model(batch[INPUTS]) if INPUTS in batch else model(**model_inputs(model, batch))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        shape = f"{[*logits.shape]}" if isinstance(logits, Tensor) else f"a {type(output).__name__} without logits"
        raise ValueError(
            f"labels [{len(labels)}] of classes need logits [{len(labels)}, C], C >= 2; the model gave {shape}"
        )
    return _checked(Predictions(logits[owner], None, owner, labels[owner], len(labels)))


def _of_numbers(model: nn.Module, batch: Batch, labels: Tensor) -> Predictions:
    output: Any = model(batch[INPUTS]) if INPUTS in batch else model(**model_inputs(model, batch))
    means = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    shape = list(means.shape) if isinstance(means, Tensor) else f"a {type(output).__name__} without logits"
    regresses = INPUTS in batch or getattr(getattr(model, "config", None), "problem_type", None) == "regression"
    if not isinstance(means, Tensor) or not (
        means.ndim in (1, 2)
        and (len(means), means.numel()) == (len(labels), labels.numel())
        and (regresses or means.numel() == len(means))  # several classes at once are no regression
    ):
        raise ValueError(
            f"a likelihood needs integer labels, or one float an output of a model that regresses; got {labels.dtype} "
            f"{[*labels.shape]}, and the model gave {shape}"
        )
    means = means.reshape(len(labels), -1)
    owner = torch.arange(len(labels), device=means.device)
    return GaussianPredictions(means, None, owner, labels.to(means.dtype).reshape(means.shape), len(labels))


def _checked(predictions: Predictions) -> Predictions:
    C = predictions.rows.shape[1] if predictions.head is None else predictions.head.classes
    wrong = (predictions.labels < 0) | (predictions.labels >= C)
    if bool(wrong.any()):
        raise ValueError(f"labels must be in 0 ... {C - 1} or {IGNORED}; got {int(predictions.labels[wrong][0])}")
    return predictions


def _place_in_example(predictions: Predictions) -> Tensor:
    """Return [m]: a row's number among those of its example, from 0."""
    owner = predictions.owner
    counts = torch.bincount(owner, minlength=predictions.examples)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(owner), device=owner.device) - starts[owner]
