"""What penalties cost beside a training step: DeltaNorm and L2SP on a real model with LoRA.

    python benchmarks/bench_penalties.py --model PATH [--rounds 7] [--threads 2] [--write]

The model (such as SmolLM2-135M) carries LoRA of rank 16 on all its linear layers. A step is forward and backward pass
of 8 x 128 tokens and AdamW. A penalty is its value and its backward pass into gradients that are there. Each round
measures one step and every penalty, in an order that turns from round to round, and compares within the round; the
median over rounds is reported. "written out" is what the penalties are worth against: the same sum of squares with the
products scaling * B A built, by plain operations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, Pairs, report, table
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmtune.adapters import LoRA, attach
from llmtune.adapters.attach import adapter_layers
from llmtune.regularizers import L2SP, DeltaNorm
from llmtune.testing.small import moved
from llmtune.types import Penalty

BATCH, TOKENS = 8, 128
AGAIN = 3  # times a penalty is measured in a round; the median counts


def adapted(path: str) -> nn.Module:
    """Return the model in float32 with LoRA of rank 16 on all linear layers, not at its start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    attach(model, LoRA(rank=16, alpha=32))
    return model.train()


def penalties_of(model: nn.Module) -> dict[str, Penalty]:
    """Return what is measured, and leave the model's adapter moved away from where the penalties hold it."""
    at_base = L2SP(model, 1.0)
    moved(model, scale=0.01)
    at_adapter = L2SP(model, 1.0)
    moved(model, seed=1, scale=0.01)
    return {
        "DeltaNorm": DeltaNorm(1.0),
        "L2SP, anchor W": at_base,
        "L2SP, anchor W + s B A": at_adapter,
        "written out": lambda m: 0.5 * sum(layer.deltas()["weight"].square().sum() for layer in adapter_layers(m)),
    }


def step_of(model: nn.Module) -> Callable[[], float]:
    """Return a function that takes one training step and returns its seconds; gradients stay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.randint(0, model.config.vocab_size, (BATCH, TOKENS))

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        return time.perf_counter() - began

    return step


def cost_of(penalty: Penalty, model: nn.Module) -> Callable[[], float]:
    """Return a function that returns the seconds of a penalty's value and backward pass."""

    def once() -> float:
        began = time.perf_counter()
        penalty(model).backward()
        return time.perf_counter() - began

    return lambda: statistics.median(once() for _ in range(AGAIN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = adapted(wanted.model)
    penalties = penalties_of(model)
    check_equal(penalties, model)
    measured = {"step": step_of(model), **{name: cost_of(penalty, model) for name, penalty in penalties.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(1 + wanted.rounds):
        order = list(measured) if number % 2 else list(reversed(measured))
        if number == 0:
            order = list(measured)  # a step first: gradients must be there
        for name in order:
            took = measured[name]()
            if number:
                seconds[name].append(took)
    found: dict[str, Any] = {}
    lines = [("training step", f"{statistics.median(seconds['step']) * 1e3:.1f}", "")]
    for name in penalties:
        pairs = Pairs(seconds[name], seconds["step"])
        found[name] = pairs.summary()
        lines.append((name, f"{statistics.median(seconds[name]) * 1e3:.1f}", f"{pairs.ratio():.2%}"))
    print(table(lines, header=("", "median, ms", "of a step")))
    layers = len(adapter_layers(model))
    result = {"model": wanted.model.rstrip("/").split("/")[-1], "batch": BATCH, "tokens": TOKENS, "layers": layers}
    report("bench_penalties", result | {"found": found}, path=RESULTS / "penalties.json" if wanted.write else None)


def check_equal(penalties: dict[str, Penalty], model: nn.Module) -> None:
    """Raise where those that are the same sum differ."""
    with torch.no_grad():
        values = {name: float(penalties[name](model)) for name in ("DeltaNorm", "L2SP, anchor W", "written out")}
    if any(abs(value - values["written out"]) > 1e-4 * values["written out"] for value in values.values()):
        raise SystemExit(f"the values differ: {values}")


if __name__ == "__main__":
    main()
