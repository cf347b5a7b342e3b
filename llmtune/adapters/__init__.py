"""Adapters: small trained changes beside a frozen model, put on, switched, merged, saved, taken off without a trace."""

from llmtune.adapters.adalora import AdaLoRAConv1D, AdaLoRALinear
from llmtune.adapters.adalora_config import AdaLoRA
from llmtune.adapters.adalora_orthogonality import AdaLoRAOrthogonality
from llmtune.adapters.attach import active, adapter_names, adapter_parameters, attach, detach, disabled, set_active
from llmtune.adapters.bottleneck import BottleneckLayer, ParallelBottleneckLayer, bottleneck_change
from llmtune.adapters.bottleneck_config import Bottleneck
from llmtune.adapters.config import DoRA, LoRA
from llmtune.adapters.dora import DoRAConv1D, DoRALinear, row_norms
from llmtune.adapters.files import load, save
from llmtune.adapters.formula import lora_change
from llmtune.adapters.fused import lora_linear
from llmtune.adapters.layer import AdapterLayer
from llmtune.adapters.lora import LoRAConv1D, LoRAEmbedding, LoRALinear
from llmtune.adapters.loreft import LoReFT, LoReFTLayer, loreft_change
from llmtune.adapters.merge import merge, unmerge
from llmtune.adapters.prompt_positions import prompt_positions
from llmtune.adapters.rank_budget import RankBudget, kept_triplets, trim_ranks
from llmtune.adapters.record import AdapterConfig
from llmtune.adapters.report import AttachReport, LoadReport, MergeReport, trainable_summary
from llmtune.adapters.trained_copy import TrainedBias, TrainedCopy

__all__ = [
    "AdaLoRA",
    "AdaLoRAConv1D",
    "AdaLoRALinear",
    "AdaLoRAOrthogonality",
    "AdapterConfig",
    "AdapterLayer",
    "AttachReport",
    "Bottleneck",
    "BottleneckLayer",
    "DoRA",
    "DoRAConv1D",
    "DoRALinear",
    "LoRA",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "LoReFT",
    "LoReFTLayer",
    "LoadReport",
    "MergeReport",
    "ParallelBottleneckLayer",
    "RankBudget",
    "TrainedBias",
    "TrainedCopy",
    "active",
    "adapter_names",
    "adapter_parameters",
    "attach",
    "bottleneck_change",
    "detach",
    "disabled",
    "kept_triplets",
    "load",
    "lora_change",
    "lora_linear",
    "loreft_change",
    "merge",
    "prompt_positions",
    "row_norms",
    "save",
    "set_active",
    "trainable_summary",
    "trim_ranks",
    "unmerge",
]
