"""Prompt tuning and P-tuning: the records. `PromptLayer` says what a body does with the virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmtune.adapters.body import embeddings_of, find_body
from llmtune.adapters.layer import adapter_chain, bare_module, named_places
from llmtune.adapters.loreft import TOGETHER, LoReFTLayer
from llmtune.adapters.plan import Build, Plan
from llmtune.adapters.prompt_encoder import PromptEncoder, PromptTable
from llmtune.adapters.prompt_layer import PromptLayer, PromptMemory
from llmtune.adapters.record import AdapterConfig, check_probability, check_whole
from llmtune.adapters.targets import inside
from llmtune.adapters.virtual_tokens import KEY, VirtualTokens, common_fields, prompt_entries


class _Prompt(VirtualTokens):
    """What both methods share: the places of their layers, and twice as many rows as are read in PEFT's files."""

    def start(self, embeddings: nn.Module) -> Tensor:
        """Return what the table starts as, [n, E]: standard normal draws, as PEFT's."""
        weight: Any = bare_module(embeddings).weight
        return torch.randn(self.tokens, weight.shape[1]).to(device=weight.device, dtype=self.dtype)

    def source(self, embeddings: nn.Module) -> PromptTable:
        """Return what makes the virtual tokens."""
        return PromptTable(self.start(embeddings))

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`."""
        method = type(self).__name__
        body = find_body(model, method)
        embeddings_of(body.module, method)
        keep = body.decoder is not None

        def stand_in(base: nn.Module) -> PromptLayer:
            return PromptLayer(base, self.source(embeddings_of(base, method)), keep=keep, adapter_name=name)

        builders: list[tuple[str, Build]] = [(body.place, stand_in)]
        if body.decoder_place is not None:
            builders.append((body.decoder_place, lambda base: PromptMemory(base, self.tokens, adapter_name=name)))
        places = dict(named_places(model))
        for inner in places:
            edits = [layer for layer in adapter_chain(places[inner]) if isinstance(layer, LoReFTLayer) and layer.inputs]
            if edits and inside(inner, [body.place]):
                raise ValueError(TOGETHER.format(prompt=method))
        plan = self.planned(model, name, [place for place, _ in builders])
        plan.builders += builders
        return plan

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries; see `AdapterConfig.file_entries`."""
        method = type(self).__name__
        body = find_body(model, method).module
        weight: Any = bare_module(embeddings_of(body, method)).weight
        entries = prompt_entries(model, self, name, body=body, token_dim=weight.shape[1])
        return dict(sorted((entries | self.own_entries(weight.shape[1])).items()))

    def own_entries(self, token_dim: int) -> dict[str, Any]:
        """Return PEFT's entries for this method alone."""
        raise NotImplementedError

    def of_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, of twice as many rows the first half; see `AdapterConfig.of_file`."""
        found = super().of_file(tensors)
        if KEY in found and len(found[KEY]) == 2 * self.tokens:
            found[KEY] = found[KEY][: self.tokens]
        return found


def _idle_rows(tokens: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    if KEY not in tensors or len(tensors[KEY]) != 2 * tokens:
        return []
    return [f"num_transformer_submodules 2 (rows {tokens} to {2 * tokens - 1} of {KEY}, which nothing reads)"]


@dataclass(frozen=True, kw_only=True)
class PromptTuning(_Prompt):
    """Prompt tuning: n trained vectors before the text's own, everything else frozen; see `PromptLayer`.

    Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning" (2021). An encoder-decoder gets them in
    its encoder, as in the paper. PEFT's files for one hold 2 n rows, of which it reads the first n: these are loaded,
    and `LoadReport.unmatched` tells of the others; files written here hold n.

    What comes out of the model has the shapes it had, and labels need not be widened. PEFT's logits have n positions
    more, and its loss one target more in every row: the first token, unless its label is -100. The `position_ids` of
    the text go up by n. Where a decoder is given none, rows that start with padding get those that generation makes of
    the attention mask, so that padding on the left changes nothing; PEFT counts padding. An encoder counts it as well,
    and a model that knows distances alone, as T5, has the padding between both, as with PEFT.

    Args:
        tokens: n.
        initialise: "random", standard normal draws as in PEFT (the paper's are uniform in [-0.5, 0.5]); or
            "vocabulary", the vectors of n words drawn from the whole vocabulary.
        seed: of the draws; None takes torch's own state.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: a value is out of its range; the sentence names it.
        TypeError: a value has a wrong type.

    Example:
        >>> from llmtune.adapters import PromptTuning, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> print(attach(tiny_llama(), PromptTuning(tokens=5)))
        adapter "default": 1 modules
        trainable params: 140 || all params: 21,336 || trainable%: 0.6562
    """

    initialise: Literal["random", "vocabulary"] = "random"
    seed: int | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initialise not in ("random", "vocabulary"):
            raise ValueError(f'initialise must be "random" or "vocabulary"; got {self.initialise!r}')
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise TypeError(f"seed must be a whole number or None; got {self.seed!r}")

    @torch.no_grad()
    def start(self, embeddings: nn.Module) -> Tensor:
        """Return what the table starts as, [n, E]."""
        weight: Any = bare_module(embeddings).weight
        V, E = weight.shape
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        if self.initialise == "random":
            return torch.randn(self.tokens, E, generator=generator).to(device=weight.device, dtype=self.dtype)
        words = torch.randint(V, (self.tokens,), generator=generator)
        return embeddings(words.to(weight.device)).to(self.dtype, copy=True)

    def own_entries(self, token_dim: int) -> dict[str, Any]:
        """Return PEFT's entries for prompt tuning alone."""
        start = "SAMPLE_VOCAB" if self.initialise == "vocabulary" else "RANDOM"
        return {
            "prompt_tuning_init": start, "prompt_tuning_init_text": None, "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        }  # fmt: skip

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[AdapterConfig, tuple[str, ...]]:
        """Return the record; see `AdapterConfig.from_file`. How PEFT drew the start says nothing about a file."""
        known = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
        fields, idle = common_fields(entries, known, model, tensors)
        sampled = entries.get("prompt_tuning_init") == "SAMPLE_VOCAB"
        config = cls(**fields, initialise="vocabulary" if sampled else "random")
        return config, (*idle, *_idle_rows(config.tokens, tensors))


@dataclass(frozen=True, kw_only=True)
class PTuning(_Prompt):
    """P-tuning: virtual tokens before the text that a small network makes, trained with them; see `PromptEncoder`.

    Liu et al., "GPT Understands, Too" (2021). Its template may put virtual tokens among the words; here, as in PEFT,
    all come first. PEFT's files hold what the network makes and not the network: a loaded adapter gives the same
    outputs to the bit, is trained on as a plain table, and its record has `encoder=None`. Where the virtual tokens go,
    and what comes out, is as with `PromptTuning`.

    Args:
        tokens: n.
        encoder: "mlp", "lstm", or None for no network: the table itself, which is what loading gives.
        hidden: F, the network's width; None takes the model's.
        layers: of the LSTM. The MLP has three linear layers, as in PEFT.
        dropout: between the layers of the LSTM, in training mode.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: a value is out of its range, or has no meaning for this encoder; the sentence names it.
        TypeError: a value has a wrong type.

    Example:
        >>> from llmtune.adapters import PTuning, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> print(attach(tiny_llama(), PTuning(tokens=5, hidden=7)))
        adapter "default": 1 modules
        trainable params: 623 || all params: 21,819 || trainable%: 2.8553
    """

    encoder: Literal["mlp", "lstm"] | None = "mlp"
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0

    peft_type: ClassVar[str] = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("mlp", "lstm", None):
            raise ValueError(f'encoder must be "mlp", "lstm" or None; got {self.encoder!r}')
        if self.hidden is not None:
            check_whole("hidden", self.hidden)
        check_whole("layers", self.layers)
        check_probability("dropout", self.dropout)
        if self.encoder is None and self.hidden is not None:
            raise ValueError(f"hidden has no meaning without an encoder; got {self.hidden}")
        if self.encoder != "lstm" and (self.layers != 2 or self.dropout):
            raise ValueError(
                f'layers and dropout are of the LSTM (encoder="lstm"); got layers={self.layers}, '
                f"dropout={self.dropout} with encoder={self.encoder!r}"
            )
        if self.layers == 1 and self.dropout:
            raise ValueError("dropout acts between the layers of the LSTM, and layers=1 has no between: leave it out")

    def source(self, embeddings: nn.Module) -> PromptTable:
        """Return the network, or the table where there is none."""
        start = self.start(embeddings)
        if self.encoder is None:
            return PromptTable(start)
        return PromptEncoder(
            start, kind=self.encoder, hidden=self.hidden or start.shape[1], layers=self.layers, dropout=self.dropout
        )

    def own_entries(self, token_dim: int) -> dict[str, Any]:
        """Return PEFT's entries for P-tuning alone; it has none for a table, and reads any encoder's file as one."""
        return {
            "encoder_dropout": self.dropout, "encoder_hidden_size": self.hidden or token_dim,
            "encoder_num_layers": self.layers, "encoder_reparameterization_type": (self.encoder or "mlp").upper(),
        }  # fmt: skip

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[AdapterConfig, tuple[str, ...]]:
        """Return the record of a table; see `AdapterConfig.from_file`."""
        known = {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
        fields, idle = common_fields(entries, known, model, tensors)
        config = cls(**fields, encoder=None)
        return config, (*idle, *_idle_rows(config.tokens, tensors))
