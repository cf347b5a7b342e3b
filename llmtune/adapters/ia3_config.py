"""The (IA)^3 record: what to adapt and how, and PEFT's files of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmtune.adapters.ia3 import IA3Linear
from llmtune.adapters.layer import adapter_chain, named_places
from llmtune.adapters.peft_config import as_targets, check_entries, common_entries, fitted, written_exclude
from llmtune.adapters.plan import Build, Plan, plan_targets
from llmtune.adapters.record import AdapterConfig, Targets, check_dtype, check_expressions, check_names
from llmtune.adapters.targets import check_linear, inside, linear_sizes, matching, names

OWN = {"exclude_modules", "feedforward_modules", "init_ia3_weights", "modules_to_save", "peft_type", "target_modules"}


@dataclass(frozen=True, kw_only=True)
class IA3(AdapterConfig):
    """(IA)^3 on chosen linear layers of a model; see `IA3Linear` for the formula.

    The paper adapts keys, values and, by its inputs, the second layer of the feed-forward part; in a Llama that is
    `IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"])`. PEFT keeps a table of such names by
    architecture; here they are always said.

    Args:
        targets: all modules adapted: suffixes of their names (["k_proj", "v_proj"]), one regular expression that
            matches whole names, or "all-linear": every linear layer but the output head of a Hugging Face model.
        feedforward: suffixes, or one regular expression, of those among them whose inputs are scaled.
        exclude: suffixes, or one regular expression, of modules to leave out.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: a value is out of its range; the sentence names it.
        TypeError: a value has a wrong type.
    """

    targets: Targets
    feedforward: Targets = ()
    exclude: Targets = ()
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    peft_type: ClassVar[str] = "IA3"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_names(self.targets, self.exclude, self.train_modules)
        check_expressions("feedforward", self.feedforward)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`.

        Raises:
            ValueError: a pattern of feedforward matches none of the modules adapted; and as `plan_targets`.
        """

        def build(place: str, module: nn.Module) -> Build:
            check_linear(place, module, "IA3")
            scales_inputs = names(self.feedforward, place)
            return lambda base: IA3Linear(base, feedforward=scales_inputs, dtype=self.dtype, adapter_name=name)

        plan = plan_targets(
            model, self, name, adaptable=lambda module: linear_sizes(module) is not None, build=build
        )  # fmt: skip
        if self.feedforward:
            matching(self.feedforward, plan.adapted, what="feedforward", where="among the modules adapted")
        return plan

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries; see `AdapterConfig.file_entries`."""
        entries = common_entries(model, self, name, self.peft_type)
        inputs = [place for place, layer in _layers(model, name) if layer.feedforward]
        others = [place for place, layer in _layers(model, name) if not layer.feedforward]
        entries["feedforward_modules"] = _written(self.feedforward, inputs, others, entries["target_modules"])
        return dict(sorted((entries | {"exclude_modules": written_exclude(self), "init_ia3_weights": True}).items()))

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[IA3, tuple[str, ...]]:
        """Return an IA3 record; see `AdapterConfig.from_file`.

        Raises:
            ValueError: the entries ask for an option that is not offered, or leave a choice to PEFT's table.
        """
        check_entries(entries, OWN, {})
        for key in ("target_modules", "feedforward_modules"):
            if entries.get(key) is None:
                raise ValueError(f"{key} is not set, which leaves it to a table of PEFT's: write the names out")
        config, idle = fitted(
            cls(
                targets=as_targets(entries["target_modules"]),
                exclude=as_targets(entries.get("exclude_modules") or ()),
                train_modules=tuple(entries.get("modules_to_save") or ()),
                dtype=next((tensor.dtype for key, tensor in tensors.items() if key.endswith(".ia3_l")), torch.float32),
            ),
            model,
        )
        feedforward, unused = _read(as_targets(entries["feedforward_modules"]), config, model)
        return replace(config, feedforward=feedforward), (*idle, *(f"feedforward_modules {end}" for end in unused))

    def check_attached(self, model: nn.Module, name: str, attached: AdapterConfig, *, source: Path) -> None:
        """Raise where the attached adapter scales inputs in other places.

        Raises:
            ValueError: so it does, or they are of different methods; see `AdapterConfig.check_attached`.
        """
        super().check_attached(model, name, attached, source=source)
        for place, layer in _layers(model, name):
            if layer.feedforward != names(self.feedforward, place):
                raise ValueError(
                    f'the adapter in {source} and the attached "{name}" differ in whether the inputs of {place} are '
                    "scaled: detach it first, and loading attaches what the file describes"
                )


def _layers(model: nn.Module, name: str) -> list[tuple[str, IA3Linear]]:
    return [
        (place, layer)
        for place, module in named_places(model)
        for layer in adapter_chain(module)
        if isinstance(layer, IA3Linear) and layer.adapter_name == name
    ]


def _written(feedforward: Targets, inputs: list[str], others: list[str], targets: Any) -> str | list[str]:
    """Return what says to PEFT which inputs are scaled.

    PEFT takes the ends of names without regard to dots, and wants a list to be part of the list of targets. Where the
    suffixes do not fit that, an expression for the whole names is written.
    """
    if isinstance(feedforward, str):
        return feedforward
    ends = tuple(feedforward)
    alike = all(place.endswith(ends) for place in inputs) and not any(place.endswith(ends) for place in others)
    if alike and (isinstance(targets, str) or set(targets).issuperset(ends)):
        return sorted(ends)
    return "|".join(re.escape(place) for place in inputs)


def _read(given: Targets, config: IA3, model: nn.Module) -> tuple[Targets, list[str]]:
    """Return what names the same modules by the rule of records as PEFT's entry by PEFT's, and what matches nothing."""
    adapted = [
        place
        for place, module in named_places(model)
        if names(config.targets, place) and linear_sizes(module) is not None
        if not names(config.exclude, place) and not inside(place, config.train_modules)
    ]
    if isinstance(given, str):
        return (given, []) if any(re.fullmatch(given, place) for place in adapted) else ((), [given] if given else [])
    found = {end: [place for place in adapted if place.endswith(end)] for end in given}
    same = all(names([end], place) == (place in found[end]) for end in given for place in adapted)
    kept = [end for end in given if found[end]]
    places = dict.fromkeys(place for end in kept for place in found[end])
    return tuple(kept if same else places), [end for end in given if not found[end]]
