"""A sequence of tasks in several processes: the weights and scores of one, and it goes on where it was cut."""

import functools

import pytest
import torch
from ranks_cases import off
from ranks_worker import run
from sequences import language_tasks, settings

from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_padded
from llmtune.data.mixing import MixedBatches
from llmtune.data.replay import ReplayBuffer
from llmtune.forgetting.projected import GradientProjectionMemory
from llmtune.testing.models import tiny_llama
from llmtune.training.sequence import TaskSequence
from llmtune.training.sequence_adapters import AdapterPerTask, InfLoRAPerTask
from llmtune.training.sequence_distill import DistillFromCopy
from llmtune.training.sequence_methods import EWCPerTask, InterpolatePerTask, OverTasks
from llmtune.training.sequence_replay import AveragedGEMPerTask, DarkReplay, Replay
from llmtune.training.sequence_task import TaskMethod

pytestmark = pytest.mark.slow


class Cut(TaskMethod):
    """Ends the run before a task."""

    def __init__(self, index):
        self.index = index

    def before_task(self, run):
        if run.index == self.index:
            raise KeyboardInterrupt


METHODS = {
    "EWC": lambda: [EWCPerTask(1e3, kind="empirical")],
    "replay": lambda: [Replay(ReplayBuffer(4), functools.partial(MixedBatches, ratio=0.3))],
    "dark replay": lambda: [  # with labels: at its own predictions a row's gradient is rounding, which Adam makes large
        DarkReplay(ReplayBuffer(4), functools.partial(MixedBatches, ratio=0.3), alpha=0.5, beta=1.0, k=5)
    ],
    "A-GEM": lambda: [AveragedGEMPerTask(ReplayBuffer(4), rows=2)],
    "distillation": lambda: [DistillFromCopy(0.5)],
    "half of the way back": lambda: [InterpolatePerTask(0.5)],
    "InfLoRA": lambda: [AdapterPerTask(LoRA(rank=2, alpha=4, targets=["q_proj"])), InfLoRAPerTask(0.7)],
    "adapters": lambda: [AdapterPerTask(LoRA(rank=2, alpha=4, targets=["q_proj"]))],
    "GPM": lambda: [
        OverTasks(GradientProjectionMemory(energy=0.9), lambda part, run: part.finish_task(run.model, run.batches()))
    ],
}


def through(name, folder=None, cut=None):
    """Return the weights and the scores at the end; with `cut` the run is ended before that task, and gone on with."""
    for last in (False, True) if cut else (True,):
        model, own = tiny_llama(), METHODS[name]()
        sequence = TaskSequence(
            model, language_tasks(), settings=settings(folder, rows_per_micro_batch=1), collate=collate_padded,
            methods=[*own, Cut(None if last else cut)],
        )  # fmt: skip
        if last:
            history = sequence.run(resume=cut is not None)
        else:
            with pytest.raises(KeyboardInterrupt):
                sequence.run(resume=True)
    return {key: p.detach().clone() for key, p in model.named_parameters()}, history.scores


def in_a_process(rank, folder):
    return {name: (through(name), through(name, f"{folder}/{name}", cut=2)) for name in METHODS}


def test_two_processes_are_one(tmp_path):
    one, other = run(2, in_a_process, str(tmp_path), folder=tmp_path)
    for name in METHODS:
        (weights, scores), (resumed, again) = one[name]
        wanted, of_one = through(name)
        assert off(weights, wanted) < 1e-5
        for key in wanted:
            assert torch.equal(weights[key], resumed[key])
            assert torch.equal(weights[key], other[name][0][0][key])
        assert scores == again == other[name][0][1]
        for row, found in zip(of_one, scores, strict=True):
            assert found == pytest.approx(row, rel=1e-4)
