"""The AdaLoRA record: where, from which rank to which, on what schedule; and its files in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmtune.adapters.adalora import AdaLoRAConv1D, AdaLoRALinear
from llmtune.adapters.config import LoRA
from llmtune.adapters.layer import adapter_chain, named_places
from llmtune.adapters.peft_config import config_of, read_lora
from llmtune.adapters.plan import Build, Plan, plan_targets
from llmtune.adapters.record import (
    AdapterConfig,
    Targets,
    check_dtype,
    check_mapping,
    check_names,
    check_positive,
    check_probability,
    check_whole,
)
from llmtune.adapters.targets import check_linear, is_conv1d, linear_sizes
from llmtune.errors import did_you_mean

PEFT_NAMES = {
    "initial_rank": "init_r", "target_rank": "target_r", "total_steps": "total_step", "warmup_steps": "tinit",
    "final_steps": "tfinal", "interval": "deltaT", "beta1": "beta1", "beta2": "beta2",
    "orthogonality": "orth_reg_weight",
}  # fmt: skip
DEFAULTS = {
    "init_r": 12, "target_r": 8, "total_step": 0, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
    "orth_reg_weight": 0.5,
}  # fmt: skip
# Entries of PEFT's LoRA that its AdaLoRA has as well and does not read.
IDLE = ("r", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "init_lora_weights", "eva_config")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(AdapterConfig):
    """AdaLoRA on chosen linear layers of a model; see `AdaLoRALinear` for the formula.

    The record says how ranks are to be cut; a `RankBudget` does it, as a callback of the loop or step by step, and
    `AdaLoRAOrthogonality` is the penalty. Without them this is a LoRA of rank `initial_rank` in another form.

    Args:
        alpha: the change is scaled by alpha / (initial_rank + 1e-5).
        total_steps: optimizer steps of the whole training.
        initial_rank: r at the start, of every layer.
        target_rank: the mean rank at the end.
        warmup_steps: before the cutting begins.
        final_steps: after it has ended: the last ones, with the ranks as they are.
        interval: cut at every so many steps.
        beta1: how slowly the sensitivity of an entry is smoothed, above 0 and below 1.
        beta2: the same for how much it varies.
        orthogonality: the strength that `AdaLoRAOrthogonality` has where it is given none; 0 for no penalty.
        targets: suffixes of module names, one regular expression that matches whole names, or "all-linear".
        exclude: suffixes, or one regular expression, of modules to leave out.
        dropout: probability with which an entry of a layer's input is dropped on the way to A.
        kept_ranks: how many triplets a layer has left, by its full name; `trim_ranks` and PEFT's files fill it in.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: a value is out of its range; the sentence names it.
        TypeError: a value has a wrong type.
    """

    alpha: float
    total_steps: int
    initial_rank: int = 12
    target_rank: int = 8
    warmup_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    targets: Targets = "all-linear"
    exclude: Targets = ()
    dropout: float = 0.0
    kept_ranks: Mapping[str, int] = field(default_factory=dict)
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    peft_type: ClassVar[str] = "ADALORA"

    def __post_init__(self) -> None:
        check_mapping("kept_ranks", self.kept_ranks)
        object.__setattr__(self, "kept_ranks", dict(self.kept_ranks))
        check_positive("alpha", self.alpha)
        for name in ("total_steps", "initial_rank", "target_rank", "interval"):
            check_whole(name, getattr(self, name))
        for name in ("warmup_steps", "final_steps"):
            steps = getattr(self, name)
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
                raise ValueError(f"{name} must be a whole number of steps, 0 or more; got {steps!r}")
        for name in ("beta1", "beta2"):
            check_positive(name, getattr(self, name))
            check_probability(name, getattr(self, name))
        if not isinstance(self.orthogonality, int | float) or self.orthogonality != 0:
            check_positive("orthogonality", self.orthogonality)
        if self.target_rank > self.initial_rank:
            raise ValueError(f"target_rank {self.target_rank} is larger than initial_rank {self.initial_rank}")
        if self.warmup_steps >= self.total_steps - self.final_steps:
            raise ValueError(
                f"{self.warmup_steps} warmup_steps and {self.final_steps} final_steps leave none of the "
                f"{self.total_steps} total_steps to cut ranks in"
            )
        for place, rank in self.kept_ranks.items():
            check_whole(f"kept_ranks[{place!r}]", rank)
        check_probability("dropout", self.dropout)
        check_dtype(self.dtype)
        check_names(self.targets, self.exclude, self.train_modules)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`."""
        plan = plan_targets(
            model,
            self,
            name,
            adaptable=lambda module: linear_sizes(module) is not None,
            build=partial(self._build, name=name),
        )
        for place in self.kept_ranks:
            if place not in plan.adapted:
                raise ValueError(
                    f'kept_ranks: "{place}" is none of the adapted modules.{did_you_mean(place, plan.adapted)}'
                )
        return plan

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries; see `AdapterConfig.file_entries`."""
        alike = LoRA(
            rank=self.initial_rank, alpha=self.alpha, targets=self.targets, exclude=self.exclude, dropout=self.dropout,
            train_modules=self.train_modules, dtype=self.dtype,
        )  # fmt: skip
        kept = {
            f"{place}.lora_E": [number < rank for number in range(self.initial_rank)]
            for place, rank in self.kept_ranks.items()
        }
        entries = config_of(model, alike, name) | {
            "peft_type": "ADALORA", "r": 8, "rank_pattern": kept or None,
            **{theirs: getattr(self, ours) for ours, theirs in PEFT_NAMES.items()},
        }  # fmt: skip
        return dict(sorted(entries.items()))

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[AdaLoRA, tuple[str, ...]]:
        """Return the record, without the layers of which PEFT's file has kept nothing; see `AdapterConfig.from_file`.

        Raises:
            ValueError: biases are trained, or another entry asks for something that is not offered.
        """
        rest = {key: value for key, value in entries.items() if key not in (*DEFAULTS, *IDLE)}
        alike, unmatched = read_lora(LoRA, rest, model, tensors)
        if alike.train_bias != "none":
            raise ValueError(f'bias="{alike.train_bias}" asks for something that is not offered with AdaLoRA')
        masks = {} if entries.get("rank_pattern") is None else entries["rank_pattern"]
        check_mapping("rank_pattern", masks)
        for place, mask in masks.items():
            if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
                raise ValueError(f"rank_pattern[{place!r}] must be a list of true and false; got {mask!r}")
        kept = {place.partition(".lora_E")[0]: sum(mask) for place, mask in masks.items()}
        targets, exclude = alike.targets, alike.exclude
        if 0 in kept.values():
            targets, exclude = tuple(place for place, rank in kept.items() if rank), ()
        own = {ours: entries.get(theirs, DEFAULTS[theirs]) for ours, theirs in PEFT_NAMES.items()}
        return cls(
            alpha=alike.alpha, targets=targets, exclude=exclude, dropout=alike.dropout,
            kept_ranks={place: rank for place, rank in kept.items() if rank}, train_modules=alike.train_modules,
            dtype=alike.dtype, **own,
        ), unmatched  # fmt: skip

    def of_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors without the empty ones that PEFT writes for rank 0; see `AdapterConfig.of_file`."""
        ends = (".lora_A", ".lora_B", ".lora_E")
        return {key: tensor for key, tensor in tensors.items() if tensor.numel() or not key.endswith(ends)}

    def check_attached(self, model: nn.Module, name: str, attached: AdapterConfig, *, source: Path) -> None:
        """Raise where the attached adapter scales otherwise; see `AdapterConfig.check_attached`."""
        super().check_attached(model, name, attached, source=source)
        for entry in ("alpha", "initial_rank"):
            mine, theirs = getattr(self, entry), getattr(attached, entry)
            if mine != theirs:
                raise ValueError(
                    f'the adapter in {source} has {entry}={mine}, which scales it, the attached "{name}" has {theirs}: '
                    "detach it first, and loading attaches what the file describes"
                )

    def _build(self, place: str, module: nn.Module, *, name: str) -> Build:
        check_linear(place, module, "AdaLoRA")
        sizes = linear_sizes(module)
        assert sizes is not None
        rank = self.kept_ranks.get(place, self.initial_rank)
        if rank > self.initial_rank:
            raise ValueError(f"kept_ranks has {rank} for {place}, more than the initial_rank {self.initial_rank}")
        if rank > min(sizes):
            raise ValueError(
                f"the rank {rank} is larger than {place} allows: the smaller of its two sizes is {min(sizes)}"
            )
        kind = AdaLoRAConv1D if is_conv1d(module) else AdaLoRALinear

        def build(base: nn.Module) -> AdaLoRALinear:
            return kind(
                base, rank=rank, alpha=self.alpha, initial_rank=self.initial_rank, dropout=self.dropout,
                dtype=self.dtype, adapter_name=name,
            )  # fmt: skip

        return build


def adalora_layers(model: nn.Module, name: str) -> dict[str, AdaLoRALinear]:
    """Return an adapter's layers by the bare names of the modules adapted; empty where it has none."""
    return {
        place: layer
        for place, module in named_places(model)
        for layer in adapter_chain(module)
        if layer.adapter_name == name and isinstance(layer, AdaLoRALinear)
    }
