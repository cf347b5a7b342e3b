"""A sequence of tasks: what is trained, by what, how it is scored, what is refused."""

import dataclasses
import json

import pytest
import torch
from runs import Stop, equal, weights
from sequences import NAMES, KeepsRows, class_rows_of, classifier, language_tasks, settings, texts

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.merge import merge
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.metrics.continual import ContinualMatrix
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.training.checkpoint_folder import list_checkpoints
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.training.loop import TrainingLoop
from llmtune.training.randomness import derive_seed
from llmtune.training.sequence import TaskSequence
from llmtune.training.sequence_score import loss_score
from llmtune.training.sequence_task import Task, TaskMethod


def sequence(model=None, tasks=None, folder=None, **changed):
    given = {"collate": collate_padded, "settings": settings(folder)} | changed
    return TaskSequence(tiny_gpt2(dropout=0.1) if model is None else model, tasks or language_tasks(), **given)


def test_each_task_is_the_loop_that_one_would_write_and_its_score_the_loops_loss():
    by_hand, scores, losses = tiny_gpt2(dropout=0.1), [], []
    tasks = language_tasks()

    def scored():
        found = []
        for task in tasks:
            loop = TrainingLoop(
                by_hand, task.train, settings=settings(), collate=collate_padded, eval_data=task.evaluation
            )
            found.append(-loop.evaluate()["eval_loss"])
        return found

    baseline = scored()
    for task in tasks:
        run = dataclasses.replace(settings(), seed=derive_seed(0, "task", task.name))
        losses.append(TrainingLoop(by_hand, task.train, settings=run, collate=collate_padded).fit().column("loss"))
        scores.append(scored())
    model = tiny_gpt2(dropout=0.1)
    history = sequence(model).run()
    assert equal(weights(model), weights(by_hand))
    assert [rows.column("loss") for rows in history.loops] == losses
    assert history.tasks == list(NAMES)
    torch.testing.assert_close(torch.tensor([history.baseline, *history.scores]), torch.tensor([baseline, *scores]))


def test_tasks_seen_so_far_are_scored_alone_where_that_is_asked_for(tmp_path):
    whole = sequence().run()
    asked = []

    def score(model, task):
        asked.append(task.name)
        return loss_score(model, task, collate=collate_padded, settings=settings(), loss=causal_lm_loss)

    history = sequence(folder=tmp_path, scored="seen", score=score).run()
    assert asked == ["maths", "maths", "french", "maths", "french", "law"]
    assert history.baseline == []
    expected = [[s if i <= t else None for i, s in enumerate(row)] for t, row in enumerate(whole.scores)]
    assert history.scores == expected
    assert sequence(folder=tmp_path, scored="seen", score=score).run(resume=True).scores == expected
    assert "forward_transfer" not in ContinualMatrix(history.scores).summary()
    with pytest.raises(CheckpointError, match="scoring of the sequence: seen in the run, all now"):
        sequence(folder=tmp_path).run(resume=True)
    with pytest.raises(ValueError, match='scored must be "all" or "seen", which tasks are scored after each; got 1'):
        sequence(scored=1)


def test_a_task_may_have_settings_of_its_own():
    tasks = language_tasks()
    tasks[1] = dataclasses.replace(tasks[1], settings={"epochs": 2, "learning_rate": 0.0})
    seen = []
    model = tiny_gpt2()
    history = sequence(model, tasks, methods=[Watches(lambda run: seen.append((run.settings, weights(model))))]).run()
    assert [len(rows) for rows in history.loops] == [3, 5, 3]  # 2 epochs of 7 rows, 3 a step
    assert [run.epochs for run, _ in seen] == [None, 2, None]
    assert equal(seen[1][1], seen[2][1])
    assert len({run.seed for run, _ in seen}) == 3


class Watches(TaskMethod):
    def __init__(self, before=None, after=None):
        self.before_task = before or super().before_task
        self.after_task = after or super().after_task


def test_hooks_come_in_order_and_what_they_draw_depends_on_seed_task_and_hook_alone():
    def draws(tasks, **changed):
        found = {}

        def method(place):
            def draw(when):
                return lambda run: found.setdefault((run.task.name, when, place), torch.rand(()).item())

            return Watches(draw("before"), draw("after"))

        sequence(tasks=tasks, methods=[method(0), method(1)], **changed).run()
        return found

    tasks = language_tasks()
    found, other = draws(tasks), draws([tasks[2], tasks[0]])
    assert len(set(found.values())) == len(found) == 12
    assert list(found)[:4] == [("maths", when, place) for when in ("before", "after") for place in (0, 1)]
    assert other == {key: found[key] for key in other}
    assert not set(found.values()) & set(draws(tasks, settings=settings(seed=1)).values())


def test_methods_change_rows_loss_penalties_callbacks_and_the_optimizer():
    class Halved(torch.optim.SGD):
        pass

    def arrange(run):
        run.train_data = run.train_data[:3]
        run.loss = Twice()
        run.penalties.append(lambda model: 0.5 * model.lm_head.weight.square().sum())
        run.wrap_optimizer.append(lambda optimizer: Halved(optimizer.param_groups[0]["params"], lr=0.0))
        run.collate = lambda rows: collate_padded(rows, pad_to_multiple_of=8)

    class Twice:
        def __call__(self, model, batch):
            loss = model(**batch).loss
            return 2 * loss, {"length": batch["input_ids"].shape[1]}

        def count_targets(self, batch):
            return int((batch["labels"][:, 1:] != -100).sum())

    seen, model = [], tiny_llama()
    start = weights(model)
    made = sequence(model, methods=[Watches(arrange, lambda run: seen.append(run.loop))])
    history = made.run()
    assert [type(loop.optimizer) for loop in seen] == [Halved] * 3
    assert equal(start, weights(model))  # by a learning rate of 0
    row = history.loops[0][0]
    assert row["length"] == 8
    assert row["penalty"] == pytest.approx(0.5 * model.lm_head.weight.square().sum().item())
    assert [len(loop.train_data) for loop in seen] == [3, 3, 3]
    assert made.run_now.loop is seen[-1]


def test_a_loop_of_ones_own():
    class Mine(TrainingLoop):
        pass

    seen = []
    sequence(loop=Mine, methods=[Watches(after=lambda run: seen.append(type(run.loop)))]).run()
    assert seen == [Mine] * 3


def test_a_batch_of_the_tasks_own_rows():
    seen = []

    def look(run):
        seen.append([batch["labels"].tolist() for batch in run.batches()])
        seen.append([batch["labels"].tolist() for batch in run.batches(5, rows=2)])

    tasks = language_tasks()[:1]
    sequence(tasks=tasks, methods=[Watches(look)]).run()
    every = [row["labels"] for row in tasks[0].train]
    assert seen[0] == [every[:3], every[3:6], every[6:]]
    drawn = [row for batch in seen[1] for row in batch]
    assert [len(batch) for batch in seen[1]] == [2, 2, 1]
    assert len({tuple(row) for row in drawn}) == 5
    assert all(row in every for row in drawn)


class TestScores:
    def test_a_function_is_called_in_eval_mode_without_gradients_and_from_one_random_state(self):
        seen = []

        def score(model, task):
            seen.append((task.name, model.training, torch.is_grad_enabled(), torch.rand(()).item()))
            return torch.tensor(0.25)

        model = tiny_gpt2().train()
        history = sequence(model, score=score).run()
        assert model.training
        assert history.baseline == [0.25] * 3
        assert history.scores == [[0.25] * 3] * 3
        assert [name for name, *_ in seen] == list(NAMES) * 4
        assert not any(training or grad for _, training, grad, _ in seen)
        assert len({draw for *_, draw in seen}) == 3

    def test_accuracy_is_the_share_of_rows_that_are_right(self):
        rows = class_rows_of([0, 1, 2], seed=1, count=11)
        rows[4]["labels"] = -100
        model = classifier(3).eval()
        given = {"loss": classification_loss, "score": "accuracy", "settings": settings(learning_rate=0.0)}
        history = sequence(model, [Task("one", rows, rows)], **given).run()
        right = [int(model(torch.tensor([row["input_ids"]])).logits.argmax()) == row["labels"] for row in rows]
        assert history.baseline == [sum(right) / 10] == history.scores[0]
        assert 0 < sum(right) < 10

    def test_none_needs_no_evaluation_rows(self):
        tasks = [dataclasses.replace(task, evaluation=None) for task in language_tasks()]
        history = sequence(tasks=tasks, score=None).run()
        assert (history.baseline, history.scores, len(history.loops)) == ([], [], 3)
        with pytest.raises(ValueError, match='task "maths" has no evaluation rows to be scored on: give Task'):
            sequence(tasks=tasks)
        tasks[0] = language_tasks()[0]
        changed = {"settings": dataclasses.replace(settings(), eval_every=1), "score": None}
        with pytest.raises(ValueError, match='task "french" has no evaluation rows, and eval_every asks for'):
            sequence(tasks=tasks, **changed)
        tasks[1:] = [dataclasses.replace(task, settings={"eval_every": None}) for task in tasks[1:]]
        assert len(sequence(tasks=tasks, **changed).run().loops) == 3

    def test_what_is_no_score(self):
        with pytest.raises(ValueError, match='score of task "maths" must be a finite number; got nan'):
            sequence(score=lambda model, task: float("nan")).run()
        with pytest.raises(ValueError, match="must be a finite number; got None"):
            sequence(score=lambda model, task: None).run()
        with pytest.raises(ValueError, match=r'score must be "accuracy", "loss", a function of .*; got .f1.$'):
            sequence(score="f1")
        with pytest.raises(ValueError, match='"accuracy" is for classifiers, and this model predicts tokens'):
            sequence(score="accuracy").run()
        blank = [{"input_ids": [5, 7, 9], "labels": [-100] * 3}]
        with pytest.raises(ValueError, match='no evaluation row of task "blank" has a target'):
            sequence(tasks=[Task("blank", texts(3, seed=0), blank)]).run()

    def test_evaluations_within_a_task_come_where_they_are_asked_for(self):
        history = sequence(settings=settings(eval_every=2)).run()
        assert ["eval_loss" in row for row in history.loops[1]] == [False, True, True]
        assert not any("eval_loss" in row for rows in sequence().run().loops for row in rows)


class Interrupts(TaskMethod):
    """Ends a run in the middle of a task, where one is named."""

    def __init__(self, index=None):
        self.index = index

    def before_task(self, run):
        if run.index == self.index:
            self.index = None
            run.callbacks.append(Stop(1))


class TestResume:
    @pytest.mark.parametrize("given", ["the same object", "a new model"])
    def test_goes_on_where_it_was_stopped(self, tmp_path, given):
        alone = tiny_gpt2(dropout=0.1)
        wanted = sequence(alone, folder=tmp_path / "alone", methods=[KeepsRows(), Interrupts()]).run()
        model = tiny_gpt2(dropout=0.1)
        made = sequence(model, folder=tmp_path / "cut", methods=[KeepsRows(), Interrupts(1)])
        with pytest.raises(KeyboardInterrupt):
            made.run()
        if given == "a new model":
            model = tiny_gpt2(dropout=0.1)
            made = sequence(model, folder=tmp_path / "cut", methods=[KeepsRows(), Interrupts()])
        history = made.run(resume=True)
        assert equal(weights(model), weights(alone))
        assert history.scores == wanted.scores
        assert [rows.column("loss") for rows in history.loops] == [rows.column("loss") for rows in wanted.loops]

    def test_a_model_of_another_start_is_put_back_where_all_of_it_is_trained(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            sequence(tiny_llama(), folder=tmp_path, methods=[Interrupts(0)]).run()
        other = tiny_llama(seed=3)
        sequence(other, folder=tmp_path, methods=[Interrupts()]).run(resume=True)
        alone = tiny_llama()
        sequence(alone, methods=[Interrupts()]).run()
        assert equal(weights(other), weights(alone))

    def test_a_finished_sequence_is_not_run_again_and_the_model_is_all_that_it_was(self, tmp_path):
        def freeze(run):
            run.model.lm_head.requires_grad_(False)

        def flags(model):
            return [parameter.requires_grad for parameter in model.parameters()]

        model = tiny_llama()
        wanted = sequence(model, folder=tmp_path, methods=[Watches(after=freeze)]).run()
        again, other = tiny_llama(), []
        made = sequence(again, folder=tmp_path, loop=other.append, methods=[Watches(after=freeze)])
        assert (made.run(resume=True), other) == (wanted, [])
        assert equal(weights(again), weights(model))
        assert flags(again) == flags(model)
        assert flags(model).count(False) == 1

    def test_resume_of_nothing_starts(self, tmp_path):
        assert len(sequence(folder=tmp_path).run(resume=True).loops) == 3

    def test_what_lies_in_the_folder(self, tmp_path):
        tasks = [dataclasses.replace(task, name=f"{task.name} / 1.0") for task in language_tasks()]
        model = tiny_llama()
        attach(model, LoRA(rank=3, alpha=6, targets=["q_proj"]))
        sequence(model, tasks, folder=tmp_path, clear=True).run()
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["00-maths-1-0", "01-french-1-0", "02-law-1-0", "step-00000002", "step-00000003"]
        assert sorted(path.name for path in (tmp_path / names[-1]).iterdir()) == [
            "manifest.json", "state.json", "tensors.safetensors"
        ]  # fmt: skip
        assert [list_checkpoints(tmp_path / name) for name in names[:3]] == [[], [], []]
        assert (tmp_path / names[0] / "history.csv").is_file()
        state = read_checkpoint(tmp_path / names[-1])
        assert not state["model"]["bare"]  # what is frozen and as it was counts by its checksum
        assert all("lora_" in name for name in state["model"]["own"])
        json.dumps(state["plan"])

    def test_another_sequence_is_refused(self, tmp_path):
        tasks, folder = language_tasks(), tmp_path / "run"
        sequence(folder=folder, methods=[KeepsRows()]).run()

        def message(text, **changed):
            with pytest.raises(CheckpointError, match=text):
                sequence(**({"folder": folder, "methods": [KeepsRows()]} | changed)).run(resume=True)

        with pytest.raises(CheckpointError, match="already holds a run, up to step-00000003: go on with it by"):
            sequence(folder=folder, methods=[KeepsRows()]).run()
        message("tasks of the sequence: .'maths', 'french', 'law'. in the run, .'french'", tasks=tasks[1:])
        message("methods of the sequence: .'KeepsRows'. in the run, .. now", methods=[])
        message("scoring of the sequence: all in the run, nothing now", score=None)
        other = [dataclasses.replace(tasks[0], train=texts(7, seed=9)), *tasks[1:]]
        message('task "maths" has other train rows than in the run', tasks=other)
        other = [*tasks[:2], dataclasses.replace(tasks[2], evaluation=texts(4, seed=9))]
        message('task "law" has other evaluation rows than in the run', tasks=other)
        other = [tasks[0], dataclasses.replace(tasks[1], settings={"learning_rate": 0.5}), tasks[2]]
        message('task "french": learning_rate was 0.01 in the run and is 0.5 now', tasks=other)
        message("the sequence began with another model: .* is in one of the two only", model=tiny_llama())

    def test_another_frozen_weight_is_refused(self, tmp_path):
        for seed, resume in ((0, False), (1, True)):
            model = tiny_llama(seed=seed)
            attach(model, LoRA(rank=3, alpha=6, targets=["q_proj"]))
            made = sequence(model, folder=tmp_path)
            if resume:
                with pytest.raises(CheckpointError, match="has other values than in the model that the sequence began"):
                    made.run(resume=True)
            else:
                made.run()

    def test_what_was_attached_and_is_not_rebuilt_is_told(self, tmp_path):
        class Attaches(TaskMethod):
            def before_task(self, run):
                attach(run.model, LoRA(rank=3, alpha=6, targets=["q_proj"]), run.task.name)

        sequence(tiny_llama(), folder=tmp_path, methods=[Attaches()]).run()
        with pytest.raises(CheckpointError, match='adapter "maths" in the run, and now nothing has attached it'):
            sequence(tiny_llama(), folder=tmp_path, methods=[Attaches()]).run(resume=True)

    def test_a_task_folder_in_use_is_refused(self, tmp_path):
        run = settings(tmp_path / "01-french")
        TrainingLoop(tiny_gpt2(), texts(7, seed=1), settings=run, collate=collate_padded).fit()
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="01-french already holds a run"):
                sequence(folder=tmp_path).run(resume=resume)

    def test_a_folder_of_a_loop_is_refused(self, tmp_path):
        TrainingLoop(tiny_gpt2(), texts(7, seed=1), settings=settings(tmp_path), collate=collate_padded).fit()
        with pytest.raises(CheckpointError, match=r"it lacks given, .*: it is no sequence's"):
            sequence(folder=tmp_path).run(resume=True)

    def test_what_cannot_be_saved_is_told_before_a_step(self, tmp_path):
        class Odd(TaskMethod):
            def state_dict(self):
                return {"rows": {1, 2}}

        with pytest.raises(TypeError, match=r"saved state must be tensors and JSON values; methods\.0\.rows is a set"):
            sequence(folder=tmp_path, methods=[Odd()]).run()


def test_an_adapter_left_merged_is_refused(tmp_path):
    def after(run):
        merge(run.model)

    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=6, targets=["q_proj"]))
    with pytest.raises(ValueError, match='adapter "default" stands merged in the weights at the end of a task'):
        sequence(model, folder=tmp_path, methods=[Watches(after=after)]).run()


def test_bad_input():
    rows = texts(3, seed=0)
    with pytest.raises(ValueError, match="a sequence needs one task or more; got none"):
        TaskSequence(tiny_gpt2(), [], settings=settings())
    with pytest.raises(ValueError, match='two tasks are called "a": give each a name of its own'):
        sequence(tasks=[Task("a", rows, rows)] * 2)
    with pytest.raises(TypeError, match="tasks must be Task records; got a dict"):
        sequence(tasks=[{"train": rows}])
    with pytest.raises(TypeError, match=r"methods must be TaskMethod objects, .*; got the class KeepsRows"):
        sequence(methods=[KeepsRows])
    with pytest.raises(TypeError, match=r"methods must be TaskMethod objects, .*; got a function"):
        sequence(methods=[lambda model: 0.0])
    with pytest.raises(TypeError, match="a model, that is a torch module, is expected"):
        sequence(model="gpt2")
    with pytest.raises(ValueError, match=r"run\(resume=True\) needs a folder to resume from"):
        sequence().run(resume=True)
    made = sequence()
    made.run()
    with pytest.raises(ValueError, match="this sequence has run already: make a new one of a new model"):
        made.run()
    with pytest.raises(TypeError, match="a task's name must be a string; got 3"):
        Task(3, rows)
    with pytest.raises(ValueError, match="a task needs a name; got ' '"):
        Task(" ", rows)
    with pytest.raises(ValueError, match='the training data of task "a" is empty'):
        Task("a", [])
    with pytest.raises(TypeError, match='the evaluation data of task "a" must be rows with a length and an index'):
        Task("a", rows, {"x": 1})
    with pytest.raises(ValueError, match=r'task "a": "epoch" is no setting of a loop. Did you mean "epochs"'):
        Task("a", rows, settings={"epoch": 3})
    with pytest.raises(ValueError, match='task "a": folder is the sequence\'s'):
        Task("a", rows, settings={"folder": "x"})
    with pytest.raises(ValueError, match="learning_rate must be a number of at least 0; got -1"):
        sequence(tasks=[Task("a", rows, rows, settings={"learning_rate": -1})])
