"""Folding an adapter's change into the base's weights, in float32 with one rounding, and taking it out to the bit."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers, detach, record_of
from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, bare_named_parameters, named_places
from llmtune.adapters.merge_quantized import check_plain, is_quantised, plain_dtype, put_plain
from llmtune.adapters.quantized import dequantized_weight, forget_quantization, stored_bytes
from llmtune.adapters.record import check_flag
from llmtune.adapters.report import MergeReport
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy
from llmtune.modules import unwrap

Place = tuple[nn.Module, str]  # a bare module and the local name of one of its parameters or buffers


@torch.no_grad()
def merge(
    model: nn.Module,
    name: str = "default",
    *,
    keep_base: bool = True,
    untie: bool = False,
    dequantize: bool | torch.dtype = False,
) -> MergeReport:
    """Fold an adapter into the weights: W + its change, in float32, rounded once to W's dtype.

    Args:
        model: a model with the adapter.
        name: the adapter's name.
        keep_base: keep the originals on the CPU, so that `unmerge` is exact to the bit. False removes the adapter's
            layers for good: with the last adapter gone the model is a plain one.
        untie: where a weight to be changed is tied to another (embedding and output head), give it storage of its own
            first. Without it such a weight raises, unless the adapter changes it alike in all its places (`NewTokens`).
        dequantize: put a plain `nn.Linear` with the merged weight in the place of every quantised layer adapted, in
            the dtype the weight had before it was quantised, or in the one given here. Merging into the quantised
            weight itself would round most of the change away, so without this it raises. With keep_base the quantised
            layers themselves are kept, where they lie.

    Returns:
        What was changed, the bytes kept, and the largest rounding.

    Raises:
        ValueError: there is no such adapter; it is merged already; a weight is tied, or quantised; the change is not
            finite or too large for the weight's dtype; a bias is trained where the base has none; the adapter is
            switched off. Nothing has been changed then.
        TypeError: a flag is neither True nor False.
    """
    check_flag("keep_base", keep_base)
    check_flag("untie", untie)
    if not isinstance(dequantize, torch.dtype):
        check_flag("dequantize", dequantize)
    model = unwrap(model)
    record = record_of(model, name)
    if name in record.merged:
        raise ValueError(f'adapter "{name}" is merged already: unmerge it first')
    if record.merged and not keep_base:
        raise ValueError(
            f'adapter "{record.merged[-1]}" is merged: merge with keep_base=True, or unmerge that one first'
        )
    if not all(layer.active for layer in adapter_layers(model, name)):
        raise ValueError(
            f'adapter "{name}" is switched off, and merging it would change what the model gives: switch it on first '
            "(set_active)"
        )
    names = _place_names(model)
    tied = _tied(names)
    changes, alike = _changes(model, name, names, tied, dequantize)
    quantised = {place: changes.pop(place) for place in list(changes) if is_quantised(place)}
    shared = [place for place in changes if place in tied and place not in alike]
    if shared and not untie:
        raise ValueError(
            f"{names[shared[0]]} shares its storage with another parameter (tied weights), which would change too: "
            "pass untie=True to give it storage of its own"
        )
    first_names = {id(parameter): bare for bare, parameter in bare_named_parameters(model)}
    kept: dict[Place, tuple[Tensor, Tensor | None]] = {}
    rounding = 0.0
    for place in list(changes):
        parameter, merged = _parameter(place), changes.pop(place)
        kept[place] = (parameter, parameter.detach().cpu().clone() if keep_base else None)
        if place in shared:
            _set(place, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
            for bare in (names[other] for other in names if other == place or _parameter(other) is parameter):
                for flags in record.flags.values():
                    flags.setdefault(bare, flags.get(first_names[id(parameter)], parameter.requires_grad))
        exact = merged()
        _parameter(place).copy_(exact)
        rounding = max(rounding, float((_parameter(place).to(exact.dtype) - exact).abs().max()))
    swaps, lost = put_plain(model, quantised, dequantize)
    untied_config = bool(shared) and _untie_config(model)
    for layer in adapter_layers(model, name):
        layer.merged = True
    report = MergeReport(
        name, tuple(names[place] for place in (*kept, *quantised)),
        sum(t.nbytes for _, t in kept.values() if t is not None), max(rounding, lost),
        tuple(names[place] for place in shared), tuple(names[place] for place in quantised),
        sum(plain.weight.nbytes - (0 if keep_base else stored_bytes(old)) for _, old, plain in swaps),
    )  # fmt: skip
    if keep_base:
        record.merged.append(name)
        record.kept[name] = (list(kept.items()), untied_config, swaps)
    else:
        detach(model, name)
        record.folded.append(name)
        if swaps:
            forget_quantization(model)
    return report


@torch.no_grad()
def unmerge(model: nn.Module, name: str = "default") -> None:
    """Put back the weights of before `merge`, bit for bit; the adapter takes part in the forward pass again.

    Args:
        model: a model with the adapter merged.
        name: the adapter's name.

    Raises:
        ValueError: the adapter is not merged, or another one was merged after it.
    """
    model = unwrap(model)
    record = record_of(model, name)
    if name not in record.merged:
        raise ValueError(f'adapter "{name}" is not merged: there is nothing to take out')
    if record.merged[-1] != name:
        raise ValueError(f'adapter "{record.merged[-1]}" was merged after "{name}": unmerge that one first')
    kept, untied_config, swaps = record.kept.pop(name)
    for holder, layer, _ in swaps:
        holder.base = layer
    for place, (parameter, original) in kept:
        if _parameter(place) is not parameter:
            _set(place, parameter)
        else:
            parameter.copy_(original)
    if untied_config:
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]
    record.merged.remove(name)
    for layer in adapter_layers(model, name):
        layer.merged = False


def _changes(
    model: nn.Module,
    name: str,
    names: dict[Place, str],
    tied: dict[Place, list[Place]],
    dequantize: bool | torch.dtype,
) -> tuple[dict[Place, Any], set[Place]]:
    """Return for each parameter a function that gives its merged value in float32, all checked; and those that are tied
    and changed alike in all their places, of which the first alone is returned."""
    by_place: dict[Place, list[tuple[AdapterLayer, str]]] = defaultdict(list)
    readers = {
        id(bare_module(layer)): layer
        for layer in adapter_layers(model)
        if layer.reads_weight and not layer.merged and layer.adapter_name != name
    }
    for layer in dict.fromkeys(adapter_layers(model, name)):
        bare = bare_module(layer)
        reader = readers.get(id(bare))
        spares = isinstance(layer, TrainedBias) and (reader is None or not reader.reads_bias)
        # two that read the weight stand at one place only where each reads what the other leaves alone
        if reader is not None and not spares and not layer.reads_weight:
            raise ValueError(
                f'adapter "{reader.adapter_name}" is made for the weights as they are, and "{name}" would change '
                f'them under it: merge "{reader.adapter_name}" first'
            )
        under = next((o for o in adapter_chain(layer.base) if isinstance(o, TrainedCopy) and not o.merged), None)
        if isinstance(layer, TrainedCopy) and under is not None:
            raise ValueError(
                f'adapter "{name}" trains a copy of a {type(bare).__name__}, and so does "{under.adapter_name}" before '
                f'it: merge "{under.adapter_name}" first'
            )
        deltas = layer.deltas()
        if not deltas:
            raise ValueError(f'adapter "{name}" is no change of weights, so it cannot be merged into them')
        inner = next((other for other in adapter_chain(layer.base) if other.reads_output), None)
        if inner is not None:
            raise ValueError(
                f'adapter "{name}" adds to what "{inner.adapter_name}" makes of the output of a '
                f'{type(bare).__name__}, which no change of its weight does: detach "{inner.adapter_name}" first'
            )
        for local, delta in deltas.items():
            place = _place(bare, local)
            if place not in names:
                raise ValueError(f'adapter "{name}" trains a {local} where the base {type(bare).__name__} has none')
            parameter = _parameter(place)
            if is_quantised(place):
                check_plain(bare, names[place], dequantize)
            elif not parameter.is_floating_point() or parameter.shape != delta.shape:
                raise ValueError(
                    f"{names[place]} is {tuple(parameter.shape)} of {parameter.dtype}: only a floating weight of shape "
                    f"{tuple(delta.shape)} can be merged into. De-quantise it first"
                )
            if not bool(delta.isfinite().all()):
                raise ValueError(f"the change of {names[place]} is not finite: nothing has been merged")
            by_place[place].append((layer, local))
        if isinstance(layer, TrainedCopy):  # a norm's running statistics, say, have gone on with the copy
            by_place |= {_place(bare, local): [(layer, local)] for local, _ in layer.copy.named_buffers()}
    alike = {place for place in by_place if _changed_alike(tied.get(place, []), by_place)}
    repeated = {other for place in alike for other in tied[place][1:]}
    changes = {place: _merged(place, layers) for place, layers in by_place.items() if place not in repeated}
    for place, value in changes.items():
        if is_quantised(place):
            _check_fits(names[place], plain_dtype(place[0], model, dequantize), None, value)
        else:
            _check_fits(names[place], _parameter(place).dtype, _parameter(place), value)
    return changes, alike


def _changed_alike(places: list[Place], by_place: dict[Place, list[tuple[AdapterLayer, str]]]) -> bool:
    """Return whether one parameter stands in several places and layers of the same origins change it in each."""
    if len({id(_parameter(place)) for place in places}) != 1 or not all(place in by_place for place in places):
        return False
    return len({tuple(id(layer.origin) for layer, _ in by_place[place]) for place in places}) == 1


def _check_fits(name: str, dtype: torch.dtype, before: Tensor | None, value: Any) -> None:
    """Raise where the merged value is too large for a dtype with a smaller range than float32's."""
    if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(torch.float32).max:
        fits = value().to(dtype).isfinite()
        if not bool((fits if before is None else fits | ~before.isfinite()).all()):
            raise ValueError(f"the merged {name} is too large for {dtype}: nothing has been merged")


def _merged(place: Place, layers: list[tuple[AdapterLayer, str]]) -> Any:
    def value() -> Tensor:
        replaced = [layer.replacements()[local] for layer, local in layers if local in layer.replacements()]
        if replaced and len(layers) == 1:
            found = replaced[0]
            return found.to(torch.promote_types(found.dtype, torch.float32)) if found.is_floating_point() else found
        parameter = dequantized_weight(place[0]) if is_quantised(place) else _parameter(place)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.to(wide) + sum(layer.deltas()[local].to(wide) for layer, local in layers)

    return value


def _place_names(model: nn.Module) -> dict[Place, str]:
    return {
        (bare_module(module), local): f"{place}.{local}" if place else local
        for place, module in named_places(model)
        for local, parameter in (*bare_module(module)._parameters.items(), *bare_module(module)._buffers.items())
        if parameter is not None
    }


def _place(bare: nn.Module, local: str) -> Place:
    inner, _, last = local.rpartition(".")
    return bare.get_submodule(inner), last


def _parameter(place: Place) -> Tensor:
    module, local = place
    parameter = module._parameters[local] if local in module._parameters else module._buffers[local]
    assert parameter is not None
    return parameter


def _set(place: Place, parameter: nn.Parameter) -> None:
    module, local = place
    module._parameters[local] = parameter


def _tied(names: dict[Place, str]) -> dict[Place, list[Place]]:
    """Return for each place whose parameter shares its storage with another place's all the places that share it."""
    by_storage: dict[int, list[Place]] = defaultdict(list)
    for place in names:
        parameter = _parameter(place)
        if not isinstance(parameter, nn.Parameter):
            continue
        by_storage[parameter.untyped_storage().data_ptr() or id(parameter)].append(place)
    return {place: places for places in by_storage.values() if len(places) > 1 for place in places}


def _untie_config(model: nn.Module) -> bool:
    """Tell a Hugging Face configuration that the weights are no longer tied, so that saving and loading keep both."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        return True
    return False
