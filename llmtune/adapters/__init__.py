"""Adapters: small trained changes beside a frozen model, put on, switched, merged, saved, taken off without a trace."""

from llmtune.adapters.attach import active, adapter_names, adapter_parameters, attach, detach, disabled, set_active
from llmtune.adapters.config import DoRA, LoRA
from llmtune.adapters.dora import DoRAConv1D, DoRALinear, row_norms
from llmtune.adapters.files import load, save
from llmtune.adapters.formula import lora_change
from llmtune.adapters.fused import lora_linear
from llmtune.adapters.layer import AdapterLayer
from llmtune.adapters.lora import LoRAConv1D, LoRAEmbedding, LoRALinear
from llmtune.adapters.merge import merge, unmerge
from llmtune.adapters.new_tokens import NewTokens
from llmtune.adapters.record import AdapterConfig
from llmtune.adapters.report import AttachReport, LoadReport, MergeReport, trainable_summary
from llmtune.adapters.small import BitFit, LayerNormTuning, TrainedNorm
from llmtune.adapters.token_rows import NewTokensEmbedding, NewTokensHead
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "AttachReport",
    "BitFit",
    "DoRA",
    "DoRAConv1D",
    "DoRALinear",
    "LayerNormTuning",
    "LoRA",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "LoadReport",
    "MergeReport",
    "NewTokens",
    "NewTokensEmbedding",
    "NewTokensHead",
    "TrainedBias",
    "TrainedCopy",
    "TrainedNorm",
    "active",
    "adapter_names",
    "adapter_parameters",
    "attach",
    "detach",
    "disabled",
    "load",
    "lora_change",
    "lora_linear",
    "merge",
    "row_norms",
    "save",
    "set_active",
    "trainable_summary",
    "unmerge",
]
