"""Adapters: small trained changes beside a frozen model, put on, switched, merged, saved, taken off without a trace."""

from llmtune.adapters.attach import active, adapter_names, adapter_parameters, attach, detach, disabled, set_active
from llmtune.adapters.combine import combine
from llmtune.adapters.config import DoRA, LoRA
from llmtune.adapters.dora import DoRAConv1D, DoRALinear, row_norms
from llmtune.adapters.files import load, save
from llmtune.adapters.formula import lora_change
from llmtune.adapters.fused import lora_linear
from llmtune.adapters.ia3 import IA3, IA3Linear, ia3_scale
from llmtune.adapters.layer import AdapterLayer
from llmtune.adapters.lora import LoRAConv1D, LoRALinear
from llmtune.adapters.lora_embedding import LoRAEmbedding
from llmtune.adapters.memory import MemorySummary, memory_summary
from llmtune.adapters.merge import merge, unmerge
from llmtune.adapters.parameters import LoRAParameter, changed_experts
from llmtune.adapters.prefix import PrefixTuning
from llmtune.adapters.prefix_layer import PrefixLayer, PrefixTable
from llmtune.adapters.prompt import PromptTuning, PTuning
from llmtune.adapters.prompt_encoder import PromptEncoder, PromptTable
from llmtune.adapters.prompt_layer import PromptLayer
from llmtune.adapters.quantized import dequantized_weight, quantize, quantized_kind
from llmtune.adapters.reach import check_gradients
from llmtune.adapters.record import AdapterConfig
from llmtune.adapters.report import AttachReport, CombineReport, LoadReport, MergeReport, trainable_summary
from llmtune.adapters.stack import AdapterStack
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy
from llmtune.adapters.vera import SharedProjections, VeRALinear, draw_projections, vera_linear
from llmtune.adapters.vera_config import VeRA

__all__ = [
    "IA3",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterStack",
    "AttachReport",
    "CombineReport",
    "DoRA",
    "DoRAConv1D",
    "DoRALinear",
    "IA3Linear",
    "LoRA",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAParameter",
    "LoadReport",
    "MemorySummary",
    "MergeReport",
    "PTuning",
    "PrefixLayer",
    "PrefixTable",
    "PrefixTuning",
    "PromptEncoder",
    "PromptLayer",
    "PromptTable",
    "PromptTuning",
    "SharedProjections",
    "TrainedBias",
    "TrainedCopy",
    "VeRA",
    "VeRALinear",
    "active",
    "adapter_names",
    "adapter_parameters",
    "attach",
    "changed_experts",
    "check_gradients",
    "combine",
    "dequantized_weight",
    "detach",
    "disabled",
    "draw_projections",
    "ia3_scale",
    "load",
    "lora_change",
    "lora_linear",
    "memory_summary",
    "merge",
    "quantize",
    "quantized_kind",
    "row_norms",
    "save",
    "set_active",
    "trainable_summary",
    "unmerge",
    "vera_linear",
]
