"""Processes that train together, started cheaply: each is forked from one that has imported everything once."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import time
import traceback
import uuid
from pathlib import Path

import torch

PRELOADED = [
    "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2", "transformers.optimization", "llmtune.training.loop",
    "llmtune.training.sharding", "llmtune.testing.models", "llmtune.adapters",
]  # fmt: skip


class Processes:
    """`world` processes that run `work(rank, *arguments)`; each one's result, and what it printed.

    Args:
        world: how many.
        work: a function of a test module, by name.
        arguments: picklable.
        folder: where they meet and leave their results.
        joined: whether they make a process group first.
    """

    def __init__(self, world, work, *arguments, folder, joined=True):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = Path(folder) / f"processes-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir(parents=True)
        self.running = [
            context.Process(target=_begin, args=(rank, world, joined, self.folder, work, arguments))
            for rank in range(world)
        ]
        for process in self.running:
            process.start()

    def codes(self, seconds=120):
        """Return the exit codes; end and fail where one does not end."""
        end = time.monotonic() + seconds
        for process in self.running:
            process.join(max(0.0, end - time.monotonic()))
        stuck = [rank for rank, process in enumerate(self.running) if process.is_alive()]
        for rank in stuck:
            self.running[rank].kill()
        assert not stuck, f"processes {stuck} hang after {seconds} s:\n{self.printed()}"
        return [process.exitcode for process in self.running]

    def results(self):
        """Return what each process returned; fail with the tracebacks where one failed."""
        codes = self.codes()
        assert codes == [0] * len(codes), f"{codes}\n{self.printed()}"
        return [torch.load(self.folder / f"{rank}.pt", weights_only=False) for rank in range(len(codes))]

    def printed(self):
        return "\n".join(f"--- process {path.stem}\n{path.read_text()}" for path in sorted(self.folder.glob("*.txt")))


def run(world, work, *arguments, folder):
    """Return what `work(rank, *arguments)` gives in each of `world` processes."""
    return Processes(world, work, *arguments, folder=folder).results()


def _begin(rank, world, joined, folder, work, arguments):
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
    with (folder / f"{rank}.txt").open("w", buffering=1) as printed, contextlib.redirect_stdout(printed):
        with contextlib.redirect_stderr(printed):
            faulthandler.enable(printed)
            try:
                if joined:
                    torch.distributed.init_process_group(
                        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
                    )
                torch.save(work(rank, *arguments), folder / f"{rank}.pt")
                if joined:
                    torch.distributed.destroy_process_group()
            except Exception:
                traceback.print_exc()
                raise SystemExit(1) from None
