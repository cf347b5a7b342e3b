"""From bases of layers' inputs to the parameters that must not change along them, plain or under LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module
from llmtune.adapters.lora import LoRAConv1D, LoRALinear
from llmtune.errors import did_you_mean
from llmtune.forgetting.layer_inputs import has_inputs_first, inputs_of, linear_places
from llmtune.optim.changed_update import full_float32, wide
from llmtune.optim.update_projection import Directions, check_basis

ZERO = 1e-5  # a part of A below this share of its size is rounding


def protected_parameters(model: nn.Module, bases: Mapping[str, Tensor]) -> dict[nn.Parameter, Directions | None]:
    """Return what `UpdateProjection` takes so that layers' outputs on inputs x in the span of their bases stay.

    weight W:       dW U = 0, along the inputs: the last dimension, or the first of GPT-2's Conv1D. One that several
                    layers share keeps to all of their bases.
    bias:           held still (None), as W x + b stays only where b does.
    LoRA's A:       dA U = 0.
    LoRA's B:       dB V = 0, V an orthonormal basis of A U [r, k], which then stays as it is.

    The change of B A on U is dB A U + B_new dA U + ..., so both are needed, and together they are exact after any
    number of steps. A as it is drawn has a part in every direction: then V is all of R^r as soon as k >= r, and B is
    held. `project_lora_a` takes that part out of a new adapter first, at no cost since B = 0; then A U = 0, B is free,
    and the adapter adds nothing on the old inputs however it is trained. With A frozen B alone is projected.

    What is not trained is left out, and so is every parameter that belongs to none of these layers: norms, embeddings
    and further layers train freely, and what they change moves the inputs of all layers behind them. Freeze those for
    outputs that stay.

    Args:
        model: any module, with or without adapters and wrappers.
        bases: {bare name of a linear layer: [in, k], orthonormal columns}, as `input_basis` gives it.

    Returns:
        {parameter: its directions, or None for one that is held}; the bases are not copied.

    Raises:
        ValueError: a name is no linear layer's; a basis does not fit; nothing is trained; a layer has another trained
            adapter than LoRA, whose effect on inputs is no such product; or a new adapter's B would be held whole.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> found = protected_parameters(model, {"0": torch.tensor([[1.0], [0.0], [0.0]])})
        >>> found[model[0].weight].dim, found[model[0].bias] is None
        (-1, True)
    """
    found: dict[nn.Parameter, Directions | None] = {}
    for name, place, basis in _checked(model, bases):
        bare: Any = bare_module(place)
        if bare.weight.requires_grad:
            found[bare.weight] = _with(found.get(bare.weight), basis, 0 if has_inputs_first(bare) else -1)
        if bare.bias is not None and bare.bias.requires_grad:
            found[bare.bias] = None
        for layer in trained_lora(name, place):
            found.update(_of_lora(name, layer, basis))
    if not found:
        raise ValueError(
            f"nothing is trained in the {len(bases)} layers that have a basis: there is nothing to project"
        )
    return found


@torch.no_grad()
def _with(known: Directions | None, basis: Tensor, dim: int) -> Directions:
    """Return a weight's directions; of one that another layer has too, an orthonormal basis of both layers' inputs."""
    if known is None:
        return Directions(basis, dim)
    both = torch.cat([wide(known.basis), wide(basis).to(known.basis.device)], dim=1)
    with full_float32(both.device):
        left, values, _ = torch.linalg.svd(both, full_matrices=False)
    return Directions(left[:, values > ZERO].contiguous(), dim)


@torch.no_grad()
def project_lora_a(model: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """Take the part in protected subspaces out of A of new LoRA adapters, in place: A <- A - (A U) U^T.

    B must still be 0, so the model's outputs stay as they are to the bit. Call it once after `attach`, before
    `protected_parameters`. With A frozen afterwards this is the first half of InfLoRA's idea, without its choice of
    directions.

    Args:
        model: with LoRA attached.
        bases: {bare name of a linear layer: [in, k], orthonormal columns}; those without a trained LoRA are passed by.

    Raises:
        ValueError: no layer with a basis has a trained LoRA; B of one is not 0, so that this would change the model; a
            subspace is all there is and would leave A = 0; or as in `protected_parameters`. Nothing has changed then.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> _ = attach(model, LoRA(rank=2, alpha=2))
        >>> project_lora_a(model, {"0": torch.tensor([[1.0], [0.0], [0.0]])})
        >>> model[0].lora_a[:, 0]
        tensor([0., 0.], grad_fn=<SelectBackward0>)
    """
    layers = [(layer, basis) for name, place, basis in _checked(model, bases) for layer in trained_lora(name, place)]
    if not layers:
        raise ValueError(f"none of the {len(bases)} layers that have a basis has a trained LoRA: attach it first")
    for layer, basis in layers:
        if bool(layer.lora_b.any()) or layer.start_a is not None:
            raise ValueError(
                f'adapter "{layer.adapter_name}" has been trained, or begins with B other than 0: taking a part out of '
                'A would change the model. Attach a new one (initialise="kaiming")'
            )
        if basis.shape[1] == basis.shape[0]:
            raise ValueError(
                f"a basis of all {basis.shape[0]} inputs leaves nothing of A: leave the layer out of the adapter "
                f'"{layer.adapter_name}", or take less energy'
            )
    for layer, basis in layers:
        with full_float32(layer.lora_a.device):
            a = wide(layer.lora_a)
            for _ in range(2):  # the second takes out what rounding has left, so that A U = 0 to A's last bit
                a = a - (a @ basis.to(a)) @ basis.to(a).T
            layer.lora_a.copy_(a)


def _checked(model: nn.Module, bases: Mapping[str, Tensor]) -> Iterator[tuple[str, nn.Module, Tensor]]:
    if not isinstance(bases, Mapping) or not bases:
        raise ValueError(f"bases must be {{name of a layer: [in, k]}} with at least one; got {bases!r:.60}")
    places = linear_places(model)
    for name, basis in bases.items():
        if name not in places:
            raise ValueError(f'there is a basis of "{name}", which is no linear layer.{did_you_mean(name, places)}')
        check_basis(basis, torch.Size([inputs_of(places[name])]), what=f"the basis of {name}")
        yield name, places[name], basis


def trained_lora(name: str, place: nn.Module) -> list[LoRALinear]:
    """Return the LoRA layers of a place of which something is trained.

    Raises:
        ValueError: another kind of adapter is trained there.
    """
    found = []
    for layer in adapter_chain(place):
        if not any(p.requires_grad for p in _own(layer)):
            continue
        if type(layer) not in (LoRALinear, LoRAConv1D):
            raise ValueError(
                f'{name} carries adapter "{layer.adapter_name}", a {type(layer).__name__}: only LoRA can be projected, '
                "as its change is a product B A. Leave the layer out of that adapter, or of the bases (modules=...)"
            )
        assert isinstance(layer, LoRALinear)
        found.append(layer)
    return found


def _own(layer: AdapterLayer) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if not name.startswith("base.")]


@torch.no_grad()
def _of_lora(name: str, layer: LoRALinear, basis: Tensor) -> dict[nn.Parameter, Directions | None]:
    found: dict[nn.Parameter, Directions | None] = {}
    if layer.lora_a.requires_grad:
        found[layer.lora_a] = Directions(basis)
    if layer.lora_bias is not None and layer.lora_bias.requires_grad:
        found[layer.lora_bias] = None
    if not layer.lora_b.requires_grad:
        return found
    a = wide(layer.lora_a)
    with full_float32(a.device):
        left, values, _ = torch.linalg.svd(a @ basis.to(a), full_matrices=False)
    count = int((values > ZERO * a.norm()).sum())
    if count == len(a) and not bool(layer.lora_b.any()):
        raise ValueError(
            f'all of B of the new adapter "{layer.adapter_name}" at {name} would be held at 0, and nothing be learned: '
            "call project_lora_a(model, bases) first"
        )
    if count:
        found[layer.lora_b] = Directions(left[:, :count].contiguous())
    return found
