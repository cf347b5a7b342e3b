"""Adapters: small trained changes beside a frozen model, put on, switched, merged, saved, taken off without a trace."""

from llmtune.adapters.adalora import AdaLoRAConv1D, AdaLoRALinear
from llmtune.adapters.adalora_config import AdaLoRA
from llmtune.adapters.adalora_orthogonality import AdaLoRAOrthogonality
from llmtune.adapters.attach import active, adapter_names, adapter_parameters, attach, detach, disabled, set_active
from llmtune.adapters.bottleneck import BottleneckLayer, ParallelBottleneckLayer, bottleneck_change
from llmtune.adapters.bottleneck_config import Bottleneck
from llmtune.adapters.combine import combine
from llmtune.adapters.config import DoRA, LoRA
from llmtune.adapters.dora import DoRAConv1D, DoRALinear, row_norms
from llmtune.adapters.files import load, save
from llmtune.adapters.formula import lora_change
from llmtune.adapters.fused import lora_linear
from llmtune.adapters.ia3 import IA3Linear, ia3_scale
from llmtune.adapters.ia3_config import IA3
from llmtune.adapters.interpolated import interpolated
from llmtune.adapters.layer import AdapterLayer
from llmtune.adapters.lora import LoRAConv1D, LoRALinear
from llmtune.adapters.lora_embedding import LoRAEmbedding
from llmtune.adapters.loreft import LoReFT, LoReFTLayer, loreft_change
from llmtune.adapters.memory import MemorySummary, memory_summary
from llmtune.adapters.merge import merge, unmerge
from llmtune.adapters.new_tokens import NewTokens
from llmtune.adapters.parameters import LoRAParameter, changed_experts
from llmtune.adapters.prefix import PrefixTuning
from llmtune.adapters.prefix_layer import PrefixLayer, PrefixTable
from llmtune.adapters.prompt import PromptTuning, PTuning
from llmtune.adapters.prompt_encoder import PromptEncoder, PromptTable
from llmtune.adapters.prompt_layer import PromptLayer
from llmtune.adapters.prompt_positions import prompt_positions
from llmtune.adapters.quantized import dequantized_weight, quantize, quantized_kind
from llmtune.adapters.rank_budget import RankBudget, kept_triplets, trim_ranks
from llmtune.adapters.reach import check_gradients
from llmtune.adapters.record import AdapterConfig
from llmtune.adapters.report import AttachReport, CombineReport, LoadReport, MergeReport, trainable_summary
from llmtune.adapters.small import BitFit, LayerNormTuning, TrainedNorm
from llmtune.adapters.stack import AdapterStack
from llmtune.adapters.token_rows import NewTokensEmbedding, NewTokensHead
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy
from llmtune.adapters.vera import SharedProjections, VeRALinear, draw_projections, vera_linear
from llmtune.adapters.vera_config import VeRA

__all__ = [
    "IA3",
    "AdaLoRA",
    "AdaLoRAConv1D",
    "AdaLoRALinear",
    "AdaLoRAOrthogonality",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterStack",
    "AttachReport",
    "BitFit",
    "Bottleneck",
    "BottleneckLayer",
    "CombineReport",
    "DoRA",
    "DoRAConv1D",
    "DoRALinear",
    "IA3Linear",
    "LayerNormTuning",
    "LoRA",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAParameter",
    "LoReFT",
    "LoReFTLayer",
    "LoadReport",
    "MemorySummary",
    "MergeReport",
    "NewTokens",
    "NewTokensEmbedding",
    "NewTokensHead",
    "PTuning",
    "ParallelBottleneckLayer",
    "PrefixLayer",
    "PrefixTable",
    "PrefixTuning",
    "PromptEncoder",
    "PromptLayer",
    "PromptTable",
    "PromptTuning",
    "RankBudget",
    "SharedProjections",
    "TrainedBias",
    "TrainedCopy",
    "TrainedNorm",
    "VeRA",
    "VeRALinear",
    "active",
    "adapter_names",
    "adapter_parameters",
    "attach",
    "bottleneck_change",
    "changed_experts",
    "check_gradients",
    "combine",
    "dequantized_weight",
    "detach",
    "disabled",
    "draw_projections",
    "ia3_scale",
    "interpolated",
    "kept_triplets",
    "load",
    "lora_change",
    "lora_linear",
    "loreft_change",
    "memory_summary",
    "merge",
    "prompt_positions",
    "quantize",
    "quantized_kind",
    "row_norms",
    "save",
    "set_active",
    "trainable_summary",
    "trim_ranks",
    "unmerge",
    "vera_linear",
]
