"""Token noise: real tokens replaced at random, by random tokens or by a mask token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtune.adapters.record import check_probability


def token_noise(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    p: float,
    *,
    vocabulary: int | None = None,
    mask_token: int | None = None,
    special_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return token ids in which each real token is replaced with probability p.

    By the mask token, or by one drawn evenly from the vocabulary without its special tokens (by chance the same one).
    Padding and special tokens stay, and labels are the caller's: the model learns the clean text from noisy input.

        class NoisyTokens(TrainingLoop):
            def prepare_batch(self, batch):
                batch = super().prepare_batch(batch)
                if not self.model.training:  # an evaluation
                    return batch
                ids = token_noise(batch["input_ids"], batch.get("attention_mask"), 0.1, vocabulary=32000)
                return {**batch, "input_ids": ids}

    Args:
        input_ids: [B, T] ints.
        attention_mask: [B, T], not 0 at real tokens; None where all are real.
        p: probability, 0 to below 1.
        vocabulary: replace by random tokens below this number.
        mask_token: replace by this token. Exactly one of the two is given.
        special_tokens: ids never replaced and never drawn; where tokens are padded without a mask, the padding's too.
        generator: of the draws, on the ids' device; left out, torch's global random state.

    Returns:
        [B, T], a new tensor of the ids' dtype.

    Raises:
        ValueError: p, vocabulary or mask_token is out of range; not exactly one of these two is given; the shapes
            differ; or all of the vocabulary is special.

    Example:
        >>> ids = torch.tensor([[1, 7, 8, 9, 0]])
        >>> mask = torch.tensor([[1, 1, 1, 1, 0]])
        >>> token_noise(ids, mask, 0.999999, mask_token=3, special_tokens=(1,)).tolist()
        [[1, 3, 3, 3, 0]]

    Xie et al., "Data Noising as Smoothing in Neural Network Language Models" (2017), section 3: unigram noise with an
    even distribution, and blank noise.
    """
    check_probability("p", p)
    if (vocabulary is None) == (mask_token is None):
        raise ValueError(f"one of vocabulary and mask_token is expected; got {vocabulary} and {mask_token}")
    if (vocabulary is not None and vocabulary < 1) or (mask_token is not None and mask_token < 0):
        raise ValueError(f"a vocabulary from 1 or a mask_token from 0 is expected; got {vocabulary} and {mask_token}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"the attention_mask must be of the ids' shape {[*input_ids.shape]}; got {[*attention_mask.shape]}"
        )
    device = input_ids.device
    special = torch.as_tensor(special_tokens, dtype=input_ids.dtype, device=device)
    hit = torch.rand(input_ids.shape, generator=generator, device=device) < p
    hit &= ~torch.isin(input_ids, special)
    if attention_mask is not None:
        hit &= attention_mask != 0
    if vocabulary is None:
        return torch.where(hit, torch.as_tensor(mask_token, dtype=input_ids.dtype, device=device), input_ids)
    tokens = torch.arange(vocabulary, dtype=input_ids.dtype, device=device)
    tokens = tokens[~torch.isin(tokens, special)]
    if len(tokens) == 0:
        raise ValueError(f"all {vocabulary} tokens of the vocabulary are special: there is none to draw")
    drawn = torch.randint(len(tokens), input_ids.shape, generator=generator, device=device)
    return torch.where(hit, tokens[drawn], input_ids)
