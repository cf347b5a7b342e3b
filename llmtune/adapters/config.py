"""The LoRA record: what to adapt and how, checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from llmtune.adapters.lora import INITIALISATIONS
from llmtune.errors import did_you_mean

Targets = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """LoRA on chosen modules of a model; see `LoRALinear` for the formula.

    Args:
        rank: r.
        alpha: the change is scaled by alpha / r.
        targets: suffixes of module names (["q_proj", "v_proj"]), one regular expression that matches whole names, or
            "all-linear": every linear layer but the output head of a Hugging Face model; on a plain module, every one.
        exclude: suffixes, or one regular expression, of modules to leave out.
        dropout: probability with which an entry of a linear layer's input is dropped on the way to A; embeddings have
            no such entries, as in PEFT.
        rslora: scale by alpha / sqrt(r) instead.
        lora_bias: train a bias beside every B; raises where a target is an embedding.
        rank_pattern: another rank for the modules whose name ends in a pattern (a regular expression): {"q_proj": 4}.
        alpha_pattern: the same for alpha.
        initialise: "kaiming" or "gaussian".
        train_bias: "none", "lora_only" (those of adapted modules) or "all"; copies are trained, the model's own stay.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: a value is out of its range; the sentence names it.
        TypeError: a value has a wrong type.
    """

    rank: int
    alpha: float
    targets: Targets = "all-linear"
    exclude: Targets = ()
    dropout: float = 0.0
    rslora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    initialise: str = "kaiming"
    train_bias: Literal["none", "lora_only", "all"] = "none"
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name)))  # what the caller does to theirs changes nothing
        for name, rank in (("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {rank!r}")
        alphas = (("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()))
        for name, alpha in alphas:
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                raise ValueError(f"{name} must be a number above 0; got {alpha!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability from 0 to below 1; got {self.dropout!r}")
        if self.initialise not in INITIALISATIONS:
            known = ", ".join(f'"{name}"' for name in INITIALISATIONS)
            raise ValueError(
                f"initialise must be one of {known}; got {self.initialise!r}."
                f"{did_you_mean(str(self.initialise), INITIALISATIONS)}"
            )
        if self.train_bias not in ("none", "lora_only", "all"):
            raise ValueError(f'train_bias must be "none", "lora_only" or "all"; got {self.train_bias!r}')
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating torch dtype; got {self.dtype!r}")
        self._check_names()

    def _check_names(self) -> None:
        if isinstance(self.train_modules, str):
            raise TypeError(f"train_modules must be a list of suffixes; got the string {self.train_modules!r}")
        for name, value in (("targets", self.targets), ("exclude", self.exclude)):
            try:
                re.compile(value) if isinstance(value, str) else [re.compile(part) for part in value]
            except (TypeError, re.error) as error:
                raise ValueError(
                    f"{name} must be suffixes or one regular expression; got {value!r}: {error}"
                ) from error
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
        if not self.targets and not self.train_modules:
            raise ValueError('targets names no module: give suffixes, a regular expression, or "all-linear"')


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """DoRA on chosen linear layers of a model; see `DoRALinear` for the formula.

    It takes what `LoRA` takes, but no `lora_bias`, and goes to linear layers and GPT-2's Conv1D alone. Dropout acts on
    the way to A; PEFT's acts on the way to W as well.

    Raises:
        ValueError, TypeError: as `LoRA`, and where `lora_bias` is asked for.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise ValueError("lora_bias has no place in DoRA, whose bias stands outside: train_bias trains the base's")
