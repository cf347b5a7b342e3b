"""Small parts of a model, trained as copies: its biases (BitFit) or its norms (LayerNorm tuning).

Both train what is there already and add nothing to run: merged, the model is what it was, with other numbers in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmtune.adapters.layer import PREFIX, adapter_chain, bare_module, named_places
from llmtune.adapters.peft_config import about_model, as_targets, check_entries, copied, fitted
from llmtune.adapters.plan import Build, Plan, copied_places, every_bias, plan_targets
from llmtune.adapters.record import AdapterConfig, Targets, check_dtype, check_names
from llmtune.adapters.targets import inside
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy, adds_bias_last


@dataclass(frozen=True)
class _Named:
    """The modules that a record comes to on a model."""

    targets: Targets
    exclude: Targets
    train_modules: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class BitFit(AdapterConfig):
    """Train biases and nothing else: y = W x + b', where b' starts as b and b stays as it was beside it.

    Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models"
    (2021), section 3; the paper trains a new classification head as well (`train_modules`). There the biases themselves
    are trained; here copies, so that several adapters can share a model. PEFT has no such method, so the files are of
    our own format.

    Args:
        targets: suffixes of module names (["query", "LayerNorm"]), or one regular expression that matches whole names:
            modules whose own bias is trained. Left out, every bias of the model.
        train_modules: suffixes of modules to train whole, as copies.
        dtype: of the copies, or a wider one where it cannot hold the base's; None keeps the base's. Small steps are
            lost in a bfloat16 bias: torch.float32 keeps them.

    Raises:
        ValueError: targets names nothing or is no expression.
        TypeError: train_modules is a string, or dtype is no floating dtype.

    Example:
        >>> from llmtune.adapters import attach
        >>> from llmtune.testing.models import tiny_gpt2
        >>> print(attach(tiny_gpt2(), BitFit()))
        adapter "default": 13 modules (every bias 13)
        trainable params: 452 || all params: 15,516 || trainable%: 2.9131
    """

    targets: Targets | None = None
    train_modules: Sequence[str] = ()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        _check(self.targets, (), self.train_modules, self.dtype)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`.

        Raises:
            ValueError: the model has no bias, or one bias serves two modules.
            TypeError: a bias that is meant cannot be trained beside its module.
        """
        places = dict(named_places(model))
        whole = copied_places(self.train_modules, places)
        targets = self.targets
        if targets is None:
            targets = _expression(every_bias(
                places, whole, who="BitFit", instead="name the modules whose bias you mean in targets"
            ))  # fmt: skip
        if targets == "":
            raise ValueError(
                f"this {type(model).__name__} has no bias to train: use LayerNormTuning, which trains its norms, or "
                "LoRA(..., lora_bias=True), which gives it biases"
            )
        plan = plan_targets(
            model, _Named(targets, (), self.train_modules), name, adaptable=adds_bias_last, build=self._builder(name)
        )
        _check_shared(places, plan.adapted)
        if self.targets is None:
            plan.counts = {"every bias": len(plan.adapted)}
        return plan

    def _builder(self, name: str) -> Any:
        def build(place: str, module: nn.Module) -> Build:
            bare = bare_module(module)
            if not adds_bias_last(bare):
                raise TypeError(
                    f"{place} is a {type(bare).__name__}{'' if _has_bias(bare) else ' without a bias'}: BitFit goes to "
                    "linear layers, Conv1D and layer norms with a bias. Narrow the targets, or name it in train_modules"
                )
            if isinstance(bare, NonDynamicallyQuantizableLinear):
                raise TypeError(
                    f"{place} belongs to nn.MultiheadAttention, which takes its bias without calling it, so a trained "
                    "one would do nothing: name the attention in train_modules"
                )
            return lambda base: TrainedBias(base, dtype=self.dtype, adapter_name=name)

        return build


class TrainedNorm(TrainedCopy):
    """A norm trained as a copy, saved as PEFT saves one: `TrainedCopy` under PEFT's names for LN_TUNING.

    Args:
        base: a norm with a weight [E], and a bias [E] or none.
        dtype, adapter_name: as for `TrainedCopy`.
    """

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names and the copy's tensors; see `AdapterLayer`."""
        state = self.copy.state_dict(keep_vars=True)
        return {f"{PREFIX}{place}.ln_tuning_layers.{local}": value for local, value in state.items()}


@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(AdapterConfig):
    """Train the norms alone: the weights [E] of every LayerNorm and RMSNorm, and their biases where they have them.

    Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning" (2023), section 3. Copies
    are trained, the model's own stay. The files are PEFT's, of its type LN_TUNING; PEFT's list of norms for some models
    leaves norms out (Qwen's), ours goes by structure.

    Args:
        targets: suffixes of module names, or one regular expression that matches whole names. Left out, every norm: a
            module of a class whose name ends in "Norm" with a weight of one dimension.
        exclude: suffixes, or one regular expression, of norms to leave out.
        train_modules: suffixes of modules to train whole, as copies.
        dtype: of the copies, or a wider one where it cannot hold the base's; None keeps the base's, as PEFT does.

    Raises:
        ValueError: targets names nothing or is no expression.
        TypeError: train_modules is a string, or dtype is no floating dtype.

    Example:
        >>> from llmtune.adapters import attach
        >>> from llmtune.testing.models import tiny_llama
        >>> print(attach(tiny_llama(), LayerNormTuning()))
        adapter "default": 5 modules (every norm 5)
        trainable params: 140 || all params: 21,336 || trainable%: 0.6562
    """

    targets: Targets | None = None
    exclude: Targets = ()
    train_modules: Sequence[str] = ()
    dtype: torch.dtype | None = None

    peft_type: ClassVar[str] = "LN_TUNING"

    def __post_init__(self) -> None:
        _check(self.targets, self.exclude, self.train_modules, self.dtype)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`.

        Raises:
            ValueError: the model has no norm with a weight.
            TypeError: a target is no such norm.
        """
        places = dict(named_places(model))
        targets = self.targets
        if targets is None:
            whole = copied_places(self.train_modules, places)
            targets = _expression(p for p, m in places.items() if p and is_norm(m) and not inside(p, whole))
        if targets == "":
            raise ValueError(f"this {type(model).__name__} has no norm with a weight to train: use LoRA or BitFit")
        plan = plan_targets(
            model, _Named(targets, self.exclude, self.train_modules), name, adaptable=is_norm,
            build=self._builder(name),
        )  # fmt: skip
        if self.targets is None:
            plan.counts = {"every norm": len(plan.adapted)}
        return plan

    def _builder(self, name: str) -> Any:
        def build(place: str, module: nn.Module) -> Build:
            if not is_norm(module):
                raise TypeError(
                    f"{place} is a {type(bare_module(module)).__name__}, no norm with a weight of one dimension: "
                    "narrow the targets, or name it in train_modules to train it whole"
                )
            if any(not isinstance(layer, TrainedCopy) for layer in adapter_chain(module)):
                raise ValueError(
                    f'{place} already belongs to adapter "{adapter_chain(module)[0].adapter_name}", and a copy of the '
                    "norm would run without it: attach LayerNormTuning first, or detach that one"
                )
            return lambda base: TrainedNorm(base, dtype=self.dtype, adapter_name=name)

        return build

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries; see `AdapterConfig.file_entries`."""
        norms = sorted(place for place, module in named_places(model) if _trains(module, name))
        excluded = self.exclude if isinstance(self.exclude, str) else sorted(self.exclude)
        targets = self.targets if isinstance(self.targets, str) else sorted(self.targets or norms)
        entries = about_model(model) | {
            "exclude_modules": excluded if self.targets and excluded else None,
            "modules_to_save": copied(model, name) or None,
            "peft_type": self.peft_type,
            "target_modules": targets,
        }
        return dict(sorted(entries.items()))

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[LayerNormTuning, tuple[str, ...]]:
        """Return the record and the patterns that match nothing; see `AdapterConfig.from_file`."""
        check_entries(entries, {"exclude_modules", "modules_to_save", "peft_type", "target_modules"}, {})
        kinds = {tensor.dtype for key, tensor in tensors.items() if ".ln_tuning_layers." in key}
        config = cls(
            targets=as_targets(entries.get("target_modules") or ()) or None,
            exclude=as_targets(entries.get("exclude_modules") or ()),
            train_modules=tuple(entries.get("modules_to_save") or ()),
            dtype=kinds.pop() if len(kinds) == 1 else None,
        )
        if config.targets is None:
            return config, ()
        return cast("tuple[LayerNormTuning, tuple[str, ...]]", fitted(cast(Any, config), model))


def is_norm(module: nn.Module) -> bool:
    """Return whether the bare module is a norm by its structure: named so, with a floating weight [E] of its own."""
    bare = bare_module(module)
    weight = bare._parameters.get("weight")
    named = re.search(r"Norm(Gated)?$", type(bare).__name__) is not None
    return named and weight is not None and weight.ndim == 1 and weight.is_floating_point()


def _check(targets: Targets | None, exclude: Targets, train_modules: Sequence[str], dtype: Any) -> None:
    check_names(".*" if targets is None else targets, exclude, train_modules)
    if dtype is not None:
        check_dtype(dtype)


def _expression(places: Iterable[str]) -> str:
    """Return the regular expression that matches these whole names and no others; empty where there are none."""
    return "|".join(re.escape(place) for place in places)


def _has_bias(bare: nn.Module) -> bool:
    return isinstance(getattr(bare, "bias", None), Tensor)


def _check_shared(places: Mapping[str, nn.Module], adapted: Sequence[str]) -> None:
    """A trained bias acts at its own place, so a bias that two modules add would be trained in one of them only."""
    adding: dict[int, list[str]] = {}
    for place, module in places.items():
        if adds_bias_last(bare_module(module)):
            adding.setdefault(id(bare_module(module).bias), []).append(place)
    for place in adapted:
        together = adding[id(bare_module(places[place]).bias)]
        if len(together) > 1:
            raise ValueError(f"{' and '.join(together)} add one and the same bias: name them in train_modules instead")


def _trains(module: nn.Module, name: str) -> bool:
    return any(isinstance(layer, TrainedNorm) and layer.adapter_name == name for layer in adapter_chain(module))
