"""The language-model head and its loss, forward and backward, against torch's own functions; and its memory.

    python benchmarks/bench_head.py [--parts speed frozen products memory] [--heads ...] [--pairs 3] [--write]

speed: `linear_cross_entropy` against `F.cross_entropy(F.linear(...))`, the same over the labelled rows alone, and
torch's `F.linear_cross_entropy` with its options; N = 2048 and 4096 rows, the heads of SmolLM2-135M (V=49152, E=576)
and of Qwen2.5-0.5B (V=151936, E=896), float32 and bfloat16, with half of the labels ignored and with none. Gradients of
hidden states and head.
products: the three products of 64, 128 and 256 rows in float32 by themselves, as the loss makes them and by
torch's matrix product.
frozen: the same as speed where the head asks for no gradient, as under LoRA.
memory: by how much one step raises the peak memory of a fresh process, beyond inputs and gradients.

Random numbers, hidden states of the size that a final norm gives; nothing is downloaded. All ways of a case compute the
same, which is checked before it is timed, and are measured in turns; torch's chunked way, which takes up to a minute a
step, once a case, at the smallest N.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, in_turns, peak_memory, report, reset_peak_memory, table
from torch import Tensor

from llmtune.losses import linear_cross_entropy
from llmtune.losses.head_products import add_head_gradient, gradient_into, logits_into

HEADS = {"SmolLM2-135M": (49152, 576), "Qwen2.5-0.5B": (151936, 896)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHOSEN = list(HEADS)
SIZES = [2048, 4096]
MIB = 2**20
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def labelled_only(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    rows = targets != -100
    return F.cross_entropy(F.linear(hidden[rows], weight), targets[rows])


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


WAYS: dict[str, Call] = {"ours": ours, "plain": plain, "labelled only": labelled_only, "torch": torchs}
SLOW = "torch"


def inputs(N: int, V: int, E: int, dtype: torch.dtype, ignored: float, *, frozen: bool = False) -> list[Tensor]:
    """Return hidden [N, E], weight [V, E] and targets [N], a share of which is ignored."""
    draw = torch.Generator().manual_seed(N + V)
    hidden = torch.randn(N, E, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(V, E, generator=draw).mul_(E**-0.5).to(dtype).requires_grad_(not frozen)
    targets = torch.randint(V, (N,), generator=draw)
    targets[torch.rand(N, generator=draw) < ignored] = -100
    return [hidden, weight, targets]


def step(call: Call, tensors: list[Tensor]) -> float:
    """Return how long one forward and backward pass takes, in seconds."""
    for tensor in tensors:
        tensor.grad = None
    began = time.perf_counter()
    call(*tensors).backward()
    return time.perf_counter() - began


def check_equal(tensors: list[Tensor], ways: dict[str, Call]) -> dict[str, float]:
    """Return how far each way's gradients are from those of ours, over the largest entry; raise where they differ."""
    kept, off = {}, {}
    allowed = 1e-4 if tensors[0].dtype == torch.float32 else 3e-2
    for name, call in ways.items():
        step(call, tensors)
        kept[name] = [tensor.grad for tensor in tensors if tensor.requires_grad]
        pairs = zip(kept[name], kept["ours"], strict=True)
        off[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        if name != "ours":
            del kept[name]
        if not off[name] < allowed:
            raise RuntimeError(f"{name} does not compute what ours does: it differs by {off[name]:.2g}")
    return off


def speed(sizes: list[int], pairs: int, *, frozen: bool) -> dict[str, Any]:
    """Compare the ways; every figure is another way's time over ours."""
    found: dict[str, Any] = {}
    rows = []
    for head in CHOSEN:
        V, E = HEADS[head]
        for dtype_name, dtype in DTYPES.items():
            for N in sizes:
                for ignored in (0.5, 0.0):
                    left_out = {"labelled only"} if not ignored else set()
                    left_out |= {SLOW} if N > min(sizes) else set()
                    ways = {name: call for name, call in WAYS.items() if name not in left_out}
                    tensors = inputs(N, V, E, dtype, ignored, frozen=frozen)
                    check_equal(tensors, ways)
                    times: dict[str, list[float]] = {name: [] for name in ways}
                    for number in range(pairs):
                        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
                            if number == 0 or name != SLOW:
                                times[name].append(step(ways[name], tensors))
                    name = f"{head}, {dtype_name}, N={N}, {ignored:.0%} ignored"
                    ratios = {
                        way: statistics.median(a / b for a, b in zip(taken, times["ours"], strict=False))
                        for way, taken in times.items()
                    }
                    found[name] = {"seconds": times, "times_as_fast": ratios}
                    shown = [f"{ratios[way]:.2f}" if way in ratios else "-" for way in WAYS if way != "ours"]
                    rows.append([name, f"{1e3 * statistics.median(times['ours']):.0f}", *shown])
                    print(rows[-1], flush=True)
    print(table(rows, header=("trained hidden states" if frozen else "all trained", "ours, ms", *list(WAYS)[1:])))
    return found


def products(pairs: int) -> dict[str, Any]:
    """Compare the head's products of few rows with torch's; every figure is torch's time over ours."""
    found: dict[str, Any] = {}
    rows = []
    for head in CHOSEN:
        V, E = HEADS[head]
        weight = torch.randn(V, E)
        d_weight = torch.zeros(V, E)
        for n in (64, 128, 256):
            h, g, z, d = torch.randn(n, E), torch.randn(n, V), torch.empty(n, V), torch.empty(n, E)
            both: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
                "logits": (partial(logits_into, z, h, weight), partial(torch.mm, h, weight.T, out=z)),
                "gradient of hidden": (partial(gradient_into, d, g, weight, 1.0), partial(torch.mm, g, weight, out=d)),
                "gradient of head": (
                    partial(add_head_gradient, d_weight, g, h, 1.0, first=False), partial(d_weight.addmm_, g.T, h),
                ),
            }  # fmt: skip
            ratios = {
                name: 1 / in_turns(partial(timed, mine), partial(timed, torchs_own), pairs=pairs).ratio()
                for name, (mine, torchs_own) in both.items()
            }
            found[f"{head}, {n} rows"] = ratios
            rows.append([f"{head}, {n} rows", *(f"{ratio:.2f}" for ratio in ratios.values())])
            print(rows[-1], flush=True)
    print(table(rows, header=("times as fast as torch's product", *found[next(iter(found))])))
    return found


def timed(call: Callable[[], Any]) -> float:
    """Return how long a call takes, in seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def memory(sizes: list[int]) -> dict[str, Any]:
    """Measure what one step holds beyond inputs and gradients, each case in a process of its own."""
    found: dict[str, Any] = {}
    rows = []
    ways = [way for way in ("ours", "plain", SLOW) if way in WAYS]
    for head in CHOSEN:
        for dtype in DTYPES:
            for frozen in (False, True):
                for N in sizes:
                    command = [sys.executable, __file__, "--extra-memory", head, dtype, str(N), str(int(frozen))]
                    extra = {}
                    for way in ways:
                        run = subprocess.run([*command, way], check=True, capture_output=True, text=True)
                        extra[way] = int(run.stdout)
                    name = f"{head}, {dtype}, N={N}, {'frozen' if frozen else 'trained'} head"
                    found[name] = extra
                    rows.append([name, *(f"{value / MIB:.0f}" for value in extra.values())])
                    print(rows[-1], flush=True)
    print(table(rows, header=("MiB beyond inputs and gradients", *ways)))
    return found


def extra_memory(head: str, dtype: str, N: int, frozen: bool, way: str) -> int:
    """Return by how many bytes one step raises this process's peak memory, beyond the gradients it leaves."""
    V, E = HEADS[head]
    torch.set_num_threads(2)
    step(WAYS[way], inputs(64, 1024, 64, DTYPES[dtype], 0.5, frozen=frozen))  # what torch sets up on first use
    tensors = inputs(N, V, E, DTYPES[dtype], 0.5, frozen=frozen)
    gc.collect()
    reset_peak_memory()
    before = peak_memory()
    step(WAYS[way], tensors)
    gradients = sum(t.grad.nbytes for t in tensors if t.grad is not None)
    return peak_memory() - before - gradients


def main() -> None:
    """Measure, print tables and the JSON line, and write the result where asked."""
    parser = argparse.ArgumentParser(description="Measure the head and its loss against torch's own.")
    parts = ("speed", "frozen", "products", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="rows of hidden states")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--without-torch", action="store_true", help="leave out torch's chunked way, by far the slowest"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/head-<part>[-heads-sizes].json")
    parser.add_argument("--extra-memory", nargs=5, help=argparse.SUPPRESS)  # used by this file itself
    options = parser.parse_args()
    if options.extra_memory is not None:
        head, dtype, N, frozen, way = options.extra_memory
        print(extra_memory(head, dtype, int(N), frozen == "1", way))
        return
    torch.set_num_threads(options.threads)
    CHOSEN[:] = options.heads
    if options.without_torch:
        del WAYS[SLOW]
    for part in options.parts:
        if part == "memory":
            made = memory(options.sizes)
        elif part == "products":
            made = products(max(5, options.pairs))
        else:
            made = speed(options.sizes, options.pairs, frozen=part == "frozen")
        whole = options.heads == list(HEADS) and options.sizes == SIZES
        name = "-".join(["head", part, *([] if whole else [*options.heads, *map(str, options.sizes)])])
        path = RESULTS / f"{name}.json" if options.write else None
        report(f"bench_head {part}", {"heads": {head: HEADS[head] for head in CHOSEN}, "cases": made}, path=path)


if __name__ == "__main__":
    main()
