"""Prefix tuning: the record. `PrefixLayer` says what a body does with the prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from llmtune.adapters.body import Body, find_body
from llmtune.adapters.plan import Build, Plan
from llmtune.adapters.prefix_layer import PrefixAttention, PrefixLayer, PrefixTable, own_attention
from llmtune.adapters.record import AdapterConfig, check_whole
from llmtune.adapters.virtual_tokens import HEADS, LAYERS, VirtualTokens, common_fields, number_of, prompt_entries


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(VirtualTokens):
    """Prefix tuning: n trained keys and values before the text's own in every attention layer; see `PrefixLayer`.

    Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (2021). An encoder-decoder gets them in
    its decoder's attention to itself, as with PEFT; the paper has them in the encoder as well. There layer i of L has
    the pair 2 i mod L of the table, which is how PEFT deals it out: where L is even two layers share a pair, and half
    of the table is never read.

    The text's positions are made as with `PromptTuning`: padding on the left of a decoder's row is not counted.

    PEFT's files hold what the projection makes and not the projection: a loaded adapter gives the same outputs to the
    bit, is trained on as a plain table, and its record has `projection=False`.

    Args:
        tokens: n.
        projection: train a network that makes the prefixes of smaller ones, as in the paper's section 4.3.
        hidden: F, the network's width; None takes K D, the size of all a token's keys in a layer.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: a value is out of its range, or has no meaning; the sentence names it.
        TypeError: a value has a wrong type.

    Example:
        >>> from llmtune.adapters import PrefixTuning, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> print(attach(tiny_llama(), PrefixTuning(tokens=5)))
        adapter "default": 3 modules
        trainable params: 560 || all params: 21,756 || trainable%: 2.5740
    """

    projection: bool = False
    hidden: int | None = None

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.projection, bool):
            raise TypeError(f"projection must be True or False, its width is hidden; got {self.projection!r}")
        if self.hidden is not None:
            check_whole("hidden", self.hidden)
            if not self.projection:
                raise ValueError(f"hidden has no meaning without projection=True; got {self.hidden}")

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`."""
        place, bare, paired = _reader(find_body(model, "PrefixTuning"))
        attention = own_attention(bare)
        _check_layers(bare, attention)
        L, K, D = _sizes(bare)
        table = PrefixTable(
            tokens=self.tokens, layers=L, heads=K, size=D, hidden=(self.hidden or K * D) if self.projection else None,
            every_second=paired, dtype=self.dtype, device=next(bare.parameters()).device,
        )  # fmt: skip

        def handed(layer: int) -> Build:
            return lambda base: PrefixAttention(base, table, layer, adapter_name=name)

        builders: list[tuple[str, Build]] = [(place, lambda base: PrefixLayer(base, table, adapter_name=name))]
        builders += [(f"{place}.{inner}", handed(layer)) for inner, (layer, _) in attention.items()]
        plan = self.planned(model, name, [place for place, _ in builders])
        plan.builders += builders
        return plan

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries; see `AdapterConfig.file_entries`."""
        _, bare, paired = _reader(find_body(model, "PrefixTuning"))
        L, K, D = _sizes(bare)
        entries = prompt_entries(model, self, name, body=bare, token_dim=K * D, submodules=2 if paired else 1) | {
            "encoder_hidden_size": self.hidden or K * D, "init_weights": None, "num_attention_heads": K,
            "num_layers": L, "prefix_projection": self.projection,
        }  # fmt: skip
        return dict(sorted(entries.items()))

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[AdapterConfig, tuple[str, ...]]:
        """Return the record of a table; see `AdapterConfig.from_file`. How PEFT drew the start says nothing."""
        known = {"encoder_hidden_size", "init_weights", "prefix_projection"}
        fields, idle = common_fields(entries, known, model, tensors)
        _, bare, _ = _reader(find_body(model, "PrefixTuning"))
        L, K, D = _sizes(bare)
        said = tuple(entries.get(key) for key in ("num_layers", "num_attention_heads", "token_dim"))
        if said != (L, K, K * D):
            raise ValueError(
                f"the prefixes are for {said[0]} layers of {said[1]} key/value heads and {said[2]} numbers a key; the "
                f"model has {L}, {K} and {K * D}"
            )
        return cls(**fields), tuple(idle)


def _reader(body: Body) -> tuple[str, nn.Module, bool]:
    """Return the place of what reads a prefix, the bare module there, and whether it is a decoder beside an encoder."""
    if body.decoder is not None and body.decoder_place is not None:
        return body.decoder_place, body.decoder, True
    return body.place, body.module, False


def _sizes(bare: Any) -> tuple[int, int, int]:
    """Return L, K and D of a body: layers, key/value heads, and the size of a head."""
    config = bare.config
    H = number_of(config, HEADS) or 1
    K = number_of(config, ("num_key_value_heads",)) or H
    D = number_of(config, ("head_dim", "d_kv")) or (number_of(config, ("hidden_size", "n_embd", "d_model")) or 0) // H
    return number_of(config, LAYERS) or 0, K, D


def _check_layers(bare: Any, attention: Mapping[str, tuple[int, nn.Module]]) -> None:
    """Raise where not every layer of the body, and only these, attends to keys and values in a cache."""
    L = _sizes(bare)[0]
    uneven = getattr(bare.config, "num_kv_shared_layers", 0) or getattr(bare.config, "is_heterogeneous", False)
    if not attention or sorted(layer for layer, _ in attention.values()) != list(range(L)) or uneven:
        raise TypeError(
            f"PrefixTuning needs a body in which each of the {L} layers keeps keys and values of one size in a cache; "
            f"{type(bare).__name__} is not like that"
        )
