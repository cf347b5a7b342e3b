"""InfLoRA: a new task's A is designed from its inputs, orthogonal to those of earlier tasks, and then frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_names, record_of
from llmtune.adapters.config import LoRA
from llmtune.adapters.layer import adapter_chain, named_places
from llmtune.adapters.lora import LoRALinear, LowRankLayer
from llmtune.errors import did_you_mean
from llmtune.forgetting.input_directions import checked_basis, designed_rows, extended_basis
from llmtune.forgetting.input_rows import Covariance, counted_rows, inputs_of
from llmtune.modules import train_mode, unwrap


@dataclass(frozen=True)
class InfLoRAReport:
    """What `inflora_start` set.

    Attributes:
        name: the adapter.
        rows: of each module, how many rows of its A are in use: its rank, or fewer where the protected inputs leave
            fewer directions that the new inputs have. The other rows are 0, and their columns of B learn nothing.
        counted: how many input vectors there were at each module.
    """

    name: str
    rows: dict[str, int]
    counted: dict[str, int]


@torch.no_grad()
def inflora_start(
    model: nn.Module, name: str, batches: Iterable[Any], *, protected: Mapping[str, Tensor] | None = None
) -> InfLoRAReport:
    """Set the A of a new LoRA from the inputs of its task, orthogonal to the protected ones, and freeze it.

    A = U_r^T / sqrt(3), with U_r the first r left singular vectors of (I - P) X X^T

    X are the inputs of the module on the new task, P projects onto the protected basis. B, which is 0, alone is trained
    then. As A does not move, s B A x = 0 for every protected x after any number of steps of any optimizer, to the
    rounding of A's dtype. The factor 1 / sqrt(3) is the authors' code's, whatever the inputs' scale: it is the expected
    length of a row of LoRA's usual start, uniform in +-1 / sqrt(in), so learning rates carry over.

    Call it on every task after `AdapterStack.start` and before training; on the first without `protected`, which
    afterwards comes from `protected_inputs`. `AdapterStack.save` keeps A and what is frozen.

    Where we differ: a direction left over by rounding alone is no direction; its row is 0 (the code's may be any, a
    protected one too). Padding is not counted as an input.

    Args:
        model: with the adapter, as `AdapterStack.start` leaves it; the earlier adapters as the task will train on them.
        name: the adapter: a LoRA on linear layers and GPT-2's Conv1D, not yet trained.
        batches: of the new task's training data: dicts for `model(**batch)`, or (inputs, targets) pairs; the same in
            all processes.
        protected: {bare name of a module, or of its weight: Q [in, k], orthonormal columns}, at least for every module
            that the adapter goes to. Left out, nothing is protected: the first task.

    Returns:
        What was set.

    Raises:
        ValueError: there is no such adapter, or it is not the newest, merged, trained already, or starts from the
            weights; it goes to something without input vectors; a basis is missing, of another size, not orthonormal,
            or leaves no direction free; there is no batch, or the inputs are not finite. Nothing has been changed then.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> model = nn.Sequential(nn.Linear(5, 3))
        >>> _ = attach(model, LoRA(rank=2, alpha=2), "maths")
        >>> inflora_start(model, "maths", [(torch.randn(7, 5), None)]).rows
        {'0': 2}

    Liang and Li 2024, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", section 4 (where LoRA's
    A is called B); code: liangyanshuo/InfLoRA, `methods/inflora.py`.
    """
    model = unwrap(model)
    layers = _fresh_layers(model, name)
    bases = {place: _basis_of(place, protected, layer.lora_a.shape[1]) for place, layer in layers.items()}
    _check_names(model, protected)
    found = _collect(model, layers, batches)
    rows = {
        place: designed_rows(found[place].total, len(layer.lora_a), protected=bases[place])
        for place, layer in layers.items()
    }
    used = {place: int((a.abs().amax(1) > 0).sum()) for place, a in rows.items()}
    for place, count in used.items():
        if count == 0:
            raise ValueError(
                f"the protected inputs of {place} leave none of the new task's directions free: protect a smaller "
                "share of the energy, or leave the module out of the targets"
            )
    for place, layer in layers.items():
        layer.lora_a.copy_(rows[place] / math.sqrt(3))
        layer.lora_a.requires_grad_(False)
    return InfLoRAReport(name, used, {place: one.rows for place, one in found.items()})


@torch.no_grad()
def protected_inputs(
    model: nn.Module, name: str, batches: Iterable[Any], *, energy: float, protected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the basis of the inputs to protect once a task is learned: the earlier one, extended by this task's.

    Args:
        model: with the adapter, after its training.
        name: the adapter, whose modules are meant.
        batches: of the task's training data, as for `inflora_start`.
        energy: the share of the inputs' energy that the basis must hold, above 0 and at most 1; see `extended_basis`.
        protected: what this gave after the task before; modules of it that the adapter does not touch are kept.

    Returns:
        {bare name of a module: [in, k]}, float32 tensors, which safetensors saves as they are.

    Raises:
        ValueError: as `inflora_start`, but that the adapter may be trained, and a basis may be missing.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> model = nn.Sequential(nn.Linear(5, 3))
        >>> _ = attach(model, LoRA(rank=2, alpha=2), "maths")
        >>> protected_inputs(model, "maths", [(torch.eye(5)[:2], None)], energy=0.99)["0"].shape
        torch.Size([5, 2])

    Liang and Li 2024, section 4.2, after Saha et al. 2021. The complement that they store of a large basis (DualGPM)
    saves memory and is the same projection; it is not kept here.
    """
    model = unwrap(model)
    layers = _layers(model, name)
    _check_names(model, protected)
    sizes = {place: layer.lora_a.shape[1] for place, layer in layers.items()}
    bases = {p: None if _key(p, protected) is None else _basis_of(p, protected, n) for p, n in sizes.items()}
    extended_basis(torch.ones(1, 1), energy)  # checked before the work
    found = _collect(model, layers, batches)
    own = {_key(place, protected) for place in layers}
    kept = {key: basis.clone() for key, basis in (protected or {}).items() if key not in own}
    return kept | {p: extended_basis(found[p].total, energy, protected=bases[p]) for p in layers}


def _layers(model: nn.Module, name: str) -> dict[str, LowRankLayer]:
    """Return the adapter's layers of low rank by the bare name of the module, checked."""
    config = record_of(model, name).configs[name]
    if not isinstance(config, LoRA) or config.decomposes:
        raise ValueError(f'adapter "{name}" is {type(config).__name__}: InfLoRA designs the A of a plain LoRA')
    if config.target_parameters:
        raise ValueError(f'adapter "{name}" has target_parameters, whose inputs InfLoRA does not see: leave them out')
    found = {
        place: layer
        for place, module in named_places(model)
        for layer in adapter_chain(module)
        if layer.adapter_name == name and isinstance(layer, LowRankLayer)
    }
    for place, layer in found.items():
        if not isinstance(layer, LoRALinear):
            raise ValueError(f"{place} is an embedding, which has no input vectors: leave it out of the targets")
    if not found:
        raise ValueError(f'adapter "{name}" adapts no module by LoRA: there is no A to design')
    return found


def _fresh_layers(model: nn.Module, name: str) -> dict[str, LowRankLayer]:
    """Return the layers of an adapter whose A may still be set."""
    layers = _layers(model, name)
    if name != adapter_names(model)[-1]:
        raise ValueError(f'adapter "{name}" is not the newest: InfLoRA sets A before the task\'s training')
    if name in record_of(model, name).merged:
        raise ValueError(f'adapter "{name}" is merged into the weights: InfLoRA sets A before the task\'s training')
    for place, layer in layers.items():
        if layer.start_a is not None or bool((layer.lora_b != 0).any()):
            raise ValueError(
                f'adapter "{name}" has a B that is not 0 at {place}: InfLoRA sets A before the task\'s training, with '
                'initialise="kaiming" or "gaussian"'
            )
    return layers


def _key(place: str, protected: Mapping[str, Tensor] | None) -> str | None:
    return next((key for key in (place, f"{place}.weight") if key in (protected or {})), None)


def _basis_of(place: str, protected: Mapping[str, Tensor] | None, size: int) -> Tensor | None:
    if protected is None:
        return None
    key = _key(place, protected)
    if key is None:
        raise ValueError(
            f'protected has no basis for "{place}", which the adapter goes to, so that earlier tasks would not be '
            f"protected there: give an empty one, [{size}, 0], if that is meant.{did_you_mean(place, protected)}"
        )
    return checked_basis(protected[key], size, place)


def _check_names(model: nn.Module, protected: Mapping[str, Tensor] | None) -> None:
    places = [place for place, _ in named_places(model)]
    for key in protected or {}:
        if key not in places and key.removesuffix(".weight") not in places:
            raise ValueError(f'protected names "{key}", which the model has not.{did_you_mean(key, places)}')


def _collect(model: nn.Module, layers: Mapping[str, LowRankLayer], batches: Iterable[Any]) -> dict[str, Covariance]:
    """Run the batches in eval mode and return X X^T of every layer's inputs."""
    found = {place: Covariance() for place in layers}
    if isinstance(batches, Mapping | str):
        raise ValueError("batches must be an iterable of batches; got a single one: put it into a list")
    with train_mode(model, False):
        for batch in batches:
            with _watching(model, layers, found, batch):
                if isinstance(batch, Mapping):
                    model(**inputs_of(model, batch))
                else:
                    model(batch[0])
    for place, one in found.items():
        if one.rows == 0:
            raise ValueError(f"no input has reached {place}: batches is empty, all padding, or the model skips it")
        if not bool(one.total.isfinite().all()):
            raise ValueError(f"the inputs of {place} are not finite")
    return found


@contextmanager
def _watching(
    model: nn.Module, layers: Mapping[str, LowRankLayer], found: Mapping[str, Covariance], batch: Any
) -> Iterator[None]:
    def take(place: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        found[place].add(args[0], counted_rows(model, place, batch, args[0].shape[:-1]))

    handles = [layer.register_forward_pre_hook(partial(take, place)) for place, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
