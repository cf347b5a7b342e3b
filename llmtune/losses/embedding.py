"""One vector for a whole text, out of a model's last hidden states."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.head import model_inputs
from llmtune.losses.packed import is_packed
from llmtune.modules import unwrap
from llmtune.types import Batch

Pooling = Literal["mean", "cls", "last"]
POOLINGS = ("mean", "cls", "last")


def sentence_embeddings(model: nn.Module, batch: Batch, *, pooling: Pooling = "mean") -> Tensor:
    """Return one vector a row: the mean, the first or the last of the row's last hidden states.

    Padding takes no part, on either side: "mean" is over the real tokens, "cls" is the first real token and "last" the
    last one, by the attention mask. "cls" is what an encoder like BERT has learned to sum up in, "last" is for a
    decoder, whose other tokens have not seen the whole text.

    Args:
        model: an encoder, or a decoder without its language-modelling head (`AutoModel`), or a sequence classifier;
            wrapped or not.
        batch: "input_ids" and "attention_mask" [B, T], and what else the model's forward takes; one text a row.
            Without a mask all tokens are real.
        pooling: "mean", "cls" or "last".

    Returns:
        [B, E], in at least float32; with gradient; not normalised.

    Raises:
        ValueError: the batch is packed, a row has no real token, the pooling is unknown, or the model gives no hidden
            states or has a language-modelling head.

    Example:
        >>> from llmtune.testing.models import tiny_bert
        >>> ids = torch.tensor([[5, 7, 11], [3, 2, 0]])
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> sentence_embeddings(tiny_bert(labels=2), {"input_ids": ids, "attention_mask": mask}).shape
        torch.Size([2, 22])
    """
    return embeddings_and_output(model, batch, pooling=pooling)[0]


def embeddings_and_output(model: nn.Module, batch: Batch, *, pooling: Pooling) -> tuple[Tensor, Any]:
    """Return (`sentence_embeddings` [B, E], the model's whole output), from one forward pass."""
    check_pooling(pooling)
    inner: Any = unwrap(model)
    _check_body(inner)
    if is_packed(batch):
        raise ValueError(
            "the batch is packed (position_ids start again within a row), and a row would get one vector for several "
            "texts: pad one text a row (collate_padded)"
        )
    inputs = model_inputs(model, batch)
    body = getattr(inner, "base_model", None)
    if isinstance(body, nn.Module) and body is not inner:
        inputs["output_hidden_states"] = True  # a classifier does not give its body's output by itself
    output = model(**inputs)
    hidden: Any = getattr(output, "last_hidden_state", None)
    if hidden is None:
        layers: Any = getattr(output, "hidden_states", None)
        if not layers:
            raise ValueError(f"{type(inner).__name__} gives neither last_hidden_state nor hidden_states to pool")
        hidden = layers[-1]
    return pooled(hidden, batch.get("attention_mask"), pooling), output


def pooled(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Return [B, E] of hidden states [B, T', E] and a mask [B, T] of the last T of them, 0 at padding, or None.

    Raises:
        ValueError: a row has no real token.
    """
    hidden = at_least_float32(hidden)
    if mask is None:
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
    real = mask.bool()
    if not bool(real.any(1).all()):
        raise ValueError(f"row {int((~real.any(1)).nonzero()[0])} has no real token: its attention_mask is all 0")
    hidden = hidden[:, -real.shape[1] :]  # from the end: virtual tokens stand before the first
    if pooling == "mean":
        return hidden.masked_fill(~real[:, :, None], 0.0).sum(1) / real.sum(1, keepdim=True)
    place = torch.arange(real.shape[1], device=real.device)
    at = real.int().argmax(1) if pooling == "cls" else torch.where(real, place, -1).amax(1)
    return hidden[torch.arange(len(hidden), device=real.device), at]


def check_pooling(pooling: str) -> None:
    """Raise ValueError where the pooling is unknown."""
    if pooling not in POOLINGS:
        raise ValueError(f'pooling must be "mean", "cls" or "last"; got {pooling!r}')


def _check_body(inner: Any) -> None:
    if "decoder_input_ids" in inspect.signature(inner.forward).parameters:
        raise ValueError(f"{type(inner).__name__} is an encoder-decoder: give its encoder (model.get_encoder())")
    find = getattr(inner, "get_output_embeddings", None)
    if callable(find) and isinstance(find(), nn.Module):
        raise ValueError(
            f"{type(inner).__name__} has a language-modelling head, whose logits would be made for nothing: load the "
            "model without it (AutoModel), or as a classifier"
        )
