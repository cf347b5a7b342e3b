"""The LoRA record: what to adapt and how, checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmtune.adapters.dora import check_dora_start
from llmtune.adapters.initialise import INITIALISATIONS, known_start, reads_weight
from llmtune.adapters.lora_plan import check_same_meaning, plan_lora
from llmtune.adapters.peft_config import config_of, read_lora
from llmtune.adapters.plan import Plan
from llmtune.adapters.record import (
    AdapterConfig,
    Targets,
    check_dtype,
    check_flag,
    check_mapping,
    check_names,
    check_positive,
    check_probability,
    check_whole,
)
from llmtune.adapters.token_ids import read_tokens
from llmtune.errors import did_you_mean


@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterConfig):
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
        target_parameters: suffixes of parameters to change by themselves, which no linear layer owns: the stacked
            weights of experts (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]) or a matrix; see
            `LoRAParameter`. They come beside the targets, which `targets=()` leaves out. No dropout and no lora_bias
            then: the change is one of the weights, not of an output.
        initialise: "kaiming" or "gaussian" (B = 0, so the start is exact), "orthogonal", "pissa", "pissa_niter_4" (any
            number) or "olora"; see `llmtune.adapters.initialise`. Files of the last three hold twice the rank, since
            they take the start off.
        train_bias: "none", "lora_only" (those of adapted modules) or "all"; copies are trained, the model's own stay.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        train_tokens: ids of tokens whose rows of the input embedding are trained too, and of the output head where it
            is tied; or {end of a module's name: ids} for other embeddings and heads. See `NewTokens`.
        dtype: of the adapter's parameters.
        any_rank: take ranks above the smaller side of a layer, which add nothing; files of combined adapters have them.

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
    target_parameters: Sequence[str] = ()
    train_tokens: Sequence[int] | Mapping[str, Sequence[int]] = ()
    dtype: torch.dtype = torch.float32
    any_rank: bool = False

    peft_type: ClassVar[str] = "LORA"
    decomposes: ClassVar[bool] = False  # whether rows get lengths of their own: DoRA

    def __post_init__(self) -> None:
        for name in ("rslora", "lora_bias", "any_rank"):
            check_flag(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern"):
            check_mapping(name, getattr(self, name))
            object.__setattr__(self, name, dict(getattr(self, name)))  # what the caller does to theirs changes nothing
        for name, rank in (("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            check_whole(name, rank)
        for name, alpha in (
            ("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items())
        ):  # fmt: skip
            check_positive(name, alpha)
        check_probability("dropout", self.dropout)
        if not known_start(self.initialise):
            known = ", ".join(f'"{name}"' for name in INITIALISATIONS)
            raise ValueError(
                f"initialise must be one of {known}; got {self.initialise!r}."
                f"{did_you_mean(str(self.initialise), INITIALISATIONS)}"
            )
        if self.train_bias not in ("none", "lora_only", "all"):
            raise ValueError(f'train_bias must be "none", "lora_only" or "all"; got {self.train_bias!r}')
        object.__setattr__(self, "train_tokens", read_tokens(self.train_tokens))
        check_dtype(self.dtype)
        check_names(self.targets, self.exclude, self.train_modules, self.target_parameters)
        self._check_target_parameters()
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error

    def _check_target_parameters(self) -> None:
        asked = {"dropout": self.dropout, "lora_bias": self.lora_bias, "DoRA": self.decomposes}
        for what, value in asked.items() if self.target_parameters else ():
            if value:
                raise ValueError(
                    f"{what} has no place with target_parameters, which change weights and not outputs: leave it out, "
                    "or give the parameters an adapter of their own"
                )

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`."""
        return plan_lora(model, self, name)

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries; see `AdapterConfig.file_entries`."""
        return config_of(model, self, name)

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[LoRA, tuple[str, ...]]:
        """Return a LoRA or DoRA record; see `AdapterConfig.from_file`."""
        return read_lora(DoRA if entries.get("use_dora") else LoRA, entries, model, tensors)

    def check_attached(self, model: nn.Module, name: str, attached: AdapterConfig, *, source: Path) -> None:
        """Raise where the attached adapter scales otherwise or trains other tokens; see `AdapterConfig.check_attached`.

        Raises:
            ValueError: it does.
        """
        super().check_attached(model, name, attached, source=source)
        if isinstance(attached, LoRA) and reads_weight(attached.initialise):
            raise ValueError(
                f'the attached "{name}" started from the weights ("{attached.initialise}") and files hold that start '
                "as well: detach it first, and loading attaches what the file describes"
            )
        check_same_meaning(model, self, name, source=source)


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """DoRA on chosen linear layers of a model; see `DoRALinear` for the formula.

    It takes what `LoRA` takes, but no `lora_bias` and no `target_parameters`, and goes to linear layers and GPT-2's
    Conv1D alone. Dropout acts on the way to A; PEFT's acts on the way to W as well.

    Raises:
        ValueError, TypeError: as `LoRA`, and where `lora_bias` or `target_parameters` is asked for.
    """

    decomposes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise ValueError("lora_bias has no place in DoRA, whose bias stands outside: train_bias trains the base's")
        check_dora_start(self.initialise)
