"""Parts work together: a pairwise cover of adapter, loss, penalty, precision, execution and batch, three steps each."""

import itertools
import math
import shutil
from functools import partial

import pytest
import torch

from llmtune.adapters import (
    IA3,
    AdaLoRA,
    Bottleneck,
    DoRA,
    LayerNormTuning,
    LoRA,
    LoReFT,
    PrefixTuning,
    PromptTuning,
    VeRA,
    adapter_parameters,
    attach,
)
from llmtune.adapters.layer import bare_named_parameters
from llmtune.data import collate_packed, collate_padded
from llmtune.forgetting import EWC, DistillToBase
from llmtune.losses import CausalLMLoss, causal_lm_loss
from llmtune.regularizers import L2SP, DeltaNorm
from llmtune.testing import tiny_gpt2, tiny_llama, uneven_rows
from llmtune.training import LoopSettings, TrainingLoop


def ewc(model):
    names = [name for name, _ in bare_named_parameters(model) if "q_proj" in name or "c_attn.weight" in name]
    return EWC({name: torch.full_like(p, 0.1) for name, p in bare_named_parameters(model) if name in names}, model, 1.0)


AXES = {
    "model": {"llama": tiny_llama, "gpt2": partial(tiny_gpt2, dropout=0.1)},
    "adapter": {
        "lora": LoRA(rank=3, alpha=5),
        "lora everywhere": LoRA(rank=2, alpha=5, rslora=True, dropout=0.1, lora_bias=True),
        "lora and biases": LoRA(rank=2, alpha=5, train_bias="lora_only"),
        "lora and head": LoRA(rank=2, alpha=5, train_modules=["lm_head"]),
        "lora and tokens": LoRA(rank=2, alpha=5, train_tokens=[5, 7]),
        "lora from the weights": LoRA(rank=2, alpha=5, initialise="pissa"),
        "dora": DoRA(rank=3, alpha=5, dropout=0.1),
        "adalora": AdaLoRA(initial_rank=3, target_rank=2, alpha=5, total_steps=3),
        "vera": VeRA(rank=7),
        "ia3": IA3(targets=r".*(q_proj|k_proj|c_attn|c_fc)"),
        "norms": LayerNormTuning(),
        "bottleneck": Bottleneck(size=3, dropout=0.1),
        "reft": LoReFT(rank=2, positions="all"),
        "prefix": PrefixTuning(tokens=3),
        "prompt": PromptTuning(tokens=3),
    },
    "loss": {
        "causal": causal_lm_loss,
        "smoothed": CausalLMLoss(label_smoothing=0.1, z_loss=1e-3),
        "distilled": DistillToBase(strength=0.5, temperature=2.0),
    },
    "penalty": {"none": None, "ewc": ewc, "l2sp": partial(L2SP, strength=1.0), "delta norm": lambda _: DeltaNorm(1.0)},
    "precision": {"float32": "float32", "bf16": "bf16"},
    "execution": {"eager": None, "aot_eager": "aot_eager"},
    "batch": {"padded": collate_padded, "packed": collate_packed},
}

# What cannot be, and says so: these penalties are on weights, and virtual tokens stand before one text.
NO_WEIGHT = ("bottleneck", "reft", "prefix", "prompt")
REFUSED = {
    **{(adapter, "penalty", "ewc"): "reaches no parameter that is trained"
       for adapter in ("norms", *NO_WEIGHT)},
    **{(adapter, "penalty", "l2sp"): "none of the model's" for adapter in NO_WEIGHT},
    **{(adapter, "penalty", "delta norm"): "no weight by a product of low rank|no product of low rank"
       for adapter in ("dora", "ia3", "norms", *NO_WEIGHT)},
    **{(adapter, "batch", "packed"): "packed" for adapter in ("prefix", "prompt")},
}  # fmt: skip


def pairwise_cover():
    """Return cells that hold every pair of values of any two axes at least once, chosen greedily."""
    names = list(AXES)
    left = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in AXES[a] for y in AXES[b]
    }  # fmt: skip
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*AXES.values())]
    chosen = []
    while left:
        best = max(every, key=lambda cell: sum(pair in left for pair in itertools.combinations(cell.items(), 2)))
        left -= set(itertools.combinations(best.items(), 2))
        chosen.append(best)
    return chosen


CELLS = pairwise_cover()


def parameters():
    for cell in CELLS:
        slow = [] if cell["execution"] == "eager" else [pytest.mark.slow]  # compiling takes most of a cell's time
        yield pytest.param(cell, id="-".join(cell.values()), marks=slow)


@pytest.mark.parametrize("cell", parameters())
def test_parts_train_together(cell):
    train_together(cell)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++")
@pytest.mark.parametrize("adapter", ["lora", "lora everywhere", "dora", "vera", "ia3", "adalora"])
def test_parts_train_together_compiled_in_earnest(adapter):
    others = {"loss": "causal", "penalty": "none", "precision": "float32", "batch": "padded"}
    train_together({"model": "llama", "adapter": adapter, "execution": "inductor", **others})


def train_together(cell):
    chosen = {axis: AXES[axis].get(value, value) for axis, value in cell.items()}
    model = chosen["model"]()
    attach(model, chosen["adapter"])
    frozen = {name: p.detach().clone() for name, p in bare_named_parameters(model)}
    run = torch.compile(model, backend=chosen["execution"]) if chosen["execution"] else model
    settings = LoopSettings(max_steps=3, rows_per_step=4, rows_per_micro_batch=2, learning_rate=1e-2,
                            precision=chosen["precision"], progress=False)  # fmt: skip
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}

    def fit():
        penalties = [chosen["penalty"](model)] if chosen["penalty"] else []
        how = {"collate": chosen["batch"], "loss": chosen["loss"], "penalties": penalties}
        return TrainingLoop(run, uneven_rows(), settings=settings, **how).fit()

    keys = [(cell["adapter"], axis, value) for axis, value in cell.items()]
    refused = [REFUSED[key] for key in keys if key in REFUSED]
    if refused:
        with pytest.raises(ValueError, match="|".join(refused)):
            fit()
        return
    history = fit()
    assert all(math.isfinite(row["loss"]) for row in history)
    for name, parameter in bare_named_parameters(model):
        assert torch.equal(parameter, frozen[name]), f"the base weight {name} has changed"
    assert any(not torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


def test_the_cover_is_pairwise_and_small():
    assert len(CELLS) <= 150
    for a, b in itertools.combinations(AXES, 2):
        assert {(cell[a], cell[b]) for cell in CELLS} == set(itertools.product(AXES[a], AXES[b]))
