"""The one door to attention, and the choice of the backend behind it.

A backend is a module with `NAME`, `refusal(case)` and `attend(case)`. To add one, write its file and put it into
`_BACKENDS` at the place where "auto" should try it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from llmtune.attention import chunked, packed, reference, sdpa, windowed
from llmtune.attention.bands import has_part
from llmtune.attention.biases import RelativeBias
from llmtune.attention.case import AttentionCase
from llmtune.attention.mask_base import Mask
from llmtune.attention.window import SlidingWindow
from llmtune.errors import did_you_mean

_BACKENDS: dict[str, ModuleType] = {backend.NAME: backend for backend in (windowed, packed, sdpa, chunked, reference)}
SMALL = 2**20  # scores; below, one fused call or the plain formula is as good as anything cleverer


@dataclass(frozen=True)
class BackendChoice:
    """A backend's name, and why it was chosen, in words."""

    name: str
    reason: str


def available_backends() -> tuple[str, ...]:
    """Return the names `backend` takes besides "auto", in the order "auto" tries them."""
    return tuple(_BACKENDS)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | RelativeBias | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let every query take a weighted mean of the values, weighted by how well it matches their keys.

    softmax(softcap(scale * Q K^T) + bias + mask) V, with softcap(x) = c * tanh(x / c); the knobs act in that order.

    A query that may attend to no key gives 0, a zero gradient and an LSE of -inf, in every backend. Where torch's
    function takes a tensor as mask, this one takes a mask that says what it means, and an additive tensor as bias.
    Under autocast the inputs are first brought to autocast's dtype, as torch's function does.

    Args:
        query: [B, H, T, D].
        key: [B, K, S, D]; H must be a multiple of K. Query heads 0 ... H/K - 1 use key head 0, and so on.
        value: [B, K, S, Dv].
        mask: which query may attend to which key: `Causal()`, `Padding(...)`, `Documents(...)`, `Dense(...)`, joined
            with `&`. Left out, every query sees every key.
        bias: added to the scores; [T, S] or [B, H, T, S], where a size may be 1; may carry gradient. Or an `ALiBi` or
            a `RelativePositionBias`, which go by distance and need no table.
        scale: what the products are multiplied by; left out, D ** -0.5.
        dropout_p: probability, 0 to 1, that a weight is dropped (the rest is scaled by 1 / (1 - p)).
        softcap: c > 0, bounds the scores to -c ... c.
        sinks: [H] logits of one more key for each head, whose value is zero.
        return_lse: return the log-sum-exp of the scores too: of what is seen, before dropout, sinks included.
        backend: "auto", or a name from `available_backends()`.
        generator: the random state that dropout draws from; left out, torch's own.

    Returns:
        out [B, H, T, Dv] in the query's dtype; with `return_lse`, (out, lse), lse [B, H, T] in float32 (float64 for
        float64 inputs), differentiable.

    Raises:
        TypeError: an argument is of a wrong kind, such as a tensor for a mask.
        ValueError: sizes, dtypes or devices do not fit; the backend does not exist, or cannot take a knob (the sentence
            names the backends that can). Nothing has been computed then.

    >>> from llmtune.attention import Causal, scaled_dot_product_attention
    >>> q, k = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    >>> v = torch.arange(3.0).expand(1, 2, 1, 3).transpose(2, 3)
    >>> scaled_dot_product_attention(q, k, v, mask=Causal())[0, 0, :, 0]
    tensor([0.0000, 0.5000, 1.0000])

    Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1; grouped heads: Ainslie et al., "GQA" (2023); soft
    capping: Gemma Team, "Gemma 2" (2024), section 2; sinks: OpenAI, "gpt-oss" (2025), section 2.2.
    """
    device = query.device.type if isinstance(query, Tensor) else "cpu"
    if device != "meta" and torch.is_autocast_enabled(device):
        query, key, value = (_autocast(tensor, device) for tensor in (query, key, value))
        with torch.autocast(device, enabled=False):
            return scaled_dot_product_attention(
                query, key, value, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, softcap=softcap, sinks=sinks,
                return_lse=return_lse, backend=backend, generator=generator,
            )  # fmt: skip
    case = AttentionCase(
        query, key, value, mask, bias, scale, dropout_p, softcap, sinks, return_lse, generator
    )  # fmt: skip
    name = _choose(case).name if backend == "auto" else _named(backend, case)
    out, lse = _BACKENDS[name].attend(case)
    return (out, lse) if return_lse else out


def choose_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | RelativeBias | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
) -> BackendChoice:
    """Return the backend that "auto" takes for a call, and why. Nothing is computed.

    Args:
        query: [B, H, T, D].
        key: [B, K, S, D].
        value: [B, K, S, Dv].
        mask, bias, scale, dropout_p, softcap, sinks, return_lse, generator: as in `scaled_dot_product_attention`.

    Raises:
        TypeError, ValueError: as `scaled_dot_product_attention`.

    >>> from llmtune.attention import choose_backend
    >>> x = torch.zeros(1, 2, 3, 8)
    >>> choose_backend(x, x, x, softcap=30.0)
    BackendChoice(name='reference', reason='there are few scores, and sdpa cannot take softcap=30.0')
    """
    return _choose(
        AttentionCase(query, key, value, mask, bias, scale, dropout_p, softcap, sinks, return_lse, generator)
    )


def _choose(case: AttentionCase) -> BackendChoice:
    """The first backend that takes the case and is worth it there; every rule gives its reason."""
    no_sdpa = sdpa.refusal(case)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        if no_sdpa is None and not (case.return_lse or case.sinks is not None or case.bias_is_learned()):
            return BackendChoice("sdpa", "torch.compile or torch.func can trace it")
        return BackendChoice("reference", "torch.compile or torch.func can trace it")
    if case.scores < SMALL:
        if no_sdpa is None:
            return BackendChoice("sdpa", "one fused call for so few scores")
        return BackendChoice("reference", f"there are few scores, and sdpa cannot take {no_sdpa}")
    if case.query.device.type == "cpu" and case.mask is not None and sdpa.needs_table(case):
        if has_part(case.mask, SlidingWindow) and windowed.refusal(case) is None:
            return BackendChoice("windowed", "only the keys in the window are computed")
        if packed.refusal(case) is None:
            return BackendChoice("packed", "only what the mask lets meet is computed, and no table is made")
    if no_sdpa is not None:
        return BackendChoice("chunked", f"memory stays linear in the length, and sdpa cannot take {no_sdpa}")
    too_much = sdpa.holds_all_scores(case)
    if too_much is not None:
        return BackendChoice("chunked", f"sdpa would hold all scores at once because of {too_much}")
    return BackendChoice("sdpa", "torch's fused kernel takes every argument")


def _named(backend: str, case: AttentionCase) -> str:
    if not isinstance(backend, str):
        raise TypeError(f'backend must be "auto" or a name from available_backends(), got {backend!r}')
    if backend not in _BACKENDS:
        names = ", ".join(f'"{name}"' for name in ("auto", *_BACKENDS))
        raise ValueError(f'there is no attention backend "{backend}", only {names}.{did_you_mean(backend, _BACKENDS)}')
    why_not = _BACKENDS[backend].refusal(case)
    if why_not is not None:
        able = ", ".join(f'"{name}"' for name, other in _BACKENDS.items() if other.refusal(case) is None)
        raise ValueError(f'the attention backend "{backend}" cannot take {why_not}; {able} can')
    return backend


def _autocast(tensor: Tensor, device: str) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
