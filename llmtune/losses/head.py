"""One mechanism for every language-model head: the hidden states that enter it, and what becomes of its logits.

A loss that never builds the whole [B, T, V] of logits needs the head's input and the head itself. Both are taken from
the model's own forward pass, by a hook on `model.get_output_embeddings()`, so that whatever stands before the head
(BERT's transform, T5's factor d_model ** -0.5) is included and wrappers around the model still do their work. What
stands after the head (soft-capping, a factor, BART's bias) is read from the configuration and checked against the
model's own logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.losses.cross_entropy import scaled_and_capped
from llmtune.modules import is_fsdp, marked, unwrap
from llmtune.types import Batch

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)


@dataclass(frozen=True)
class Head:
    """A language model's head and what its model does to the logits: softcap * tanh(logit_scale * (W h + b) / softcap).

    Attributes:
        module: the head as it stands in the model: a linear layer, or an adapter layer around one.
        classes: V, how many logits it gives.
        softcap: the bound of the logits, or None.
        logit_scale: factor on the logits, before the soft cap.
        extra_bias: [V] added after the head (BART's `final_logits_bias`), or None.
    """

    module: nn.Module
    classes: int
    softcap: float | None = None
    logit_scale: float = 1.0
    extra_bias: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits [..., V] for hidden states [..., E] before the head; builds them all."""
        return self.finish(self.module(hidden))

    def finish(self, raw: Tensor) -> Tensor:
        """Return the model's logits [..., V] from what the head module gave [..., V]."""
        logits = raw if self.extra_bias is None else raw + self.extra_bias
        return scaled_and_capped(logits, self.logit_scale, self.softcap)

    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """Return (weight [V, E], bias [V] or None) where the head is a plain linear layer; None where it is not.

        An adapter layer that takes no part (switched off, or merged) counts as the layer under it. Where this is None,
        call `logits` on as many rows as fit: it runs the head as it stands, adapters and dropout included.
        """
        module: Any = self.module
        while hasattr(module, "base") and not getattr(module, "takes_part", True):
            module = module.base
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if not plain or len(module.weight) != self.classes:
            return None  # quantized, or with a forward pass of its own
        weight, bias = _gathered(module, module.weight), _gathered(module, module.bias)
        if type(weight) not in (nn.Parameter, Tensor):
            return None  # quantized, or spread over processes
        if self.extra_bias is None:
            return weight, bias
        return weight, self.extra_bias if bias is None else bias + self.extra_bias


def hidden_before_head(model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
    """Run the model on a batch and return what enters its head, and the head; the logits are never built.

    Args:
        model: a Hugging Face model with a language-modelling head; may be inside `torch.compile` or data-parallel
            wrappers, which are called as they stand.
        batch: tensors by name, as the model's forward takes them; "labels" is left out.

    Returns:
        (hidden [B, T, E] with gradient, head): `head.logits(hidden)` are the model's logits.

    Raises:
        ValueError: the model has no head (`get_output_embeddings`), does not call it exactly once, or changes its
            logits in a way that the configuration does not tell.
    """
    inner = unwrap(model)
    module = _head_module(inner)
    with _watched(module) as (captured, raw):
        output = model(**model_inputs(model, batch))
    if len(captured) != 1:
        raise ValueError(
            f"{type(inner).__name__} must call its head {type(module).__name__} once in a forward pass; it called it "
            f"{len(captured)} times. Compute the loss from the model's own logits instead"
        )
    hidden, logits = captured[0], _logits(output, raw[0])
    if logits is not None and is_fsdp(inner):
        hidden = hidden + 0.0 * logits.sum()  # FSDP starts its backward pass at the model's own output, or crashes
    return hidden, _head(inner, module, raw[0], output)


def read_head(inner: nn.Module, raw: Tensor, output: Any) -> Head:
    """Return the head of a model whose forward pass somebody else has run and watched.

    Args:
        inner: the bare module.
        raw: [B, n, V] what the head module gave.
        output: what the model gave, with logits [B, n, V].

    Raises:
        ValueError: the model changes its logits in a way that the configuration does not tell.
    """
    logits, first = _logits(output, raw), (slice(0, 1), slice(0, 1))
    seen = {"logits": None if logits is None else logits[first].detach()}
    return _head(inner, _head_module(inner), raw[first].detach(), seen)


def _gathered(module: nn.Module, tensor: Any) -> Any:
    """Return a tensor-parallel head's parameter whole where FSDP manages the head: FSDP lets it run once a pass."""
    spread = getattr(getattr(tensor, "device_mesh", None), "mesh_dim_names", None)
    return tensor.full_tensor() if spread == ("tp",) and is_fsdp(module) else tensor


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the entries of a batch that go to `model(**inputs)` in training.

    "labels" is left out. `use_cache=False` is added where the model's forward takes it: a cache costs memory, and makes
    transformers forget that a batch is packed. Where `position_ids` start again within a row (packed documents), an
    `attention_mask` of ones is left out, because with any mask transformers lets packed documents see each other.

    Args:
        model: the model to be called, wrapped or not.
        batch: tensors by name; position_ids and attention_mask [B, T].

    Raises:
        ValueError: packed position ids come with an attention mask that has zeros.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "use_cache" not in inputs and _takes(model, "use_cache"):
        inputs["use_cache"] = False
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None or positions is None or mask.ndim != 2 or positions.ndim != 2:
        return inputs
    real = mask[:, 1:].bool() & mask[:, :-1].bool()
    if bool(((positions[:, 1:] != positions[:, :-1] + 1) & real).any()):
        if not bool(mask.bool().all()):
            raise ValueError(
                "the batch is packed (position_ids start again within a row) and its attention_mask has zeros: "
                "transformers would let packed documents see each other. Pack without padding (collate_packed), "
                "or pad one document a row (collate_padded)"
            )
        del inputs["attention_mask"]
    return inputs


@contextmanager
def _watched(head: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Let the head see only the first position of what it is given; collect (what it was given, what it made of it)."""
    captured: list[Tensor] = []
    raw: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        captured.append(args[0])
        # not detached: from the output, data-parallel training finds out which parameters took part
        return (args[0][(slice(0, 1),) * (args[0].ndim - 1)], *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        raw.append(output)

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    own: Any = type(head)
    head.__class__ = marked(own)
    try:
        yield captured, raw
    finally:
        head.__class__ = own
        for handle in handles:
            handle.remove()


def _takes(model: nn.Module, name: str) -> bool:
    """Return whether the model's forward takes the keyword, by name or by handing every keyword on to its inner
    model."""
    inner = unwrap(model)
    while True:
        parameters = inspect.signature(inner.forward).parameters
        if name in parameters:
            return True
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
        get_base = getattr(inner, "get_base_model", None)  # PEFT's wrapper
        below = get_base() if callable(get_base) else getattr(inner, "base_model", None)
        if not isinstance(below, nn.Module) or below is inner:
            return False
        inner = below


def _head_module(inner: nn.Module) -> nn.Module:
    find = getattr(inner, "get_output_embeddings", None)
    module = find() if callable(find) else None
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{type(inner).__name__} has no language-modelling head: get_output_embeddings() "
            f"{'is missing' if find is None else f'gives {module!r}'}. Load the model with its head "
            "(AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM), or give it that method"
        )
    return module


def _head(inner: nn.Module, module: nn.Module, raw: Tensor, output: Any) -> Head:
    """Return the head with that reading of the configuration which makes the model's own logits of `raw`."""
    readings = _readings(inner, module, raw.shape[-1])
    logits = _logits(output, raw)
    if logits is None:
        return readings[0]
    with torch.no_grad():
        errors = [_difference(head, raw, logits) for head in readings]
        largest, *errors = torch.stack([logits.float().nan_to_num().abs().max(), *errors]).tolist()
    best = min(range(len(readings)), key=lambda at: errors[at])
    if errors[best] <= largest * (1e-4 if raw.dtype in (torch.float32, torch.float64) else 2e-2):
        return readings[best]
    raise ValueError(
        f"{type(inner).__name__} changes its logits after the head in a way that its configuration does not tell "
        f"({', '.join(f'softcap {head.softcap} and scale {head.logit_scale:g}' for head in readings)} all give other "
        "logits). Compute the loss from the model's own logits instead"
    )


def _difference(head: Head, raw: Tensor, logits: Tensor) -> Tensor:
    """Return how far the head's reading is from the logits. Some models finish them in their own type, some in float32:
    the right reading is exact in one of the two, and half precision cannot hide a wrong one."""
    made = [head.finish(raw.to(kind)).float().nan_to_num() for kind in (raw.dtype, torch.float32)]
    want = logits.float().nan_to_num()
    return torch.stack([(given - want).abs().max() for given in made]).min()


def _logits(output: Any, raw: Tensor) -> Tensor | None:
    """Return the logits among a model's outputs: by name, or in a tuple the first tensor of the shape of `raw`."""
    if isinstance(output, Mapping):
        return output.get("logits")
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Tensor) and part.shape == raw.shape), None)
    return getattr(output, "logits", None)


def _readings(inner: nn.Module, module: nn.Module, classes: int) -> list[Head]:
    """Return what the configuration may mean, the likeliest first. Models read the same entry in different ways:
    Granite divides the logits by `logits_scaling`, HyperCLOVA X multiplies them, MiniCPM3 divides before the head."""
    config: Any = getattr(inner, "config", None)
    if hasattr(config, "get_text_config"):  # models of several parts keep the language model's entries one level down
        config = config.get_text_config(decoder=True)

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = [getattr(config, name, None) for name in names]
        return [float(value) for value in found if isinstance(value, int | float) and value not in (0, 1)]

    factors, divisors = numbers(FACTORS), numbers(DIVISORS)
    scales = [*factors, *(1 / d for d in divisors), *divisors, 1.0]
    caps: list[float | None] = [*numbers(SOFTCAPS), None]
    bias = getattr(inner, "final_logits_bias", None)
    extra = bias.reshape(-1) if isinstance(bias, Tensor) else None
    return [Head(module, classes, cap, scale, extra) for cap, scale in product(caps, scales)]
