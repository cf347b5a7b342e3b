"""What parts against forgetting cost: EWC beside a training step, Fisher information beside a plain backward pass.

    python benchmarks/bench_forgetting_cost.py --model PATH [--rounds 7] [--threads 2] [--write]

The model (such as SmolLM2-135M) carries LoRA of rank 16 on all its linear layers. Three questions:

- EWC on the effective weights W + s B A, at the anchor W and at an anchor W + s B A, beside a training step: forward
  and backward pass of 8 x 128 tokens and AdamW. Also with Fisher information in bfloat16.
- a penalty that looks at A and B alone, beside the same step: 1/2 sum F (theta - anchor)^2 of these tensors.
- the empirical Fisher information of A and B, summed over a batch of 16 x 64 tokens, by hooks and by the plain loop,
  beside the plain backward pass of the same batch's mean loss, which gives no Fisher information. Beside it, without a
  goal, what `diagonal_fisher` gives of such a model: that of the effective weights, which are many more.

A penalty is its value and its backward pass into gradients that are there. Each round measures everything, in an order
that turns from round to round, and compares within the round; the median over rounds is reported. Values are compared
before anything is measured: EWC's with the same sum written out, and the Fisher information of hooks with the loop's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import RESULTS, Pairs, report, table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmtune.adapters import LoRA, attach
from llmtune.adapters.effective import anchor_of, effective_parameters
from llmtune.forgetting import EWC, diagonal_fisher, penalty_memory
from llmtune.gradients.per_example import ExampleGradients, Method, undisturbed
from llmtune.losses import causal_lm_loss
from llmtune.testing.models import tiny_llama
from llmtune.testing.small import moved
from llmtune.types import Batch, Penalty
from llmtune.weights.quadratic import quadratic

GOALS = {"EWC, anchor W": 0.05, "A and B alone": 0.02, "Fisher of A and B, hooks": 1.3}
AGAIN = 3  # times a penalty is measured in a round; the median counts


def adapted(path: str | None) -> nn.Module:
    """Return the model in float32 with LoRA of rank 16 on all linear layers, not at its start."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) if path else tiny_llama()
    attach(model, LoRA(rank=16, alpha=32))
    return model.train()


def made_up(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a Fisher information of the values' shapes."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(value.shape, generator=generator) for name, value in values.items()}


def penalties_of(model: nn.Module) -> dict[str, Penalty]:
    """Return what is measured, and leave the model's adapter moved away from where the penalties hold it."""
    fisher = made_up(anchor_of(model))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own, start = made_up(factors), {name: p.detach().clone() for name, p in factors.items()}
    at_base = EWC(fisher, model, 1.0)
    half = EWC(fisher, model, 1.0, dtype=torch.bfloat16)
    anchor = {name: entry.parameter for name, entry in effective_parameters(model).items() if name in fisher}
    moved(model, scale=0.01)
    at_adapter = EWC(fisher, model, 1.0)
    moved(model, seed=1, scale=0.01)

    def written_out(m: nn.Module) -> Tensor:
        entries = effective_parameters(m)
        return 0.5 * sum((f * (entries[name].value() - anchor[name]).square()).sum() for name, f in fisher.items())

    return {
        "EWC, anchor W": at_base,
        "EWC, anchor W, bfloat16": half,
        "EWC, anchor W + s B A": at_adapter,
        "EWC written out": written_out,
        "A and B alone": lambda m: torch.stack([quadratic(p, own[n], start[n]) for n, p in factors.items()]).sum(),
    }


def step_of(model: nn.Module, rows: int, tokens: int) -> Callable[[], float]:
    """Return a function that takes one training step and returns its seconds; gradients stay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens))

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        return time.perf_counter() - began

    return step


def cost_of(penalty: Penalty, model: nn.Module) -> Callable[[], float]:
    """Return a function that returns the seconds of a penalty's value and backward pass."""
    once = seconds_of(lambda: penalty(model).backward())
    return lambda: statistics.median(once() for _ in range(AGAIN))


def squares_of(model: nn.Module, batch: Batch, method: Method, *, checked: bool = False) -> dict[str, Tensor]:
    """Return the sum over a batch's examples of the squared gradient of A and B: Fisher information times rows.

    `checked` leaves out the comparison of two examples, which is done once a data set.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}

    def total(group: Batch) -> Tensor:
        return causal_lm_loss(model, group) * causal_lm_loss.count_targets(group)

    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(len(batch["input_ids"]))]
    with undisturbed(model, parameters):
        engine = ExampleGradients(model, parameters, method, total)
        engine.checked = checked
        for _, group, tape in engine.groups(rows):
            with tape:
                score = total(group)
            for name, _, piece in tape.gradients(score):
                sums[name] += piece.square().sum(0)
    return sums


def seconds_of(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that does the work and returns its seconds."""

    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return once


def fishers_of(model: nn.Module, batch: Batch) -> dict[str, Callable[[], float]]:
    """Return what takes a batch's Fisher information, by name."""
    methods: tuple[Method, ...] = ("hooks", "loop")
    return {
        **{f"Fisher of A and B, {m}": seconds_of(partial(squares_of, model, batch, m, checked=True)) for m in methods},
        "Fisher of W + s B A": seconds_of(partial(diagonal_fisher, model, [batch], kind="empirical")),
    }


def backward_of(model: nn.Module, batch: Batch) -> Callable[[], float]:
    """Return a function that returns the seconds of the batch's mean loss and its plain backward pass."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return seconds_of(lambda: torch.autograd.grad(causal_lm_loss(model, batch), parameters))


def check_equal(model: nn.Module, penalties: dict[str, Penalty], batch: Batch) -> None:
    """Raise where what is the same sum differs."""
    with torch.no_grad():
        found, wanted = (float(penalties[name](model)) for name in ("EWC, anchor W", "EWC written out"))
    if abs(found - wanted) > 1e-4 * wanted:
        raise SystemExit(f"EWC gives {found}, the same sum written out {wanted}")
    hooks, loop = (squares_of(model, batch, method) for method in ("hooks", "loop"))
    for name, value in loop.items():
        if float((hooks[name] - value).abs().max()) > 1e-3 * float(value.max()):
            raise SystemExit(f"the Fisher information of {name} is another by hooks than by the loop")


def in_rounds(measured: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each, measured in an order that turns from round to round; the first round is no one's."""
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(1 + rounds):
        for name in list(measured) if number % 2 == 0 else list(reversed(measured)):
            took = measured[name]()
            if number:
                seconds[name].append(took)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="left out, a tiny model, to try the script")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of a training step")
    parser.add_argument("--tokens", type=int, default=128, help="of a row of a training step")
    parser.add_argument("--fisher-rows", type=int, default=16)
    parser.add_argument("--fisher-tokens", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    if wanted.write and not wanted.model:
        raise SystemExit("--write needs a --model: figures of a tiny one say nothing")
    torch.set_num_threads(wanted.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = adapted(wanted.model)
    memory = {"float32": penalty_memory(model), "bfloat16": penalty_memory(model, dtype=torch.bfloat16)}
    penalties = penalties_of(model)
    ids = torch.randint(0, model.config.vocab_size, (wanted.fisher_rows, wanted.fisher_tokens))
    batch = {"input_ids": ids, "labels": ids}
    check_equal(model, penalties, batch)
    step, backward = "training step", "plain backward pass"
    found: dict[str, Any] = {}
    lines: list[tuple[str, str, str, str]] = []
    for against, base, others in (
        (step, step_of(model, wanted.rows, wanted.tokens), {n: cost_of(p, model) for n, p in penalties.items()}),
        (backward, backward_of(model, batch), fishers_of(model, batch)),
    ):
        seconds = in_rounds({against: base, **others}, wanted.rounds)
        lines.append((against, f"{statistics.median(seconds[against]) * 1e3:.1f}", "", ""))
        for name in others:
            pairs = Pairs(seconds[name], seconds[against])
            found[name] = {"against": against, "goal": GOALS.get(name), **pairs.summary()}
            goal = f"at most {GOALS[name]:g}" if name in GOALS else ""
            lines.append((name, f"{statistics.median(seconds[name]) * 1e3:.1f}", f"{pairs.ratio():.3f}", goal))
    print(table(lines, header=("", "median, ms", "ratio", "goal")))
    result = {
        "model": wanted.model.rstrip("/").split("/")[-1] if wanted.model else "tiny_llama",
        "step": [wanted.rows, wanted.tokens],
        "fisher": [wanted.fisher_rows, wanted.fisher_tokens],
        "penalty_bytes": memory,
        "found": found,
    }
    path = RESULTS / "forgetting-cost.json" if wanted.write else None
    report("bench_forgetting_cost", result, path=path)


if __name__ == "__main__":
    main()
