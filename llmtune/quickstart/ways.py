"""The four ways of a quickstart, each from the same weights, on the same data, for the same number of steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.files import load, save
from llmtune.adapters.merge import merge
from llmtune.data.collate import collate_packed
from llmtune.data.packing import PackedDataset
from llmtune.forgetting.distillation import DistillToBase
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.head import model_inputs
from llmtune.metrics.language import perplexity
from llmtune.quickstart.inputs import Inputs, Pack
from llmtune.quickstart.model import load_model
from llmtune.quickstart.peak import read_peak, start_peak
from llmtune.training.history import History
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Batch, LossFunction, Penalty

WAYS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "distill": "LoRA + DistillToBase",
    "ewc": "LoRA + EWC",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a quickstart's runs are.

    Attributes:
        max_tokens: tokens in a pack of the new domain.
        steps: optimizer steps; None for one pass over the data.
        rows_per_step: packs whose gradient makes a step.
        evaluations: how often the held-out texts of the new domain are measured, the end included.
        measured: packs of each held-out side to measure on, at most.
        fisher: packs of the old domain to take Fisher information from.
        rank: of LoRA, on every linear layer but the head.
        learning_rate: of the ways with LoRA; full fine-tuning takes a tenth.
        distill: strength of DistillToBase.
        ewc: strength of EWC.
    """

    max_tokens: int
    steps: int | None
    rows_per_step: int
    evaluations: int
    measured: int
    fisher: int
    rank: int
    learning_rate: float
    distill: float
    ewc: float

    def steps_over(self, packs: PackedDataset) -> int:
        """Return the optimizer steps of a run over these packs."""
        return self.steps or ceil(len(packs) / self.rows_per_step)


EMBEDDED = Sizes(
    max_tokens=256, steps=24, rows_per_step=8, evaluations=4, measured=24, fisher=32,
    rank=16, learning_rate=5e-3, distill=0.3, ewc=0.3,
)  # fmt: skip
OWN = Sizes(
    max_tokens=1024, steps=12, rows_per_step=1, evaluations=2, measured=8, fisher=8,
    rank=16, learning_rate=5e-4, distill=0.3, ewc=0.3,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What one way came to.

    Attributes:
        way: a key of `WAYS`.
        new: perplexity of the new domain's held-out texts (before, after).
        old: perplexity of the old domain's held-out texts (before, after).
        trained: parameters trained.
        seconds: of the way's own work: loading, Fisher information, training; without measuring on held-out texts.
        peak: bytes the process held at most, from loading to the end of training.
        history: a row a step, some of them with the loss on the new domain's held-out texts.
        adapter: the folder of the saved adapter; None for full fine-tuning.
        checked: what the check of the saved adapter found; empty for full fine-tuning.
    """

    way: str
    new: tuple[float, float]
    old: tuple[float, float]
    trained: int
    seconds: float
    peak: int
    history: History
    adapter: Path | None
    checked: str


def measure(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Return the perplexities of the held-out texts: (new domain, old domain)."""
    return perplexity(model, _batches(inputs.new_held_out)), perplexity(model, _batches(inputs.old_held_out))


def run_way(
    way: str,
    folder: Path,
    inputs: Inputs,
    sizes: Sizes,
    *,
    before: tuple[float, float],
    seed: int,
    out: Path,
    bar: bool,
) -> Result:
    """Tune the model in `folder` in one way, measure it, and save and check its adapter.

    Args:
        way: a key of `WAYS`.
        folder: the model's folder; read anew, so that every way starts from the same weights.
        inputs: the texts.
        sizes: of the run.
        before: perplexities of the untuned model (new, old).
        seed: of the data order and of LoRA's start.
        out: an existing folder; the adapter goes to `out / "adapter-<way>"`.
        bar: whether to show the loop's banner and bar.

    Raises:
        RuntimeError: the saved adapter does not give back the tuned model.
    """
    start_peak()
    began = time.perf_counter()
    model = load_model(folder)
    torch.manual_seed(seed)
    loss, penalties = prepare(way, model, inputs, sizes)
    seconds = time.perf_counter() - began
    steps = sizes.steps_over(inputs.new)
    settings = LoopSettings(
        max_steps=steps, rows_per_step=sizes.rows_per_step, rows_per_micro_batch=min(sizes.rows_per_step, 2),
        learning_rate=sizes.learning_rate / (10 if way == "full" else 1), schedule="cosine",
        warmup_steps=min(4, steps // 4), seed=seed, eval_every=ceil(steps / sizes.evaluations), progress=bar,
    )  # fmt: skip
    history = TrainingLoop(
        model, inputs.new, eval_data=inputs.new_held_out, settings=settings, loss=loss, penalties=penalties
    ).fit()
    seconds, peak = seconds + sum(history.column("seconds")), read_peak()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    new, old = exp(history[-1][held_out_loss(history)]), perplexity(model, _batches(inputs.old_held_out))
    adapter = None if way == "full" else out / f"adapter-{way}"
    checked = "" if adapter is None else save_and_check(model, folder, adapter, collate_packed(inputs.new_held_out[:1]))
    return Result(way, (before[0], new), (before[1], old), trained, seconds, peak, history, adapter, checked)


def held_out_loss(history: History) -> str:
    """Return the history's name of the loss on held-out texts, without what a method adds to it."""
    return "eval_task_loss" if "eval_task_loss" in history.names() else "eval_loss"


def prepare(way: str, model: nn.Module, inputs: Inputs, sizes: Sizes) -> tuple[LossFunction, Sequence[Penalty]]:
    """Attach what the way trains, and return its loss and penalties."""
    if way == "full":
        return causal_lm_loss, ()
    attach(model, LoRA(rank=sizes.rank, alpha=2 * sizes.rank))
    if way == "distill":
        return DistillToBase(strength=sizes.distill), ()
    if way == "ewc":
        return causal_lm_loss, [EWC(diagonal_fisher(model, _batches(inputs.old)), model, sizes.ewc)]
    return causal_lm_loss, ()


@torch.no_grad()
def save_and_check(model: nn.Module, folder: Path, adapter: Path, batch: Batch) -> str:
    """Save the adapter, merge it into the model, load it into a fresh model, and compare the logits of all three.

    Args:
        model: with the trained adapter; a plain, merged model afterwards.
        folder: of the untuned model.
        adapter: the folder to save into.
        batch: what to compare on.

    Returns:
        A line that says how far apart they are.

    Raises:
        RuntimeError: the reloaded adapter gives other logits at all, or the merged model differs by more than rounding.
    """
    model.eval()
    wanted = _logits(model, batch)
    save(model, adapter)
    merge(model, keep_base=False)
    merged = float((_logits(model, batch) - wanted).abs().max())
    fresh = load_model(folder)
    load(fresh, adapter)
    reloaded = float((_logits(fresh.eval(), batch) - wanted).abs().max())
    found = f"largest difference of a logit: loaded again {reloaded:.1e}, merged {merged:.1e}"
    if reloaded != 0.0 or not merged <= 1e-4 * max(1.0, float(wanted.abs().max())):
        raise RuntimeError(f"the adapter saved in {adapter} does not give back the tuned model; {found}")
    return found


def _batches(packs: Sequence[Pack]) -> list[Batch]:
    return [collate_packed([pack]) for pack in packs]


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(**model_inputs(model, batch)).logits
    return logits
