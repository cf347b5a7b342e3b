"""Layers of Hugging Face's models built anew from our parts, with their weights copied by name.

A rebuilt layer is a `Rebuilt`: the model, its second layer, our block, and which of our modules has whose weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    Olmo2Config,
    Olmo2Model,
    PhiConfig,
    PhiModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5Model,
)

from llmtune.attention import RelativePositionBias
from llmtune.attention.positions import RotaryEmbedding
from llmtune.layers import FeedForward, MultiHeadAttention, TransformerBlock

B, T, S = 3, 11, 7
LENGTHS = (11, 5, 7)
EPS = 1e-3  # far from what torch takes by itself, so that leaving it out shows


@dataclass
class Rebuilt:
    """What a test compares."""

    model: nn.Module
    layer: nn.Module
    block: TransformerBlock
    names: dict[str, str]
    bias: RelativePositionBias | None = None


def tiny(make: Callable[[Any], nn.Module], config: Any) -> Any:
    """A seeded model in evaluation mode, whose norms and biases are away from 1 and 0."""
    model = make(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def parameters(layer: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """The parameters of `layer` under the names of ours."""
    return {
        f"{ours}.{kind}": tensor
        for ours, theirs in names.items()
        for kind, tensor in layer.get_submodule(theirs).named_parameters(recurse=False)
    }


def copied(block: TransformerBlock, layer: nn.Module, names: dict[str, str]) -> TransformerBlock:
    """The block with the weights of `layer`: all of them, for loading is strict."""
    block.load_state_dict(parameters(layer, names))
    return block.eval()


def captured(layer: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """What goes into a layer and what comes out of it, [B, T, E] both, while `run` is run."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(keep, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    hidden, output = seen
    return hidden, output


def norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=EPS)


def rms_norm(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=EPS)


PROJECTIONS = ("query", "key", "value", "output")
COMMON = {"vocab_size": 97, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = {
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj",
}  # fmt: skip
PRE = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}


def bert() -> Rebuilt:
    config = BertConfig(
        vocab_size=97, hidden_size=33, num_hidden_layers=2, num_attention_heads=3, intermediate_size=29,
        layer_norm_eps=EPS,
    )  # fmt: skip
    model = tiny(BertModel, config)
    block = TransformerBlock(MultiHeadAttention(33, 3), FeedForward(33, 29), norm=norm, order="post")
    names = {
        "attention.query": "attention.self.query", "attention.key": "attention.self.key",
        "attention.value": "attention.self.value", "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm", "feed_forward.up": "intermediate.dense",
        "feed_forward.down": "output.dense", "feed_forward_norm": "output.LayerNorm",
    }  # fmt: skip
    layer = model.encoder.layer[1]
    return Rebuilt(model, layer, copied(block, layer, names), names)


def gpt2() -> Rebuilt:
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=33, n_layer=2, n_head=3, n_inner=31, layer_norm_epsilon=EPS
    )
    model = tiny(GPT2Model, config)
    layer = model.h[1]
    block = TransformerBlock(MultiHeadAttention(33, 3), FeedForward(33, 31, activation="gelu_tanh"), norm=norm)
    # Conv1D has its weight the other way round, and the three projections side by side.
    weights, biases = layer.attn.c_attn.weight.t().chunk(3), layer.attn.c_attn.bias.chunk(3)
    state = {f"attention.{name}.weight": weight for name, weight in zip(PROJECTIONS, weights, strict=False)}
    state |= {f"attention.{name}.bias": bias for name, bias in zip(PROJECTIONS, biases, strict=False)}
    for ours, theirs in (
        ("attention.output", layer.attn.c_proj),
        ("feed_forward.up", layer.mlp.c_fc),
        ("feed_forward.down", layer.mlp.c_proj),
    ):
        state |= {f"{ours}.weight": theirs.weight.t(), f"{ours}.bias": theirs.bias}
    names = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
    block.load_state_dict(state | parameters(layer, names))
    return Rebuilt(model, layer, block.eval(), names)


def llama() -> Rebuilt:
    config = LlamaConfig(
        **COMMON, hidden_size=30, intermediate_size=37, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
        rms_norm_eps=EPS, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = tiny(LlamaModel, config)
    attention = MultiHeadAttention(30, 6, key_heads=2, head_size=10, bias=False, rotary=RotaryEmbedding(10, base=500.0))
    block = TransformerBlock(attention, FeedForward(30, 37, activation="swiglu", bias=False), norm=rms_norm)
    return Rebuilt(model, model.layers[1], copied(block, model.layers[1], GATED | PRE), GATED | PRE)


def qwen3() -> Rebuilt:
    config = Qwen3Config(
        **COMMON, hidden_size=30, intermediate_size=37, num_attention_heads=6, num_key_value_heads=2, head_dim=14,
        rms_norm_eps=EPS, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = tiny(Qwen3Model, config)
    attention = MultiHeadAttention(
        30, 6, key_heads=2, head_size=14, bias=False, qk_norm=rms_norm, rotary=RotaryEmbedding(14, base=500.0)
    )
    block = TransformerBlock(attention, FeedForward(30, 37, activation="swiglu", bias=False), norm=rms_norm)
    names = GATED | PRE | {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
    return Rebuilt(model, model.layers[1], copied(block, model.layers[1], names), names)


def olmo2() -> Rebuilt:
    config = Olmo2Config(
        **COMMON, hidden_size=60, intermediate_size=37, num_attention_heads=6, num_key_value_heads=2,
        rms_norm_eps=EPS, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = tiny(Olmo2Model, config)
    attention = MultiHeadAttention(
        60, 6, key_heads=2, bias=False, qk_norm=rms_norm, qk_norm_over="projection",
        rotary=RotaryEmbedding(10, base=500.0),
    )  # fmt: skip
    feed_forward = FeedForward(60, 37, activation="swiglu", bias=False)
    block = TransformerBlock(attention, feed_forward, norm=rms_norm, order="output")
    names = GATED | {
        "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
        "attention_output_norm": "post_attention_layernorm",
        "feed_forward_output_norm": "post_feedforward_layernorm",
    }  # fmt: skip
    return Rebuilt(model, model.layers[1], copied(block, model.layers[1], names), names)


def gemma2() -> Rebuilt:
    config = Gemma2Config(
        **COMMON, hidden_size=30, intermediate_size=37, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
        rms_norm_eps=EPS, query_pre_attn_scalar=7, attn_logit_softcapping=3.0,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager",
    )  # fmt: skip
    model = tiny(Gemma2Model, config)
    attention = MultiHeadAttention(
        30, 6, key_heads=2, head_size=10, bias=False, rotary=RotaryEmbedding(10, base=500.0), scale=7**-0.5,
        softcap=3.0,
    )  # fmt: skip
    feed_forward = FeedForward(30, 37, activation="geglu_tanh", bias=False)
    block = TransformerBlock(attention, feed_forward, norm=rms_norm, order="sandwich")
    norms = {
        "attention_norm": "input_layernorm", "attention_output_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm", "feed_forward_output_norm": "post_feedforward_layernorm",
    }  # fmt: skip
    layer = model.layers[1]  # the second layer is one without a window
    block = copied(block, layer, GATED | norms)
    for ours in norms:  # Gemma's norms multiply by 1 + weight
        block.get_submodule(ours).weight.data.add_(1.0)
    return Rebuilt(model, layer, block, GATED | norms)


def gpt_neox() -> Rebuilt:
    config = GPTNeoXConfig(
        **COMMON, hidden_size=42, intermediate_size=37, num_attention_heads=3, layer_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.43},
    )  # fmt: skip
    model = tiny(GPTNeoXModel, config)
    layer = model.layers[1]
    attention = MultiHeadAttention(42, 3, rotary=RotaryEmbedding(6, base=500.0))
    block = TransformerBlock(attention, FeedForward(42, 37), norm=norm, order="parallel")
    names = PRE | {
        "attention.output": "attention.dense", "feed_forward.up": "mlp.dense_h_to_4h",
        "feed_forward.down": "mlp.dense_4h_to_h",
    }  # fmt: skip
    fused, state = layer.attention.query_key_value, parameters(layer, names)
    for index, name in enumerate(PROJECTIONS[:3]):  # head after head, each with its query, key and value
        state[f"attention.{name}.weight"] = fused.weight.view(3, 3, 14, 42)[:, index].reshape(42, 42)
        state[f"attention.{name}.bias"] = fused.bias.view(3, 3, 14)[:, index].reshape(42)
    block.load_state_dict(state)
    return Rebuilt(model, layer, block.eval(), names)


def phi() -> Rebuilt:
    config = PhiConfig(
        **COMMON, hidden_size=42, intermediate_size=37, num_attention_heads=3, layer_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.43},
    )  # fmt: skip
    model = tiny(PhiModel, config)
    attention = MultiHeadAttention(42, 3, rotary=RotaryEmbedding(6, base=500.0))
    feed_forward = FeedForward(42, 37, activation="gelu_tanh")
    block = TransformerBlock(attention, feed_forward, norm=norm, order="parallel_shared")
    names = {
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.output": "self_attn.dense",
        "feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2", "attention_norm": "input_layernorm",
    }  # fmt: skip
    return Rebuilt(model, model.layers[1], copied(block, model.layers[1], names), names)


def t5(side: str) -> Rebuilt:
    """The second layer of T5's encoder or decoder; the bias of the first layer serves all."""
    config = T5Config(
        vocab_size=97, d_model=29, d_kv=11, d_ff=31, num_layers=2, num_decoder_layers=2, num_heads=3,
        relative_attention_num_buckets=8, relative_attention_max_distance=13, layer_norm_epsilon=EPS,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        feed_forward_proj="relu" if side == "encoder" else "gated-gelu",
    )  # fmt: skip
    model = tiny(T5Model, config)
    stack = model.encoder if side == "encoder" else model.decoder
    layer, is_decoder = stack.block[1], side == "decoder"
    make = partial(MultiHeadAttention, 29, 3, head_size=11, bias=False, scale=1.0)
    block = TransformerBlock(
        make(),
        FeedForward(29, 31, activation="geglu_tanh" if is_decoder else "relu", bias=False),
        norm=rms_norm,
        cross_attention=make(context_width=29) if is_decoder else None,
    )
    names = {"attention_norm": "layer.0.layer_norm"}
    names |= {f"attention.{n}": f"layer.0.SelfAttention.{n[0]}" for n in PROJECTIONS}
    if is_decoder:
        names |= {"cross_attention_norm": "layer.1.layer_norm", "feed_forward_norm": "layer.2.layer_norm"}
        names |= {f"cross_attention.{n}": f"layer.1.EncDecAttention.{n[0]}" for n in PROJECTIONS}
        inside = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    else:
        names |= {"feed_forward_norm": "layer.1.layer_norm"}
        inside = {"up": "wi", "down": "wo"}
    last = 2 if is_decoder else 1
    names |= {f"feed_forward.{ours}": f"layer.{last}.DenseReluDense.{theirs}" for ours, theirs in inside.items()}
    bias = RelativePositionBias(3, 8, 13, bidirectional=not is_decoder)
    bias.weight.data.copy_(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    return Rebuilt(model, layer, copied(block, layer, names), names, bias)
