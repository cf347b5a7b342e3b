"""Methods of a sequence that keep rows, a copy or a basis: what each gives the tasks' loops, by hand."""

import gc
import weakref
from functools import partial

import pytest
import torch
from runs import weights
from sequences import class_rows_of, classifier, language_tasks, settings

from llmtune.adapters.attach import adapter_layers
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_padded
from llmtune.data.mixing import MixedBatches
from llmtune.data.replay import ReplayBuffer
from llmtune.forgetting.cached_teacher import with_teacher
from llmtune.forgetting.dark_replay import DERLoss
from llmtune.forgetting.gem import AveragedGEM
from llmtune.forgetting.orthogonal_lora import OrthogonalLoRA
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.models import tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.sequence import TaskSequence
from llmtune.training.sequence_adapters import AdapterPerTask, InfLoRAPerTask, OrthogonalLoRAPerTask
from llmtune.training.sequence_distill import DistillFromCopy
from llmtune.training.sequence_methods import InterpolatePerTask
from llmtune.training.sequence_replay import AveragedGEMPerTask, DarkReplay, Replay
from llmtune.training.sequence_task import Task, TaskMethod
from llmtune.training.statistics_head import HeadFromStatistics
from llmtune.training.task_heads import HeadPerTask, TaskHeads

ADAPTER = LoRA(rank=3, alpha=6, targets=["q_proj"])
MIXED = partial(MixedBatches, ratio=0.3)


class Looks(TaskMethod):
    def __init__(self, before=lambda run: None, after=lambda run: None):
        self.before, self.after, self.starts, self.ends = before, after, [], []

    def before_task(self, run):
        self.starts.append(self.before(run))

    def after_task(self, run):
        self.ends.append(self.after(run))


def run(model, *methods, tasks=None, **changed):
    given = {"settings": settings(), "collate": collate_padded, "methods": methods, "score": None} | changed
    return TaskSequence(model, tasks or language_tasks(), **given).run()


def class_tasks():
    return [
        Task(name, class_rows_of(labels, seed=n)) for n, (name, labels) in enumerate((("a", (0, 1)), ("b", (3, 4))))
    ]


def classes(model, *methods, **changed):
    return run(model, *methods, tasks=class_tasks(), loss=classification_loss, **changed)


class TestDarkReplay:
    def test_rows_are_kept_with_what_the_model_made_of_them_when_their_task_ended(self):
        model, buffer = classifier(labels=5), ReplayBuffer(6, per_task=True)
        seen = Looks(after=lambda run: weights(run.model))
        losses = Looks(before=lambda run: run.loss)
        classes(model, seen, DarkReplay(buffer, MIXED, alpha=0.5, beta=0.25), losses)
        assert all(isinstance(loss, DERLoss) and loss.loss == classification_loss for loss in losses.starts)
        assert [(loss.alpha, loss.beta) for loss in losses.starts] == [(0.5, 0.25)] * 2
        for task, then in zip(class_tasks(), seen.ends, strict=True):
            teacher = classifier(labels=5)
            teacher.load_state_dict(then)
            kept = [row for row in buffer.rows() if row["labels"] in {own["labels"] for own in task.train}]
            assert len(kept) == 3
            for row, wanted in zip(kept, with_teacher(kept, teacher), strict=True):
                torch.testing.assert_close(row["teacher_logits"], wanted["teacher_logits"])

    def test_replayed_rows_are_held_to_it(self):
        """With a large factor the first task's rows stay where they were, while the second is learned."""
        moved = []
        for alpha in (1e-6, 10.0):
            buffer = ReplayBuffer(13)
            at = Looks(after=lambda run: run.model.eval()(**collate_padded(class_tasks()[0].train)).logits.detach())
            steps = settings(max_steps=15, rows_per_step=5)
            classes(classifier(labels=5), DarkReplay(buffer, MIXED, alpha=alpha), at, settings=steps)
            moved.append((at.ends[1] - at.ends[0]).norm().item())
        assert moved[1] < 0.5 * moved[0]

    def test_a_language_model_keeps_the_likeliest_tokens(self):
        buffer = ReplayBuffer(4)
        history = run(tiny_llama(), DarkReplay(buffer, MIXED, alpha=0.5, k=5))
        assert all(row["teacher_indices"].shape == (5, 5) for row in buffer.rows())
        assert ["distillation" in rows[0] for rows in history.loops] == [False, True, True]
        run(tiny_t5(), DarkReplay(ReplayBuffer(4), MIXED, alpha=0.5, k=5), loss=sequence_to_sequence_loss)

    def test_the_first_task_and_evaluation_are_of_new_rows(self):
        plain, dark = tiny_llama(), tiny_llama()
        first = language_tasks()[:1]
        run(plain, tasks=first)
        run(dark, DarkReplay(ReplayBuffer(4), MIXED, alpha=0.5, k=5), tasks=first)
        assert all(torch.equal(value, weights(dark)[name]) for name, value in weights(plain).items())
        buffers = ReplayBuffer(6), ReplayBuffer(4)
        methods = [DarkReplay(buffers[0], MIXED, alpha=0.5), AveragedGEMPerTask(buffers[1], rows=2)]
        tasks = [Task(task.name, task.train, task.train) for task in class_tasks()]
        history = run(
            classifier(labels=5), *methods, tasks=tasks, loss=classification_loss, settings=settings(eval_every=1)
        )
        assert all(row["eval_loss"] > 0 for row in history.loops[1])

    def test_with_a_copy_as_teacher(self):
        """The teacher gets the rows as a model takes them."""
        model, seen = classifier(labels=5), []
        model.register_forward_pre_hook(lambda module, args, given: seen.append(set(given)), with_kwargs=True)
        classes(model, DarkReplay(ReplayBuffer(6), MIXED, alpha=0.5), DistillFromCopy(0.5))
        assert not any(name.startswith("teacher") for given in seen for name in given)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="alpha must be a finite number, 0 or more; got -1"):
            DarkReplay(ReplayBuffer(4), MIXED, alpha=-1.0)
        with pytest.raises(ValueError, match="k must be a whole number of at least 1; got 0"):
            DarkReplay(ReplayBuffer(4), MIXED, alpha=1.0, k=0)
        with pytest.raises(TypeError, match="a buffer is expected whose add takes prepare="):
            DarkReplay(Bare(), MIXED, alpha=1.0)
        with pytest.raises(TypeError, match="mix is called with the task's rows and the buffer; got None"):
            DarkReplay(ReplayBuffer(4), None, alpha=1.0)
        model = tiny_llama()
        before = weights(model)
        with pytest.raises(ValueError, match="keeps predictions of rows as collate_padded or collate_packed takes"):
            run(model, DarkReplay(ReplayBuffer(4), MIXED, alpha=1.0, k=5), collate=lambda rows: collate_padded(rows))
        with pytest.raises(TypeError, match="the loss must be causal_lm_loss, masked_lm_loss"):
            run(model, DarkReplay(ReplayBuffer(4), MIXED, alpha=1.0), loss=OwnLoss())
        with pytest.raises(ValueError, match="k is needed for a language model"):
            run(model, DarkReplay(ReplayBuffer(4), MIXED, alpha=1.0))
        assert all(torch.equal(value, weights(model)[name]) for name, value in before.items())


class Bare(list):
    def add(self, rows):
        self.extend(rows)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class OwnLoss:
    def __call__(self, model, batch):
        return causal_lm_loss(model, batch)

    def count_targets(self, batch):
        return causal_lm_loss.count_targets(batch)


class TestAveragedGEMPerTask:
    def test_it_is_the_callback_with_rows_of_the_buffer(self):
        model, buffer = tiny_llama(), ReplayBuffer(4, per_task=True)
        seen = Looks(before=lambda run: (run.callbacks[:], run.train_data, run.settings, buffer.rows(), weights(model)))
        run(model, AveragedGEMPerTask(buffer, rows=2), seen, tasks=language_tasks()[:2])
        assert seen.starts[0][0] == []
        (gem,), data, own, stored, start = seen.starts[1]
        assert data == language_tasks()[1].train
        again = tiny_llama()
        again.load_state_dict(start)

        def drawn(step):
            batches = list(gem.memory(step))
            assert [len(batch["input_ids"]) for batch in batches] == [2]
            for row in batches[0]["input_ids"].tolist():
                assert row in [kept["input_ids"] for kept in stored]
            return batches

        assert len({str(drawn(step)) for step in range(9)}) > 1
        loop = TrainingLoop(again, data, settings=own, collate=collate_padded, callbacks=[AveragedGEM(drawn)])
        loop.fit()
        assert all(torch.equal(value, weights(model)[name]) for name, value in weights(again).items())

    def test_rows_without_a_target_give_no_reference_and_memory_is_that_of_a_micro_batch(self):
        tasks = class_tasks()
        some = [{**row, "labels": -100} if n % 2 else row for n, row in enumerate(tasks[0].train)]
        buffer, sizes = ReplayBuffer(13), []

        def collate(rows):
            sizes.append(len(rows))
            return collate_padded(rows)

        seen = Looks(before=lambda run: run.callbacks[:])
        method = AveragedGEMPerTask(buffer, rows=5)
        steps = settings(rows_per_step=4, rows_per_micro_batch=2)
        given = {"loss": classification_loss, "settings": steps, "collate": collate}
        run(classifier(labels=5), method, seen, tasks=[Task("a", some), tasks[1]], **given)
        sizes.clear()
        (gem,) = seen.starts[1]
        assert all(int(label) != -100 for step in range(7) for batch in gem.memory(step) for label in batch["labels"])
        assert sizes == [2, 2, 1] * 7
        bare = ReplayBuffer(4)
        bare.add([{**row, "labels": -100} for row in tasks[0].train])
        with pytest.raises(ValueError, match="none of the 4 stored rows has a target"):
            run(classifier(labels=5), AveragedGEMPerTask(bare), tasks=tasks[1:], loss=classification_loss)

    def test_the_space_reaches_it(self):
        seen = Looks(before=lambda run: [callback.space for callback in run.callbacks])
        run(tiny_llama(), AveragedGEMPerTask(ReplayBuffer(4), space="gradient"), seen)
        assert seen.starts == [[], ["gradient"], ["gradient"]]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="rows must be a whole number of at least 1; got 0"):
            AveragedGEMPerTask(ReplayBuffer(4), rows=0)
        with pytest.raises(ValueError, match='space must be "update" or "gradient"; got \'weights\''):
            AveragedGEMPerTask(ReplayBuffer(4), space="weights")
        with pytest.raises(TypeError, match="a buffer with a length, add, state_dict"):
            AveragedGEMPerTask([])


class TestDistillFromCopy:
    @pytest.mark.parametrize(("which", "wanted"), [("all", None), ("earlier", (0, 1))])
    def test_the_teacher_is_the_model_as_the_task_found_it(self, which, wanted):
        model = classifier(labels=5)
        seen = Looks(before=lambda run: (run.loss, weights(run.model)))
        history = classes(model, DistillFromCopy(0.5, temperature=2.0, classes=which), seen)
        assert seen.starts[0][0] == classification_loss
        loss, start = seen.starts[1]
        assert (loss.loss, loss.strength, loss.temperature, loss.classes) == (classification_loss, 0.5, 2.0, wanted)
        assert all(torch.equal(value, start[name]) for name, value in weights(loss.teacher).items())
        assert not any(parameter.requires_grad for parameter in loss.teacher.parameters())
        first = history.loops[1][0]
        assert first["distillation"] == pytest.approx(0.0, abs=1e-3)  # dropout alone parts the two at the first step

    def test_the_classes_go_round(self):
        method, other = DistillFromCopy(0.5, classes="earlier"), DistillFromCopy(0.5, classes="earlier")
        classes(classifier(labels=5), method)
        other.load_state_dict(method.state_dict())
        assert other.seen == (0, 1, 3, 4)

    def test_one_copy_at_a_time(self):
        alive = []
        seen = Looks(before=lambda run: run.index and alive.append(weakref.ref(run.loss.teacher)))
        counted = Looks(before=lambda run: sum(one() is not None for one in alive))
        run(tiny_llama(), DistillFromCopy(0.5), seen, counted)
        gc.collect()
        assert counted.starts == [0, 1, 1]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="strength must be a finite number, 0 or more; got -1"):
            DistillFromCopy(-1.0)
        with pytest.raises(ValueError, match=r'up to task "one" rows have the labels \[3\] alone'):
            run(
                classifier(), DistillFromCopy(1.0, classes="earlier"), loss=classification_loss,
                tasks=[Task("one", class_rows_of((3,), seed=0))],
            )  # fmt: skip
        with pytest.raises(ValueError, match='classes="earlier" is for classifiers; of a language model'):
            run(tiny_llama(), DistillFromCopy(1.0, classes="earlier"))
        with pytest.raises(ValueError, match='classes must be "all" or "earlier"; got 3'):
            DistillFromCopy(1.0, classes=3)
        bare = [Task("bare", [{"input_ids": [3, 5]}] * 4)]
        with pytest.raises(ValueError, match='row 0 of task "bare" has no "labels"'):
            run(classifier(), DistillFromCopy(1.0, classes="earlier"), tasks=bare, loss=classification_loss)


class TestInterpolatePerTask:
    def test_each_task_but_the_first_goes_part_of_the_way(self):
        model = tiny_llama()
        trained, left = (Looks(after=lambda run: weights(run.model)) for _ in "tl")
        run(model, trained, InterpolatePerTask(0.25, parameters=lambda name: name != "lm_head.weight"), left)
        first, second, third = left.ends
        assert all(torch.equal(value, first[name]) for name, value in trained.ends[0].items())
        for before, after, now in ((first, trained.ends[1], second), (second, trained.ends[2], third)):
            for name, value in now.items():
                if name == "lm_head.weight":
                    assert torch.equal(value, after[name])
                    continue
                wanted = before[name].double() + 0.25 * (after[name].double() - before[name].double())
                torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(first["model.norm.weight"], third["model.norm.weight"])

    def test_nothing_of_a_task_is_left_at_0_and_all_at_1(self):
        ends = {}
        for alpha in (0, 1, None):
            model, seen = tiny_llama(), Looks(after=lambda run: weights(run.model))
            run(model, *([] if alpha is None else [InterpolatePerTask(alpha)]), seen)
            ends[alpha] = seen.ends
        assert all(torch.equal(value, ends[0][0][name]) for name, value in ends[0][2].items())
        assert all(torch.equal(value, ends[1][2][name]) for name, value in ends[None][2].items())

    def test_bad_input(self):
        for alpha in (-0.1, 1.5, True, "0.5", float("nan")):
            with pytest.raises(ValueError, match="alpha must be a number from 0 to 1"):
                InterpolatePerTask(alpha)
        for merge in (False, True):
            adapter, part = AdapterPerTask(ADAPTER, merge=merge), InterpolatePerTask(0.5, parameters=["lm_head.weight"])
            for methods in ((adapter, part), (part, adapter)):
                with pytest.raises(ValueError, match=r"goes back with plain weights, and .* the adapters maths"):
                    run(tiny_llama(), *methods)
        with pytest.raises(ValueError, match=r'no parameter "lm_hed\.weight"'):
            run(tiny_llama(), InterpolatePerTask(0.5, parameters=["lm_hed.weight"]), tasks=language_tasks()[:1])

    def test_where_nothing_is_trained_there_is_no_way_back(self):
        for methods in ([HeadFromStatistics("classifier"), InterpolatePerTask(0.5)],
                        [InterpolatePerTask(0.5), HeadFromStatistics("classifier")]):  # fmt: skip
            model = classifier(labels=5)
            body = weights(model)
            classes(model, *methods)
            assert all(torch.equal(v, body[n]) for n, v in weights(model).items() if not n.startswith("classifier"))


def test_each_lora_is_held_orthogonal_to_the_earlier_ones():
    seen = Looks(before=lambda run: run.penalties)
    run(tiny_llama(), AdapterPerTask(ADAPTER), OrthogonalLoRAPerTask(0.5, form="paper"), seen)
    assert seen.starts == [[], [OrthogonalLoRA(0.5, form="paper")], [OrthogonalLoRA(0.5, form="paper")]]
    with pytest.raises(ValueError, match="form must be one of normalised, paper, code"):
        OrthogonalLoRAPerTask(0.5, form="plain")
    with pytest.raises(ValueError, match=r'the adapter of the earlier task "maths" is gone.*without merge=True'):
        run(tiny_llama(), AdapterPerTask(ADAPTER, merge=True), OrthogonalLoRAPerTask(0.5))
    with pytest.raises(ValueError, match=r'"maths" of its own, and the model has none: put AdapterPerTask'):
        run(tiny_llama(), OrthogonalLoRAPerTask(0.5))


class TestInfLoRAPerTask:
    def test_each_a_stays_where_no_earlier_input_is(self):
        model = tiny_llama()
        method = InfLoRAPerTask(0.9, examples=None)
        seen = Looks(before=lambda run: dict(method.protected), after=lambda run: dict(method.protected))
        run(model, AdapterPerTask(ADAPTER), method, seen)
        for number, name in enumerate(("maths", "french", "law")):
            for layer, (place, q) in zip(adapter_layers(model, name), sorted(seen.ends[2].items()), strict=True):
                assert not layer.lora_a.requires_grad
                assert layer.lora_b.abs().sum() > 0
                if number:
                    basis = seen.starts[number][place]
                    assert (layer.lora_a @ basis).abs().max() < 1e-5
                    assert q.shape[1] > basis.shape[1]
        other = InfLoRAPerTask(0.9)
        other.load_state_dict(method.state_dict())
        assert other.protected.keys() == method.protected.keys()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="energy must be above 0 and at most 1; got 0"):
            InfLoRAPerTask(0)
        with pytest.raises(ValueError, match="examples must be a whole number of at least 1; got 0"):
            InfLoRAPerTask(examples=0)
        with pytest.raises(ValueError, match=r'"maths" of its own, and the model has none: put AdapterPerTask'):
            run(tiny_llama(), InfLoRAPerTask())


@pytest.mark.parametrize(
    "make",
    [lambda: Replay(ReplayBuffer(4), MIXED), lambda: DarkReplay(ReplayBuffer(4), MIXED, alpha=1.0),
     lambda: AveragedGEMPerTask(ReplayBuffer(4)), lambda: DistillFromCopy(1.0)],
)  # fmt: skip
def test_old_rows_and_teachers_do_not_go_through_another_tasks_head(make):
    model = classifier(2)
    model.classifier = TaskHeads({"a": 2, "b": 5}, 22)
    for methods in ((HeadPerTask(), make()), (make(), HeadPerTask())):
        with pytest.raises(ValueError, match="the model has TaskHeads, of which the task's own is in use"):
            classes(model, *methods)


def test_two_methods_do_not_share_a_buffer():
    buffer = ReplayBuffer(4)
    with pytest.raises(ValueError, match="two methods keep rows in one buffer"):
        run(tiny_llama(), Replay(buffer, MIXED), AveragedGEMPerTask(buffer))
