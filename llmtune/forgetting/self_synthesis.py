"""Rehearsal rows that the model writes itself, where the old data are not to be had."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import active, adapter_names
from llmtune.forgetting.likelihood import IGNORED, has_head
from llmtune.losses.chunked import at_least_float32
from llmtune.modules import reference_pass, unwrap


def self_synthesised(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    teacher: Sequence[str] = (),
    end: int | Sequence[int] | None = None,
    rows_per_batch: int = 16,
    generator: torch.Generator | None = None,
) -> list[dict[str, list[int]]]:
    """Return n rows that the model itself continues from prompts, without its adapters: old knowledge to rehearse.

    Tokens are drawn from p(next | text so far) with nothing cut off (no top-k, no top-p). At temperature 1 the summed
    loss of these rows is, but for a constant, an unbiased estimate of KL(p_base || p) of whole texts: rehearsing them
    pulls the model to where it was. Other temperatures sharpen or flatten what is rehearsed, and are biased.

    Row i continues prompt i mod len(prompts). Which tokens it gets depends on the generator and on i alone, not on the
    batch size: every row has uniform numbers of its own, u_t, and takes the first token at which the cumulated
    probability exceeds u_t.

    Args:
        model: a causal language model, or an encoder-decoder, whose encoder then reads the prompt; wrapped or not.
        prompts: token ids, one or more each: the beginnings of texts, instructions, or only the first token, [[1]].
        n: how many rows, 1 or more.
        max_tokens: how many tokens a row gets at most, 1 or more.
        temperature: the logits are divided by it; larger than 0.
        teacher: names of the adapters that stay on; none for the bare model.
        end: token ids at which a text ends; left out, those of the model's generation config.
        rows_per_batch: rows that are drawn together; only prompts of one length share a batch, so nothing is padded.
        generator: of the draws; None for torch's global random state.

    Returns:
        Rows for `MixedBatches` (of an encoder-decoder with `unit=loss`) or any loop, in order: {"input_ids", "labels"},
        lists, with labels on what the model wrote (the end token among it) and -100 on the prompt; of an
        encoder-decoder, labels are what it wrote alone.

    Raises:
        ValueError: there is no prompt, or an empty one; a number is out of range; a name in `teacher` is no adapter's;
            the model cannot generate; or its predictions are not finite.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> rows = self_synthesised(tiny_llama(), [[1]], 3, max_tokens=5, generator=torch.Generator().manual_seed(0))
        >>> len(rows), rows[0]["labels"][0], rows[0]["input_ids"][1:] == rows[0]["labels"][1:]
        (3, -100, True)

    Reference:
        Huang et al. 2024, "Mitigating catastrophic forgetting in large language models with self-synthesized
        rehearsal", which has instructions written from examples and answered by the latest model, and keeps those that
        are typical of a cluster; here nothing is filtered.
    """
    inner: Any = unwrap(model)
    _check(inner, prompts, n, max_tokens, temperature, rows_per_batch)
    ends = _ends(inner, end)
    uniform = torch.rand(n, max_tokens, dtype=torch.float64, generator=generator, device=_place(generator))
    order = sorted(range(n), key=lambda row: len(prompts[row % len(prompts)]))
    written: dict[int, list[int]] = {}
    with _as_writer(inner, tuple(teacher)):
        for rows in _of_one_length(order, prompts, rows_per_batch):
            given = torch.tensor([list(prompts[row % len(prompts)]) for row in rows])
            for row, tokens in zip(rows, _write(inner, given, uniform[rows], temperature, ends), strict=True):
                written[row] = tokens
    return [_row(inner, list(prompts[row % len(prompts)]), written[row]) for row in range(n)]


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the class at which the cumulated softmax first exceeds a uniform number: a draw from the softmax.

    Args:
        logits: [B, V].
        uniform: [B] in 0 ... 1.

    Returns:
        [B] int64.

    Raises:
        ValueError: the logits are not finite (-inf is).
    """
    p = logits.double().softmax(-1)
    if not bool(p.isfinite().all()):
        raise ValueError("the model's predictions are not finite: its logits hold NaN or infinity")
    below = p.cumsum(-1)
    last = (p > 0).long().cumsum(-1).argmax(-1)  # rounding may leave the sum below u: then the last possible class
    found = torch.searchsorted(below, (uniform.to(p) * below[:, -1])[:, None], right=True).squeeze(1)
    return torch.minimum(found, last)


def _write(inner: Any, prompts: Tensor, uniform: Tensor, temperature: float, ends: set[int]) -> list[list[int]]:
    """Return what the model writes behind prompts [B, n], with numbers [B, max_tokens]."""
    device = next(inner.parameters()).device
    inputs, step = _first_inputs(inner, prompts.to(device))
    written: list[list[int]] = [[] for _ in range(len(prompts))]
    open_rows = set(range(len(prompts)))
    cache = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    for place in range(uniform.shape[1]):
        output = inner(**inputs)
        logits = at_least_float32(output.logits[:, -1]) / temperature
        tokens = draw(logits, uniform[:, place].to(device))
        for row, token in enumerate(tokens.tolist()):
            if row in open_rows:
                written[row].append(token)
                if token in ends:
                    open_rows.discard(row)
        if not open_rows:
            break
        inputs = {**inputs, step: tokens[:, None], cache: getattr(output, cache)}
    return written


def _first_inputs(inner: Any, prompts: Tensor) -> tuple[dict[str, Any], str]:
    """Return the first call's inputs, and which of them is replaced by the new tokens [B, 1] in the later ones."""
    inputs: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = 1
    if not inner.config.is_encoder_decoder:
        return {**inputs, "input_ids": prompts}, "input_ids"
    start = prompts.new_full((len(prompts), 1), _decoder_start(inner))
    return {**inputs, "encoder_outputs": inner.get_encoder()(prompts), "decoder_input_ids": start}, "decoder_input_ids"


def _decoder_start(inner: Any) -> int:
    config = inner.config
    start = config.decoder_start_token_id
    return int(start if start is not None else config.bos_token_id)


def _row(inner: Any, prompt: list[int], written: list[int]) -> dict[str, list[int]]:
    if inner.config.is_encoder_decoder:
        return {"input_ids": prompt, "labels": written}
    return {"input_ids": prompt + written, "labels": [IGNORED] * len(prompt) + written}


def _of_one_length(order: list[int], prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield the rows, sorted by their prompts' lengths, in batches of one length."""
    batch: list[int] = []
    for row in order:
        length = len(prompts[row % len(prompts)])
        if batch and (len(batch) == size or len(prompts[batch[0] % len(prompts)]) != length):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _as_writer(inner: nn.Module, teacher: tuple[str, ...]) -> Any:
    entered = ExitStack()
    if adapter_names(inner) or teacher:
        entered.enter_context(active(inner, teacher))
    entered.enter_context(reference_pass(inner))
    return entered


def _ends(inner: Any, end: int | Sequence[int] | None) -> set[int]:
    if end is None:
        end = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
        end = inner.config.eos_token_id if end is None else end
    if end is None:
        return set()
    return {int(end)} if isinstance(end, int) else {int(token) for token in end}


def _place(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _check(
    inner: Any, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, temperature: float, rows_per_batch: int
) -> None:
    if not (has_head(inner) and callable(getattr(inner, "can_generate", None)) and inner.can_generate()):
        raise ValueError(f"{type(inner).__name__} cannot write texts: a causal model or an encoder-decoder is needed")
    if len(prompts) == 0 or any(isinstance(prompt, int) or len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"prompts must be lists of token ids, one or more each, such as [[1]]; got {prompts!r:.80}")
    for name, value in (("n", n), ("max_tokens", max_tokens), ("rows_per_batch", rows_per_batch)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}")
    known = inner.get_input_embeddings().weight.shape[0]
    if wrong := [token for prompt in prompts for token in prompt if not 0 <= token < known]:
        raise ValueError(f"prompts hold token {wrong[0]}, and the model knows 0 to {known - 1}: is it another model's?")
    longest, places = max(map(len, prompts)), getattr(inner.config, "max_position_embeddings", None)
    length = max(longest, max_tokens) if inner.config.is_encoder_decoder else longest + max_tokens
    if places is not None and length > places:
        raise ValueError(
            f"texts of up to {length} tokens, the longest prompt's {longest} and max_tokens={max_tokens}, go beyond "
            f"the model's {places} positions: ask for fewer"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number larger than 0; got {temperature}")
