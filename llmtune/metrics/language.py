"""How well a language model predicts text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from llmtune.errors import NonFiniteError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.packed import check_documents_apart, is_packed
from llmtune.modules import eval_mode
from llmtune.types import Batch


def perplexity(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return exp of the mean negative log-likelihood of a target token, over all targets of all batches.

    Every target counts the same, however batches are cut: only a sum and a count are kept, never the logits. Computed
    in eval mode without gradients; each module's own mode is put back. The first token of a document is no target.

    Args:
        model: a Hugging Face causal language model, with or without adapters and wrappers.
        batches: dicts with "input_ids" and "labels" [B, T] (unshifted, -100 ignored), packed or padded; read once and
            moved to the model's device. A batch without a target adds nothing.

    Returns:
        1 or more; infinite where the mean is too large for a float.

    Raises:
        ValueError: there is no target: no batches, or all labels are -100; or packed documents see each other in this
            model.
        NonFiniteError: the loss of a batch is NaN; says which.
        TypeError: `batches` is a single batch.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> perplexity(tiny_llama(), [{"input_ids": ids, "labels": ids}]) > 1
        True
    """
    if isinstance(batches, Mapping):
        raise TypeError("batches must be a list, or another iterable, of batches; got a single one")
    device = next(model.parameters()).device
    total, count, tried = 0.0, 0, False
    with eval_mode(model), torch.no_grad():
        for index, batch in enumerate(batches):
            targets = causal_lm_loss.count_targets(batch)
            if targets == 0:
                continue
            moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            if not tried and is_packed(batch):
                check_documents_apart(model, moved)
                tried = True
            loss = causal_lm_loss(model, moved).item()
            if math.isnan(loss):
                raise NonFiniteError(
                    f"the loss of batch {index} (from 0) is NaN: the model's weights or inputs hold NaN"
                )
            total, count = total + loss * targets, count + targets
    if count == 0:
        raise ValueError("there is no target to predict: no batches, or all labels are -100")
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf
