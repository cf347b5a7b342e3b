"""A stack of adapters as files: each adapter as `save` writes it, and their order and state as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llmtune.adapters.attach import adapter_names, adapter_parameters, detach, record_of, set_active
from llmtune.adapters.files import load, save
from llmtune.adapters.merge import merge, unmerge

FILE = "adapter_stack.json"
KEYS = ("names", "active", "trained", "merged", "folded")


def save_stack(
    model: nn.Module,
    folder: str | Path,
    state: Mapping[str, Sequence[str]],
    *,
    over: Mapping[str, Sequence[str]],
    frozen: Mapping[str, Sequence[str]],
) -> Path:
    """Write every adapter and, last, the file of their state. See `AdapterStack.save`."""
    for name in state["names"]:
        save(model, folder, name)
    path = Path(folder) / FILE
    temporary = path.with_name(f".{FILE}.{os.getpid()}.tmp")
    described: dict[str, Any] = {key: list(state[key]) for key in KEYS}
    for key, by_name in (("over", over), ("frozen", frozen)):
        described[key] = {name: list(some) for name, some in by_name.items()}
    temporary.write_text(json.dumps(described, indent=2), encoding="utf-8")
    os.replace(temporary, path)
    return Path(folder)


def load_stack(model: nn.Module, folder: str | Path, *, folded: Iterable[str]) -> None:
    """Put a saved stack onto a model without adapters. See `AdapterStack.load`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model has adapters, `folded` is not the stack's, or the files do not fit.
    """
    (state, over, frozen), folded = read_stack(Path(folder)), list(folded)
    if adapter_names(model):
        raise ValueError(
            f"a stack is loaded into a model without adapters; this one has {', '.join(adapter_names(model))}: "
            "detach them first"
        )
    if folded != state["folded"]:
        raise ValueError(
            f"the stack in {folder} stands on weights into which these tasks were merged for good: "
            f"{', '.join(state['folded']) or 'none'}; folded names {', '.join(folded) or 'none'}. Give the model that "
            "has those weights, and name those tasks"
        )
    try:
        for name in state["names"]:  # each comes over the weights that it came over then
            _merge(model, [other for other in over.get(name, []) if other in state["merged"]])
            load(model, folder, name)
        _merge(model, state["merged"])
        set_active(model, state["active"])
        strange = [name for name in state["trained"] if name not in state["names"]]
        if strange:
            raise ValueError(f'{folder}/{FILE}: "trained" names {strange[0]}, which is none of the stack\'s adapters')
        for name in state["names"]:
            held, own = frozen.get(name, []), adapter_parameters(model, name)
            if unknown := [key for key in held if key not in own]:
                raise ValueError(f'{folder}/{FILE}: "frozen" names {unknown[0]}, which adapter "{name}" has not')
            for key, parameter in own.items():
                parameter.requires_grad_(name in state["trained"] and key not in held)
    except BaseException:
        take_off(model)
        raise
    record_of(model, state["names"][-1]).folded = folded


def _merge(model: nn.Module, names: Iterable[str]) -> None:
    """Merge those that are not yet merged. A tied weight was untied then, and a quantised one de-quantised, or it would
    not have been merged."""
    for name in names:
        if name not in record_of(model, name).merged:
            merge(model, name, untie=True, dequantize=True)


def take_off(model: nn.Module) -> None:
    """Take every adapter off a model, out of the weights where one was merged."""
    names = adapter_names(model)
    for name in reversed(record_of(model, names[0]).merged.copy() if names else []):
        unmerge(model, name)
    for name in reversed(names):
        detach(model, name)


def read_stack(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
    """Return what the file of the state holds: lists of names; for each adapter those merged when it came; and for each
    trained one the parameters of its that are frozen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {FILE}: give the folder that a stack was saved into")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {type(error).__name__}: {error}") from error
    lists = [found.get(key) for key in KEYS] if isinstance(found, dict) else [None]
    whole = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
    over, frozen = (found.get(key, {}) if isinstance(found, dict) else None for key in ("over", "frozen"))
    if not whole or not found["names"] or not isinstance(over, dict) or not isinstance(frozen, dict):
        raise ValueError(f"{path} describes no stack of adapters: it must hold lists of names for {', '.join(KEYS)}")
    return {key: found[key] for key in KEYS}, over, frozen
