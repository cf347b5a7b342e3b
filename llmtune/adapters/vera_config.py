"""The VeRA record: what to adapt and how, and PEFT's files of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers
from llmtune.adapters.layer import bare_module
from llmtune.adapters.peft_config import as_targets, check_entries, common_entries, fitted
from llmtune.adapters.plan import Build, Plan, plan_targets
from llmtune.adapters.record import (
    AdapterConfig,
    Targets,
    check_dtype,
    check_flag,
    check_names,
    check_probability,
    check_whole,
)
from llmtune.adapters.targets import check_linear, linear_sizes
from llmtune.adapters.vera import FILE_A, FILE_B, SharedProjections, VeRALinear

PLAIN: dict[str, Any] = {"layers_pattern": None, "layers_to_transform": None}
OWN = {
    "bias", "d_initial", "init_weights", "modules_to_save", "peft_type", "projection_prng_key", "r", "save_projection",
    "target_modules", "vera_dropout",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VeRA(AdapterConfig):
    """VeRA on chosen linear layers of a model; see `VeRALinear` for the formula.

    Args:
        rank: r; more than LoRA's, since it costs r + out numbers a layer: the paper takes 256 and more.
        targets: suffixes of module names (["q_proj", "v_proj"]), one regular expression that matches whole names, or
            "all-linear": every linear layer but the output head of a Hugging Face model; on a plain module, every one.
        exclude: suffixes, or one regular expression, of modules to leave out.
        dropout: probability with which an entry of a layer's input is dropped on the way to A.
        d_initial: what lambda_d starts at; not 0, where nothing could be learned.
        seed: of A and B: PEFT's projection_prng_key.
        save_projection: write A and B into the file. Without, they are left out where the seed gives them again; those
            that came from another file and differ are written all the same.
        train_bias: "none", "vera_only" (those of adapted modules) or "all"; copies are trained, the model's own stay.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters, and of A and B.

    Raises:
        ValueError: a value is out of its range; the sentence names it.
        TypeError: a value has a wrong type.
    """

    rank: int
    targets: Targets = "all-linear"
    exclude: Targets = ()
    dropout: float = 0.0
    d_initial: float = 0.1
    seed: int = 0
    save_projection: bool = True
    train_bias: Literal["none", "vera_only", "all"] = "none"
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    peft_type: ClassVar[str] = "VERA"

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        check_probability("dropout", self.dropout)
        start = self.d_initial
        if isinstance(start, bool) or not isinstance(start, int | float) or not 0 < abs(start) < math.inf:
            raise ValueError(f"d_initial must be a number other than 0; got {start!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1; got {self.seed!r}")
        check_flag("save_projection", self.save_projection)
        if self.train_bias not in ("none", "vera_only", "all"):
            raise ValueError(f'train_bias must be "none", "vera_only" or "all"; got {self.train_bias!r}')
        check_dtype(self.dtype)
        check_names(self.targets, self.exclude, self.train_modules)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers, which will share one `SharedProjections`; see `AdapterConfig.plan`."""
        sizes: list[tuple[int, int]] = []
        shared: list[SharedProjections] = []  # one, drawn when the first layer is made, as wide as the widest

        def build(place: str, module: nn.Module) -> Build:
            check_linear(place, module, "VeRA")
            sizes.extend(filter(None, [linear_sizes(module)]))

            def make(base: nn.Module) -> VeRALinear:
                if not shared:
                    device = next((p.device for p in bare_module(base).parameters()), None)
                    columns, rows = (max(side) for side in zip(*sizes, strict=True))
                    shared.append(
                        SharedProjections(self.rank, columns, rows, seed=self.seed, dtype=self.dtype, device=device)
                    )
                return VeRALinear(
                    base, rank=self.rank, dropout=self.dropout, d_initial=self.d_initial, projections=shared[0],
                    dtype=self.dtype, adapter_name=name,
                )  # fmt: skip

            return make

        return plan_targets(
            model, self, name, adaptable=lambda module: linear_sizes(module) is not None, build=build,
            train_bias="lora_only" if self.train_bias == "vera_only" else self.train_bias,
        )  # fmt: skip

    def spare_tensors(self, model: nn.Module, name: str) -> frozenset[str]:
        """Return the names of A and B where they are not to be saved and the seed gives them again."""
        shared = _shared(model, name)
        again = not self.save_projection and (shared is None or shared.drawn_from(self.seed))
        return frozenset((FILE_A, FILE_B) if again else ())

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries; see `AdapterConfig.file_entries`."""
        own = {
            "bias": self.train_bias,
            "d_initial": self.d_initial,
            "init_weights": True,
            "projection_prng_key": self.seed,
            "r": self.rank,
            "save_projection": not self.spare_tensors(model, name),
            "vera_dropout": self.dropout,
        }
        common = common_entries(model, self, name, self.peft_type, excludes=False)
        return dict(sorted((PLAIN | common | own).items()))

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[VeRA, tuple[str, ...]]:
        """Return a VeRA record; see `AdapterConfig.from_file`. A and B in the file are taken whatever the entries say.

        Raises:
            ValueError: the entries ask for an option that is not offered here.
        """
        check_entries(entries, OWN, PLAIN)
        start = entries.get("d_initial", 0.1)
        config = cls(
            rank=entries.get("r", 256),
            targets=as_targets(entries.get("target_modules") or ()),
            dropout=entries.get("vera_dropout", 0.0),
            d_initial=0.1 if start == 0 else start,  # the start is of no consequence any more
            seed=entries.get("projection_prng_key", 0),
            save_projection=bool(entries.get("save_projection", True)) or FILE_A in tensors,
            train_bias=entries.get("bias", "none"),
            train_modules=tuple(entries.get("modules_to_save") or ()),
            dtype=next((tensor.dtype for key, tensor in tensors.items() if ".vera_lambda_" in key), torch.float32),
        )
        return fitted(config, model)

    def check_attached(self, model: nn.Module, name: str, attached: AdapterConfig, *, source: Path) -> None:
        """Raise where the file leaves A and B to a seed that the attached ones are not from.

        Raises:
            ValueError: so it is, or they are of different methods; see `AdapterConfig.check_attached`.
        """
        super().check_attached(model, name, attached, source=source)
        if not self.save_projection and not self.spare_tensors(model, name):
            raise ValueError(
                f'the adapter in {source} draws its A and B from seed {self.seed}, the attached "{name}" has others: '
                "detach it first, and loading attaches what the file describes"
            )


def _shared(model: nn.Module, name: str) -> SharedProjections | None:
    layers = (layer for layer in adapter_layers(model, name) if isinstance(layer, VeRALinear))
    return next((layer.projections for layer in layers), None)
