"""The base of every record: what a method of adapting is asked for by `attach`, `save` and `load`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from llmtune.adapters.plan import Plan

Targets = str | Sequence[str]
METHODS: dict[str, type[AdapterConfig]] = {}  # every record by its class's name, the latest of that name
PEFT_TYPES: dict[str, type[AdapterConfig]] = {}  # those that PEFT has, by its name for them
CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"  # an adapter's files
UNFINISHED = ".adapter_unfinished"  # there while the first two are being exchanged
OWN_TYPE = "LLMTUNE"  # what stands for "peft_type" in the files of methods that PEFT does not have


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A frozen record of what to adapt and how; each method is a subclass, a user's own too.

    A subclass is a frozen dataclass with `plan`. What `save` writes for it then is its name and its fields, which must
    be JSON values or a `torch.dtype`; `load` finds the class by that name among those that have been defined.
    A method with files in PEFT's format sets `peft_type` and overrides `file_entries` and `from_file`.
    """

    peft_type: ClassVar[str] = OWN_TYPE

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.plan is not AdapterConfig.plan and not cls.__name__.startswith("_"):  # else a base of several
            METHODS[cls.__name__] = cls
        if "peft_type" in cls.__dict__:
            PEFT_TYPES[cls.peft_type] = cls

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out which layers this record means on a model, and change nothing.

        Args:
            model: the root, with or without adapters.
            name: the adapter's name.

        Raises:
            ValueError, TypeError: the record cannot be carried out on this model; the sentence says why.
        """
        raise NotImplementedError(f"{type(self).__name__} must say in plan(model, name) which layers it makes")

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return the entries of `adapter_config.json` for an adapter attached as `name`: JSON values."""
        settings = {field.name: _as_json(getattr(self, field.name)) for field in fields(self)}
        return {"method": type(self).__name__, "peft_type": OWN_TYPE, "settings": settings}

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[AdapterConfig, tuple[str, ...]]:
        """Return the record that the entries describe, and the patterns in them that match nothing on the model.

        Args:
            entries: what `adapter_config.json` holds.
            model: the model it is for.
            tensors: what the file of tensors holds; it tells dtypes.

        Raises:
            ValueError: the entries ask for something that is not offered.
        """
        settings = entries.get("settings", {})
        check_mapping("settings", settings)
        known = {field.name for field in fields(cls)}
        unknown = [key for key in settings if key not in known]
        if unknown:
            raise ValueError(f"{cls.__name__} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [key for key in required if key not in settings]
        if missing:
            raise ValueError(f"{cls.__name__} needs the setting {missing[0]!r}, which is not there")
        values = {key: _from_json(value) for key, value in settings.items()}
        kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        if isinstance(values.get("dtype"), torch.dtype) and len(kinds) == 1:
            values["dtype"] = kinds.pop()  # what was trained may have been cast since it was attached
        return cls(**values), ()

    def spare_tensors(self, model: nn.Module, name: str) -> frozenset[str]:
        """Return the names of those of an attached adapter's tensors that a file of this record need not hold, because
        the record alone gives them again."""
        return frozenset()

    def to_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's tensors as its file holds them, from what its layers name (`file_tensors`).

        Args:
            tensors: by name.
        """
        return dict(tensors)

    def of_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file, not only one of our own, as the adapter's layers name and shape them.

        Args:
            tensors: by name.
        """
        return dict(tensors)

    def check_attached(self, model: nn.Module, name: str, attached: AdapterConfig, *, source: Path) -> None:
        """Raise where tensors saved with this record would mean something else in an adapter attached with another.

        Args:
            model: the model.
            name: the attached adapter's name.
            attached: its record.
            source: the folder this record was read from.

        Raises:
            ValueError: they are of different methods.
        """
        if type(self) is not type(attached):
            raise ValueError(
                f'the adapter in {source} is {type(self).__name__}, the attached "{name}" is '
                f"{type(attached).__name__}: detach it first, and loading attaches what the file describes"
            )


def check_names(
    targets: Targets,
    exclude: Targets = (),
    train_modules: Sequence[str] = (),
    target_parameters: Sequence[str] = (),
) -> None:
    """Check what names modules in a record: suffixes or one regular expression; the last two suffixes alone.

    Raises:
        TypeError: train_modules or target_parameters is no list of strings.
        ValueError: an expression is none, or nothing is named at all.
    """
    check_suffixes("train_modules", train_modules)
    check_suffixes("target_parameters", target_parameters)
    check_expressions("targets", targets)
    check_expressions("exclude", exclude)
    if not targets and not train_modules and not target_parameters:
        raise ValueError('targets names no module: give suffixes, a regular expression, or "all-linear"')


def check_suffixes(name: str, value: Any) -> None:
    """Raise TypeError where `value` is no list of strings."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be a list of suffixes; got the string {value!r}")
    if not _are_strings(value):
        raise TypeError(f"{name} must be a list of suffixes, strings all, or () for none; got {value!r}")


def check_expressions(name: str, value: Any) -> None:
    """Raise ValueError where `value` is neither suffixes nor one regular expression."""
    if not isinstance(value, str) and not _are_strings(value):
        raise ValueError(f"{name} must be suffixes or one regular expression; got {value!r}")
    try:
        [re.compile(part) for part in ([value] if isinstance(value, str) else value)]
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} must be suffixes or one regular expression; got {value!r}: {error}") from error


def check_mapping(name: str, value: Any) -> None:
    """Raise TypeError where `value` is no dict with strings for keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a dict with strings for keys, empty for none; got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError where `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_adapter_name(value: Any) -> None:
    """Raise TypeError where `value` is no string."""
    if not isinstance(value, str):
        raise TypeError(f'an adapter is meant by its name, a string such as "default"; got {value!r}')


def check_whole(name: str, value: Any) -> None:
    """Raise ValueError where `value` is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


def check_probability(name: str, value: Any) -> None:
    """Raise ValueError where `value` is no probability from 0 to below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a probability from 0 to below 1; got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError where `value` is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a number above 0; got {value!r}")


def check_dtype(value: Any) -> None:
    """Raise TypeError where `value` is no floating torch dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"dtype must be a floating torch dtype; got {value!r}")
    if value.itemsize < 2:
        raise TypeError(f"dtype must have 16 bits or more, since fewer cannot be trained; got {value!r}")


def _are_strings(value: Any) -> bool:
    return isinstance(value, Sequence | AbstractSet) and all(isinstance(part, str) for part in value)


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return dict(value) if isinstance(value, Mapping) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"dtype"}:
        found = getattr(torch, str(value["dtype"]), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{value['dtype']!r} is no dtype of torch")
        return found
    return tuple(value) if isinstance(value, list) else value
