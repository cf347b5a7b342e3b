"""New tokens: train the rows of a few tokens in the input embedding, and in the output head where it is tied.

    W' = W but for the rows t_1 ... t_n of new or rare tokens, which are trained, n * E numbers in all

PEFT has this as TRAINABLE_TOKENS and, beside LoRA, as `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import PREFIX, named_places
from llmtune.adapters.peft_config import about_model, as_targets, check_entries
from llmtune.adapters.plan import Plan, copied_places, finish
from llmtune.adapters.record import OWN_TYPE, AdapterConfig, Targets, check_dtype, check_names
from llmtune.adapters.token_ids import check_tokens
from llmtune.adapters.token_plan import (
    TokenGroup,
    check_same_tokens,
    check_tied_together,
    named_holders,
    places_of_tokens,
    token_builders,
    token_groups,
    token_places,
)


@dataclass(frozen=True, kw_only=True)
class NewTokens(AdapterConfig):
    """Train the embeddings of new or rare tokens and nothing else; see `NewTokensEmbedding` and `NewTokensHead`.

    The rows start as they are in the model, so its output is the same to the bit until they are trained. Where the
    weight is tied (an output head, T5's embeddings of encoder and decoder), all its places use the trained rows, which
    are held once; PEFT does so too, but leaves out the bias of a tied head (BERT's), which shows at the start already.

    For tokens that the model has not had, give them rows first, then attach:

        tokenizer.add_tokens(["<think>", "</think>"])
        model.resize_token_embeddings(len(tokenizer))
        attach(model, NewTokens(tokens=tokenizer.convert_tokens_to_ids(["<think>", "</think>"])))

    Resizing puts a new embedding in place of the one that is adapted, so it must come before. On a model whose head is
    not tied, name the head in targets as well if it is to produce the tokens.

    Args:
        tokens: ids, each once; the order is that of the rows in a file.
        targets: suffixes of module names, or one regular expression that matches whole names: embeddings or linear
            heads; each weight among them gets rows of its own. Left out, the model's input embedding.
        train_modules: suffixes of modules to train whole, as copies. PEFT has no such entry for this method, so with
            them the files are of our own format.
        dtype: of the rows, or a wider one where it cannot hold the model's.

    Raises:
        ValueError: tokens are missing, negative or repeated; targets names nothing or is no expression.
        TypeError: a token is no whole number; train_modules is a string; dtype is no floating dtype.

    Example:
        >>> from llmtune.adapters import attach
        >>> from llmtune.testing.models import tiny_gpt2
        >>> print(attach(tiny_gpt2(), NewTokens(tokens=[96, 95, 17])))
        adapter "default": 2 modules
        trained rows of single tokens: transformer.wte, lm_head
        trainable params: 78 || all params: 15,142 || trainable%: 0.5151
    """

    tokens: Sequence[int]
    targets: Targets | None = None
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        object.__setattr__(self, "tokens", tuple(self.tokens))
        check_names(".*" if self.targets is None else self.targets, (), self.train_modules)
        check_dtype(self.dtype)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`."""
        groups = self._groups(model)
        plan = Plan(copied=copied_places(self.train_modules, dict(named_places(model))), tokens=token_places(groups))
        finish(model, plan, name)
        plan.adapted = list(plan.tokens)
        plan.builders += token_builders(model, groups, name, dtype=self.dtype)
        return plan

    def _groups(self, model: nn.Module) -> list[TokenGroup]:
        if self.targets is None:
            return token_groups(model, places_of_tokens(model, self.tokens))
        return token_groups(model, dict.fromkeys(named_holders(model, self.targets), self.tokens))

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries, or our own with `train_modules`; see `AdapterConfig.file_entries`."""
        if self.train_modules:
            return super().file_entries(model, name)
        owners = [group.owner for group in self._groups(model)]
        entries = about_model(model) | {
            "init_weights": True,
            "peft_type": self.peft_type,
            "target_modules": owners[0] if self.targets is None else sorted(owners),
            "token_indices": list(self.tokens),
        }
        return dict(sorted(entries.items()))

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[AdapterConfig, tuple[str, ...]]:
        """Return the record; see `AdapterConfig.from_file`."""
        if entries.get("peft_type") == OWN_TYPE:
            return super().from_file(entries, model, tensors)
        check_entries(entries, {"init_weights", "peft_type", "target_modules", "token_indices"}, {})
        dtype = next(
            (tensor.dtype for key, tensor in tensors.items() if "trainable_tokens_delta" in key), torch.float32
        )
        targets = as_targets(entries.get("target_modules") or ()) or None
        config = cls(tokens=tuple(entries.get("token_indices") or ()), targets=targets, dtype=dtype)
        groups = config._groups(model)
        if targets is not None:
            check_tied_together(model, groups, named_holders(model, targets))
        for group in groups:
            keys = [f"{PREFIX}{place}.trainable_tokens_delta" for place in (group.owner, *group.tied)]
            rows = [tensors[key] for key in keys if key in tensors]
            if any(not torch.equal(rows[0], other) for other in rows[1:]):
                raise ValueError(
                    f"{group.owner} and {', '.join(group.tied)} are one weight in this model, and the file holds "
                    "different rows for them, trained apart, which is not offered here"
                )
        return config, ()

    def check_attached(self, model: nn.Module, name: str, attached: AdapterConfig, *, source: Path) -> None:
        """Raise where the attached adapter trains other tokens; see `AdapterConfig.check_attached`."""
        super().check_attached(model, name, attached, source=source)
        check_same_tokens(model, self._groups(model), name, source=source)
