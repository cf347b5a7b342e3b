"""How often a step waits for the device: once, however many micro-batches it has."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.data.collate import collate_padded
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings


class Readings(TorchDispatchMode):
    """Counts how often a floating-point number is read out of a tensor, for which a device would have to be done."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


def readings(size, kind=TrainingLoop):
    settings = LoopSettings(max_steps=1, rows_per_step=8, rows_per_micro_batch=size, progress=False)
    loop = kind(tiny_llama(), uneven_rows(8), settings=settings, collate=collate_padded)
    batches = loop.micro_batches(0)
    assert len(batches) == 8 // size
    with Readings() as found:
        loop.training_step(batches)
    return found.count


class ReadsEachLoss(TrainingLoop):
    def compute_loss(self, model, batch):
        loss = super().compute_loss(model, batch)
        return loss, {"read": float(loss)}


def test_numbers_are_read_once_a_step_and_not_once_a_micro_batch():
    assert readings(1) == readings(8)
    assert readings(1, ReadsEachLoss) == readings(8, ReadsEachLoss) + 7  # such a reading would be seen
