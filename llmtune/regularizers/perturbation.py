"""Noise on a model's token embeddings: whose ball it lies in, the steepest step, how it gets into a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtune.modules import unwrap
from llmtune.regularizers.hooked import hooked
from llmtune.types import Batch

Norm = Literal["l2", "linf"]
LOST = 0.5  # the share of the noise that rounding may take


def real_tokens(batch: Batch) -> Tensor:
    """Return booleans [B, T]: which of the batch's "input_ids" are no padding.

    Raises:
        ValueError: the batch has no "input_ids" [B, T], or an attention mask of another shape.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        came = f"{[*ids.shape]}" if isinstance(ids, Tensor) else repr(ids)
        raise ValueError(f'token embeddings are changed, so the batch needs "input_ids" [B, T]; got {came}')
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(f"the attention mask must say of each token {[*ids.shape]} if it is real; got {[*mask.shape]}")
    return mask.bool()


def examples_of(batch: Batch, real: Tensor) -> Tensor:
    """Return [B, T] integers: the number of the example that each token belongs to.

    An example is a row, or a document of a packed row, where `position_ids` start again. So noise has the same ball
    whether rows are padded or packed.

    Args:
        batch: with "position_ids" [B, T] where it may be packed.
        real: [B, T] booleans.
    """
    starts = torch.zeros_like(real)
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape == real.shape:
        starts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1) & real[:, 1:] & real[:, :-1]
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view(real.shape) - 1


def example_norms(x: Tensor, examples: Tensor) -> Tensor:
    """Return [B, T, 1]: for each token the Euclidean norm of all that its example has of x.

    Args:
        x: [B, T, E].
        examples: [B, T] from `examples_of`.
    """
    squares = x.new_zeros(examples.numel()).index_add(0, examples.flatten(), x.square().sum(-1).flatten())
    return squares.sqrt()[examples][..., None]


def climb(noise: Tensor, slope: Tensor, examples: Tensor, *, step: float, radius: float, norm: Norm) -> Tensor:
    """Return the noise after the steepest step of a given length upwards, put back into the ball of its example.

        "l2":   P(noise + step * slope / ||slope||),  each example's noise as a whole within ||.|| <= radius
        "linf": P(noise + step * sign(slope)),        each entry within +- radius

    Args:
        noise: [B, T, E].
        slope: [B, T, E], the gradient of what is to grow.
        examples: [B, T] from `examples_of`.
        step: the length of the step, in the norm.
        radius: of the ball.
        norm: "l2" or "linf".
    """
    if norm == "linf":
        return (noise + step * slope.sign()).clamp(-radius, radius)
    slope = slope / slope.abs().amax().clamp(min=torch.finfo(slope.dtype).tiny)  # so that no square is lost
    tiny = torch.finfo(slope.dtype).tiny
    return within(noise + step * slope / example_norms(slope, examples).clamp(min=tiny), examples, radius)


def within(noise: Tensor, examples: Tensor, radius: float) -> Tensor:
    """Return the noise [B, T, E], each example's scaled down to a Euclidean norm of `radius` where it is longer."""
    tiny = torch.finfo(noise.dtype).tiny
    return noise * (radius / example_norms(noise, examples).clamp(min=tiny)).clamp(max=1.0)


def embedding_of(model: nn.Module) -> nn.Module:
    """Return the module that makes vectors of "input_ids"; of an encoder-decoder, its encoder's.

    Raises:
        ValueError: the model has none.
    """
    inner: Any = unwrap(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False) and hasattr(inner, "get_encoder"):
        inner = inner.get_encoder()
    find = getattr(inner, "get_input_embeddings", None)
    module = find() if callable(find) else None
    if not isinstance(module, nn.Module) or getattr(module, "weight", torch.empty(0)).ndim != 2:
        raise ValueError(
            f"{type(inner).__name__} has no embedding of tokens: get_input_embeddings() "
            f"{'is missing' if find is None else f'gives {module!r}'}, so there is nothing to put noise on"
        )
    return module


def blank_noise(model: nn.Module, real: Tensor) -> Tensor:
    """Return zeros [B, T, E] in the shape of the model's token embeddings, in at least float32.

    Args:
        model: whose embeddings.
        real: [B, T] booleans.
    """
    weight: Any = embedding_of(model).weight
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.zeros(*real.shape, weight.shape[1], dtype=wide, device=real.device)


@contextmanager
def embeddings_moved(model: nn.Module, noise: Tensor) -> Iterator[None]:
    """Add noise to the token embeddings of the forward pass inside the block.

    By a hook on the embedding module, not by `inputs_embeds`: so models that look at the ids elsewhere (the place of
    the last token in a classifier, positions counted from padding) still see them.

    Args:
        model: wrapped or not.
        noise: [B, T, E].

    Raises:
        ValueError: the embedding is not called on the batch's tokens; or the noise is lost in its rounding.
    """
    module = embedding_of(model)
    seen: list[Tensor] = []

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if seen:  # an encoder-decoder may share the module: its encoder calls it first
            return None
        seen.append(output.detach())
        return output + noise.to(output.dtype) if output.shape == noise.shape else None

    with hooked([(module, "after", after)]):
        yield
    _check_felt(module, seen, noise.detach())


def _check_felt(module: nn.Module, seen: list[Tensor], noise: Tensor) -> None:
    name = type(module).__name__
    if not seen or seen[0].shape != noise.shape:
        gave = f"it gave {[*seen[0].shape]}" if seen else "it was not called"
        raise ValueError(f"noise {[*noise.shape]} belongs on what the model's {name} makes of input_ids; {gave}")
    plain, kind = seen[0], seen[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else plain.dtype
    felt = (plain + noise.to(plain.dtype)).to(dtype).to(noise.dtype) - plain.to(dtype).to(noise.dtype)
    if bool((felt - noise).norm() > LOST * noise.norm()):
        raise ValueError(
            f"the noise is lost in the rounding of {dtype}: of its size {float(noise.norm()):.2g} rounding takes "
            f"{float((felt - noise).norm()):.2g}. Give a larger epsilon (the embeddings' entries are of size "
            f"{float(plain.float().std()):.2g}), or compute in a wider type"
        )
