"""Task after task: any method over any sequence of tasks, saved between and inside them, and scored after each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from llmtune.adapters.attach import adapter_names
from llmtune.data.collate import collate_packed
from llmtune.errors import CheckpointError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.modules import check_module, unwrap
from llmtune.training.checkpoint import newest_valid, write_checkpoint
from llmtune.training.checkpoint_folder import list_checkpoints, remove_checkpoint
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.training.distributed import Ranks
from llmtune.training.history import History
from llmtune.training.loop import TrainingLoop
from llmtune.training.randomness import derive_seed, seed_everything
from llmtune.training.resume import check_writable, refuse_used_folder
from llmtune.training.sequence_score import Score, accuracy_score, loss_score, score_of
from llmtune.training.sequence_state import checksums, load_model, model_state, plan_state, same_plan
from llmtune.training.sequence_task import Task, TaskMethod, TaskRun
from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import is_sharded
from llmtune.types import Batch, LossFunction

HOOKS = ("before_task", "after_task", "around_scoring", "rebuild", "state_dict", "load_state_dict")


@dataclass
class SequenceHistory:
    """What a sequence has recorded so far.

    Attributes:
        tasks: the names of all tasks, in order.
        baseline: the score of each task before the first was trained; empty without scoring, or of seen tasks alone.
        scores: scores[t][i] is that of task i after task t was trained, None where it was not asked for; a row a
            finished task, empty without scoring.
        loops: the history of each finished task's loop.
    """

    tasks: list[str]
    baseline: list[float] = field(default_factory=list)
    scores: list[list[float | None]] = field(default_factory=list)
    loops: list[History] = field(default_factory=list)


class TaskSequence:
    """Train a model on one task after another, each with a loop of its own, by any methods against forgetting.

    After each task the model, with its adapters, and what the methods hold are written as safetensors and JSON, under a
    temporary name that is moved; inside a task its loop writes its own checkpoints. A run that is killed anywhere and
    resumed ends bit for bit as one that was not: finished tasks are not repeated, and what a task or a hook draws at
    random is a function of the seed and the task's name.

    Args:
        model: any module; full, with adapters, or given adapters by a method.
        tasks: `Task` records, in the order in which they are trained.
        settings: of every task's loop, but for what a task has of its own. `folder` is the sequence's: what lies
            between tasks is in it, each task's loop in a folder below. The seed of a task's loop is derived from the
            settings' and the task's name.
        methods: `TaskMethod` objects, whose hooks are called in this order; none for plain sequential fine-tuning.
        collate: makes a batch of rows, as for `TrainingLoop`.
        loss: a `LossFunction`.
        score: "accuracy" of a classifier; "loss", minus the mean loss; a function of (model, task), called in eval mode
            and without gradients, higher meaning better; or None to score nothing.
        scored: "all": every task before the first and after each, (T + 1) T times in all. "seen": after each task those
            up to it, T (T + 1) / 2 times: forward transfer, which is about tasks to come, is then not known.
        loop: what makes a task's loop: `TrainingLoop`, a subclass, or a function that takes what it takes.
        clear: whether a finished task's own checkpoints are removed; they take the room of the model and the
            optimizer's state each time.

    Raises:
        ValueError: there are no tasks, two have one name, one has no evaluation rows though it is to be scored or
            evaluated; a setting is out of its range; or the model is sharded.
        TypeError: what is no task, method or module stands for one.

    Example:
        >>> from llmtune.testing.models import tiny_llama
        >>> rows = [[{"input_ids": [5, n, 11], "labels": [5, n, 11]}] * 4 for n in (7, 9)]
        >>> tasks = [Task(name, some, some) for name, some in zip(("first", "second"), rows)]
        >>> settings = LoopSettings(max_steps=2, rows_per_step=2, progress=False)
        >>> history = TaskSequence(tiny_llama(), tasks, settings=settings).run()
        >>> [len(row) for row in history.scores]
        [2, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        *,
        settings: LoopSettings,
        methods: Sequence[TaskMethod] = (),
        collate: Callable[[list[Any]], Batch] = collate_packed,
        loss: LossFunction = causal_lm_loss,
        score: Literal["accuracy", "loss"] | Score | None = "loss",
        scored: Literal["all", "seen"] = "all",
        loop: Callable[..., Any] = TrainingLoop,
        clear: bool = False,
    ) -> None:
        check_module(model)
        if is_sharded(model):
            raise ValueError("a sequence keeps the whole model between tasks: train it without sharding")
        self.model, self.tasks, self.settings, self.methods = model, list(tasks), settings, list(methods)
        self.collate, self.loss, self.make_loop, self.clear = collate, loss, loop, clear
        if scored not in ("all", "seen"):
            raise ValueError(f'scored must be "all" or "seen", which tasks are scored after each; got {scored!r}')
        self.score, self.scored = self._score(score), scored
        _check(self.tasks, self.methods, settings, scoring=self.score is not None)
        self.plan = plan_state(self.tasks, settings, self.methods, "nothing" if self.score is None else scored)
        self.history = SequenceHistory([task.name for task in self.tasks])
        self.ranks = Ranks(model)
        self.run_now: TaskRun | None = None  # the task under way, or the last one
        self._start: dict[str, str] = {}
        self._given: list[str] = []

    def run(self, *, resume: bool = False) -> SequenceHistory:
        """Train the tasks not yet finished, and return the history.

        Args:
            resume: go on where the run in the settings' folder is; with none there, start afresh. The model must be
                made as it was made then.

        Raises:
            CheckpointError: the folder holds a run already and `resume` is False, or holds another sequence's.
            ValueError: `resume` without a folder, or this object has run; and as the loop and the methods raise.
        """
        if resume and self.settings.folder is None:
            raise ValueError("run(resume=True) needs a folder to resume from: set LoopSettings(folder=...)")
        if not (resume and self._load()):
            self._begin()
        while len(self.history.loops) < len(self.tasks):
            self._train(len(self.history.loops))
        return self.history

    def folder_of(self, index: int) -> Path | None:
        """Return the folder of a task's loop; None where the settings have none."""
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", self.tasks[index].name)[:60]
        return None if self.settings.folder is None else Path(self.settings.folder) / f"{index:02d}-{plain}"

    def _begin(self) -> None:
        if self.history.loops or self.history.baseline:
            raise ValueError("this sequence has run already: make a new one of a new model, or run(resume=True)")
        for folder in (self.settings.folder, *map(self.folder_of, range(len(self.tasks)))):
            self.ranks.in_main(partial(refuse_used_folder, folder))
        if (folder := self.settings.folder) is not None:
            self.ranks.in_main(partial(check_writable, Path(folder)))
        self._start, self._given = checksums(unwrap(self.model)), adapter_names(unwrap(self.model))
        self.history.baseline = self._scores(self.tasks if self.scored == "all" else [])
        self._save()

    def _train(self, index: int) -> None:
        """Train one task, let the methods take from it, score all, and save."""
        self.run_now = None  # what the last task held, a teacher, goes before the next is made
        run = self.run_now = self._arranged(index)
        loop = run.loop_of(run.task.evaluation if run.settings.eval_every else None) if run.train else None
        steps = [] if loop is None else loop.fit(resume=run.settings.folder is not None)
        self._hooks("after_task", run)
        self.history.loops.append(History(steps))
        if self.score is not None:
            found = self._scores(self.tasks if self.scored == "all" else self.tasks[: index + 1])
            self.history.scores.append([*found, *[None] * (len(self.tasks) - len(found))])
        self._save()
        if self.clear and run.settings.folder is not None:
            self.ranks.in_main(partial(_remove_checkpoints, Path(run.settings.folder)))

    def _arranged(self, index: int) -> TaskRun:
        task = self.tasks[index]
        own = task.settings_of(self.settings)
        own = dataclasses.replace(own, folder=self.folder_of(index), seed=derive_seed(own.seed, "task", task.name))
        run = TaskRun(
            model=self.model, task=task, index=index, tasks=tuple(self.history.tasks), train_data=task.train,
            collate=self.collate, loss=self.loss, settings=own, make_loop=self.make_loop,
        )  # fmt: skip
        self._hooks("before_task", run)
        return run

    def _hooks(self, name: str, run: TaskRun) -> None:
        """Call one hook of every method, each from a random state that is a function of seed, task and hook."""
        for place, method in enumerate(self.methods):
            seed_everything(run.settings.seed, name, place)
            getattr(method, name)(run)

    def _scores(self, tasks: Sequence[Task]) -> list[float]:
        """Return the score of each of these tasks, each under what the methods put in place for it."""
        if self.score is None:
            return []
        found = []
        for task in tasks:
            with ExitStack() as around:
                for method in self.methods:
                    around.enter_context(method.around_scoring(self.model, task))
                found.append(score_of(self.score, self.model, task, seed=self.settings.seed))
        return found

    def _score(self, score: Any) -> Score | None:
        if score == "accuracy":
            return partial(accuracy_score, collate=self.collate, settings=self.settings)
        if score == "loss":
            return partial(loss_score, collate=self.collate, settings=self.settings, loss=self.loss)
        if score is not None and not callable(score):
            raise ValueError(f'score must be "accuracy", "loss", a function of (model, task), or None; got {score!r}')
        return score

    def _save(self) -> None:
        """Write the sequence as it stands between two tasks."""
        if self.settings.folder is None:
            return
        folder, done = Path(self.settings.folder), len(self.history.loops)
        state = {
            "plan": self.plan,
            "history": dataclasses.asdict(self.history),
            "start": self._start,
            "given": self._given,
            "model": model_state(self.model, self._start),
            "methods": [method.state_dict() for method in self.methods],
        }
        self.ranks.in_main(lambda: write_checkpoint(folder, done, state, keep=self.settings.keep))

    def _load(self) -> bool:
        """Put the newest state of the folder back; return whether there was one."""
        folder = Path(str(self.settings.folder))
        found = self.ranks.in_main(lambda: (whole := newest_valid(folder)) and (whole[0], whole[2]))
        if found is None:
            return False
        path, skipped = found
        for reason in skipped if self.ranks.main else []:
            print(f"skipped a damaged checkpoint: {reason}")
        state = read_checkpoint(path)
        try:
            if lacking := {"plan", "history", "start", "given", "model", "methods"} - set(state):
                raise CheckpointError(f"it lacks {', '.join(sorted(lacking))}: it is no sequence's")
            same_plan(self.plan, state["plan"])
            for method, held in zip(self.methods, state["methods"], strict=True):
                method.load_state_dict(held)
            load_model(
                self.model, state["model"], start=state["start"], given=state["given"], methods=self.methods,
                finished=self.tasks[: len(state["history"]["loops"])],
            )  # fmt: skip
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._start, self._given, past = state["start"], state["given"], state["history"]
        self.history = SequenceHistory(
            past["tasks"], past["baseline"], past["scores"], [History(rows) for rows in past["loops"]]
        )
        return True


def _remove_checkpoints(folder: Path) -> None:
    for path in list_checkpoints(folder):
        remove_checkpoint(path)


def _check(tasks: Sequence[Any], methods: Sequence[Any], settings: LoopSettings, *, scoring: bool) -> None:
    """Raise where what is given makes no sequence."""
    if not tasks:
        raise ValueError("a sequence needs one task or more; got none")
    for task in tasks:
        if not isinstance(task, Task):
            raise TypeError(f"tasks must be Task records; got a {type(task).__name__}")
        if scoring and task.evaluation is None:
            raise ValueError(
                f'task "{task.name}" has no evaluation rows to be scored on: give Task(name, train, evaluation), or '
                "score=None to score nothing"
            )
        if task.evaluation is None and task.settings_of(settings).eval_every:
            raise ValueError(
                f'task "{task.name}" has no evaluation rows, and eval_every asks for evaluations inside it: give '
                'Task(name, train, evaluation), or the task settings={"eval_every": None}'
            )
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'two tasks are called "{twice[0]}": give each a name of its own')
    buffers = [id(method.buffer) for method in methods if getattr(method, "buffer", None) is not None]
    if len(set(buffers)) < len(buffers):
        raise ValueError("two methods keep rows in one buffer, which would be shown each row twice: give each its own")
    for method in methods:
        lacking = [hook for hook in HOOKS if not callable(getattr(method, hook, None))]
        if lacking or isinstance(method, type):
            kind = f"the class {method.__name__}" if isinstance(method, type) else f"a {type(method).__name__}"
            raise TypeError(f"methods must be TaskMethod objects, with {', '.join(HOOKS)}; got {kind}")
