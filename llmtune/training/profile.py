"""Where the time and the memory of a step go: torch's profiler over a few optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmtune.types import Callback

ROWS = 30


class Profile(Callback):
    """Profile a few optimizer steps, write what was seen, and stop by itself.

    Two files are written into `folder`: `trace.json`, for Perfetto (ui.perfetto.dev) or chrome://tracing, and
    `operators.txt`, the operators that took most time by themselves and, with `memory`, those that took most memory.
    A profiled step is slower than others. An evaluation or a checkpoint is part of the step after it. Only the main
    process is profiled.

    Args:
        folder: where the two files go; made where it is missing.
        wait: steps passed over first.
        warmup: steps profiled and thrown away, at least 1: the profiler's own start costs time.
        active: steps recorded, at least 1.
        memory: whether memory is recorded too.

    Raises:
        ValueError: a count is out of its range; or, at the start of a run, it has fewer steps than `wait` + `warmup` +
            `active`.
    """

    def __init__(
        self, folder: str | Path, *, wait: int = 1, warmup: int = 1, active: int = 3, memory: bool = True
    ) -> None:
        for name, value, least in (("wait", wait, 0), ("warmup", warmup, 1), ("active", active, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        self.folder, self.memory = Path(folder), memory
        self.wait, self.warmup, self.active = wait, warmup, active
        self._profiler: torch.profiler.profile | None = None
        self._left = 0

    def on_fit_start(self, loop: Any) -> None:
        """Start waiting.

        Raises:
            ValueError: the run has fewer steps left than are to be profiled.
        """
        self._left = self.wait + self.warmup + self.active
        steps = loop.total_steps - loop.step
        if 0 < steps < self._left:
            raise ValueError(
                f"Profile needs {self._left} steps (wait {self.wait}, warmup {self.warmup}, active {self.active}); "
                f"the run has {steps}: lower one of them, or leave Profile out"
            )
        if steps == 0 or not loop.ranks.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=1),
            on_trace_ready=self._write,
            profile_memory=self.memory,
            record_shapes=True,
            acc_events=True,
        )
        self._profiler.start()

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Tell the profiler, and stop it after its last step."""
        if self._profiler is None:
            return
        self._profiler.step()
        self._left -= 1
        if self._left == 0:
            self._stop()

    def on_fit_end(self, loop: Any) -> None:
        """Stop, where the run ended early; what was recorded by then is written."""
        self._stop()

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Stop; what was recorded by then is written."""
        self._stop()

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        trace, table = self.folder / "trace.json", self.folder / "operators.txt"
        profiler.export_chrome_trace(str(trace))
        operators = profiler.key_averages()
        kind = "device" if torch.profiler.ProfilerActivity.CUDA in profiler.activities else "cpu"
        orders = [("self time", f"self_{kind}_time_total")]
        if self.memory:
            orders.append(("memory of their own", f"self_{kind}_memory_usage"))
        parts = [
            f"Operators by {what}\n{operators.table(sort_by=by, row_limit=ROWS, max_name_column_width=60)}\n"
            for what, by in orders
        ]
        table.write_text("\n".join(parts), encoding="utf-8")
        print(f"profiled {self.active} steps: {trace} for ui.perfetto.dev, {table} for reading")
