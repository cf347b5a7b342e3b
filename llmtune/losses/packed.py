"""A trial: do packed documents see each other in this model?

Models tell documents apart in different ways, or not at all, and a wrong attention implementation, a cache or a
needless mask silently turns the separation off. So no list of models is trusted: the model itself is asked.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtune.losses.head import model_inputs
from llmtune.modules import eval_mode
from llmtune.types import Batch

FIRST, SECOND = 5, 4  # tokens of the trial's two documents


def is_packed(batch: Batch) -> bool:
    """Return whether a row of the batch holds several documents: its position ids [B, T] start again at 0.

    Zeros where the attention mask [B, T] is 0, as before a text padded on the left, are no new start.
    """
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or positions.ndim != 2:
        return False
    starts = positions[:, 1:] == 0
    if mask is not None and mask.shape == positions.shape:
        starts = starts & mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(starts.any())


@torch.no_grad()
def document_leak(model: nn.Module, tokens: Tensor) -> float:
    """Return how far the output at one document moves when the other document of its pack changes.

    0, to rounding, where documents are apart. Runs three forward passes over nine tokens in eval mode.

    Args:
        model: a Hugging Face model that returns `logits` or `last_hidden_state`.
        tokens: [n] token ids to make the trial from.

    Returns:
        The largest change over the largest output: a fraction.

    Raises:
        ValueError: the model's forward takes no `position_ids`.
    """
    kinds = tokens.unique()
    if len(kinds) < 2:
        kinds = torch.cat([kinds, kinds ^ 1])
    pick = torch.arange(FIRST + SECOND, device=tokens.device) % 2
    ids = kinds[pick]
    other_first, other_second = ids.clone(), ids.clone()
    other_first[:FIRST] = kinds[1 - pick[:FIRST]]
    other_second[FIRST:] = kinds[1 - pick[FIRST:]]
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).to(tokens.device)

    def run(row: Tensor) -> Tensor:
        batch = {"input_ids": row[None], "position_ids": positions[None]}
        try:
            output = model(**model_inputs(model, batch))
        except TypeError as error:
            raise ValueError(
                f"{type(model).__name__} cannot tell packed documents apart: {error}. Use collate_padded"
            ) from error
        logits = getattr(output, "logits", None)
        return (output.last_hidden_state if logits is None else logits)[0].float()

    with eval_mode(model):
        base = run(ids)
        moved = [(run(other_first) - base)[FIRST:], (run(other_second) - base)[:FIRST]]
    return max(float(part.abs().max()) for part in moved) / max(float(base.abs().max()), 1e-30)


def check_documents_apart(model: nn.Module, batch: Batch) -> None:
    """Raise where a batch may be packed and the model lets packed documents see each other; otherwise do nothing.

    A batch may be packed where it has position ids and no padding, whether or not one of its rows holds more than one
    document: the next one will.

    Args:
        model: the model about to see such batches.
        batch: "input_ids" [B, T], and where it may be packed "position_ids" [B, T].

    Raises:
        ValueError: the documents see each other, or the model takes no position ids; says what to do.
    """
    mask = batch.get("attention_mask")
    if batch.get("position_ids") is None or (mask is not None and not bool(mask.all())):
        return
    leak = document_leak(model, batch["input_ids"].flatten())
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    if not leak > (1e-2 if half else 1e-4):  # a NaN is not packing's fault
        return
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "its own")
    way_out = (
        "Its attention layers are not told where documents start: use collate_padded"
        if attention == "llmtune"
        else 'Call llmtune.integrations.register() and model.set_attn_implementation("llmtune"), or use collate_padded'
    )
    raise ValueError(
        f"packed documents see each other in {type(model).__name__} under attention {attention!r}: changing one "
        f"document moves another's output by {leak:.1%}. {way_out}"
    )
