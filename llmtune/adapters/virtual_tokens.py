"""What the records of prompts and prefixes share: their checks, and how PEFT describes them in a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers
from llmtune.adapters.layer import PREFIX, named_places
from llmtune.adapters.peft_config import TASKS, about_model, check_entries, copied
from llmtune.adapters.plan import Plan, copied_places, finish
from llmtune.adapters.record import AdapterConfig, check_dtype, check_suffixes, check_whole

KEY = "prompt_embeddings"  # PEFT's name of the only tensor in a file of virtual tokens, without a prefix
COPIES = "base_model."  # what PEFT puts before a module trained whole beside them, shorter than elsewhere
OWN = {
    "modules_to_save", "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens",
    "peft_type", "token_dim",
}  # fmt: skip
EVERY_TASK = TASKS | {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
PEFT_HEADS = ("classifier", "score", "qa_outputs")  # what PEFT itself trains whole in classifiers
HEADS = ("num_attention_heads", "n_head", "num_heads")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(AdapterConfig):
    """The base of the records of prompts and prefixes.

    Args:
        tokens: n, how many virtual tokens.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: `tokens` is no whole number of at least 1.
        TypeError: a value has a wrong type.
    """

    tokens: int
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens)
        check_dtype(self.dtype)
        check_suffixes("train_modules", self.train_modules)

    def planned(self, model: nn.Module, name: str, adapted: Sequence[str]) -> Plan:
        """Return a plan with the places checked and the copies in it, but without the method's own builders."""
        plan = Plan(adapted=list(adapted), copied=copied_places(self.train_modules, dict(named_places(model))))
        finish(model, plan, name)
        return plan

    def to_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors by PEFT's names; see `AdapterConfig.to_file`."""
        return {key.replace(PREFIX, COPIES, 1): tensor for key, tensor in tensors.items()}

    def of_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors by the names they have here; see `AdapterConfig.of_file`."""
        return {key if key == KEY else PREFIX + key.removeprefix(COPIES): value for key, value in tensors.items()}

    def check_attached(self, model: nn.Module, name: str, attached: AdapterConfig, *, source: Path) -> None:
        """Raise where the attached adapter's network made the virtual tokens; see `AdapterConfig.check_attached`."""
        super().check_attached(model, name, attached, source=source)
        found = [layer.file_tensors("").get(KEY) for layer in adapter_layers(model, name)]
        if not all(table is None or isinstance(table, nn.Parameter) for table in found):
            raise ValueError(
                f'the file in {source} holds what a network made, and the network of the attached "{name}" cannot be '
                "found again from it: detach it first, and loading attaches a table in its stead"
            )


def prompt_entries(
    model: nn.Module, config: VirtualTokens, name: str, *, body: Any, token_dim: int, submodules: int = 1
) -> dict[str, Any]:
    """Return the entries of `adapter_config.json` that every method of virtual tokens has.

    Args:
        model: the model it is attached to.
        config: its record.
        name: its name.
        body: the bare body, whose configuration tells sizes.
        token_dim: the size of one virtual token.
        submodules: PEFT's num_transformer_submodules.
    """
    whole = copied(model, name)
    return about_model(model) | {
        "auto_mapping": None,
        "modules_to_save": whole or None,
        "num_attention_heads": number_of(body.config, HEADS),
        "num_layers": number_of(body.config, LAYERS),
        "num_transformer_submodules": submodules,
        "num_virtual_tokens": config.tokens,
        "peft_type": config.peft_type,
        "task_type": _task(type(model).__name__, whole),
        "token_dim": token_dim,
    }


def _task(kind: str, copied: Sequence[str]) -> str:
    """Return what PEFT is to take the model for. It wants a classifier's head to be in the file; a file without one is
    for a model that only makes features, which gives the same outputs."""
    task = next((task for ending, task in EVERY_TASK.items() if kind.endswith(ending)), "FEATURE_EXTRACTION")
    has_head = any(place.endswith(PEFT_HEADS) for place in copied)
    return task if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or has_head else "FEATURE_EXTRACTION"


def common_fields(
    entries: Mapping[str, Any], known: Collection[str], model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a record that every method has, and PEFT's modules_to_save that are not in the model.

    Args:
        entries: of `adapter_config.json`.
        known: the keys that the method has beside the common ones.
        model: the model it is for.
        tensors: the file's; they tell the dtype.

    Raises:
        ValueError: the entries ask for something that is not offered here.
    """
    check_entries(entries, OWN | set(known), {})
    named = list(dict.fromkeys(entries.get("modules_to_save") or ()))
    places = [place for place, _ in named_places(model) if place]
    ends = {end: [place for place in places if place.endswith(end)] for end in named}
    copied = [place for place in places if any(place in found for found in ends.values())]
    dtype = tensors[KEY].dtype if KEY in tensors else torch.float32
    fields = {"tokens": entries.get("num_virtual_tokens"), "train_modules": tuple(copied), "dtype": dtype}
    return fields, [f"modules_to_save {end}" for end, found in ends.items() if not found]


def number_of(config: Any, names: Sequence[str]) -> int | None:
    """Return the first of the configuration's entries that is a number."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
