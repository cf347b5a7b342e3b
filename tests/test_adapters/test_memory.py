"""What a model and its training keep in memory, against counts by hand."""

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, MemorySummary, attach, memory_summary, quantize
from llmtune.testing.models import tiny_llama

SIZES = 11 * 7 + 7 + 7 * 5  # a linear layer with a bias, one without


def small(dtype=torch.float32):
    return nn.Sequential(nn.Linear(11, 7, dtype=dtype), nn.Linear(7, 5, bias=False, dtype=dtype))


def test_full_fine_tuning():
    found = memory_summary(small())
    assert found == MemorySummary({}, 0, 4 * SIZES, 4 * SIZES, 8 * SIZES)
    assert found.total == 16 * SIZES
    model = small(torch.bfloat16)
    model[0].requires_grad_(False)
    assert memory_summary(model) == MemorySummary({"bfloat16": 2 * 84}, 0, 2 * 35, 2 * 35, 4 * 35)


def test_lora_in_float32_over_a_bf16_base():
    model = small(torch.bfloat16)
    attach(model, LoRA(rank=2, alpha=3))
    own = 2 * (11 + 7) + 2 * (7 + 5)
    assert memory_summary(model) == MemorySummary({"bfloat16": 2 * SIZES}, 0, 4 * own, 4 * own, 8 * own)
    attach(model, LoRA(rank=3, alpha=3, targets=["1"]), "second")
    found = memory_summary(model)
    assert found.frozen == {"bfloat16": 2 * SIZES, "float32": 4 * own}, "the first adapter is frozen"
    assert found.trained == 4 * 3 * (7 + 5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qlora(kind):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (the extra quant) is not installed")
    model = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16), nn.LayerNorm(48))
    quantize(model, kind)
    attach(model, LoRA(rank=2, alpha=3))
    own = 2 * (64 + 48)
    found = memory_summary(model)
    if kind == "nf4":  # 48 blocks of 64: a byte for the scale of each; a table; a float for 256 scales, a table, a mean
        frozen, state = {"nf4": 48 * 64 // 2, "bfloat16": 2 * 48, "float32": 4 * 96}, 48 + 16 * 4 + 4 + 256 * 4 + 4
    else:
        frozen, state = {"int8": 48 * 64, "bfloat16": 2 * 48, "float32": 4 * 96}, 48 * 4
    assert found == MemorySummary(frozen, state, 4 * own, 4 * own, 8 * own)
    model(torch.randn(3, 64, dtype=torch.bfloat16).requires_grad_(True)) if kind == "int8" else None
    assert memory_summary(model) == found, "also after int8 has moved its scales at the first call"


def test_tied_weights_count_once_and_meta_counts_what_would_be():
    tied, free = (memory_summary(tiny_llama(tied=tied)).trained for tied in (True, False))
    assert free - tied == 4 * 97 * 28
    with torch.device("meta"):
        assert memory_summary(small()).total == 16 * SIZES


def test_it_prints():
    text = str(MemorySummary({"nf4": 3 * 2**30, "bfloat16": 2**29}, 5 * 2**20, 2048, 2048, 4096))
    assert text.splitlines() == [
        "frozen               3.5 GiB (nf4 3.0 GiB, bfloat16 512.0 MiB)",
        "quantization         5.0 MiB",
        "trained              2.0 KiB",
        "gradients            2.0 KiB",
        "AdamW's moments      4.0 KiB",
        "total                3.5 GiB",
    ]
    assert str(MemorySummary({}, 0, 7, 7, 14)).splitlines()[0] == "frozen                   0 B (none)"
    assert "<pre>" in memory_summary(small())._repr_html_()
