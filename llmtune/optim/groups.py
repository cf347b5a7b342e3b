"""Which parameters get which learning rate and weight decay: decay, layer-wise rates, LoRA+, a new head's rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from llmtune.modules import check_module
from llmtune.optim.depth import LAYER, steps_below_top

BIAS = re.compile(r"(?:^|[._])bias(?![a-z])")
# What starts at zero in LoRA: B, and of an embedding A. The second way of writing is PEFT's.
ZERO_AT_START = re.compile(r"(?:^|\.)(?:lora_b|lora_B\.\w+\.weight|lora_embedding_A\.\w+)$")
# What Hugging Face's models call a head that a checkpoint of a language model does not have.
HEADS = (
    "classifier", "pre_classifier", "classification_head", "score", "qa_outputs", "qa_classifier", "v_head",
    "multiple_choice_head", "sequence_summary", "logits_proj",
)  # fmt: skip


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    lora_plus_ratio: float | None = None,
    head_rate: float | None = None,
    heads: Sequence[str] = HEADS,
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups for any torch optimizer, each in exactly one.

    rate = learning_rate * layer_decay^(steps below the top) * (lora_plus_ratio for B, else 1)
           with head_rate in place of learning_rate in a new head

    Weight decay goes to tensors of two or more dimensions, embeddings among them; not to biases and norms, nor to other
    vectors such as DoRA's magnitudes. A table that is a bias (T5's relative_attention_bias) counts as one.

    Layer decay (Clark et al., "ELECTRA" (2020), in the fine-tuning details) lowers the rate from the top of a stack of
    L layers down: what lies above the layers (a last norm, a pooler, a head) has the full rate, layer n has
    layer_decay^(L - n) of it, embeddings layer_decay^(L + 1). It goes by the numbers in names like `layers.3.` or
    `h.3.`, frozen layers included; an encoder and a decoder are counted each by itself.

    LoRA+ (Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models" (2024)) gives B, which starts at zero, a
    higher rate than A; they recommend 16 times. In an embedding it is A that starts at zero, so A gets the higher rate
    there. PEFT's `create_loraplus_optimizer` gives both of an embedding's a rate of their own (1e-6 unless it is set),
    and the ratio to all vectors; here vectors keep the rate.

    A head that was added for the task starts at random, and may learn faster than what was pretrained. It is found by
    its name, outside of layers; a language model's own head ("lm_head", "cls") is pretrained and none of these.

    Args:
        model: any module, with or without adapters and wrappers; its parameters may be on the meta device.
        learning_rate: above 0.
        weight_decay: of the groups that have one, at least 0.
        layer_decay: above 0 and at most 1; None for one rate at every depth.
        lora_plus_ratio: how many times A's rate B has, above 0; None for the same.
        head_rate: the learning rate of new heads, above 0; None for that of the top.
        heads: what modules of new heads are called: one of the parts of their dotted name.

    Returns:
        Dicts with "name", "params", "lr" and "weight_decay"; no group is empty. A parameter that is tied to another
        comes once, under its first name.

    Raises:
        TypeError: `model` is no module.
        ValueError: a number is out of its range; nothing requires a gradient; there is a `layer_decay` and no name has
            a layer number, a `lora_plus_ratio` and no B is trained, or a `head_rate` and no head is; `heads` come
            without a `head_rate`.

    Example:
        >>> import torch
        >>> from llmtune.testing.models import tiny_llama
        >>> groups = parameter_groups(tiny_llama(), learning_rate=1e-3, weight_decay=0.1, layer_decay=0.5)
        >>> for group in groups:
        ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
        model.embeddings.decay 0.000125 0.1 1
        model.layers.0.decay 0.00025 0.1 7
        model.layers.0.no_decay 0.00025 0.0 2
        model.layers.1.decay 0.0005 0.1 7
        model.layers.1.no_decay 0.0005 0.0 2
        top.no_decay 0.001 0.0 1
        top.decay 0.001 0.1 1
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_module(model)
    _check("learning_rate", learning_rate, lambda rate: rate > 0, "above 0")
    _check("weight_decay", weight_decay, lambda decay: decay >= 0, "of at least 0")
    if layer_decay is not None:
        _check("layer_decay", layer_decay, lambda decay: 0 < decay <= 1, "above 0 and at most 1")
    if lora_plus_ratio is not None:
        _check("lora_plus_ratio", lora_plus_ratio, lambda ratio: ratio > 0, "above 0")
    if head_rate is not None:
        _check("head_rate", head_rate, lambda rate: rate > 0, "above 0")
    elif tuple(heads) != HEADS:
        raise ValueError("heads has no effect without a head_rate: give both, or neither")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: attach an adapter, or unfreeze what to train")
    faster = set() if lora_plus_ratio is None else _zero_at_start(model, trained)
    steps = {} if layer_decay is None else steps_below_top(model)
    new = set() if head_rate is None else _in_new_heads(trained, heads)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.items():
        where, below = ("head", 0) if name in new else steps.get(name, ("", 0))
        decays = parameter.ndim >= 2 and not BIAS.search(name)
        rate = (head_rate or 1.0) if name in new else learning_rate * (layer_decay or 1.0) ** below
        rate *= (lora_plus_ratio or 1.0) if name in faster else 1.0
        parts = (where, "lora_b" if name in faster else "", "decay" if decays else "no_decay")
        label = ".".join(filter(None, parts))
        group = {"name": label, "params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault(label, group)["params"].append(parameter)
    return list(groups.values())


def _check(name: str, value: Any, fits: Callable[[float], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value) or value == float("inf"):
        raise ValueError(f"{name} must be a number {wanted}; got {value!r}")


def _zero_at_start(model: nn.Module, trained: dict[str, nn.Parameter]) -> set[str]:
    """Return the names of the trained tensors that LoRA starts at zero."""
    embeddings = {place for place, module in model.named_modules() if hasattr(module, "num_embeddings")}

    def starts_at_zero(name: str) -> bool:
        place, _, local = name.rpartition(".")
        if f"{place}.lora_e" in trained:  # AdaLoRA's, where E starts at zero and B does not
            return False
        if place in embeddings and local in ("lora_a", "lora_b"):
            return local == "lora_a"
        return ZERO_AT_START.search(name) is not None

    found = {name for name in trained if starts_at_zero(name)}
    if not found:
        raise ValueError(
            "lora_plus_ratio is for LoRA's B (parameters called lora_b), and no such parameter is trained here: attach "
            "a LoRA first, or leave lora_plus_ratio out"
        )
    return found


def _in_new_heads(names: Iterable[str], heads: Sequence[str]) -> set[str]:
    """Return the names of what lies in a module that is called as one of `heads`, outside of layers."""
    wanted = set(heads)
    found = {name for name in names if wanted & set(name.split(".")[:-1]) and not LAYER.match(name)}
    if not found:
        last = list(names)[-1]
        raise ValueError(
            f"head_rate is for a new head (a module called {', '.join(heads)}), and no such is trained here (the last "
            f"that is trained: {last}): give the head's name in heads=[...], or leave head_rate out"
        )
    return found
