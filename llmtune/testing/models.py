"""Tiny seeded models of the four shapes fine-tuning meets, built from configurations: nothing is downloaded.

All sizes are different primes where the architecture allows it, so that a swapped axis cannot pass. Weights are drawn
wider than the library's default, so that attention and positions matter and a wrong mask shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 97


def _build(make: Any, config: Any, seed: int, attention: str) -> PreTrainedModel:
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.2)
            else:  # biases start at 0 and norms at 1: move both off, so that leaving one out shows
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_llama(seed: int = 0, *, attention: str = "sdpa", tied: bool = False) -> PreTrainedModel:
    """Return a LlamaForCausalLM: 2 layers, 4 query heads over 2 key heads, width 28, vocabulary 97."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=28, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, max_position_embeddings=128, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return _build(LlamaForCausalLM, config, seed, attention)


def tiny_gpt2(seed: int = 0, *, attention: str = "sdpa", dropout: float = 0.0) -> PreTrainedModel:
    """Return a GPT2LMHeadModel (Conv1D layers, learned positions, tied head): 2 layers, 2 heads, width 26."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=26, n_layer=2, n_head=2, n_inner=31, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return _build(GPT2LMHeadModel, config, seed, attention)


def tiny_bert(
    seed: int = 0, *, attention: str = "sdpa", labels: int | None = None, dropout: float = 0.0
) -> PreTrainedModel:
    """Return a BertForMaskedLM, or with `labels` a BertForSequenceClassification: 2 layers, 2 heads, width 22."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29,
        max_position_embeddings=128, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )  # fmt: skip
    config.num_labels = labels or 2
    return _build(BertForMaskedLM if labels is None else BertForSequenceClassification, config, seed, attention)


def tiny_t5(seed: int = 0, *, attention: str = "sdpa", dropout: float = 0.0) -> PreTrainedModel:
    """Return a T5ForConditionalGeneration: 2 + 2 layers, 2 heads of 11, width 26, relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=26, d_kv=11, d_ff=31, num_layers=2, num_decoder_layers=2, num_heads=2,
        relative_attention_num_buckets=7, relative_attention_max_distance=19, dropout_rate=dropout,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return _build(T5ForConditionalGeneration, config, seed, attention)


def tiny_qwen3_moe(seed: int = 0, *, attention: str = "sdpa", experts: str = "eager") -> PreTrainedModel:
    """Return a Qwen3MoeForCausalLM: 2 layers, 5 experts of 13 of which 2 are taken, width 28, vocabulary 97.

    Args:
        seed: of the weights.
        attention: transformers' name of the attention function.
        experts: transformers' name of the way in which experts are run.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=28, intermediate_size=37, moe_intermediate_size=13, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_experts=5, num_experts_per_tok=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    config._experts_implementation = experts
    return _build(Qwen3MoeForCausalLM, config, seed, attention)
