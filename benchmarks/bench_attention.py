"""What attention costs, forward and backward, against torch's own function; and how time and memory grow.

    python benchmarks/bench_attention.py [--parts masks memory growth] [--pairs 5] [--threads 2] [--write] [--plot FILE]

masks: documents in a row, a sliding window, and plain causal attention, against `F.scaled_dot_product_attention` with
the table of the same mask (plain causal: with `is_causal=True`).
memory: soft-capping, a learned bias and dropout, a few queries at a time ("chunked") against the formula over all
scores at once: torch's own math path for the bias and for dropout, and for soft-capping, which torch does not have, the
formula written out. Peak memory is that of a fresh process each.
growth: every backend alone, T = 512 ... 16384.

Random numbers of H=8, D=64 in float32; nothing is downloaded. Both sides of a pair compute the same, and the first pair
of each case compares their outputs and gradients.
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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, in_turns, peak_memory, report, reset_peak_memory, table
from torch import Tensor, nn

from llmtune.attention import (
    Causal,
    Documents,
    Mask,
    RelativePositionBias,
    SlidingWindow,
    scaled_dot_product_attention,
)  # fmt: skip

H, D = 8, 64
MIB = 2**20
Call = Callable[..., Tensor]


def inputs(T: int) -> list[Tensor]:
    """Return query, key and value [1, H, T, D] that want a gradient, and the gradient of the output."""
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(1, H, T, D, generator=generator).requires_grad_(i < 3) for i in range(4)]


def uneven(count: int, total: int, sigma: float) -> list[int]:
    """Return `count` document lengths, log-normal, that sum to `total`."""
    drawn = torch.empty(count).log_normal_(0.0, sigma, generator=torch.Generator().manual_seed(0))
    lengths = (drawn / drawn.sum() * total).int().clamp(min=1).tolist()
    lengths[lengths.index(max(lengths))] += total - sum(lengths)
    return lengths


def step(call: Call, tensors: list[Tensor]) -> float:
    """Return how long one forward and backward pass takes, in seconds."""
    *leaves, pull = tensors
    began = time.perf_counter()
    call(*leaves).backward(pull)
    took = time.perf_counter() - began
    for leaf in leaves:
        leaf.grad = None
    return took


def middle_of(call: Call, tensors: list[Tensor], repeats: int) -> float:
    """Return the median of some steps: a short step is repeated, so that a pair is not decided by one hiccup."""
    return statistics.median(step(call, tensors) for _ in range(repeats))


def same_result(ours: Call, theirs: Call, tensors: list[Tensor]) -> float:
    """Return the largest difference of outputs and gradients, over the largest entry; raise above 1e-4."""
    *leaves, pull = tensors
    worst = 0.0
    for a, b in zip(*([out, *torch.autograd.grad(out, leaves, pull)] for out in (f(*leaves) for f in (ours, theirs))),
                    strict=True):  # fmt: skip
        worst = max(worst, float((a.detach() - b.detach()).abs().max() / b.detach().abs().max()))
    if not worst < 1e-4:
        raise RuntimeError(f"the two sides do not compute the same: they differ by {worst:.2g} of the largest entry")
    return worst


MASKS: dict[str, tuple[int, Mask, str, float]] = {  # name: T, mask, backend, speed to reach
    "32 documents of 128, T=4096": (4096, Causal() & Documents.from_lengths([128] * 32), "packed", 25.0),
    "8 documents of 128, T=1024": (1024, Causal() & Documents.from_lengths([128] * 8), "packed", 8.0),
    "32 documents, log-normal 0.5, T=4096": (
        4096, Causal() & Documents.from_lengths(uneven(32, 4096, 0.5)), "packed", 15.0,
    ),
    "32 documents, log-normal 1, T=4096": (
        4096, Causal() & Documents.from_lengths(uneven(32, 4096, 1.0)), "packed", 15.0,
    ),
    "window of 512, T=8192": (8192, Causal() & SlidingWindow(512), "windowed", 7.5),
    "causal, T=1024": (1024, Causal(), "sdpa", 1 / 1.03),
    "causal, T=4096": (4096, Causal(), "sdpa", 1 / 1.03),
}  # fmt: skip


def masks(pairs: int) -> dict[str, Any]:
    """Compare speed under masks; every figure is their time over ours."""
    found: dict[str, Any] = {}
    rows = []
    for name, (T, mask, backend, wanted) in MASKS.items():
        tensors = inputs(T)
        written = None if backend == "sdpa" else mask.dense(T, T)

        def ours(q: Tensor, k: Tensor, v: Tensor, mask: Mask = mask) -> Tensor:
            return scaled_dot_product_attention(q, k, v, mask=mask)

        def theirs(q: Tensor, k: Tensor, v: Tensor, written: Tensor | None = written) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=written, is_causal=written is None)

        off = same_result(ours, theirs, tensors)
        repeats = 9 if T <= 1024 else 3 if backend != "windowed" else 1
        measured = in_turns(
            lambda: middle_of(ours, tensors, repeats),  # noqa: B023
            lambda: middle_of(theirs, tensors, repeats if written is None or T <= 1024 else 1),  # noqa: B023
            pairs=pairs if written is not None else 4 * pairs,
        )
        speed = 1 / measured.ratio()
        found[name] = {
            **measured.summary(), "speed": speed, "to_reach": wanted, "reached": speed >= wanted, "difference": off,
        }  # fmt: skip
        figures = statistics.median(measured.ours), statistics.median(measured.theirs)
        rows.append([name, *(f"{1e3 * x:.1f}" for x in figures), f"{speed:.2f}", f"{wanted:.2f}"])
        print(rows[-1], flush=True)
    print(table(rows, header=("mask", "ours, ms", "torch, ms", "times as fast", "to reach")))
    return found


def memory_cases(T: int) -> dict[str, tuple[Call, Call, bool]]:
    """Return ours, theirs, and whether they compute the same (dropout draws differently)."""
    bias = RelativePositionBias(H)
    nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(0))
    future = torch.full((T, T), float("-inf")).triu(1)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(-2, -1) * (D**-0.5 / 50.0)) * 50.0
        return torch.softmax(scores + future, dim=-1) @ v

    return {
        "soft-capping, causal": (
            lambda q, k, v: scaled_dot_product_attention(q, k, v, mask=Causal(), softcap=50.0), formula, True,
        ),
        "learned bias (T5)": (
            lambda q, k, v: scaled_dot_product_attention(q, k, v, bias=bias),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias.dense(T, T)), True,
        ),
        "dropout 0.1, causal": (
            lambda q, k, v: scaled_dot_product_attention(q, k, v, mask=Causal(), dropout_p=0.1),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True), False,
        ),
    }  # fmt: skip


def extra_memory(call: Call, tensors: list[Tensor]) -> int:
    """Return by how many bytes one step raises the peak memory of this process, which must be fresh."""
    gc.collect()
    reset_peak_memory()
    before = peak_memory()
    step(call, tensors)
    return peak_memory() - before


def in_fresh_process(*arguments: object) -> int:
    """Return what this file prints with `--extra-memory` and these arguments, in a process of its own."""
    command = [sys.executable, __file__, "--extra-memory", *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def extra_memory_of(kind: str, name: str, T: int, threads: int) -> int:
    """Return the extra memory of one step of "ours" or "theirs" in a memory case, or of a backend in "growth"."""
    torch.set_num_threads(threads)
    for backend in ("sdpa", "chunked", "reference"):  # what torch sets up on first use is not counted
        step(partial(scaled_dot_product_attention, backend=backend), inputs(64))
    if kind == "growth":
        return extra_memory(growth_call(name, T), inputs(T))
    return extra_memory(memory_cases(T)[name][kind == "theirs"], inputs(T))


def memory(pairs: int, T: int) -> dict[str, Any]:
    """Compare peak memory and time where torch holds all scores at once."""
    found: dict[str, Any] = {"T": T}
    rows = []
    for name, (ours, theirs, comparable) in memory_cases(T).items():
        if comparable:
            same_result(*memory_cases(512)[name][:2], inputs(512))
        threads = torch.get_num_threads()
        bytes_ours, bytes_theirs = (in_fresh_process(side, name, T, threads) for side in ("ours", "theirs"))
        tensors = inputs(T)
        measured = in_turns(lambda: step(ours, tensors), lambda: step(theirs, tensors), pairs=pairs)  # noqa: B023
        share, ratio = bytes_theirs / bytes_ours, measured.ratio()
        found[name] = {
            **measured.summary(), "ours_bytes": bytes_ours, "theirs_bytes": bytes_theirs, "memory_times_less": share,
            "reached": share >= 20.0 and ratio <= 1.0,
        }  # fmt: skip
        rows.append([
            name, f"{bytes_ours / MIB:.0f}", f"{bytes_theirs / MIB:.0f}", f"{share:.0f}",
            f"{statistics.median(measured.ours):.2f}", f"{statistics.median(measured.theirs):.2f}", f"{ratio:.2f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    header = (f"T={T}", "ours, MiB", "all scores, MiB", "times less", "ours, s", "all scores, s", "time ratio (<= 1)")
    print(table(rows, header=header))
    return found


GROWTH: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {  # name: the call's knobs for T, the largest T
    "reference (causal)": (lambda T: {"mask": Causal(), "backend": "reference"}, 4096),
    "sdpa (causal)": (lambda T: {"mask": Causal(), "backend": "sdpa"}, 16384),
    "sdpa (documents of 128, a table)": (
        lambda T: {"mask": Causal() & Documents.from_lengths([128] * (T // 128)), "backend": "sdpa"}, 16384,
    ),
    "packed (documents of 128)": (
        lambda T: {"mask": Causal() & Documents.from_lengths([128] * (T // 128)), "backend": "packed"}, 16384,
    ),
    "windowed (512)": (lambda T: {"mask": Causal() & SlidingWindow(512), "backend": "windowed"}, 16384),
    "chunked (causal, soft-capped)": (lambda T: {"mask": Causal(), "softcap": 50.0, "backend": "chunked"}, 16384),
}  # fmt: skip


def growth_call(name: str, T: int) -> Call:
    """Return the call of a backend at length T."""
    knobs = GROWTH[name][0](T)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, **knobs)


def growth() -> dict[str, Any]:
    """Measure every backend alone, from T = 512 to 16384: median seconds of three steps, and the extra peak memory."""
    found: dict[str, Any] = {}
    rows = []
    for name, (_, largest) in GROWTH.items():
        found[name], told = {}, []
        for T in (512, 1024, 2048, 4096, 8192, 16384):
            if T > largest:  # the scores of all queries at once would take tens of gigabytes
                found[name][T] = None
                told.append("-")
                continue
            extra = in_fresh_process("growth", name, T, torch.get_num_threads())
            seconds = middle_of(growth_call(name, T), inputs(T), 3)
            found[name][T] = {"seconds": seconds, "extra_bytes": extra}
            told.append(f"{1e3 * seconds:.0f} / {extra / MIB:.0f}")
            print(name, T, told[-1], flush=True)
        rows.append([name, *told])
    print(table(rows, header=("ms / MiB at T =", "512", "1024", "2048", "4096", "8192", "16384")))
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw time and memory over T, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (key, unit, label) in zip(
        figure.subplots(1, 2), (("seconds", 1.0, "seconds"), ("extra_bytes", MIB, "MiB beyond the inputs")), strict=True
    ):
        for name, by_length in found.items():
            points = [(int(T), x[key] / unit) for T, x in by_length.items() if x is not None]
            axes.loglog([T for T, _ in points], [max(y, 1e-3) for _, y in points], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="T, tokens in the row", ylabel=label, title=f"forward + backward, {label}")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print tables and the JSON line, and write result and plot where asked."""
    parser = argparse.ArgumentParser(description="Measure attention against torch's own.")
    parser.add_argument(
        "--parts", nargs="+", choices=("masks", "memory", "growth"), default=["masks", "memory", "growth"]
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs for each comparison, at least 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=8192, help="T of the memory part")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/attention-<part>.json")
    parser.add_argument("--plot", type=Path, help="where to draw the growth")
    parser.add_argument("--extra-memory", nargs=4, help=argparse.SUPPRESS)  # used by this file itself
    options = parser.parse_args()
    if options.extra_memory is not None:
        kind, name, T, threads = options.extra_memory
        print(extra_memory_of(kind, name, int(T), int(threads)))
        return
    if options.pairs < 3:
        parser.error(f"--pairs must be at least 3; got {options.pairs}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for part in options.parts:
        made = {
            "masks": lambda: masks(options.pairs),
            "memory": lambda: memory(options.pairs, options.length),
            "growth": growth,
        }[part]()
        if part == "growth" and options.plot is not None:
            plot(made, options.plot)
        name = f"attention-{part}"
        result = {"unit": "seconds", "heads": H, "head_size": D, "dtype": "float32", "cases": made}
        report(name, result, path=RESULTS / f"{name}.json" if options.write else None)


if __name__ == "__main__":
    main()
