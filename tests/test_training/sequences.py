"""What the tests of sequences share: small tasks, a method with state, a sequence as the law of kills takes it."""

import os
import signal

import torch

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_padded
from llmtune.data.mixing import MixedBatches
from llmtune.data.replay import ReplayBuffer
from llmtune.forgetting import (
    SLAO,
    GradientProjectionMemory,
    OnlineEWC,
    SynapticIntelligence,
    project_lora_a,
)
from llmtune.losses.classification import classification_loss
from llmtune.testing.models import VOCABULARY, tiny_bert, tiny_gpt2
from llmtune.training.sequence import TaskSequence
from llmtune.training.sequence_adapters import AdapterPerTask, InfLoRAPerTask, OrthogonalLoRAPerTask
from llmtune.training.sequence_distill import DistillFromCopy, DistillFromEarlier
from llmtune.training.sequence_methods import EWCPerTask, InterpolatePerTask, L2SPToLast, OverTasks
from llmtune.training.sequence_replay import AveragedGEMPerTask, DarkReplay, Replay
from llmtune.training.sequence_task import Task, TaskMethod
from llmtune.training.settings import LoopSettings
from llmtune.training.statistics_head import HeadFromStatistics
from llmtune.types import Callback

NAMES = ("maths", "french", "law")


def texts(count, *, seed, length=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def language_tasks(**changed):
    return [Task(name, texts(7, seed=n), texts(3, seed=10 + n), **changed) for n, name in enumerate(NAMES)]


def class_rows_of(labels, *, seed, count=13):
    """Rows whose class is which of the given tokens the text begins with."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(count):
        kind = n % len(labels)
        rest = torch.randint(50, VOCABULARY, (3,), generator=generator).tolist()
        rows.append({"input_ids": [3 + 7 * seed + kind, *rest], "labels": labels[kind]})
    return rows


def settings(folder=None, **changed):
    fixed = {"max_steps": 3, "rows_per_step": 3, "learning_rate": 1e-2, "progress": False}
    return LoopSettings(**(fixed | {"folder": folder, "save_every": None if folder is None else 1} | changed))


class KeepsRows(TaskMethod):
    """A tiny replay: rows drawn at random from each task, mixed into the next ones; dies where it is told to."""

    def __init__(self, death=(), *, mixed=True):
        self.rows, self.death, self.mixed = [], tuple(death), mixed

    def before_task(self, run):
        die(self.death, ("before", run.index))
        old = self.rows if self.mixed else []
        run.train_data = [*run.train_data, *({"input_ids": r.tolist(), "labels": r.tolist()} for r in old)]
        run.callbacks.append(Dies(self.death, run.index))

    def after_task(self, run):
        drawn = torch.randperm(len(run.task.train))[:2].tolist()
        self.rows += [torch.tensor(run.task.train[place]["input_ids"]) for place in drawn]
        die(self.death, ("after", run.index))

    def around_scoring(self, model, task):
        done = len(self.rows) // 2
        die(self.death, ("score", done, task.name))
        return super().around_scoring(model, task)

    def state_dict(self):
        return {"rows": self.rows, "seen": len(self.rows)}

    def load_state_dict(self, state):
        assert state["seen"] == len(state["rows"])
        self.rows = list(state["rows"])


class Dies(Callback):
    def __init__(self, death, index):
        self.death, self.index = death, index

    def on_fit_start(self, loop):
        die(self.death, ("start", self.index))

    def on_step_end(self, loop, metrics):
        die(self.death, ("step", self.index, loop.step))

    def on_save(self, loop, folder):
        die(self.death, ("saved", self.index, loop.step))

    def on_fit_end(self, loop):
        die(self.death, ("end", self.index))


def die(death, place):
    if death == place:
        os.kill(os.getpid(), signal.SIGKILL)


class AsRun:
    """A sequence with the names that `check_killed` asks of a loop."""

    def __init__(self, sequence):
        self.sequence, self.model = sequence, sequence.model

    def fit(self, *, resume=False):
        return self.sequence.run(resume=resume)

    def state_dict(self):
        history = self.sequence.history
        scores = torch.tensor([history.baseline, *history.scores], dtype=torch.float64)
        return {"scores": scores, "methods": [method.state_dict() for method in self.sequence.methods]}

    @property
    def history(self):
        loops = enumerate(self.sequence.history.loops)
        return [row | {"step": f"{task}.{row['step']}"} for task, rows in loops for row in rows]


def learning():
    return [
        OverTasks(OnlineEWC(3.0, gamma=0.9), lambda part, run: part.finish_task(run.model, run.batches(3))),
        OverTasks(SynapticIntelligence(2.0), lambda part, run: part.finish_task(run.model)),
    ]


def replay(**options):
    return Replay(ReplayBuffer(5, **options), lambda new, old: MixedBatches(new, old, 0.3))


class StartsApart(TaskMethod):
    """Takes out of a new adapter's A what earlier tasks' inputs span."""

    def __init__(self, memory):
        self.memory = memory

    def before_task(self, run):
        if self.memory.kept:
            project_lora_a(run.model, self.memory.kept)


def make_run(folder, *, kind="full", death=()):
    """A sequence of three tasks with state of every kind."""
    tasks, more = language_tasks(), {}
    if kind == "statistics":  # a body adapted to the first task, and a head out of sums
        model = tiny_bert(labels=6, dropout=0.1)
        methods = [HeadFromStatistics("classifier", adapt_first=True), KeepsRows(death, mixed=False)]
        tasks = [Task(name, *(class_rows_of((2 * n, 2 * n + 1), seed=n) for _ in "te")) for n, name in enumerate(NAMES)]
        more = {"loss": classification_loss, "score": "accuracy"}
    elif kind == "full":  # all weights, replay and EWC per task
        model, methods = tiny_gpt2(dropout=0.1), [KeepsRows(death), EWCPerTask(3.0, examples=3)]
    elif kind == "lora":  # one LoRA for all tasks
        model, methods = tiny_gpt2(dropout=0.1), [KeepsRows(death), EWCPerTask(3.0, examples=3), L2SPToLast(0.1)]
        torch.manual_seed(5)
        attach(model, LoRA(rank=3, alpha=6, targets=["c_attn"]))
    elif kind == "slao":  # one LoRA, merged into itself, under replay, online EWC and SI
        model = tiny_gpt2(dropout=0.1)
        torch.manual_seed(5)
        attach(model, LoRA(rank=3, alpha=6, targets=["c_attn"]))
        one = OverTasks(SLAO(model), lambda part, run: part.finish_task(), start=lambda part, run: part.start_task())
        methods = [one, KeepsRows(death), *learning(), replay()]
    elif kind == "rows":  # all weights, predictions kept with rows, a teacher, and half of the way back
        model = tiny_gpt2(dropout=0.1)
        dark = DarkReplay(ReplayBuffer(5), lambda new, old: MixedBatches(new, old, 0.3), alpha=0.5, beta=1.0, k=4)
        methods = [KeepsRows(death, mixed=False), dark, DistillFromCopy(0.5), InterpolatePerTask(0.5)]
    elif kind == "designed":  # a LoRA a task outside of what earlier ones read, and no step against stored rows
        model = tiny_gpt2(dropout=0.1)
        methods = [AdapterPerTask(LoRA(rank=3, alpha=6, targets=["c_attn"])), KeepsRows(death)]
        methods += [InfLoRAPerTask(0.7, examples=4), AveragedGEMPerTask(ReplayBuffer(4, per_task=True), rows=2)]
    elif kind == "many":  # all that can stand together over a LoRA a task
        model, memory = (
            tiny_gpt2(dropout=0.1),
            GradientProjectionMemory(energy=0.7, modules=["transformer.h.0.attn.c_attn"]),
        )
        methods = [AdapterPerTask(LoRA(rank=3, alpha=6, targets=["c_attn"])), StartsApart(memory), KeepsRows(death)]
        methods += [*learning(), replay(per_task=True), DistillFromEarlier(0.5), OrthogonalLoRAPerTask(0.5)]
        methods += [OverTasks(memory, lambda part, run: part.finish_task(run.model, run.batches(4)))]
    else:  # a LoRA a task, one upon the other, each alone, or merged one after the other
        model = tiny_gpt2(dropout=0.1)
        adapters = AdapterPerTask(
            LoRA(rank=3, alpha=6, targets=["c_attn"]), merge=kind == "merge", alone=kind == "alone"
        )
        methods = [adapters, KeepsRows(death), EWCPerTask(3.0, examples=3)]
        methods += [DistillFromEarlier(0.5)] if kind == "stack" else []
    return AsRun(TaskSequence(model, tasks, settings=settings(folder), methods=methods, collate=collate_padded, **more))


def classifier(labels=4, seed=0):
    return tiny_bert(seed, labels=labels)
