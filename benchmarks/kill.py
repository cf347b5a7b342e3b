"""What killing a run costs: nothing but the steps since the last checkpoint. Kills runs by SIGKILL and compares.

    python benchmarks/kill.py [--kills 200] [--seed 0] [--write]

Half of the kills fall on runs that save before they go on, half on runs that save in the background. Each run has
dropout, rows that come out at random, accumulation and a penalty with state, is killed several times, resumed each
time, and at its end compared with a run that was left alone: weights, optimizer, all other tensors and losses, bit for
bit. The first difference ends the benchmark with an error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, report, table

from llmtune.testing.kill import KillReport, check_killed
from llmtune.testing.restless import restless_run

RUNS: dict[str, Callable[[Path], Any]] = {
    "saves, then goes on": restless_run,
    "saves in the background": partial(restless_run, background=True),
}


def row(name: str, found: KillReport) -> list[object]:
    """Return a line of the table."""
    ways = [found.ways[way] for way in ("at any moment", "a while into a save", "at a call of a save")]
    return [name, found.kills, *ways, found.in_saves, found.before_any, found.runs]


def main() -> None:
    """Kill, print the table and the JSON line, and write the result where asked."""
    parser = argparse.ArgumentParser(description="Kill runs, resume them, and compare with a run left alone.")
    parser.add_argument("--kills", type=int, default=200, help="kills in all, an even number")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kill.json")
    options = parser.parse_args()
    if options.kills < 2 or options.kills % 2:
        parser.error(f"--kills must be an even number of at least 2; got {options.kills}")
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = {
        name: check_killed(make, kills=options.kills // 2, seed=2 * options.seed + number)
        for number, (name, make) in enumerate(RUNS.items())
    }
    header = ("a run that", "kills", "any time", "timed in a save", "call of a save", "left a save half done",
              "before a checkpoint", "runs, all bit-equal")  # fmt: skip
    print(table([row(name, one) for name, one in found.items()], header=header))
    total, inside = sum(one.kills for one in found.values()), sum(one.in_saves for one in found.values())
    print(f"{total} kills, {inside} of them inside a save: every run ended bit for bit as the one left alone")
    result = {
        "seed": options.seed,
        "kills": total,
        "in_saves": inside,
        "bit_equal_runs": sum(one.runs for one in found.values()),
        "seconds": round(time.perf_counter() - began, 1),
        **{
            name: {
                "kills": one.kills, "in_saves": one.in_saves, "before_any": one.before_any, "bit_equal_runs": one.runs,
                "ways": dict(one.ways),
            }
            for name, one in found.items()
        },
    }  # fmt: skip
    report("kill", result, path=RESULTS / "kill.json" if options.write else None)


if __name__ == "__main__":
    main()
