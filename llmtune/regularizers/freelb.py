"""FreeLB: learn from the losses at all places on the way to the worst nearby embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.optim.draws import torch_states
from llmtune.regularizers.perturbation import blank_noise, climb, embeddings_moved, examples_of, real_tokens
from llmtune.regularizers.random_state import drawing_again
from llmtune.types import Batch, LossFunction, LossResult


@dataclass(frozen=True)
class FreeLBLoss:
    """The mean of a loss over K places on the way up: d_0 random, d_k = P(d_(k-1) + step_size * g / ||g||).

        1/K sum over k = 0 ... K-1 of L(e + d_k),   g = slope of L at d_(k-1),   ||d|| <= epsilon for each example

    d_0 is uniform in +- start * epsilon / sqrt(entries of the example). The noise lies on the token embeddings (of an
    encoder-decoder, on its encoder's) and is 0 on padding; a ball belongs to a row, or to each document of a packed
    row. All places draw the same dropout, as the paper asks in section 3.3. It is an ordinary mean of losses, so any
    loss works, and with `start=0` the gradient does not depend on how rows are split into batches.

    A step costs K forward passes and 2 K - 1 backward passes, and holds the graphs of all K until the end: the slope
    for d is taken by itself, where the authors' program takes it and the weights' in one pass. Without gradients
    (evaluation) it is the plain loss, of one pass.

    Attributes:
        loss: any `LossFunction` that runs the model on the batch's "input_ids".
        epsilon: radius of each example's ball in the Euclidean norm, in the units of the embeddings, larger than 0.
        step_size: length of a step, larger than 0.
        steps: K, 2 or more: with 1 nothing is adversarial.
        start: size of the first noise as a share of epsilon, 0 to 1; 1 in the paper.

    Raises:
        ValueError: an option is out of range.
        TypeError: the loss has no `count_targets`.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> loss, parts = FreeLBLoss(epsilon=0.5, step_size=0.2)(tiny_llama(), {"input_ids": ids, "labels": ids})
        >>> bool(parts["highest"] >= parts["first"])
        True

    Zhu et al., "FreeLB: Enhanced Adversarial Training for Natural Language Understanding" (2020), algorithm 1. Where we
    differ from the authors' program: it puts no ball around the noise unless `adv_max_norm` is set, knows no example
    but a row, so that a packed row would be one, and works on `inputs_embeds`, of which a decoder's classifier cannot
    tell where a row ends.
    """

    loss: LossFunction = causal_lm_loss
    epsilon: float = field(kw_only=True)
    step_size: float = field(kw_only=True)
    steps: int = field(default=3, kw_only=True)
    start: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("epsilon", "step_size"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number larger than 0; got {value}")
        if type(self.steps) is not int or self.steps < 2:
            raise ValueError(f"steps must be a whole number, 2 or more, or no place is adversarial; got {self.steps}")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start must be between 0 and 1, a share of epsilon; got {self.start}")
        if not callable(getattr(self.loss, "count_targets", None)):
            raise TypeError(
                f"the loss needs a count_targets(batch) method, to be a mean over targets; {self.loss!r} has none"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> LossResult:
        """Return (mean loss, parts): the loss's own parts at the first place, "first" and "highest", scalars.

        Args:
            model: wrapped or not, with an embedding of tokens.
            batch: what the loss takes, with "input_ids" [B, T].

        Raises:
            ValueError: the model is compiled, has no embedding of tokens, or the noise is lost in rounding.
        """
        if not torch.is_grad_enabled():
            return self.loss(model, batch)
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                "FreeLB runs a graph backward twice, for the noise and for the weights, which that of a compiled model "
                "cannot: train the model uncompiled (compile=False)"
            )
        real = real_tokens(batch)
        examples = examples_of(batch, real)
        noise = self._first(blank_noise(model, real), real, examples)
        state = torch_states(model.parameters())
        losses: list[Tensor] = []
        parts: Mapping[str, Any] = {}
        for place in range(self.steps):
            noise.requires_grad_()
            last = place + 1 == self.steps  # the last one draws for good, so that the next batch draws something else
            with nullcontext() if last else drawing_again(model, state), embeddings_moved(model, noise):
                result = self.loss(model, batch)
            loss, others = result if isinstance(result, tuple) else (result, {})
            losses.append(loss)
            parts = parts or others
            if not last:
                (slope,) = torch.autograd.grad(loss, noise, retain_graph=True)
                slope = slope * real[..., None]
                noise = climb(noise.detach(), slope, examples, step=self.step_size, radius=self.epsilon, norm="l2")
        stack = torch.stack(losses)
        return stack.mean(), {**parts, "first": losses[0].detach(), "highest": stack.detach().amax()}

    def count_targets(self, batch: Batch) -> int:
        """Return over how many targets the mean is taken: the loss's own count."""
        return self.loss.count_targets(batch)

    def _first(self, zeros: Tensor, real: Tensor, examples: Tensor) -> Tensor:
        """Return d_0 [B, T, E]."""
        if self.start == 0:
            return zeros
        counted = real[..., None].to(zeros.dtype)
        entries = zeros.new_zeros(examples.numel()).index_add(0, examples.flatten(), counted.flatten())
        entries = entries[examples][..., None].clamp(min=1) * zeros.shape[-1]
        return zeros.uniform_(-1, 1) * counted * (self.start * self.epsilon) / entries.sqrt()
