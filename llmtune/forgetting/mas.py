"""Memory aware synapses: what moves the model's outputs is held, whatever the labels are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtune.adapters.effective import Choice, choose_parameters, differentiable
from llmtune.forgetting.importance import ImportancePenalty, check_covers
from llmtune.forgetting.likelihood import IGNORED, INPUTS, has_head, head_of, with_decoder_inputs
from llmtune.gradients.examples import split_examples
from llmtune.gradients.hooks import HookTape
from llmtune.gradients.per_example import ExampleGradients, Method, undisturbed
from llmtune.losses.chunked import at_least_float32, default_chunk_rows
from llmtune.losses.head import hidden_before_head, model_inputs
from llmtune.modules import unwrap
from llmtune.types import Batch


def output_sensitivity(
    model: nn.Module,
    batches: Iterable[Batch | tuple[Tensor, Tensor] | Tensor],
    *,
    parameters: Choice = None,
    method: Method = "auto",
) -> dict[str, Tensor]:
    """Return how strongly each parameter moves the model's outputs, by bare names.

    Omega_i = mean over examples of | d ||f(x)||^2 / d theta_i |

    f(x) are the logits of ONE example: [C] of a classifier, [T, C] of a model that has some for each token, over its
    real tokens. No label is looked at (but those that an encoder-decoder makes its decoder's inputs of). Each example
    counts as if run alone, so batch size, order and padding change nothing, and each document of a packed row is an
    example. Computed in eval mode, accumulated in float32, a language model's logits a few rows at a time; modes,
    flags, `.grad` and the random state are as before afterwards. Under an adapter the parameter is the effective
    weight W + s B A, frozen or not.

    Args:
        model: a Hugging Face model with logits, or any module that returns logits [n, C].
        batches: dicts for `model(**batch)`, padded or packed, with labels or without; or inputs [n, ...] for
            `model(inputs)`, alone or as pairs (inputs, targets).
        parameters: bare names, or a function of one; left out, what is trained or changed by an active adapter.
        method: as in `per_example_gradients`.

    Returns:
        {bare name: float32 tensor of the parameter's shape, on its device}, 0 or more.

    Raises:
        ValueError: there is no example; a name is unknown; an encoder-decoder's batch has no decoder inputs; the
            outputs are no logits; or the result is not finite.
        TypeError: `batches` is a single batch, or holds something else.

    Example:
        >>> layer = nn.Linear(3, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(1.0)
        >>> output_sensitivity(layer, [torch.tensor([[1.0, 0.0, 2.0]])])["weight"][0]
        tensor([ 6.,  0., 12.])

    Reference:
        Aljundi et al. 2018, "Memory aware synapses", section 4.1. avalanche takes the absolute value of a batch's mean
        gradient, in which examples of opposite sign cancel out, of the norm instead of its square, in train mode.
    """
    if isinstance(batches, Mapping | Tensor):
        raise TypeError("batches must be a list, or another iterable, of batches; got a single one")
    inner = unwrap(model)
    chosen = choose_parameters(inner, parameters)
    with differentiable(inner, chosen) as tensors, undisturbed(inner, tensors):
        sums, count = _sums(inner, batches, tensors, method)
    if count == 0:
        raise ValueError("there is no example: the batches are empty")
    for name, total in sums.items():
        total /= count
        if not bool(total.isfinite().all()):
            raise ValueError(f"the sensitivity to {name} is not finite: the model gives NaN or overflows")
    return sums


class MemoryAwareSynapses(ImportancePenalty):
    """A penalty that holds each parameter as strongly as it moves the model's outputs on the tasks so far.

    penalty(model) = strength / 2 * sum_i Omega_i (theta_i - anchor_i)^2

    Omega is the sum over tasks of `output_sensitivity`, the anchor is where the model was at the end of the latest
    task, theta is the effective parameter, as in `EWC`; before the first task is finished the penalty is 0. It needs no
    labels, so a task can be finished on any text that the model is to go on treating as it does. Merge an adapter
    before `finish_task`, not after, and say by `parameters` what it had changed, or all weights are held.

    All of it, tensors included, is in `state_dict`, and so in every checkpoint of a run. It has no hooks: it works in
    `TrainingLoop`, in a plain loop and in Hugging Face's Trainer.

    Args:
        strength: 0 or more; twice the paper's lambda, which stands without 1/2.
        parameters: bare names, or a function of one; left out, what is trained, or changed by an active adapter, when a
            task is finished. What is held once stays held.
        dtype: as in `EWC`; sums over tasks are made in float32 before they are rounded.
        device: as in `EWC`.

    Raises:
        ValueError: the strength or the dtype is out of range.
        TypeError: `parameters` is one string.

    Example:
        >>> model, penalty = nn.Linear(3, 2), MemoryAwareSynapses(strength=1.0)
        >>> penalty.finish_task(model, [torch.randn(5, 3)])
        >>> penalty.tasks, penalty(model).item()
        (1, 0.0)

    Reference:
        Aljundi et al. 2018, "Memory aware synapses: learning what (not) to forget", section 4. avalanche averages the
        tasks' importances with weights of alpha and 1 - alpha, so that the latest counts most; here they are added.
    """

    def finish_task(
        self,
        model: nn.Module,
        batches: Iterable[Batch | tuple[Tensor, Tensor] | Tensor] | None = None,
        *,
        importance: Mapping[str, Tensor] | None = None,
        method: Method = "auto",
    ) -> None:
        """Take in the importance of the task just learned, and hold the model where it is now.

        Args:
            model: as it is at the end of the task.
            batches: as `output_sensitivity` takes them; or None with `importance`.
            importance: {bare name: tensor of the parameter's shape}, 0 or more, of all parameters that are to be held.
            method: "auto", "loop" or "hooks".

        Raises:
            ValueError: not one of batches and importance is given; there is no example; or the importance is negative,
                not finite, another model's, or lacks a parameter that is held. Nothing has changed then.
        """
        if (batches is None) == (importance is None):
            raise ValueError("finish_task needs the task's batches, or its importance, and not both")
        if importance is None:
            assert batches is not None
            importance = output_sensitivity(model, batches, parameters=self._names(model), method=method)
        elif not importance:
            raise ValueError("the importance names no parameter: there is nothing to hold")
        check_covers(importance, self.importance, what="importance")
        self._hold(model, importance, what="importance")


def _sums(
    model: nn.Module, batches: Iterable[Any], tensors: Mapping[str, nn.Parameter], method: Method
) -> tuple[dict[str, Tensor], int]:
    """Return (sums of absolute gradients by name, of how many examples)."""
    head_chosen = has_head(model) and bool(set(map(id, tensors.values())) & set(map(id, head_of(model).parameters())))
    device = next(iter(tensors.values())).device
    sums = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in tensors.items()}
    count = 0
    engine = ExampleGradients(model, tensors, method, lambda group: _squared_norm(model, group, whole=head_chosen))
    for batch in batches:
        for places, group, tape in engine.groups(_examples(model, batch, device)):
            with tape:
                score = _squared_norm(model, group, whole=head_chosen and isinstance(tape, HookTape))
            for name, _, piece in tape.gradients(score):
                sums[name] += piece.float().abs().sum(0)
            count += len(places)
    return sums, count


def _examples(model: nn.Module, batch: Any, device: torch.device) -> list[Batch]:
    """Return the examples of a batch, on the model's device; labels only where a decoder's inputs are made of them."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        batch = batch[0]
    if isinstance(batch, Tensor):
        batch = {INPUTS: batch}
    if not isinstance(batch, dict):
        raise TypeError(
            f"a batch must be a dict of tensors, inputs, or a pair (inputs, targets); got {type(batch).__name__}"
        )
    decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if not decoder:
        moved.pop("labels", None)
    elif not {"labels", "decoder_input_ids", "decoder_inputs_embeds"} & set(moved):
        raise ValueError(
            'an encoder-decoder needs "labels" or "decoder_input_ids" to have outputs; the batch has neither'
        )
    return split_examples(model, moved)


def _squared_norm(model: nn.Module, batch: Batch, *, whole: bool) -> Tensor:
    """Return the sum over a batch's examples of ||f(x)||^2, a scalar; a language model's logits are never all held.

    Args:
        model: the bare module.
        batch: from `_examples`, perhaps padded again on the right.
        whole: run a language model's head as its module on the whole batch, for those who watch that module.
    """
    labels, batch = batch.get("labels"), with_decoder_inputs(model, batch)
    if has_head(model) and not whole:
        hidden, head = hidden_before_head(model, batch)
        rows = hidden[_real(batch, labels, hidden)]
        size = default_chunk_rows(rows.new_empty(head.classes, 0), buffers=4)
        parts = [
            checkpoint(lambda some: at_least_float32(head.logits(some)).square().sum(), some, use_reentrant=False)
            for some in rows.split(size)
        ]
        return torch.stack(parts).sum()
    output: Any = model(batch[INPUTS]) if INPUTS in batch else model(**model_inputs(model, batch))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or not logits.is_floating_point():
        came = f"{[*logits.shape]}" if isinstance(logits, Tensor) else f"a {type(output).__name__} without logits"
        raise ValueError(f"the outputs must be logits, [n, C] or [n, T, C]; the model gave {came}")
    logits = at_least_float32(logits)
    return (logits if logits.ndim == 2 else logits[_real(batch, labels, logits)]).square().sum()


def _real(batch: Batch, labels: Tensor | None, outputs: Tensor) -> Tensor:
    """Return [n, T] which outputs [n, T, ...] are those of real tokens: not of padding, nor of virtual tokens."""
    mask = batch.get("decoder_attention_mask")
    if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
        mask = batch.get("attention_mask")
    elif mask is None and labels is not None:
        mask = labels != IGNORED
    real = torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)
    if mask is not None and mask.ndim == 2:
        real[:, : outputs.shape[1] - mask.shape[1]] = False
        real[:, outputs.shape[1] - mask.shape[1] :] = mask.bool()
    return real
