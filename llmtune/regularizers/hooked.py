"""Hooks on modules for the length of a block, seen by compiled models too, and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from llmtune.modules import marked

Hook = tuple[nn.Module, Literal["before", "after", "ended"], Callable[..., Any]]
"""A module, when to call, and what: hook(module, args, kwargs) -> (args, kwargs) or None before the forward pass,
hook(module, args, kwargs, output) -> output or None after it; "ended" is after it where it raises, too."""


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Register hooks, and take them away when the block ends, however it ends.

    While they are there, every hooked module is of an empty subclass of its class (`marked`), so that compiled models
    see them.

    Args:
        hooks: in the order of registering. A hook acts on what it is handed alone, so that of a model copied inside the
            block the copy keeps hooks of its own.
    """
    kinds: dict[nn.Module, Any] = {module: type(module) for module, _, _ in hooks}
    handles = []
    try:
        for module, when, hook in hooks:
            if when == "before":
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                ended = when == "ended"
                handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=ended))
        for module, kind in kinds.items():
            module.__class__ = marked(kind)
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind
        for handle in handles:
            handle.remove()
