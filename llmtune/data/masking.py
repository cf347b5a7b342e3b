"""Batches for masked language modelling: which tokens are hidden is a pure function of seed and text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtune.data.collate import IGNORED, collate_padded
from llmtune.types import Batch


@dataclass(frozen=True, kw_only=True)
class MaskedLMCollator:
    """Pad rows and hide some of their tokens, as BERT does (Devlin et al. 2019, section 3.1).

    Each token but the special ones is chosen with `probability`; of the chosen, 80 % become the mask token, 10 % a
    random token that is not special, 10 % stay. The labels are the original tokens where chosen, -100 elsewhere. A row
    in which chance chooses nothing gets the one token that came nearest, so that no row is computed in vain.

    The draw depends on `seed` and the row's tokens alone: not on its place, the batch, padding, or what ran before, so
    a resumed run sees what the uninterrupted one saw. The same row is therefore masked in the same way each time; take
    `dataclasses.replace(collator, seed=epoch)` for a new draw.

    Attributes:
        mask_token_id: the token that hides others.
        vocab_size: random tokens are drawn below it.
        special_ids: tokens never hidden and never drawn.
        pad_token_id: fills short rows; known by length, never by this number.
        probability: share of the tokens to choose, above 0 and below 1.
        seed: of the draw.

    Raises:
        ValueError: the probability is out of range, or all tokens are special.

    Example:
        >>> collate = MaskedLMCollator(mask_token_id=3, vocab_size=50, special_ids=(0, 1, 2, 3))
        >>> batch = collate([{"input_ids": [1, 7, 8, 9, 2]}])
        >>> bool(((batch["labels"] == -100) | (batch["labels"] > 3)).all())
        True
    """

    mask_token_id: int
    vocab_size: int
    special_ids: Sequence[int] = ()
    pad_token_id: int = 0
    probability: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.probability < 1.0:
            raise ValueError(f"probability must be above 0 and below 1; got {self.probability}")
        if len(self._drawable()) == 0:
            raise ValueError(f"all {self.vocab_size} tokens are special: there is none to draw at random")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, probability: float = 0.15, seed: int = 0) -> MaskedLMCollator:
        """Return a collator with a Hugging Face tokenizer's mask, special and padding tokens.

        Args:
            tokenizer: with a mask token.
            probability: share of the tokens to choose.
            seed: of the draw.

        Raises:
            ValueError: the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token: it is not made for masked language modelling"
            )
        return cls(
            mask_token_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            special_ids=tuple(tokenizer.all_special_ids),
            pad_token_id=tokenizer.pad_token_id or 0,
            probability=probability,
            seed=seed,
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Return the padded batch with "input_ids", "labels", "attention_mask" and further fields, [B, T].

        Args:
            rows: each with "input_ids" [n] and what `collate_padded` takes; no "labels", which are made here. A
                "special_tokens_mask" [n] adds to the special tokens and is left out.

        Raises:
            ValueError: there are no rows, a row has labels or nothing but special tokens, or `collate_padded` raises.
        """
        masked = []
        for index, row in enumerate(rows):
            if "labels" in row:
                raise ValueError(f'row {index} has "labels", which masking makes itself: leave them out')
            ids, labels = self._mask(row, index)
            kept = {name: value for name, value in row.items() if name != "special_tokens_mask"}
            masked.append({**kept, "input_ids": ids, "labels": labels})
        return collate_padded(masked, pad_token_id=self.pad_token_id)

    def _mask(self, row: Mapping[str, Any], index: int) -> tuple[Tensor, Tensor]:
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        hidden = torch.isin(ids, torch.as_tensor(self.special_ids, dtype=torch.long))
        if "special_tokens_mask" in row:
            hidden |= torch.as_tensor(row["special_tokens_mask"]).bool()
        if bool(hidden.all()):
            raise ValueError(f"row {index} has nothing but special tokens: there is none to mask")
        generator = torch.Generator().manual_seed(self._row_seed(ids))
        draw = torch.rand(len(ids), generator=generator).masked_fill(hidden, 2.0)
        chosen = draw < self.probability
        chosen[draw.argmin()] = True
        fate = torch.rand(len(ids), generator=generator)
        drawable = self._drawable()
        random = drawable[torch.randint(len(drawable), ids.shape, generator=generator)]
        out = torch.where(chosen & (fate < 0.9), random, ids)
        out = torch.where(chosen & (fate < 0.8), self.mask_token_id, out)
        return out, ids.masked_fill(~chosen, IGNORED)

    def _drawable(self) -> Tensor:
        tokens = torch.arange(self.vocab_size)
        return tokens[~torch.isin(tokens, torch.as_tensor(self.special_ids, dtype=torch.long))]

    def _row_seed(self, ids: Tensor) -> int:
        digest = hashlib.blake2b(f"{self.seed}:{ids.tolist()}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "little")
