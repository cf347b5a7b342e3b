"""Tiny seeded models of many architectures, each with the attention asked for."""

import functools

import torch
import transformers as hf
from torch import nn

from llmtune.integrations import register

register()

LLAMA = {
    "vocab_size": 97, "hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 14, "max_position_embeddings": 128, "pad_token_id": 2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
PLAIN = {name: value for name, value in LLAMA.items() if name not in ("head_dim", "num_key_value_heads")}
GPT = {"vocab_size": 97, "n_positions": 128, "n_embd": 28, "n_layer": 2, "n_head": 2, "pad_token_id": 2}
BERT = {
    "vocab_size": 97, "hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 29,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": 97, "d_model": 26, "d_kv": 11, "d_ff": 31, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 19, "dropout_rate": 0.0, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 97, "d_model": 22, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 29, "decoder_ffn_dim": 31, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
SQUARE = {
    **LLAMA,
    "hidden_size": 32,
    "intermediate_size": 32,
    "head_dim": 16,
}  # what a grouped product of experts needs

# name: (configuration, the model's name after the configuration's, sizes)
DECODERS = {
    "llama": ("Llama", "ForCausalLM", LLAMA),
    "qwen2": ("Qwen2", "ForCausalLM", LLAMA),
    "qwen3": ("Qwen3", "ForCausalLM", LLAMA),
    "mistral, window": ("Mistral", "ForCausalLM", {**LLAMA, "sliding_window": 5}),
    "starcoder2, window": ("Starcoder2", "ForCausalLM", {**LLAMA, "sliding_window": 5}),
    "gemma2, windows, softcap": (
        "Gemma2", "ForCausalLM", {**LLAMA, **WINDOWS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 14},
    ),
    "gemma3, windows": ("Gemma3Text", "ForCausalLM", {**LLAMA, **WINDOWS, "query_pre_attn_scalar": 14}),
    "gpt_oss, windows, sinks": (
        "GptOss", "ForCausalLM", {**SQUARE, **WINDOWS, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gemma4, windows, shared keys": (  # drops queries before the layers that share their keys
        "Gemma4Text", "ForCausalLM",
        {**LLAMA, "num_hidden_layers": 4, "layer_types": 2 * WINDOWS["layer_types"], "sliding_window": 5,
         "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
         "global_head_dim": 16},
    ),
    "llama4, chunks": (
        "Llama4Text", "ForCausalLM",
        {**SQUARE, "intermediate_size_mlp": 37, "num_local_experts": 2, "attention_chunk_size": 5,
         "no_rope_layers": [1, 0], "moe_layers": []},
    ),
    "gpt2": ("GPT2", "LMHeadModel", {**GPT, "n_inner": 31}),
    "gptj": ("GPTJ", "ForCausalLM", {**GPT, "rotary_dim": 6}),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", PLAIN),
    "opt": ("OPT", "ForCausalLM", {**PLAIN, "ffn_dim": 37, "word_embed_proj_dim": 28}),
    "phi": ("Phi", "ForCausalLM", {**LLAMA, "hidden_size": 24, "head_dim": 12}),
    "phi3": ("Phi3", "ForCausalLM", LLAMA),
    "olmo": ("Olmo", "ForCausalLM", LLAMA),
    "olmo2": ("Olmo2", "ForCausalLM", LLAMA),
    "cohere": ("Cohere", "ForCausalLM", {**LLAMA, "logit_scale": 1.0}),
    "stablelm": ("StableLm", "ForCausalLM", LLAMA),
}  # fmt: skip
ENCODERS = {
    "bert": ("Bert", "ForMaskedLM", BERT),
    "roberta": ("Roberta", "ForMaskedLM", {**BERT, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", "ForMaskedLM", {**BERT, "pad_token_id": 1}),
    "electra": ("Electra", "ForMaskedLM", {**BERT, "embedding_size": 22}),
    "albert": ("Albert", "ForMaskedLM", {**BERT, "embedding_size": 13}),
    "distilbert": (
        "DistilBert", "ForMaskedLM",
        {"vocab_size": 97, "dim": 22, "n_layers": 2, "n_heads": 2, "hidden_dim": 29, "max_position_embeddings": 64},
    ),
    "modernbert, windows": (
        "ModernBert", "ForMaskedLM",
        {**BERT, "hidden_size": 28, "layer_types": ["full_attention", "sliding_attention"], "local_attention": 6,
         "cls_token_id": 1, "sep_token_id": 2},
    ),
}  # fmt: skip
PAIRS = {
    "t5": ("T5", "ForConditionalGeneration", T5),
    "umt5": ("UMT5", "ForConditionalGeneration", T5),
    "bart": ("Bart", "ForConditionalGeneration", BART),
    "mbart": ("MBart", "ForConditionalGeneration", BART),
    "pegasus": ("Pegasus", "ForConditionalGeneration", BART),
    # Their decoders' layers say that they are not causal: the mask must say it all.
    "bigbird_pegasus": ("BigBirdPegasus", "ForConditionalGeneration", {**BART, "attention_type": "original_full"}),
    "pegasus_x": ("PegasusX", "ForConditionalGeneration", {**BART, "block_size": 4, "num_global_tokens": 2}),
    "nllb_moe": ("NllbMoe", "ForConditionalGeneration", {**BART, "num_experts": 2, "expert_capacity": 64}),
}
# Not every version that we support has every one of them.
DECODERS = {name: model for name, model in DECODERS.items() if hasattr(hf, f"{model[0]}Config")}
ALL = {**DECODERS, **ENCODERS, **PAIRS}
WINDOWED = [name for name in DECODERS if "window" in name]


def config_of(name, **knobs):
    family, _, sizes = ALL[name]
    return getattr(hf, f"{family}Config")(**sizes, **knobs)


def make(name, attention, **knobs):
    """A model of its own, in evaluation mode; `knobs` go into its configuration."""
    family, kind, _ = ALL[name]
    config = config_of(name, **knobs)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(hf, family.replace("Text", "") + kind)(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    if model.can_generate():
        model.generation_config.eos_token_id = None  # so that every row grows to the end
    return model


@functools.cache
def build(name, attention):
    """The model that tests share: whoever changes it must change it back."""
    return make(name, attention)


def both(name):
    return [build(name, attention) for attention in ("llmtune", "eager")]


def token_ids(B=3, T=17, seed=0):
    return torch.randint(3, 97, (B, T), generator=torch.Generator().manual_seed(seed))


def padding(side, T=17):
    lengths = torch.tensor([T, T - 6, 5])
    mask = (torch.arange(T) < lengths[:, None]).long()
    return mask if side == "right" else mask.flip(1)


LENGTHS = (5, 1, 11)  # of documents that are packed into one row
CUTS = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def alone(model, ids):
    """Logits [1, 17, V] of the documents of a row, each run by itself."""
    return torch.cat([model(input_ids=part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
