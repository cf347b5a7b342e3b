"""How much of a weight's change is left in a protected subspace, by optimizer and by what is projected.

    python benchmarks/bench_projection.py [--write]             # shares: no timing, a few seconds
    python benchmarks/bench_projection.py --cost [--rounds 7] [--write]     # what a projected step costs

A linear layer [48, 64] is trained for 200 steps on new inputs, which have parts in all directions; 8 old inputs span
what is protected (U [64, 8]). Features are of unequal size (exp of a standard normal), as those inside transformers.
Nothing, the gradient, the optimizer's update, or both (what `UpdateProjection` does) is projected. The share is
||dW U|| / ||dW||, dW the whole change. The lower rows ask the same with features of one size, of a subspace that has
nothing to do with the features, of 2000 steps, of clipping, of a small learning rate (float32's rounding of the weights
is then larger beside the change), and of bfloat16 weights.

The cost is that of one AdamW step alone, on a Llama of 4 layers, with and without the projection of all its linear
weights, in turns; and their difference beside a whole training step of 8 x 128 tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, in_turns, report, table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmtune.optim import UpdateProjection, project_change

OUT, IN, KEPT, ROWS = 48, 64, 8, 32
SEEDS = 3
WAYS = ("none", "gradient", "update", "both")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02),
    "SGD, momentum, decay": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
}
HARDER: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW, equal features": (OPTIMIZERS["AdamW"], {"spread": 0.0}),
    "AdamW, random subspace": (OPTIMIZERS["AdamW"], {"random": True}),
    "AdamW, 2000 steps": (OPTIMIZERS["AdamW"], {"steps": 2000}),
    "AdamW, clipped to 0.1": (OPTIMIZERS["AdamW"], {"clip": 0.1}),
    "AdamW, rate 1e-5": (lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.1), {}),
    "AdamW, rate 1e-5, 2000 steps": (lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.1), {"steps": 2000}),
    "AdamW, bfloat16 weights": (OPTIMIZERS["AdamW"], {"dtype": torch.bfloat16}),
}


def share_left(
    make: Callable[[Any], torch.optim.Optimizer], way: str, *, seed: int, steps: int = 200, clip: float | None = None,
    dtype: torch.dtype = torch.float32, spread: float = 1.0, random: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Return (||dW U|| / ||dW||, the last loss as a share of the first) of one run."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(IN, generator=draw))
    old = torch.randn(IN, KEPT, generator=draw)
    basis = torch.linalg.qr(old if random else sizes[:, None] * old).Q
    target = torch.randn(OUT, IN, generator=draw) / IN**0.5
    weight = nn.Parameter((torch.randn(OUT, IN, generator=draw) / IN**0.5).to(dtype))
    before, optimizer = weight.detach().double(), make([weight])
    if way in ("update", "both"):
        UpdateProjection(optimizer, {weight: basis}, gradients=way == "both")
    losses: list[Tensor] = []
    for _ in range(steps):
        x = torch.randn(ROWS, IN, generator=draw) * sizes
        loss = (x @ (weight.float() - target).T).square().mean()
        weight.grad = None
        loss.backward()
        if way == "gradient" and weight.grad is not None:
            weight.grad = project_change(weight.grad, basis).to(dtype)
        if clip is not None:
            nn.utils.clip_grad_norm_([weight], clip)
        optimizer.step()
        losses.append(loss.detach())
    change = weight.detach().double() - before
    return float((change @ basis.double()).norm() / change.norm()), float(losses[-1] / losses[0])


def shares() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return, by optimizer and way, the shares left and the losses of each seed."""
    every = {**{name: (make, {}) for name, make in OPTIMIZERS.items()}, **HARDER}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, (make, knobs) in every.items():
        found[name] = {}
        for way in WAYS:
            runs = [share_left(make, way, seed=seed, **knobs) for seed in range(SEEDS)]
            found[name][way] = {"share": [share for share, _ in runs], "loss": [loss for _, loss in runs]}
    return found


def cost(rounds: int) -> dict[str, Any]:
    """Return what AdamW's step takes with and without the projection, and a whole training step, in seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    linear = [m.weight for m in model.model.modules() if isinstance(m, nn.Linear)]
    ids = torch.randint(0, config.vocab_size, (8, 128))
    plain, projected = (torch.optim.AdamW(model.parameters(), lr=1e-5) for _ in range(2))
    UpdateProjection(projected, {w: torch.linalg.qr(torch.randn(w.shape[1], w.shape[1] // 8)).Q for w in linear})

    def seconds(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def gradients() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    passes = seconds(gradients)
    pairs = in_turns(lambda: seconds(projected.step), lambda: seconds(plain.step), pairs=rounds)
    return {
        "optimizer_step": pairs.summary(),
        "passes_seconds": passes,
        "share_of_training_step": pairs.difference() / (passes + pairs.summary()["theirs_median"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="measure time instead of shares")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the result file")
    given = parser.parse_args()
    if given.cost:
        result = cost(given.rounds)
        step = result["optimizer_step"]
        print(f"AdamW's step: {step['theirs_median']:.4f} s; projected: {step['ours_median']:.4f} s")
        report("projection-cost", result, path=RESULTS / "projection-cost.json" if given.write else None)
        return
    found = shares()
    rows = [
        [name, *(f"{max(ways[way]['share']):.1e}" for way in WAYS), *(f"{max(ways[way]['loss']):.2f}" for way in WAYS)]
        for name, ways in found.items()
    ]
    header = ["worst of 3 seeds", *(f"share, {way}" for way in WAYS), *(f"loss, {way}" for way in WAYS)]
    print(table(rows, header=header))
    sizes = {"weight": [OUT, IN], "protected": KEPT, "rows": ROWS, "steps": 200, "seeds": SEEDS}
    report("projection", {"sizes": sizes, "runs": found}, path=RESULTS / "projection.json" if given.write else None)


if __name__ == "__main__":
    main()
