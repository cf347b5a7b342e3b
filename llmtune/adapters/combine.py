"""Several adapters put together into one new LoRA: on their changes of weights, never on A and B apart.

An adapter changes a weight by D = s B A. A sum of Bs times a sum of As is no sum of changes: it holds B_i A_j of
adapters that never saw each other. So what is summed, trimmed or dropped here is D, and only then taken apart again.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers, adapter_names, adapter_parameters, attach, record_of
from llmtune.adapters.combined_change import DENSE, EXACT, METHODS, change_of_bias, combined_weight, merge_of, merged
from llmtune.adapters.config import LoRA
from llmtune.adapters.layer import AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.adapters.lora import LowRankLayer
from llmtune.adapters.record import Targets, check_adapter_name
from llmtune.adapters.report import CombineReport
from llmtune.adapters.targets import ends_in
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy, adds_bias_last
from llmtune.errors import did_you_mean
from llmtune.modules import unwrap
from llmtune.weights.deltas import check_density, check_generator, finite_numbers
from llmtune.weights.low_rank import LowRank, check_rank


@dataclass
class _Combined:
    """What the new adapter holds, by the names of the modules: factors of weights, biases beside B, trained biases."""

    weights: dict[str, LowRank] = field(default_factory=dict)
    lora_biases: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    *,
    new_name: str,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> CombineReport:
    """Put several adapters together into a new one, which stands beside them.

    With D_i the change of a weight by adapter i (s_i B_i A_i for LoRA, 0 where it does not go):

    cat              sum_i w_i D_i, exact: the factors side by side, so the ranks add up
    linear           sum_i w_i D_i, exact: in as few ranks as that sum has
    svd              the matrix of rank `rank` that is nearest to sum_i w_i D_i
    ties             the nearest to what `merge_deltas` makes of them by "ties": trimmed, signs elected
    dare             the nearest to sum_i w_i m_i D_i / density, m_i ~ Bernoulli(density)
    magnitude_prune  the nearest to sum_i w_i trim(D_i): of each D_i the largest entries, `density` of them

    PEFT's "linear", "ties", "dare_linear" and "magnitude_prune" sum, trim and drop A and B apart, and so mix B_i with
    A_j; the last three here are what PEFT calls "..._svd", but that weights count in the vote of "ties". The first
    three write out no matrix, unless an adapter's change has no low-rank form (DoRA's).

    The new adapter is a LoRA of scaling 1. As in PEFT it changes nothing until it is switched on: what the model gives
    and what is trained stay as they were, to the bit. `set_active(model, new_name)` switches it on and the others off;
    to train it on, let `adapter_parameters(model, new_name)` require a gradient.

    Biases that LoRA trains (`lora_bias`, `train_bias`) go the same way, by the plain sum for the first three methods.
    Dropout is not taken over.

    Args:
        model: a model with the adapters, on or off.
        names: the adapters, each once: LoRA, DoRA, or any method that says by which matrix it changes a weight.
        weights: w_i, one for each name, any signs.
        new_name: the new adapter's name.
        method: "cat", "linear", "svd", "ties", "dare" or "magnitude_prune".
        rank: of "svd" and those after it; left out, the largest that one of the adapters has at the module. A module
            whose smaller side, or sum of ranks under "svd", is less gets that.
        density: of "ties", "dare" and "magnitude_prune": the share of entries kept, above 0 and at most 1.
        generator: what "dare" draws from.

    Returns:
        Each module's rank, and its relative error from being brought down to it.

    Raises:
        ValueError: a name is unknown, taken or given twice; a number is out of its range, or given to a method that
            would not look at it; "cat" or "linear" is asked for a change of full rank (DoRA's); an adapter trains
            copies of whole modules, of which there can be one only; a tensor is not finite. The model is then as it
            was.
        TypeError: an adapter changes what LoRA does not go to; an argument has a wrong type; or as `attach`.

    Example:
        >>> from llmtune.adapters import LoRA, attach, combine
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> for name in ("maths", "french"):
        ...     _ = attach(model, LoRA(rank=4, alpha=8, targets=["q_proj"]), name)
        >>> print(combine(model, ["maths", "french"], [0.7, -0.2], new_name="both"))
        adapter "both": 0.7 * "maths" + -0.2 * "french" (cat)
        2 modules, rank 8, exact; off until set_active(model, "both")
    """
    wrapped, model = model, unwrap(model)
    if not isinstance(names, Sequence):
        raise TypeError(f"names must be a list of adapters' names; got {names!r}")
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        check_adapter_name(name)
    factors = dict(zip(names, _checked_weights(names, weights), strict=True))
    _check_names(model, names, new_name)
    _check_method(method, rank, density, generator)
    merge, made = merge_of(method, density, generator), _Combined()
    for place, layers in _gathered(model, factors).items():
        biases = [(w, layer.deltas()["bias"]) for w, layer in layers if isinstance(layer, TrainedBias)]
        layers = [(w, layer) for w, layer in layers if not isinstance(layer, TrainedBias)]
        if layers:
            made.weights[place] = combined_weight(place, layers, method=method, rank=rank, merge=merge)
        own = [(w, bias) for w, layer in layers if (bias := change_of_bias(layer)) is not None]
        made.lora_biases |= {place: merged(own, merge)} if own else {}
        made.biases |= {place: merged(biases, merge)} if biases else {}
    _attach_off(wrapped, _config(model, names, new_name, made), new_name)
    _fill(model, new_name, made)
    ranks = {place: part.left.shape[1] for place, part in made.weights.items()}
    return CombineReport(new_name, factors, method, ranks, {place: part.error for place, part in made.weights.items()})


def _checked_weights(names: list[str], weights: Sequence[float]) -> list[float]:
    found = finite_numbers(weights)
    if not names or len(found) != len(names):
        raise ValueError(f"expected adapters and a weight for each; got {len(names)} names and {len(found)} weights")
    return found


def _check_names(model: nn.Module, names: list[str], new_name: str) -> None:
    for name in names:
        record = record_of(model, name)
        if names.count(name) > 1:
            raise ValueError(f'adapter "{name}" is named twice: name it once, with the sum of its weights')
        layers = adapter_layers(model, name)
        if not layers:
            raise ValueError(f'adapter "{name}" is no change of weights, so there is nothing to combine')
        if name in record.merged and any(isinstance(layer, TrainedBias) for layer in layers):
            raise ValueError(f'adapter "{name}" is merged, its trained biases as well: unmerge it first')
    if new_name in adapter_names(model):
        raise ValueError(f'the model already has an adapter "{new_name}": detach it first, or choose another new_name')


def _check_method(method: str, rank: int | None, density: float | None, generator: torch.Generator | None) -> None:
    if method not in METHODS:
        known = ", ".join(f'"{known}"' for known in METHODS)
        raise ValueError(f"method must be one of {known}; got {method!r}.{did_you_mean(str(method), METHODS)}")
    if rank is not None:
        if method in EXACT:
            raise ValueError(f'"{method}" is exact and takes no rank: use method="svd" to bring the sum down to one')
        check_rank(rank)
    if density is not None:
        if method not in DENSE:
            raise ValueError(f'"{method}" keeps every entry: density={density} is for {", ".join(DENSE)}')
        check_density(density)
    elif method in DENSE:
        raise ValueError(f'"{method}" needs density, the share of entries to keep, above 0 and at most 1')
    check_generator(generator, method)


def _gathered(model: nn.Module, factors: Mapping[str, float]) -> dict[str, list[tuple[float, AdapterLayer]]]:
    """Return (weight, layer) of the adapters' layers by place, checked."""
    found: dict[str, list[tuple[float, AdapterLayer]]] = defaultdict(list)
    for place, module in named_places(model):
        for layer in reversed(adapter_chain(module)):
            if layer.adapter_name in factors:
                _check_layer(place, layer)
                found[place].append((factors[layer.adapter_name], layer))
    if all(isinstance(layer, TrainedBias) for layers in found.values() for _, layer in layers):
        raise ValueError("the adapters change no weight by a matrix, so there is nothing for a LoRA to hold")
    return found


def _check_layer(place: str, layer: AdapterLayer) -> None:
    name = layer.adapter_name
    if isinstance(layer, TrainedCopy):
        raise ValueError(
            f'adapter "{name}" trains a copy of {place}, and a module can run one copy only, so that none can be '
            "combined beside it: merge it into the weights, or combine adapters without train_modules"
        )
    for tensor in _own(layer):
        if tensor.is_meta:
            raise ValueError(f'adapter "{name}" lies on the meta device at {place}: load it first')
        if not bool(tensor.isfinite().all()):
            raise ValueError(f'adapter "{name}" has entries that are not finite at {place}: nothing has been combined')


def _own(layer: AdapterLayer) -> list[nn.Parameter]:
    return [parameter for local, parameter in layer.named_parameters() if not local.startswith("base.")]


def _config(model: nn.Module, names: list[str], new_name: str, made: _Combined) -> LoRA:
    """Return the record of a LoRA that goes where the adapters go, with scaling 1 at every rank.

    Raises:
        ValueError: an embedding would need a bias, or a trained bias has no place in it.
    """
    bare = {place: bare_module(module) for place, module in named_places(model)}
    embedding = next((place for place in made.weights if isinstance(bare[place], nn.Embedding)), None)
    if made.lora_biases and embedding is not None:
        raise ValueError(
            f"an adapter trains biases (lora_bias) and another goes to {embedding}, an embedding, where a LoRA with "
            "lora_bias cannot go: they cannot be one adapter"
        )
    beside = all(place in made.weights and adds_bias_last(bare[place]) for place in made.biases)
    rank, patterns = _ranks({place: part.left.shape[1] for place, part in made.weights.items()})
    dtypes = [p.dtype for name in names for layer in adapter_layers(model, name) for p in _own(layer)]
    config = LoRA(
        rank=rank, alpha=rank, rank_pattern=patterns, alpha_pattern=patterns, targets=_targets(bare, made.weights),
        lora_bias=bool(made.lora_biases), train_bias="none" if not made.biases else "lora_only" if beside else "all",
        dtype=reduce(torch.promote_types, dtypes),
    )  # fmt: skip
    homeless = sorted(made.biases.keys() - config.plan(model, new_name).biases)
    if homeless:
        raise ValueError(f"the bias of {homeless[0]} is trained by an adapter, and LoRA's train_bias does not reach it")
    return config


def _ranks(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return the rank that most modules have, and rank patterns for the others: by last name where that decides."""
    usual = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    ends: dict[str, set[int]] = defaultdict(set)
    for place, rank in ranks.items():
        ends[place.rsplit(".", 1)[-1]].add(rank)
    patterns = {}
    for place, rank in ranks.items():
        end = place.rsplit(".", 1)[-1]
        if rank != usual:
            patterns[re.escape(end) if len(ends[end]) == 1 else f"^{re.escape(place)}"] = rank
    return usual, patterns


def _targets(places: Mapping[str, nn.Module], adapted: Mapping[str, LowRank]) -> Targets:
    """Return the shortest targets that mean exactly these modules: last names, whole names, or an expression."""
    for ends in (sorted({place.rsplit(".", 1)[-1] for place in adapted}), sorted(adapted)):
        if {place for place in places if any(ends_in(place, end) for end in ends)} == adapted.keys():
            return tuple(ends)
    return "|".join(re.escape(place) for place in sorted(adapted))


def _attach_off(model: nn.Module, config: LoRA, name: str) -> None:
    """Attach an adapter that is neither on nor trained, and leave what is trained and the random state as they were."""
    flags = [(parameter, parameter.requires_grad) for parameter in unwrap(model).parameters()]
    devices = {parameter.device for parameter, _ in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        attach(model, config, name)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(False)
    for layer in adapter_layers(model, name):
        layer.active = False


def _fill(model: nn.Module, name: str, made: _Combined) -> None:
    for place, module in named_places(model):
        for layer in adapter_chain(module):
            if layer.adapter_name != name:
                continue
            if isinstance(layer, TrainedBias) and place in made.biases:
                layer.trained_bias.copy_(layer.trained_bias + made.biases[place])
            elif isinstance(layer, LowRankLayer):
                left, right, _ = layer.low_rank()  # views of A and B
                left.copy_(made.weights[place].left)
                right.copy_(made.weights[place].right)
                if layer.lora_bias is not None and place in made.lora_biases:
                    layer.lora_bias.copy_(made.lora_biases[place])
