"""What `import llmtune` costs over `import torch`; it may be at most 0.15 s.

    python benchmarks/bench_import.py [--pairs 7] [--write]

Every import runs in a fresh interpreter, in turns with the one it is compared with. `import llmtune` loads no part
before it is used, so the second row says what all parts together come to.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from common import RESULTS, Pairs, in_turns, report, table

ROOT = Path(__file__).parents[1]
ALLOWED = 0.15  # seconds
PARTS = sorted(path.parent.name for path in (ROOT / "llmtune").glob("*/__init__.py"))
STATEMENTS = {
    "llmtune": "import torch, llmtune",
    "all its parts": "import torch, " + ", ".join(f"llmtune.{name}" for name in PARTS),
}


def seconds(statement: str) -> float:
    """Return how long a fresh interpreter takes to run a statement and leave."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
    return time.perf_counter() - began


def row(name: str, pairs: Pairs) -> list[str]:
    """Return a line of the table."""
    found = pairs.summary()
    figures = (found["theirs_median"], found["ours_median"], found["difference_median"])
    return [name, *(f"{value:.3f}" for value in figures), f"{found['ratio_median']:.3f}"]


def main() -> None:
    """Measure, print the table and the JSON line, and write the result where asked."""
    parser = argparse.ArgumentParser(description="Measure what `import llmtune` costs over `import torch`.")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of fresh interpreters, at least 7")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/import.json")
    options = parser.parse_args()
    if options.pairs < 7:
        parser.error(f"--pairs must be at least 7; got {options.pairs}")
    measured = {
        name: in_turns(partial(seconds, statement), partial(seconds, "import torch"), pairs=options.pairs)
        for name, statement in STATEMENTS.items()
    }
    header = ("import torch, and", "torch alone, s", "with it, s", "difference, s", "ratio")
    print(table([row(name, pairs) for name, pairs in measured.items()], header=header))
    difference = measured["llmtune"].difference()
    print(f"import llmtune costs {difference:.3f} s over import torch; allowed are {ALLOWED} s")
    result = {
        "unit": "seconds",
        "allowed_difference": ALLOWED,
        "kept": difference <= ALLOWED,
        **{name: pairs.summary() for name, pairs in measured.items()},
    }
    report("import", result, path=RESULTS / "import.json" if options.write else None)
    sys.exit(0 if result["kept"] else 1)


if __name__ == "__main__":
    main()
