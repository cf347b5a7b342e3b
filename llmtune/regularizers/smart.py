"""SMART: the predictions may not move much when the embeddings move a little, in the worst direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.optim.draws import torch_states
from llmtune.regularizers.perturbation import Norm, blank_noise, embeddings_moved, examples_of, real_tokens
from llmtune.regularizers.predictions import Kind, Predictions, check_kind, hard_loss, predictions_of, sum_over_rows
from llmtune.regularizers.random_state import drawing_again
from llmtune.regularizers.symmetric import symmetric_kl
from llmtune.regularizers.worst_noise import Search
from llmtune.types import Batch, LossResult


def smart_loss(
    predict: Callable[[Tensor], Tensor],
    embeddings: Tensor,
    *,
    epsilon: float,
    steps: int = 1,
    step_size: float | None = None,
    start: float = 0.1,
    norm: Norm = "linf",
    real: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return how far the predictions move under the worst noise found in a ball around the embeddings.

        mean over rows of KL(f(e) || f(e + d)) + KL(f(e + d) || f(e)),   d = argmax over ||d|| <= epsilon

    d starts from small normal noise and takes `steps` of projected gradient ascent, each the steepest in the norm. It
    is then held fixed, and gradients flow through both predictions and the embeddings.

    Args:
        predict: embeddings [B, T, E] to logits [..., V]. It must draw nothing at random, or the same each time.
        embeddings: [B, T, E].
        epsilon: radius of the ball, in the units of the embeddings, larger than 0.
        steps: of ascent, 1 or more.
        step_size: length of a step in the norm; None for 2 epsilon, which reaches the edge of the ball from anywhere in
            it (the paper's 1e-3 in a ball of 1e-5 does as well).
        start: size of the first noise, as a share of epsilon, above 0 and at most 1.
        norm: "linf", each entry of d within +- epsilon (the paper); "l2", a row's d as a whole (VAT).
        real: [B, T] booleans, False on padding, where d is 0; None for all.
        generator: of the first noise; None for torch's own.

    Returns:
        A scalar, in at least float32.

    Raises:
        ValueError: an option is out of range, or a shape does not fit.

    Jiang et al., "SMART" (2020), section 3.1 and algorithm 1; for "l2" with one step, virtual adversarial training
    (Miyato et al. 2018). Where we differ: a step goes along sign(slope), the steepest in the largest-entry norm; the
    paper adds the slope itself, whose size depends on the batch, and its program (mt-dnn) divides it by each token's
    largest entry and does not project at all, its `epsilon` being a guard in that division. Each row's step depends on
    that row alone. The divergence is a true one (see `symmetric_kl`), and the same in the ascent and in the loss.

    Example:
        >>> weight = torch.tensor([[0.0, 0.0], [3.0, -4.0]])
        >>> value = smart_loss(lambda e: e.sum(1) @ weight.T, torch.zeros(1, 1, 2), epsilon=0.1)
        >>> p = torch.sigmoid(torch.tensor(0.7))  # the worst of the square moves the log-odds by 0.1 * (3 + 4)
        >>> torch.allclose(value, (p - 0.5) * 0.7)
        True
    """
    search = Search(epsilon, steps, step_size, start, norm)
    if embeddings.ndim != 3 or (real is not None and real.shape != embeddings.shape[:2]):
        other = "" if real is None else f" and real {[*real.shape]}"
        raise ValueError(f"expected embeddings [B, T, E] and real [B, T]; got {[*embeddings.shape]}{other}")
    real = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device) if real is None else real
    examples = examples_of({}, real)
    clean = predict(embeddings)
    fixed, around = clean.detach(), embeddings.detach()

    def divergence(noise: Tensor) -> Tensor:
        return symmetric_kl(fixed, predict(around + noise)).sum()

    with torch.enable_grad():
        first = search.first(torch.zeros_like(around), real, examples, generator)
        noise = search.worst(divergence, first, real, examples)
    return symmetric_kl(clean, predict(embeddings + noise)).mean()


@dataclass(frozen=True)
class SmartLoss:
    """A loss plus SMART's smoothness: strength * mean over labelled places of the divergence under the worst noise.

        L + strength * (KL(f(e) || f(e + d)) + KL(f(e + d) || f(e)))

    The noise d lies on the token embeddings (of an encoder-decoder, on its encoder's), is 0 on padding and is looked
    for as `smart_loss` says. It is put on by a hook, so any model works that has `get_input_embeddings`, padded or
    packed; a ball of "l2" belongs to a row, or to each document of a packed row. The clean and the perturbed passes
    draw the same dropout, so that what is measured is the noise alone (a head with dropout of its own draws for each).
    A step costs steps + 2 forward passes and steps + 1 backward passes, the last one through two passes. A language
    model's logits are never all held.

    Without gradients (evaluation) it is the plain loss, of one pass. SMART's other half, the proximal point method
    against a running average of the weights, needs state and is left out; an L2 penalty towards the start or
    distillation from the start stands for it.

    Attributes:
        loss: what to learn by: `causal_lm_loss`, `masked_lm_loss`, `sequence_to_sequence_loss` or
            `classification_loss` with integer labels, with their options.
        strength: factor of the divergence, 0 or more; 1 to 5 in the paper.
        epsilon: radius of the ball, in the units of the embeddings. The paper has 1e-5, which bfloat16 cannot see
            next to an embedding; noise that rounding swallows raises.
        steps: of ascent, 1 or more.
        step_size: length of a step in the norm; None for 2 epsilon.
        start: size of the first noise, as a share of epsilon, above 0 and at most 1.
        norm: "linf" or "l2".

    Raises:
        ValueError: an option is out of range.
        TypeError: the loss is none of the four.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> loss, parts = SmartLoss(strength=1.0, epsilon=1e-3)(tiny_llama(), {"input_ids": ids, "labels": ids})
        >>> sorted(parts)
        ['smart', 'task_loss']

    Jiang et al. 2020; see `smart_loss` for where we differ.
    """

    loss: Kind = causal_lm_loss
    strength: float = field(kw_only=True)
    epsilon: float = field(kw_only=True)
    steps: int = field(default=1, kw_only=True)
    step_size: float | None = field(default=None, kw_only=True)
    start: float = field(default=0.1, kw_only=True)
    norm: Norm = field(default="linf", kw_only=True)

    def __post_init__(self) -> None:
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be a finite number, 0 or more; got {self.strength}")
        self._search()  # checks the rest
        check_kind(self.loss, "SMART")

    def __call__(self, model: nn.Module, batch: Batch) -> LossResult:
        """Return (total, parts): "task_loss" and "smart", the divergence before its strength, scalars; or the loss.

        Args:
            model: wrapped or not, with an embedding of tokens.
            batch: what the loss takes: "input_ids" [B, T], labels of integers.

        Raises:
            ValueError: the model has no embedding of tokens, the noise is lost in rounding, or the labels are missing,
                do not fit, or are all -100.
        """
        if not torch.is_grad_enabled():
            return self.loss(model, batch)
        search, real = self._search(), real_tokens(batch)
        examples = examples_of(batch, real)
        noise = search.first(blank_noise(model, real), real, examples)
        state = torch_states(model.parameters())
        with drawing_again(model, state):
            clean = predictions_of(self.loss, model, batch)
        fixed = clean.detached()

        def divergence(noise: Tensor) -> Tensor:
            with drawing_again(model, state):
                there = self._moved(model, batch, noise)
                return sum_over_rows(lambda x, y, t: symmetric_kl(x, y).sum()[None], fixed, there).sum()

        there = self._moved(model, batch, search.worst(divergence, noise, real, examples))
        hard = hard_loss(self.loss)

        def sums(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            return torch.stack([hard.plain(x, (t,)).sum(), symmetric_kl(x, y).sum()])

        task, smooth = sum_over_rows(sums, clean, there) / len(clean.targets)
        return task + self.strength * smooth, {"task_loss": task.detach(), "smart": smooth.detach()}

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count."""
        return self.loss.count_targets(batch)

    def _search(self) -> Search:
        return Search(self.epsilon, self.steps, self.step_size, self.start, self.norm)

    def _moved(self, model: nn.Module, batch: Batch, noise: Tensor) -> Predictions:
        with embeddings_moved(model, noise):
            return predictions_of(self.loss, model, batch)
