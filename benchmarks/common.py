"""What every benchmark here shares: what was measured on, pairs measured in turns, peak memory, and the result file.

A benchmark prints a table for people and, as its last line, one JSON document for programs. Two things are compared in
one run, in turns (A B, B A, A B ...), by the median over pairs, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

J = TypeVar("J")
R = TypeVar("R")
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "einops", "peft", "trl", "accelerate", "liger-kernel")


def machine() -> dict[str, Any]:
    """Return what a figure was measured on and when: hardware, versions, date. Does not load torch by itself.

    Returns:
        JSON values: "date" (UTC), "cpu", "cores" (those this process may use), "memory_gib", "accelerator" (a name, or
        None where torch uses none), "threads" (torch's, or None where torch is not loaded), "python", "system", and
        "versions" of the packages that are installed.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = _proc("/proc/meminfo", "MemTotal")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": usable,
        "memory_gib": None if total is None else round(total / 2**30, 1),
        **_torch(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


@dataclass(frozen=True)
class Pairs:
    """What two things took, measured in turns; the same unit in both, seconds unless said otherwise.

    Attributes:
        ours: one figure a pair.
        theirs: the other figure of each pair.
    """

    ours: Sequence[float]
    theirs: Sequence[float]

    def ratio(self) -> float:
        """Return the median over pairs of ours / theirs: below 1 where ours takes less."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def difference(self) -> float:
        """Return the median over pairs of ours - theirs."""
        return statistics.median(a - b for a, b in zip(self.ours, self.theirs, strict=True))

    def summary(self) -> dict[str, Any]:
        """Return the medians, the least of each side, the spread of the ratios, and the number of pairs."""
        ratios = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        return {
            "pairs": len(ratios),
            "ours_median": statistics.median(self.ours),
            "theirs_median": statistics.median(self.theirs),
            "ours_least": min(self.ours),
            "theirs_least": min(self.theirs),
            "ratio_median": self.ratio(),
            "ratio_range": [min(ratios), max(ratios)],
            "difference_median": self.difference(),
        }


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], *, pairs: int = 7, warm_up: int = 1) -> Pairs:
    """Measure two things in turns, which goes first changing from pair to pair.

    Args:
        ours: does the work once and returns what it took.
        theirs: the same for what ours is compared with.
        pairs: how many to keep; at least 5 say something.
        warm_up: pairs to throw away first.
    """
    kept: list[tuple[float, float]] = []
    for number in range(warm_up + pairs):
        if number % 2 == 0:
            a = ours()
            b = theirs()
        else:
            b = theirs()
            a = ours()
        if number >= warm_up:
            kept.append((a, b))
    return Pairs([a for a, _ in kept], [b for _, b in kept])


def reset_peak_memory() -> None:
    """Start counting this process's peak memory anew, of the accelerator where torch uses one, else of the process.

    Raises:
        OSError: the system lets nobody reset the count (only Linux does, through /proc/self/clear_refs).
    """
    torch = _loaded_torch()
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return
    Path("/proc/self/clear_refs").write_text("5")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of many runs takes."""
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="no run is begun after so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--write", action="store_true", help="print the tables and draw the plots of the runs there")


def run_jobs(
    jobs: Iterable[J], run: Callable[[J], R], keep: Callable[[J, R], None], *, minutes: float, processes: int
) -> bool:
    """Run jobs in several processes, none begun after so many minutes; return whether all were run.

    Args:
        jobs: what is to be run, each for `run`.
        run: called in a process of its own; a module's function, or a partial of one.
        keep: called here with each job and what came of it, as it ends.
        minutes: from now.
        processes: side by side.
    """
    end, late = time.monotonic() + 60 * minutes, False
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for job, found in pool.imap_unordered(partial(_in_time, run=run, end=end), jobs):
            if found is None:
                late = True  # those that are under way are waited for
            else:
                keep(job, found)
    if late:
        print("out of time; call again to go on")
    return not late


def _in_time(job: J, *, run: Callable[[J], R], end: float) -> tuple[J, R | None]:
    return job, None if time.monotonic() > end else run(job)


def peak_memory() -> int:
    """Return the largest memory held since the last reset, in bytes: of the accelerator where one is in use."""
    torch = _loaded_torch()
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = _proc("/proc/self/status", "VmHWM")
    if peak is None:
        raise OSError("this system does not tell a process's peak memory through /proc/self/status")
    return peak


def table(rows: Iterable[Sequence[object]], *, header: Sequence[str]) -> str:
    """Return rows as aligned text, the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pieces))
        for pieces in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def report(name: str, result: Mapping[str, Any], *, path: str | Path | None = None) -> dict[str, Any]:
    """Print a benchmark's JSON line, with the machine it was measured on, and write it to a file where one is named.

    Args:
        name: of the benchmark.
        result: JSON values.
        path: the file; replaced in one move.
    """
    record = {"benchmark": name, **machine(), **result}
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    print(json.dumps(record))
    return record


def _loaded_torch() -> Any:
    return sys.modules.get("torch")


def _torch() -> dict[str, Any]:
    torch = _loaded_torch()
    used = torch is not None and torch.cuda.is_initialized()
    return {
        "accelerator": torch.cuda.get_device_name() if used else None,
        "threads": None if torch is None else torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.split("\n") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _proc(path: str, field: str) -> int | None:
    """Return a field of a /proc file in bytes; None where there is no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
