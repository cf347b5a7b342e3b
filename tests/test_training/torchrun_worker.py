"""A script as a user writes it, started by torchrun: `torchrun ... torchrun_worker.py HOW FOLDER`."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2
from llmtune.training.distributed import join_processes
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import shard
from llmtune.types import Callback


class Dies(Callback):
    """In the first attempt the second process is killed in a step, in the second the first one within a save."""

    def __init__(self, how):
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if "dies" in how else 99
        self.raises, self.slowly = "raises" in how, "slowly" in how

    def on_step_end(self, loop, metrics):
        if self.slowly:
            time.sleep(0.5)
        if self.raises and loop.step == 3 and loop.ranks.rank == 1:
            raise ValueError("seeded")
        if self.attempt == 0 and loop.step == 5 and loop.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_pretrained(self, folder):  # called while a checkpoint is being written, by the main process
        folder.mkdir(parents=True)
        if self.attempt == 1 and "step-00000008" in str(folder):
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    how, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    device = join_processes("gloo")
    model = tiny_gpt2(dropout=0.1).to(device)
    if "sharded" in how:
        shard(model)
    settings = LoopSettings(
        max_steps=10, rows_per_step=8, rows_per_micro_batch=2, learning_rate=1e-3, progress=False, folder=folder,
        save_every=2,
    )  # fmt: skip
    dies = Dies(how)
    TrainingLoop(model, uneven_rows(13), settings=settings, callbacks=[dies], tokenizer=dies).fit(resume=True)
    print(f"process {os.environ['RANK']} is done", flush=True)
    if "leaves" in how:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
