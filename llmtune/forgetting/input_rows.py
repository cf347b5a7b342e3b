"""Which input vectors of a layer belong to tokens, and the sum of their outer products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.losses.head import model_inputs
from llmtune.losses.sequence_to_sequence import decoder_inputs

CROSS = ("EncDecAttention", "encoder_attn", "crossattention")  # whose keys and values read the encoder's output
KEYS = ("k", "v", "key", "value", "k_proj", "v_proj")
IGNORED = -100


@dataclass
class Covariance:
    """X X^T of the vectors that have come, in float64 (float32 on Apple's GPUs).

    Attributes:
        total: [in, in]; 0-dimensional before the first.
        rows: how many vectors.
    """

    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    rows: int = 0

    def add(self, vectors: Tensor, counted: Tensor | None) -> None:
        """Add vectors [..., in], of which `counted` [...] says which are meant; None for all."""
        rows = vectors.reshape(-1, vectors.shape[-1]) if counted is None else vectors[counted.to(vectors.device)]
        rows = rows.detach().to(exact_dtype(rows.device))
        with torch.autocast(rows.device.type, enabled=False):
            self.total = self.total.to(rows) + rows.T @ rows
        self.rows += len(rows)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def inputs_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `model(**inputs)` is called with: no labels, but what an encoder-decoder makes of them."""
    inputs, labels = model_inputs(model, dict(batch)), batch.get("labels")
    alone = not {"decoder_input_ids", "decoder_inputs_embeds"}.intersection(inputs)
    if encoder_decoder(model) and alone and isinstance(labels, Tensor) and labels.ndim == 2:
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    return inputs


def encoder_decoder(model: nn.Module) -> bool:
    """Return whether a Hugging Face model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def counted_rows(model: nn.Module, place: str, batch: Any, shape: torch.Size) -> Tensor | None:
    """Return which of a layer's input vectors belong to tokens, a bool tensor of that shape; None for all of them.

    In an encoder-decoder the decoder's own tokens are those that `decoder_attention_mask` or the labels name, and the
    keys and values of cross-attention read the encoder's.

    Args:
        model: the bare model.
        place: the layer's bare name.
        batch: what the model was called with.
        shape: of the inputs, without their last dimension.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if encoder_decoder(model):
        parts = place.split(".")
        cross = any(part in CROSS for part in parts) and parts[-1] in KEYS
        if "decoder" in parts and not cross:
            mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
            if mask is None and isinstance(labels, Tensor) and labels.ndim == 2:
                mask = labels != IGNORED
    if not isinstance(mask, Tensor) or mask.shape != shape:
        return None
    return mask.bool()
