"""Switches of speed and memory, put on a model for the length of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from llmtune.modules import unwrap


def compiled(model: nn.Module, how: bool | str) -> Any:
    """Return the model as it is called: itself, or compiled; `how` is False, True, or the name of a backend.

    Raises:
        ValueError: torch knows no such backend.
    """
    if how is False:
        return model
    backend = "inductor" if how is True else how
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"compile must be True, False or one of {', '.join(known)}; got {how!r}")
    return torch.compile(model, backend=backend)


def autocast(device: torch.device, precision: str) -> Any:
    """Return the context in which a loss is computed: autocast under "bf16" and "fp16", none under "float32"."""
    if precision == "float32" and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "float32")


@contextmanager
def recomputing(model: nn.Module, on: bool) -> Iterator[None]:
    """Let a Hugging Face model compute its blocks' activations again in the backward pass, while the block runs.

    Raises:
        ValueError: the model has no such switch.
    """
    inner: Any = unwrap(model)
    if on:
        check_checkpointing(model)
    newest = "is_activation_checkpointing"  # asking by the older name warns where there is a newer one
    name = newest if hasattr(type(inner), newest) else "is_gradient_checkpointing"
    if not on or getattr(inner, name, False):
        yield
        return
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable()
        switch_off = getattr(inner, "activation_checkpointing_disable", None)
    else:  # its name in transformers before 5.20 or so
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        switch_off = None
    try:
        yield
    finally:
        (switch_off or inner.gradient_checkpointing_disable)()


def check_checkpointing(model: nn.Module) -> None:
    """Raise ValueError where the model has no switch for activation checkpointing, or one that its class refuses."""
    inner: Any = unwrap(model)
    switch = hasattr(inner, "activation_checkpointing_enable") or hasattr(inner, "gradient_checkpointing_enable")
    if not switch or not getattr(inner, "supports_gradient_checkpointing", True):
        raise ValueError(
            f"{type(inner).__name__} has no switch for activation checkpointing, which most Hugging Face models have: "
            "put torch.utils.checkpoint into its forward pass, or set activation_checkpointing=False"
        )
