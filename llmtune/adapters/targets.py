"""Which modules an adapter goes to: suffixes, a regular expression, or every linear layer; none may match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmtune.adapters.layer import bare_module
from llmtune.errors import did_you_mean

ALL_LINEAR = "all-linear"


def ends_in(name: str, suffix: str) -> bool:
    """Return whether a dotted module name is `suffix` or ends in ".suffix"."""
    return name == suffix or name.endswith("." + suffix)


def matching(
    patterns: str | Sequence[str], names: Sequence[str], *, what: str, where: str = "in this model"
) -> dict[str, list[str]]:
    """Return the names each pattern matches: a string is a regular expression for whole names, others are suffixes.

    Args:
        patterns: one regular expression, or suffixes.
        names: the dotted names of the model's modules.
        what: the argument the patterns came in, for the sentence.
        where: what the names are those of, for the sentence.

    Raises:
        ValueError: a pattern matches no name; names the nearest.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    found = {}
    for pattern in listed:
        if isinstance(patterns, str):
            found[pattern] = [name for name in names if re.fullmatch(pattern, name)]
        else:
            found[pattern] = [name for name in names if ends_in(name, pattern)]
        if not found[pattern]:
            if isinstance(patterns, str) and any(ends_in(name, pattern) for name in names):
                raise ValueError(
                    f'{what}: the string "{pattern}" is a regular expression for whole names and matches none; names '
                    f'do end in it: give the list ["{pattern}"]'
                )
            kind = "no module's whole name" if isinstance(patterns, str) else "no module's name or its end"
            raise ValueError(f'{what}: "{pattern}" matches {kind} {where}.{did_you_mean(pattern, _ends(names))}')
    return found


def names(patterns: str | Sequence[str], name: str) -> bool:
    """Return whether the patterns, one regular expression or suffixes as in `matching`, name a module."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(ends_in(name, suffix) for suffix in patterns)


def pattern_value(name: str, patterns: Mapping[str, Any], otherwise: Any) -> Any:
    """Return the value of the first pattern that the end of `name` matches, PEFT's rule for rank and alpha patterns."""
    for pattern, value in patterns.items():
        if fits(pattern, name):
            return value
    return otherwise


def check_patterns_used(patterns: Iterable[str], names: Sequence[str], *, what: str) -> None:
    """Raise ValueError where a pattern fits none of the adapted modules' names."""
    for pattern in patterns:
        if not any(fits(pattern, name) for name in names):
            raise ValueError(
                f'{what}: "{pattern}" fits none of the adapted modules.{did_you_mean(pattern, _ends(names))}'
            )


def linear_places(model: nn.Module, places: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of all linear layers and Conv1D, without the output head where the model has one.

    Args:
        model: the root.
        places: its modules by bare name.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    outputs = [head] if isinstance(head, nn.Module) else task_heads(model)
    heads = {id(bare_module(module)) for module in outputs}
    return [
        name for name, module in places.items() if name and is_linear(module) and id(bare_module(module)) not in heads
    ]


def task_heads(model: nn.Module) -> list[nn.Module]:
    """Return the linear layers of a Hugging Face model outside its `base_model`, if it has no language-model head.

    They are what a classifier puts on top, and start at random unless the checkpoint held them.
    """
    find = getattr(model, "get_output_embeddings", None)
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model or (callable(find) and find() is not None):
        return []
    inside = {id(module) for module in base.modules()}
    return [module for module in model.modules() if is_linear(module) and id(module) not in inside]


def is_linear(module: nn.Module) -> bool:
    """Return whether the bare module is a linear layer or GPT-2's Conv1D."""
    bare = bare_module(module)
    return isinstance(bare, nn.Linear) or is_conv1d(bare)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the bare module is transformers' Conv1D, a linear layer with its weight as [in, out]."""
    bare = bare_module(module)
    return any(
        f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D" for kind in type(bare).__mro__
    )


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) where the bare module maps [..., in] to [..., out] and says so, as `nn.Linear`, GPT-2's Conv1D
    and anything with `in_features` and `out_features`; else None."""
    bare: Any = bare_module(module)
    if is_conv1d(bare):
        return tuple(bare.weight.shape)
    sizes = (getattr(bare, "in_features", None), getattr(bare, "out_features", None))
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def check_linear(place: str, module: nn.Module, method: str) -> None:
    """Raise TypeError where the module is none that a method for linear layers can go to.

    Args:
        place: its bare name.
        module: what stands there.
        method: the method's name, for the sentence.
    """
    if linear_sizes(module) is None:
        raise TypeError(
            f"{place} is a {type(bare_module(module)).__name__}: {method} goes to linear layers and Conv1D. Name it in "
            "train_modules to train it whole, or narrow the targets"
        )
    check_called(place, module)


def check_called(place: str, module: nn.Module) -> None:
    """Raise TypeError where the module's owner takes its weight without calling it."""
    if isinstance(bare_module(module), NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{place} belongs to nn.MultiheadAttention, which takes its weight without calling it, so an adapter there "
            "would do nothing: exclude it"
        )


def inside(name: str, outer: Iterable[str]) -> bool:
    """Return whether a module's name is one of `outer` or lies within one of them."""
    return any(name == other or name.startswith(other + ".") for other in outer)


def fits(pattern: str, name: str) -> bool:
    """Return whether a rank or alpha pattern fits the end of a module's name, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _ends(names: Iterable[str]) -> list[str]:
    """Return the names' last parts, and then the names themselves, each once."""
    listed = list(names)
    return list(dict.fromkeys([*(name.rsplit(".", 1)[-1] for name in listed), *listed]))
