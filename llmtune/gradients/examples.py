"""A batch cut into its single examples: padding trimmed, packed documents taken out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.modules import unwrap
from llmtune.types import Batch

IGNORED = -100
PADDED_WITH = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": IGNORED}
PACK_FIELDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # describe the pack, not its tokens


def split_examples(model: nn.Module, batch: Batch) -> list[Batch]:
    """Return the examples of a batch, each a batch of one row that the model can be run on by itself.

    Padding (where the attention mask is 0, on either side) is cut off. A row whose position ids start again at 0 holds
    several documents, and each becomes an example. For an encoder-decoder the labels are cut after their last target.

    Args:
        model: decides whether the labels belong to the inputs' tokens or to a decoder of their own.
        batch: tensors with one row a row of inputs, [B, ...], shared by all rows where they are single numbers.

    Returns:
        The examples, in the batch's order; tensors are views of the batch's.

    Raises:
        ValueError: a tensor has another number of rows, a row is nothing but padding, or a packed batch has a field
            that cannot be cut into documents. Names the field and the row.
        TypeError: the batch is no dict of tensors.
    """
    B = _rows(batch)
    if _is_packed(batch):
        return [document for row in range(B) for document in _documents(batch, row)]
    decoder = bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))
    return [_trimmed(_row(batch, row), row, decoder) for row in range(B)]


def _rows(batch: Batch) -> int:
    if not isinstance(batch, dict) or not any(isinstance(value, Tensor) for value in batch.values()):
        raise TypeError(f"a batch is a dict of tensors; got {type(batch).__name__}")
    sizes = {name: value.shape[0] for name, value in batch.items() if isinstance(value, Tensor) and value.ndim > 0}
    sizes = {name: size for name, size in sizes.items() if name not in PACK_FIELDS}
    if not sizes:
        raise ValueError("a batch needs tensors with one row an example; all of its tensors are single numbers")
    first, B = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != B:
            raise ValueError(f'every field must have one row an example: "{first}" has {B} rows, "{name}" has {size}')
    return B


def _row(batch: Batch, row: int) -> Batch:
    return {
        name: value[row : row + 1] if isinstance(value, Tensor) and value.ndim > 0 else value
        for name, value in batch.items()
    }


def _is_packed(batch: Batch) -> bool:
    """Return whether a row holds several documents. With zeros in its mask it is padded: left-padded rows have position
    ids that look packed (0, 0, 0, 1, ...)."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or not bool((positions[:, 1:] == 0).any()):
        return False
    return mask is None or bool(mask.bool().all())


def _documents(batch: Batch, row: int) -> list[Batch]:
    shape = batch["position_ids"].shape
    fields: dict[str, Any] = {}
    for name, value in batch.items():
        if name in PACK_FIELDS or name == "attention_mask":
            continue
        if isinstance(value, Tensor) and value.ndim > 0:
            if value.shape[:2] != shape:
                raise ValueError(
                    f'a packed batch must have one value a token, {[*shape]}, in every field; "{name}" has '
                    f"{[*value.shape]}. Use collate_padded for such rows"
                )
            value = value[row : row + 1]
        fields[name] = value
    starts = [0, *(torch.nonzero(fields["position_ids"][0, 1:] == 0).flatten() + 1).tolist(), shape[1]]
    return [
        {
            name: value[:, start:stop] if isinstance(value, Tensor) and value.ndim > 0 else value
            for name, value in fields.items()
        }
        for start, stop in pairwise(starts)
    ]


def _trimmed(example: Batch, row: int, decoder: bool) -> Batch:
    mask = example.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = torch.nonzero(mask[0]).flatten()
        if len(real) == 0:
            raise ValueError(f"row {row} of the batch is nothing but padding: its attention_mask is all 0")
        own = [name for name in example if not (decoder and (name == "labels" or name.startswith("decoder_")))]
        example = _cut(example, own, mask.shape[1], int(real[0]), int(real[-1]) + 1)
    labels = example.get("labels")
    if decoder and isinstance(labels, Tensor) and labels.ndim == 2:
        targets = torch.nonzero(labels[0] != IGNORED).flatten()
        end = int(targets[-1]) + 1 if len(targets) else 1
        theirs = [name for name in example if name == "labels" or name.startswith("decoder_")]
        example = _cut(example, theirs, labels.shape[1], 0, end)
    return example


def _cut(example: Batch, names: list[str], width: int, start: int, stop: int) -> Batch:
    """Return the example with columns start ... stop of those of the named fields that are `width` wide.

    Floats [1, width] stay whole: one value a class or feature, not one a token.
    """

    def by_token(name: str, value: Any) -> bool:
        if name not in names or not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != width:
            return False
        return value.ndim > 2 or not value.is_floating_point()

    if (start, stop) == (0, width):
        return example
    return {name: value[:, start:stop] if by_token(name, value) else value for name, value in example.items()}


def stack_examples(examples: list[Batch]) -> Batch | None:
    """Return the examples as one batch, the shorter padded on the right under an attention mask.

    None where that cannot be done without changing what the model computes: a field of unknown meaning has another
    length in another example, or the examples have other fields.
    """
    if any(set(example) != set(examples[0]) for example in examples):
        return None
    lengths = [example["input_ids"].shape[1] for example in examples if "input_ids" in example]
    stacked: Batch = {}
    for name, first in examples[0].items():
        values = [example[name] for example in examples]
        if not isinstance(first, Tensor) or first.ndim == 0:
            if any(not _same(value, first) for value in values):
                return None
            stacked[name] = first
        elif all(value.shape == first.shape for value in values):
            stacked[name] = torch.cat(values)
        elif name in PADDED_WITH and first.ndim == 2:
            width = max(value.shape[1] for value in values)
            stacked[name] = torch.cat([F.pad(v, (0, width - v.shape[1]), value=PADDED_WITH[name]) for v in values])
        else:
            return None
    if len(set(lengths)) > 1 and "attention_mask" not in stacked:
        columns = torch.arange(max(lengths), device=stacked["input_ids"].device)
        stacked["attention_mask"] = (columns < columns.new_tensor(lengths)[:, None]).long()
    return stacked


def _same(value: Any, other: Any) -> bool:
    return torch.equal(value, other) if isinstance(value, Tensor) and isinstance(other, Tensor) else value == other
