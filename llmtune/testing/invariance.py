"""The laws of whole layers and models: no look at the future, and no difference from packing or padding."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtune.adapters.layer import unwrap
from llmtune.errors import LawBroken
from llmtune.testing.close import assert_close

_LENGTHS = (5, 1, 7, 3)


def check_causal(fn: Callable[[Tensor], Tensor], inputs: Tensor | None = None) -> None:
    """Check that what a layer gives at a position depends on nothing after it, exactly.

    For every t but the last, all inputs after t are replaced; the output up to t must stay the same bit for bit.

    Args:
        fn: [B, T, E] -> [B, T, ...], a function or a module; it must give the same result twice (no dropout).
        inputs: [B, T, E] numbers or [B, T] token ids, T >= 2. Left out, they are drawn: [2, 11, E] float, with E from
            the first parameter of `fn` (its last dimension), and 32 where it has none.

    Raises:
        LawBroken: an output changed; the message says at which position and by how much. Or the function gives another
            result at the second call, or NaN.
        ValueError: the inputs have fewer than 2 positions, or token ids of one kind only; or the output is not
            [B, T, ...].

    >>> from llmtune.testing.invariance import check_causal
    >>> check_causal(lambda hidden: hidden.cumsum(dim=1))
    """
    if inputs is None:
        parameter = next(fn.parameters(), None) if isinstance(fn, nn.Module) else None
        width = 32 if parameter is None else parameter.shape[-1]
        inputs = torch.randn(2, 11, width, generator=torch.Generator().manual_seed(0))
        inputs = inputs if parameter is None else inputs.to(parameter)
    if inputs.ndim < 2 or inputs.shape[1] < 2:
        raise ValueError(f"inputs must be [B, T, ...] with at least 2 positions, got shape {tuple(inputs.shape)}")
    other = _others(inputs)
    with torch.no_grad():
        out = fn(inputs)
        if not isinstance(out, Tensor) or out.shape[:2] != inputs.shape[:2]:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"fn must return a tensor [B, T, ...] = {tuple(inputs.shape[:2])} ..., got {got}")
        if bool(out.isnan().any()):
            raise LawBroken('law "causal": the output has NaN')
        if not torch.equal(out, fn(inputs)):
            raise LawBroken('law "causal": two calls on the same inputs differ; switch dropout off (.eval())')
        for t in range(inputs.shape[1] - 1):
            changed = fn(torch.cat([inputs[:, : t + 1], other[:, t + 1 :]], dim=1))
            if not torch.equal(changed[:, : t + 1], out[:, : t + 1]):
                off = (changed.double() - out.double())[:, : t + 1].abs().reshape(*out[:, : t + 1].shape[:2], -1)
                first = int(off.amax(dim=(0, 2)).nonzero()[0])
                raise LawBroken(
                    f'law "causal": other inputs after position {t} changed the output at position {first} '
                    f"by {off[:, first].max().item():.3g}"
                )


def _others(inputs: Tensor) -> Tensor:
    """Inputs that differ from `inputs` at every entry."""
    if inputs.is_floating_point():
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
        return inputs + 1.0 + noise.abs().to(inputs)
    kinds = inputs.unique()
    if len(kinds) < 2:
        raise ValueError(f"inputs must hold at least two different token ids, got only {kinds.tolist()}")
    return kinds[(torch.searchsorted(kinds, inputs) + 1) % len(kinds)]


def check_packing_invariant(model: nn.Module) -> None:
    """Check that documents packed into one row give what each gives alone.

    One row of token ids with position ids that start again at every document, no attention mask and no cache, against
    each document by itself; logits where there are some for every token, else the last hidden state.

    Args:
        model: a Hugging Face decoder or encoder; it is run in evaluation mode and left in the mode it was in.

    Raises:
        LawBroken: a document came out differently: it saw another. The message says which, and by how much.
        ValueError: the model cannot be packed: it is an encoder-decoder, or takes no position ids.

    >>> from llmtune.testing.invariance import check_packing_invariant
    >>> from llmtune.testing.models import tiny_llama
    >>> check_packing_invariant(tiny_llama())
    """
    bare: Any = unwrap(model)
    if bare.config.is_encoder_decoder or not _takes(bare, "position_ids"):
        why = "is an encoder-decoder" if bare.config.is_encoder_decoder else "takes no position_ids"
        raise ValueError(f"{type(bare).__name__} {why}, so its documents cannot be packed into one row")
    start = _first_position(bare)
    ids = _token_ids(bare, 1, sum(_LENGTHS))
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(ids.device) + start
    with _evaluating(model):
        if _states(model, input_ids=ids[:, :2]).ndim < 3:  # a classifier's logits are one for the row
            model = bare.base_model
        packed = _states(model, input_ids=ids, position_ids=positions).split(_LENGTHS, dim=1)
        for i, (document, together) in enumerate(zip(ids.split(_LENGTHS, dim=1), packed, strict=True)):
            what = (
                f'law "packed equals alone" ({type(bare).__name__}, '
                f'attn_implementation="{bare.config._attn_implementation}"): document {i} of lengths {_LENGTHS}'
            )
            assert_close(together, _states(model, input_ids=document), what=what)


def check_padding_invariant(model: nn.Module, *, sides: Sequence[str] | None = None) -> None:
    """Check that a padded row gives at its real tokens what it gives alone.

    Args:
        model: a Hugging Face decoder, encoder or encoder-decoder (whose encoder is padded); it is run in evaluation
            mode and left in the mode it was in.
        sides: of "right" and "left". Left out, both for decoders (they are padded left to generate), else right. Padded
            left, a model that takes position ids is given those of the real tokens.

    Raises:
        LawBroken: a real token came out differently: it saw padding. The message says which row, and by how much.
        ValueError: a side is neither "right" nor "left".

    >>> from llmtune.testing.invariance import check_padding_invariant
    >>> from llmtune.testing.models import tiny_bert
    >>> check_padding_invariant(tiny_bert())
    """
    bare: Any = unwrap(model)
    paired = bare.config.is_encoder_decoder
    if sides is None:
        sides = ("right", "left") if not paired and bare.can_generate() else ("right",)
    if not set(sides) <= {"right", "left"}:
        raise ValueError(f'sides must be of "right" and "left", got {list(sides)}')
    rows = [_token_ids(bare, 1, n, seed=n) for n in _LENGTHS]
    extra = {"decoder_input_ids": _token_ids(bare, 1, 5)} if paired else {}
    pad_id, longest = getattr(bare.config, "pad_token_id", None) or 0, max(_LENGTHS)
    with _evaluating(model):
        alone = [_states(model, input_ids=row, **extra) for row in rows]
        for side in sides:
            edges = [(0, longest - n) if side == "right" else (longest - n, 0) for n in _LENGTHS]
            mask = torch.cat([F.pad(torch.ones_like(row), edge) for row, edge in zip(rows, edges, strict=True)])
            inputs = {
                "input_ids": torch.cat([F.pad(row, edge, value=pad_id) for row, edge in zip(rows, edges, strict=True)]),
                "attention_mask": mask,
                **{name: ids.expand(len(rows), -1) for name, ids in extra.items()},
            }
            if side == "left" and _takes(bare, "position_ids"):
                inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0) + _first_position(bare)
            padded = _states(model, **inputs)
            for i, truth in enumerate(alone):
                # [B, T, ...] is compared at the row's real tokens, what has no T (a class, the decoder's side) as it is
                each = padded.ndim == 3 and not paired
                got = padded[i : i + 1, mask[i].bool()] if each else padded[i : i + 1]
                assert_close(
                    got, truth, what=f'law "padded equals alone" ({type(bare).__name__}, padded {side}): row {i}'
                )


def _states(model: nn.Module, **inputs: Tensor) -> Tensor:
    """Logits [B, T, V] or [B, C], else the last hidden state [B, T, E]."""
    options = {"use_cache": False} if _takes(unwrap(model), "use_cache") else {}
    outputs = model(**inputs, **options)
    logits = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _first_position(model: nn.Module) -> int:
    """RoBERTa and its like count positions from the padding id on."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _token_ids(model: Any, B: int, T: int, *, seed: int = 0) -> Tensor:
    """Random ids that are none of the special ones, which some models read as padding."""
    config = model.config.get_text_config()
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    special = {getattr(config, name, None) for name in names}
    ordinary = torch.tensor([i for i in range(min(config.vocab_size, 1000)) if i not in special])
    drawn = torch.randint(len(ordinary), (B, T), generator=torch.Generator().manual_seed(seed))
    return ordinary[drawn].to(next(model.parameters()).device)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
