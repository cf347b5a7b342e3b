"""What is common to all that makes one state dict of several: they must be alike, and what is tied stays tied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from llmtune.errors import did_you_mean

State = Mapping[str, Tensor]
MergeTensors = Callable[[tuple[str, ...], list[Tensor]], Tensor]


@torch.no_grad()
def merge_states(
    states: Sequence[State], titles: Sequence[str], merge: MergeTensors, *, integers_from: int = 0
) -> dict[str, Tensor]:
    """Return the state whose floating tensors are made by `merge`, from those of all states under one name.

    Names that stand for one tensor in any of the states are merged once and stand for one tensor in the result; so
    states in which a tied tensor was saved twice fit those in which it is one.

    Args:
        states: tensors by name, of any shapes; at least one.
        titles: what each is called in messages.
        merge: makes a floating tensor of (the names that stand for it, one tensor of each state).
        integers_from: the number of the state that gives integers and booleans.

    Returns:
        New tensors by the first state's names, on the devices of state `integers_from`, rounded once to the widest
        dtype that the states have there.

    Raises:
        ValueError: the states differ in names, shapes or kinds; what is tied in one differs in another; an entry would
            not be finite, and is not the same in all; or quantised weights differ.
        TypeError: a state is no dict of plain tensors.
    """
    check_states(states, titles)
    given = states[integers_from]
    merged: dict[str, Tensor] = {}
    for group in tied_groups(states, titles):
        tensors = [state[group[0]].detach() for state in states]
        own = given[group[0]]
        if floats(own):
            narrow = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
            near = [tensor.to(own.device) for tensor in tensors]
            made = merge(group, near)
            if any(made is tensor for tensor in near):
                made = made.to(narrow, copy=True)
            else:
                made = made.to(narrow)
                check_finite(group[0], made, near)
        else:
            check_quantised(group[0], tensors)
            made = own.detach().clone()
        merged |= dict.fromkeys(group, made)
    return {name: merged[name] for name in states[0] if name in merged}


def check_states(states: Any, titles: Sequence[str]) -> None:
    """Raise where the states are not dicts of plain tensors (TypeError), or do not fit each other (ValueError)."""
    for state, title in zip(states, titles, strict=True):
        if not isinstance(state, Mapping):
            raise TypeError(f"{title} must be a state dict, tensors by name; got a {type(state).__name__}")
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.is_complex():
                came = tensor.dtype if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
                raise TypeError(f"{name} in {title} must be a real tensor; got {came}: leave it out")
            if tensor.is_meta:
                raise ValueError(f"{name} in {title} lies on the meta device and has no values: load it first")
    first = states[0]
    for other, title in zip(states[1:], titles[1:], strict=True):
        if odd := sorted(first.keys() ^ other.keys()):
            here, there = (titles[0], title) if odd[0] in first else (title, titles[0])
            near = did_you_mean(odd[0], other if odd[0] in first else first)
            raise ValueError(f"{odd[0]} is in {here} and not in {there}: states of one model are expected.{near}")
        for name, tensor in other.items():
            if tensor.shape != first[name].shape or tensor.is_floating_point() != first[name].is_floating_point():
                raise ValueError(
                    f"{name} is {[*first[name].shape]} of {first[name].dtype} in {titles[0]} and {[*tensor.shape]} of "
                    f"{tensor.dtype} in {title}: states of one model are expected"
                )


def tied_groups(states: Sequence[State], titles: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the names of the states in groups that stand for one tensor, in any of the states; most have one name.

    Raises:
        ValueError: what is one tensor in one state has two values in another.
    """
    order = {name: place for place, name in enumerate(states[0])}
    pairs: dict[str, str] = {}  # a name: the one before it that stands for the same tensor
    for state in states:
        seen: dict[Any, str] = {}
        for name in order:
            first = seen.setdefault(_identity(state[name]), name)
            if first != name:
                pairs.setdefault(name, first)
    leaders: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in order:
        first = pairs.get(name, name)
        for state, title in zip(states, titles, strict=True):
            if first != name and not torch.equal(state[first], state[name]):
                raise ValueError(
                    f"{name} and {first} are one tied tensor in one state and differ in {title}: tie all or none"
                )
        leaders[name] = leaders.get(first, name)
        groups.setdefault(leaders[name], []).append(name)
    return [tuple(group) for group in groups.values()]


def floats(tensor: Tensor) -> bool:
    """Return whether a tensor holds weights that can be added up: of one byte (float8) they are codes."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def titles_of(states: Any) -> list[str]:
    """Return what each of several states is called in messages.

    Raises:
        TypeError: they are no list.
        ValueError: there is none.
    """
    if isinstance(states, Mapping | str) or not isinstance(states, Sequence):
        raise TypeError(f"states must be a list of state dicts; got a {type(states).__name__}")
    if not states:
        raise ValueError("there are no states: give at least one")
    return [f"states[{index}]" for index in range(len(states))]


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum_i w_i t_i / sum_i w_i in float64 (float32 on Apple's GPUs).

    Args:
        tensors: of one shape and device.
        weights: w_i, whose sum is not 0.
    """
    total = torch.zeros(tensors[0].shape, dtype=work_dtype(tensors[0]), device=tensors[0].device)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.div_(sum(weights))


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums over models are made in: float64, where the tensor's device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def check_finite(name: str, found: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError where an entry of the merged tensor is not finite, unless all states have that same entry."""
    fine = found.isfinite()
    if not bool(fine.all()):
        alike = torch.stack([tensor == tensors[0] for tensor in tensors]).all(0)
        if not bool((fine | alike).all()):
            raise ValueError(
                f"{name} would not be finite in {found.dtype}: an entry of a state is NaN or infinite, or too large "
                "for that dtype"
            )


def _identity(tensor: Tensor) -> Any:
    """Return what is equal for two tensors that are views of the same memory in the same way."""
    if tensor.numel() == 0 or not tensor.untyped_storage().data_ptr():
        return id(tensor)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*place, tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


def check_quantised(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise where one-byte tensors differ: they are codes, of which no state's are those of the merged weight."""
    small = tensors[0].element_size() == 1 and tensors[0].dtype != torch.bool
    if small and not all(torch.equal(tensor.to(tensors[0].device), tensors[0]) for tensor in tensors[1:]):
        raise ValueError(
            f"{name} is {tensors[0].dtype} and differs between the states: quantised weights cannot be merged, "
            "de-quantise them first"
        )
