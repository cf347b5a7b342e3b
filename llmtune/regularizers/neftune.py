"""NEFTune: uniform noise on the embeddings of the tokens, scaled by the real length of each document."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.body import embeddings_of, find_body
from llmtune.adapters.record import check_positive
from llmtune.regularizers.hooked import hooked


def neftune_noise(
    embeddings: Tensor, lengths: Tensor, alpha: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return noise for embeddings, the noise alone, 0 on padding.

    uniform(-1, 1) * alpha / sqrt(length * E)

    Every entry is bounded by that scale and has mean 0 and variance alpha^2 / (3 length E), so the noise of a document
    has an expected norm of about alpha / sqrt(3) whatever its length.

    Args:
        embeddings: [B, T, E], read for shape, dtype and device alone.
        lengths: [B] ints, row b's first lengths[b] tokens being real; or [B, T] ints (`token_lengths`), of each token
            how long its document is, 0 on padding.
        alpha: strength, above 0; 5, 10 or 15 in the paper.
        generator: of the draw; left out, torch's global random state.

    Returns:
        [B, T, E] in the embeddings' dtype, drawn in at least float32.

    Raises:
        ValueError: alpha is not above 0, the shapes do not fit, or a row is longer than T.

    Example:
        >>> noise = neftune_noise(torch.zeros(1, 3, 4), torch.tensor([2]), 5.0)
        >>> bool(noise.abs().max() <= 5 / (2 * 4) ** 0.5), noise[0, 2].tolist()
        (True, [0.0, 0.0, 0.0, 0.0])

    Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (2023), algorithm 1. Where we differ:
    published code, transformers' included, takes the padded length T for all rows and puts noise on padding, so the
    noise of a text depends on what else is in the batch.
    """
    check_positive("alpha", alpha)
    if embeddings.ndim != 3 or lengths.shape not in (embeddings.shape[:1], embeddings.shape[:2]):
        raise ValueError(
            "embeddings [B, T, E] and lengths [B] or [B, T] are expected; got "
            f"{[*embeddings.shape]} and {[*lengths.shape]}"
        )
    _, T, E = embeddings.shape
    lengths = lengths.to(embeddings.device)
    if lengths.ndim == 1:
        if bool((lengths > T).any()) or bool((lengths < 0).any()):
            raise ValueError(f"lengths must be from 0 to T = {T}; got {lengths.tolist()}")
        lengths = lengths[:, None] * (torch.arange(T, device=lengths.device) < lengths[:, None])
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    noise = torch.empty(embeddings.shape, dtype=wide, device=embeddings.device).uniform_(-1, 1, generator=generator)
    scale = alpha / (lengths.clamp(min=1).to(wide) * E).sqrt()
    return torch.where(lengths[..., None] > 0, noise * scale[..., None], 0.0).to(embeddings.dtype)


def token_lengths(attention_mask: Tensor | None, position_ids: Tensor | None, B: int, T: int) -> Tensor:
    """Return for each token how many real tokens its document has, 0 on padding.

    A document is a row's real tokens, or in a packed row those between two places where positions start again. So a
    document gets one number padded on the right, padded on the left, or packed.

    Args:
        attention_mask: [B, S], S >= T, not 0 where real (of a cache's positions the last T count); None for all real.
        position_ids: [B, T] or [1, T]; None for one document a row.
        B: rows.
        T: tokens of a row.

    Returns:
        [B, T] ints.

    Raises:
        ValueError: the mask or the positions are of another form.
    """
    given = attention_mask if attention_mask is not None else position_ids
    real = torch.ones(B, T, dtype=torch.bool, device=None if given is None else given.device)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.shape[1] < T:
            came = [*attention_mask.shape] if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(f"neftune reads lengths off an attention_mask [B, T], T = {T}; got {came}")
        real = attention_mask[:, -T:] != 0
    if position_ids is None:
        return real.sum(1, keepdim=True) * real
    if position_ids.ndim != 2 or position_ids.shape[1] != T:
        raise ValueError(f"neftune reads documents off position_ids [B, T], T = {T}; got {[*position_ids.shape]}")
    positions, place = position_ids.to(real.device).expand(B, T), torch.arange(T, device=real.device)
    last = torch.where(real, place, -1).cummax(1).values.roll(1, 1)  # the real token before each
    before = positions.gather(1, last.clamp(min=0))
    again = torch.where(last == place - 1, positions != before + 1, positions <= before)  # within masked gaps no start
    again[:, 0] = False  # document 0 starts there
    document = (again & real).cumsum(1)
    sizes = torch.zeros_like(document).scatter_add_(1, document, real.long())
    return sizes.gather(1, document) * real


@contextmanager
def neftune(model: nn.Module, alpha: float) -> Iterator[None]:
    """Add `neftune_noise` to a Hugging Face model's token embeddings in train mode, while the block runs.

    Lengths come from what the model is called with: a row's real tokens from `attention_mask`, padded on either side;
    a packed row's documents from `position_ids`; all T tokens where neither is given. Embeddings given as
    `inputs_embeds` get noise too. In an encoder-decoder the encoder's tokens do, and the decoder's do not. Positions
    and token types, which some models add, stay as they are, and eval mode is untouched.

    Draws come from torch's global random state, so a loop's run that is resumed repeats them. It works in compiled
    models, also in one that has run before the block, and under activation checkpointing, which leaves the embeddings
    out. Afterwards no hook is left, whether the block ends or raises, and nothing is ever in the state dict.

    Args:
        model: a Hugging Face model of text, with or without adapters or wrappers; or a module with one inside.
        alpha: strength, above 0; 5, 10 or 15 in the paper.

    Raises:
        ValueError: alpha is not above 0, or the block is inside another of the same model. In a forward pass: a mask or
            positions that tell no lengths.
        TypeError: the model is no Hugging Face model of text, or has no embedding of tokens.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> model, ids = tiny_llama().train(), torch.tensor([[5, 7, 11]])
        >>> clean = model(ids).logits
        >>> with neftune(model, 5.0):
        ...     noisy = model(ids).logits
        >>> torch.equal(noisy, clean), torch.equal(model(ids).logits, clean)
        (False, True)

    Jain et al. (2023), algorithm 1. Where we differ, see `neftune_noise`.
    """
    check_positive("alpha", alpha)
    body = find_body(model, "neftune", root=True).module
    embedding = embeddings_of(body, "neftune")
    if any(isinstance(getattr(hook, "__self__", None), _Noise) for hook in embedding._forward_hooks.values()):
        raise ValueError("neftune is on this model already: one block at a time, or the noise would be added twice")
    noise = _Noise(alpha, tuple(inspect.signature(body.forward).parameters))
    with hooked([(body, "before", noise.read), (embedding, "after", noise.add)]):
        yield


class _Noise:
    """Two hooks: one reads the lengths that the body is called with, one adds the noise to what the embedding gives."""

    def __init__(self, alpha: float, arguments: tuple[str, ...]) -> None:
        self.alpha, self.arguments = alpha, arguments
        self.lengths: Tensor | None = None  # of the tokens about to be embedded

    def read(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = dict(zip(self.arguments, args, strict=False)) | kwargs
        self.lengths = None
        if not body.training:
            return None
        embeds = inputs.get("inputs_embeds")
        text = inputs.get("input_ids") if embeds is None else embeds
        if text is None:
            return None  # the body says so itself
        lengths = _lengths(inputs, *text.shape[:2])
        if embeds is None:
            self.lengths = lengths
            return None
        return (), inputs | {"inputs_embeds": embeds + neftune_noise(embeds, lengths, self.alpha)}

    def add(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        lengths, self.lengths = self.lengths, None  # once: GPT-2 embeds token types by the same module
        return output if lengths is None else output + neftune_noise(output, lengths, self.alpha)


def _lengths(inputs: Mapping[str, Any], B: int, T: int) -> Tensor:
    if inputs.get("cu_seq_lens_q") is not None and inputs.get("position_ids") is None:
        raise ValueError("neftune reads packed documents off position_ids; got cu_seq_lens_q alone: give both")
    return token_lengths(inputs.get("attention_mask"), inputs.get("position_ids"), B, T)
