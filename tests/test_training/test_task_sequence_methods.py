"""The methods of a sequence of tasks: what each gives the tasks' loops, by hand, and that it protects."""

import dataclasses

import pytest
import torch
from runs import equal, weights
from sequences import class_rows_of, classifier, language_tasks, settings, texts

from llmtune.adapters.attach import adapter_names, adapter_parameters, attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.effective import anchor_of
from llmtune.adapters.layer import bare_module
from llmtune.adapters.stack import AdapterStack
from llmtune.data.collate import collate_padded
from llmtune.forgetting.fisher import diagonal_fisher
from llmtune.forgetting.mas import MemoryAwareSynapses
from llmtune.forgetting.online_ewc import OnlineEWC
from llmtune.forgetting.synaptic import SynapticIntelligence
from llmtune.losses.classification import classification_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.models import tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.sequence import TaskSequence
from llmtune.training.sequence_adapters import AdapterPerTask, adapter_name
from llmtune.training.sequence_distill import DistillFromEarlier
from llmtune.training.sequence_methods import EWCPerTask, L2SPToLast, OverTasks
from llmtune.training.sequence_replay import Replay
from llmtune.training.sequence_task import Task, TaskMethod
from llmtune.training.task_heads import HeadPerTask, TaskHeads
from llmtune.types import Callback

ADAPTER = LoRA(rank=3, alpha=6, targets=["q_proj"])


HELD = [*(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)), "lm_head.weight"]
PARTS = {
    "online EWC": lambda: (
        OnlineEWC(5.0, parameters=HELD),
        lambda part, run: part.finish_task(run.model, run.batches(), kind="empirical"),
    ),
    "SI": lambda: (SynapticIntelligence(5.0), lambda part, run: part.finish_task(run.model)),
    "MAS": lambda: (
        MemoryAwareSynapses(5.0, parameters=HELD),
        lambda part, run: part.finish_task(run.model, run.batches()),
    ),
}


class Looks(TaskMethod):
    """Notes what a function of the run gives, before each task and after it."""

    def __init__(self, before=None, after=None):
        self.found = []
        self.before = before or (lambda run: None)
        self.after = after or (lambda run: None)

    def before_task(self, run):
        self.found.append(self.before(run))

    def after_task(self, run):
        self.found.append(self.after(run))


def run(model, *methods, tasks=None, **changed):
    given = {"settings": settings(), "collate": collate_padded, "methods": methods} | changed
    return TaskSequence(model, tasks or language_tasks(), **given).run()


class TestEWCPerTask:
    def test_it_is_the_sum_over_the_earlier_tasks(self):
        model, method = tiny_llama(), EWCPerTask(7.0, kind="empirical")
        taken = Looks(after=lambda run: (diagonal_fisher(run.model, run.batches(), kind="empirical"), weights(model)))
        seen = Looks(before=lambda run: [penalty(model).item() for penalty in run.penalties])
        history = run(model, method, taken, seen)
        of_tasks = [pair for pair in taken.found if pair is not None]
        for place, penalties in enumerate(seen.found[::2]):
            now = of_tasks[place - 1][1]
            by_hand = [
                3.5
                * sum((f.double() * (now[n].double() - then[n].double()) ** 2).sum().item() for n, f in fisher.items())
                for fisher, then in of_tasks[:place]
            ]
            assert penalties == pytest.approx(by_hand, rel=1e-4)
        assert seen.found[4][0] > 0 == seen.found[4][1]  # the last task is where it was, the one before has moved
        assert ["penalty" in rows[0] for rows in history.loops] == [False, True, True]

    def test_it_protects(self):
        """On the first task, the stronger the less is lost; at a huge strength nothing that matters moves."""
        lost = []
        tasks = [Task(task.name, task.train, task.train) for task in language_tasks()]
        for strength in (0.0, 1e6):
            method = EWCPerTask(strength, kind="empirical")
            history = run(tiny_llama(), method, tasks=tasks, settings=settings(max_steps=12))
            lost.append(history.scores[0][0] - history.scores[2][0])
        assert lost[0] > 0.3
        assert lost[1] < 0.3 * lost[0]

    def test_what_is_held_may_be_half_as_large(self):
        """Rounded once, and the penalty is that of what was rounded."""
        whole, half = EWCPerTask(7.0, kind="empirical"), EWCPerTask(7.0, kind="empirical", dtype=torch.bfloat16)
        tasks = language_tasks()[:1]
        for method in (whole, half):
            run(tiny_llama(), method, tasks=tasks)
        for part in ("fisher", "anchor"):
            for name, value in whole.held["maths"][part].items():
                assert half.held["maths"][part][name].dtype == torch.bfloat16
                torch.testing.assert_close(half.held["maths"][part][name].float(), value, rtol=1 / 128, atol=1e-30)
        again = EWCPerTask(7.0, dtype=torch.bfloat16)
        again.load_state_dict(half.state_dict())
        run_now = TaskSequence(tiny_llama(), language_tasks(), settings=settings(), methods=[again])._arranged(0)
        (penalty,) = run_now.penalties
        assert all(value.dtype == torch.bfloat16 for value in penalty.fisher.values())
        with pytest.raises(ValueError, match="dtype must be one of"):
            EWCPerTask(7.0, dtype=torch.int8)

    def test_a_number_of_examples_and_names(self):
        def head(name):
            return name.startswith("lm_head")

        method = EWCPerTask(1.0, examples=2, parameters=head)
        run(tiny_llama(), method)
        assert [list(held["fisher"]) for held in method.held.values()] == [["lm_head.weight"]] * 3

    def test_the_state_goes_round_and_takes_the_place_of_what_was_there(self):
        method, other = EWCPerTask(1.0), EWCPerTask(1.0)
        run(tiny_llama(), method)
        run(tiny_llama(seed=1), other, tasks=[Task("else", texts(3, seed=0), texts(3, seed=0))])
        other.load_state_dict(method.state_dict())
        assert list(other.held) == ["maths", "french", "law"]
        for name, held in method.held.items():
            assert all(equal(other.held[name][part], held[part]) for part in ("fisher", "anchor"))

    def test_bad_input(self):
        with pytest.raises(ValueError, match="strength must be a finite number, 0 or more; got -1"):
            EWCPerTask(-1.0)
        with pytest.raises(ValueError, match="examples must be a whole number of at least 1; got 0"):
            EWCPerTask(1.0, examples=0)
        with pytest.raises(ValueError, match="kind must be one of sampled, exact, empirical; got 'emprical'"):
            EWCPerTask(1.0, kind="emprical")
        with pytest.raises(ValueError, match="unit must be one of sequence, token; got 'row'"):
            EWCPerTask(1.0, unit="row")


def test_l2sp_is_anchored_where_each_task_but_the_first_begins():
    model = tiny_llama()
    anchors = Looks(before=lambda run: weights(model))
    seen = Looks(before=lambda run: len(run.penalties), after=lambda run: [p(model).item() for p in run.penalties])
    run(model, L2SPToLast(3.0, new=("lm_head.weight",)), anchors, seen, Looks())
    assert seen.found[::2] == [0, 1, 1]
    now = weights(model)
    by_hand = 1.5 * sum(
        (now[n].double() - then.double()).square().sum().item()
        for n, then in anchors.found[4].items()
        if n != "lm_head.weight"
    )
    assert seen.found[5] == pytest.approx([by_hand], rel=1e-5)


class TestAdapterPerTask:
    def test_the_earlier_ones_stay_as_they_were(self):
        model = tiny_llama()
        base = weights(model)

        def look(run):
            return {n: [p.clone() for p in adapter_parameters(model, n).values()] for n in adapter_names(model)}

        def same(one, other):
            return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

        seen = Looks(after=look)
        run(model, AdapterPerTask(ADAPTER, also=("lm_head",)), seen)
        stacks = seen.found[1::2]
        assert [list(stack) for stack in stacks] == [["maths"], ["maths", "french"], ["maths", "french", "law"]]
        assert same(stacks[0]["maths"], stacks[2]["maths"])
        assert same(stacks[1]["french"], stacks[2]["french"])
        assert AdapterStack(model).trained == ["law"]
        now = weights(model)
        changed = [n for n, p in base.items() if n in now and not torch.equal(p, now[n])]
        assert changed == ["lm_head.weight"]

    @pytest.mark.parametrize("alone", [False, True])
    def test_an_earlier_adapter_of_what_goes_on_stays_too(self, alone):
        model = tiny_llama()
        seen = Looks(after=lambda run: [p.clone() for p in adapter_parameters(model, "maths").values()])
        adapter = dataclasses.replace(ADAPTER, targets=["q_proj", "lm_head"])
        run(model, AdapterPerTask(adapter, also=("lm_head",), alone=alone), seen)
        first, *later = seen.found[1::2]
        assert len(first) == 6
        assert all(torch.equal(a, b) for end in later for a, b in zip(end, first, strict=True))
        assert AdapterStack(model).trained == ["law"]

    def test_merged_none_is_left_and_the_weights_have_it_all(self):
        model, weight = tiny_llama(), "model.layers.0.self_attn.q_proj.weight"
        before = weights(model)
        ends, merged = (
            Looks(after=lambda run: anchor_of(model, [weight])[weight]),
            Looks(after=lambda run: weights(model)),
        )
        ewc = EWCPerTask(1.0, examples=2)
        run(model, ends, AdapterPerTask(ADAPTER, merge=True), ewc, merged)
        assert adapter_names(model) == []
        for wide, now in zip(ends.found[1::2], merged.found[1::2], strict=True):
            torch.testing.assert_close(now[weight], wide)
            assert now.keys() == before.keys()
        assert sorted(n for n, p in weights(model).items() if not torch.equal(p, before[n])) == [
            f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)
        ]
        assert [sorted(held["anchor"]) for held in ewc.held.values()] == [[weight, weight.replace("0", "1")]] * 3
        assert torch.equal(ewc.held["law"]["anchor"][weight], model.get_parameter(weight))

    @pytest.mark.parametrize("kind", PARTS)
    def test_what_holds_the_model_after_each_merge(self, kind):
        """The task's importance is that of the adapter as it was trained; the anchor is the merged weight."""
        weight, found = "model.layers.1.self_attn.q_proj.weight", {}
        for merge in (False, True):
            model, (part, finish) = tiny_llama(), PARTS[kind]()
            seen = Looks(after=lambda run, part=part: part.importance[weight].clone())
            history = run(model, AdapterPerTask(ADAPTER, merge=merge, also=("lm_head",)), OverTasks(part, finish), seen)
            found[merge] = seen.found[1]
            assert part.tasks == 3
            assert [max(rows.column("penalty")) > 0 for rows in history.loops] == [False, True, True]
            assert set(part.importance) == set(HELD)
        torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-6 * float(found[False].max()))
        assert adapter_names(model) == []
        model.get_parameter(weight).requires_grad_(True)
        assert part(model).item() == 0
        with torch.no_grad():
            model.get_parameter(weight).add_(0.5)
        assert part(model).item() == pytest.approx(0.5 * part.strength * 0.25 * float(part.importance[weight].sum()))

    def test_synaptic_intelligence_goes_on_where_a_run_has_ended_at_a_merge(self, tmp_path):
        def go(folder, dies=None):
            def finish(part, run):
                if run.index == dies:
                    raise RuntimeError("the power goes")
                part.finish_task(run.model)

            model, part = tiny_llama(), SynapticIntelligence(5.0)
            methods = [AdapterPerTask(ADAPTER, merge=True), OverTasks(part, finish)]
            TaskSequence(
                model, language_tasks(), settings=settings(folder), collate=collate_padded, methods=methods, score=None
            ).run(resume=True)
            return weights(model), part.importance

        with pytest.raises(RuntimeError, match="the power goes"):
            go(tmp_path / "one", dies=1)
        for found, expected in zip(go(tmp_path / "one"), go(tmp_path / "two"), strict=True):
            assert equal(found, expected)

    def test_what_holds_the_model_before_each_merge_is_refused(self):
        part, finish = PARTS["online EWC"]()
        with pytest.raises(
            ValueError, match="merged at the end of its task is merged before the penalty's finish_task"
        ):
            run(tiny_llama(), OverTasks(part, finish), AdapterPerTask(ADAPTER, merge=True))

    def test_bad_input(self):
        with pytest.raises(TypeError, match="also must be a list of beginnings of names; got the one string 'head'"):
            AdapterPerTask(ADAPTER, also="head")
        with pytest.raises(
            ValueError, match=r'no parameter of the model begins with "lm_haed".* Did you mean "lm_head'
        ):
            run(tiny_llama(), AdapterPerTask(ADAPTER, also=["lm_haed"]))


def test_what_goes_on_is_named_by_its_bare_name_and_once():
    """Also where the first task's adapter has gone around it."""
    model = tiny_llama()
    before = model.lm_head.weight.clone()
    adapter = dataclasses.replace(ADAPTER, targets=["q_proj", "lm_head"])
    run(model, AdapterPerTask(adapter, also=["lm_head.weight"]))
    assert bare_module(model.lm_head).weight.requires_grad
    assert not torch.equal(bare_module(model.lm_head).weight, before)
    copied = dataclasses.replace(ADAPTER, train_modules=["lm_head"])
    with pytest.raises(ValueError, match=r'also names "lm_head", of which each task has a copy that runs in its place'):
        run(tiny_llama(), AdapterPerTask(copied, also=["lm_head"]))


def test_a_head_beside_the_adapters_would_be_the_earlier_models_too():
    with pytest.raises(
        ValueError, match=r"lm_head.weight is trained beside the adapters, so that the earlier model would"
    ):
        run(tiny_llama(), AdapterPerTask(ADAPTER, also=("lm_head",)), DistillFromEarlier(0.5))
    inside = dataclasses.replace(ADAPTER, train_modules=["lm_head"])
    history = run(tiny_llama(), AdapterPerTask(inside), DistillFromEarlier(0.5))
    assert [rows[0]["distillation"] == 0 for rows in history.loops] == [True] * 3  # each begins as what was before it


def test_what_is_distilled_from_is_the_model_without_what_is_trained():
    seen = Looks(before=lambda run: (run.loss.teacher, run.loss.strength, run.loss.temperature))
    history = run(tiny_llama(), AdapterPerTask(ADAPTER), DistillFromEarlier(0.5, temperature=2.0), seen)
    assert seen.found[::2] == [((), 0.5, 2.0), (("maths",), 0.5, 2.0), (("maths", "french"), 0.5, 2.0)]
    assert all(rows[0]["distillation"] == 0 for rows in history.loops)
    model = tiny_llama()
    attach(model, ADAPTER)
    seen = Looks(before=lambda run: run.loss.teacher)
    run(model, DistillFromEarlier(0.5), seen)
    assert seen.found[::2] == [(), (), ()]
    with pytest.raises(ValueError, match="strength must be a finite number, 0 or more; got -1"):
        DistillFromEarlier(-1.0)


class Pull:
    """Pulls the head to the mean of where the tasks had left it."""

    def __init__(self):
        self.ends = []

    def __call__(self, model):
        there = torch.stack(self.ends).mean(0) if self.ends else 0.0
        return (model.lm_head.weight - there).square().sum()

    def state_dict(self):
        return {"ends": self.ends}

    def load_state_dict(self, state):
        self.ends = state["ends"]


def test_one_penalty_for_all_tasks_hears_of_each():
    model, penalty = tiny_llama(), Pull()
    method = OverTasks(penalty, lambda own, run: own.ends.append(run.model.lm_head.weight.detach().clone()))
    seen = Looks(after=lambda run: model.lm_head.weight.detach().clone())
    run(model, method, seen)
    assert len(penalty.ends) == 3
    assert all(torch.equal(one, other) for one, other in zip(penalty.ends, seen.found[1::2], strict=True))
    assert method.state_dict()["ends"] is penalty.ends
    other = OverTasks(Pull(), print)
    other.load_state_dict(method.state_dict())
    assert len(other.part.ends) == 3


def test_a_callback_over_all_tasks_watches_each():
    class Steps(Callback):
        steps = 0

        def on_step_end(self, loop, metrics):
            self.steps += 1

    part, ends, starts = Steps(), [], []
    method = OverTasks(
        part,
        lambda own, run: ends.append((own is part, run.task.name, own.steps)),
        start=lambda own, run: starts.append((own is part, own.steps)),
    )
    run(tiny_llama(), method)
    assert starts == [(True, 0), (True, 3), (True, 6)]
    assert ends == [(True, "maths", 3), (True, "french", 6), (True, "law", 9)]
    with pytest.raises(TypeError, match=r"must have state_dict and load_state_dict; .* has no state_dict"):
        OverTasks(lambda model: 0.0, print)
    with pytest.raises(TypeError, match=r"a penalty, .* or a Callback is expected; got <class .*OnlineEWC'>"):
        OverTasks(OnlineEWC, print)
    with pytest.raises(TypeError, match="finish and start are called with the part and the run; got None and None"):
        OverTasks(OnlineEWC(1.0), None)
    with pytest.raises(TypeError, match=r"a penalty, called with the model, or a Callback is expected; got 3"):
        OverTasks(3, print)


class Kept(list):
    """A buffer of each task's first rows."""

    def __init__(self, per_task=False):
        self.per_task, self.told = per_task, []

    def add(self, rows, **named):
        self.told.append(named)
        self.extend(rows[:2])

    def state_dict(self):
        return {"rows": list(self)}

    def load_state_dict(self, state):
        self[:] = state["rows"]


@pytest.mark.parametrize("per_task", [False, True])
def test_rows_of_the_earlier_tasks_are_mixed_in_and_only_own_ones_kept(per_task):
    buffer, tasks = Kept(per_task), language_tasks()
    method = Replay(buffer, lambda new, old: [*new, *old])
    seen = Looks(before=lambda run: list(run.train_data))
    run(tiny_llama(), method, seen, tasks=tasks)
    first, second, third = (task.train for task in tasks)
    assert seen.found[::2] == [first, [*second, *first[:2]], [*third, *first[:2], *second[:2]]]
    assert buffer.told == ([{"task": task.name} for task in tasks] if per_task else [{}] * 3)
    other = Replay(Kept(), print)
    other.load_state_dict(method.state_dict())
    assert list(other.buffer) == list(buffer)
    with pytest.raises(TypeError, match=r"a buffer with a length, add, state_dict and .* expected; got \[\]"):
        Replay([], print)


class TestHeads:
    def tasks(self, through):
        """Two tasks of two classes each, labelled through, or from 0 in each."""
        labels = ([0, 1], [2, 3]) if through else ([0, 1], [0, 1])
        return [
            Task(n, class_rows_of(k, seed=i), class_rows_of(k, seed=i))
            for i, (n, k) in enumerate(zip("ab", labels, strict=True))
        ]

    def train(self, model, through, *methods):
        given = {"loss": classification_loss, "score": "accuracy", "tasks": self.tasks(through)}
        return run(model, *methods, **given, settings=settings(max_steps=25, rows_per_step=13, schedule="constant"))

    def test_one_head_for_all_classes_forgets_the_first(self):
        history = self.train(classifier(4), True)
        assert [history.scores[0][0], history.scores[1][1]] == [1.0, 1.0]
        assert history.scores[1][0] < 0.2

    def test_a_head_for_each_task_is_trained_and_scored_as_the_tasks(self):
        model = classifier(2)
        model.classifier = TaskHeads({"a": 2, "b": 2}, 22)
        seen = Looks(after=lambda run: (model.classifier.current, weights(model)))
        history = self.train(model, False, HeadPerTask(), seen)
        (first, one), (second, two) = seen.found[1::2]
        assert (first, second) == ("a", "b")
        assert torch.equal(one["classifier.heads.task_a.weight"], two["classifier.heads.task_a.weight"])
        assert not torch.equal(one["classifier.heads.task_b.weight"], two["classifier.heads.task_b.weight"])
        assert [history.scores[0][0], history.scores[1][1]] == [1.0, 1.0]
        assert model.classifier.current == "b"
        with HeadPerTask().around_scoring(model, self.tasks(False)[0]):
            assert model.classifier.current == "a"
        assert model.classifier.current == "b"
        model.classifier.use("a")
        rows = self.tasks(False)[0].evaluation
        right = [int(model(torch.tensor([row["input_ids"]])).logits.argmax()) == row["labels"] for row in rows]
        assert history.scores[1][0] == sum(right) / len(rows)

    def test_under_ewc_a_head_counts_for_its_own_task_alone(self):
        model = classifier(2)
        model.classifier = TaskHeads({"a": 2, "b": 2}, 22)
        method = EWCPerTask(1.0)
        self.train(model, False, HeadPerTask(), method)
        fisher = method.held["a"]["fisher"]
        heads = [[name for name in held["fisher"] if "heads.task" in name] for held in method.held.values()]
        assert heads == [[f"classifier.heads.task_{n}.{part}" for part in ("weight", "bias")] for n in "ab"]
        assert fisher["classifier.heads.task_a.weight"].sum() > 0

    def test_an_adapter_that_trains_the_heads_has_them_switched_too(self):
        model = classifier(2)
        model.classifier = TaskHeads({"a": 2, "b": 3}, 22)
        attach(model, LoRA(rank=3, alpha=6, targets=["query"], train_modules=["classifier"]))
        seen = Looks(after=lambda run: [m.current for m in model.modules() if isinstance(m, TaskHeads)])
        self.train(model, False, HeadPerTask(), seen)
        assert seen.found[1::2] == [["a", "a"], ["b", "b"]]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="the model has no heads to choose from: put TaskHeads"):
            self.train(classifier(2), False, HeadPerTask())
        model = classifier(2)
        model.classifier = TaskHeads({"a": 2, "other": 2}, 22)
        with pytest.raises(ValueError, match='no head is called "b"; there are a, other'):
            self.train(model, False, HeadPerTask())
        model.classifier = TaskHeads({"a": 2, "b": 2}, 22)
        attach(model, LoRA(rank=3, alpha=6, targets=["query"]))
        with pytest.raises(ValueError, match="the heads are frozen, and a task would be learned through a random one"):
            self.train(model, False, HeadPerTask())
        with pytest.raises(ValueError, match="heads for no task: give"):
            TaskHeads({}, 5)
        with pytest.raises(ValueError, match=r'"a\.b" is no name of a module: leave dots out'):
            TaskHeads({"a.b": 2}, 5)
        with pytest.raises(ValueError, match='the head of "a" needs 2 classes or more; got 1'):
            TaskHeads({"a": 1}, 5)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_encoder_decoder_goes_through_all_of_it(adapted):
    model = tiny_t5()
    methods = [EWCPerTask(1.0, examples=2), L2SPToLast(0.1)]
    if adapted:
        methods = [AdapterPerTask(LoRA(rank=3, alpha=6, targets=["q"])), DistillFromEarlier(0.5), *methods]
    history = run(model, *methods, loss=sequence_to_sequence_loss, settings=settings(max_steps=2))
    assert [len(row) for row in history.scores] == [3, 3, 3]
    assert history.loops[2][1]["penalty"] > 0


def test_a_task_of_any_name_gets_an_adapter():
    model, names = tiny_gpt2(), ("my_task", "a/b", "a b")
    tasks = [dataclasses.replace(task, name=name) for task, name in zip(language_tasks(), names, strict=True)]
    methods = [AdapterPerTask(LoRA(rank=2, alpha=4))]
    TaskSequence(model, tasks, settings=settings(), collate=collate_padded, methods=methods, score=None).run()
    assert adapter_names(model) == ["my_task", "a-b-07f4401c", "a-b-806c5cd3"]
    assert adapter_name("数学") != adapter_name("法语")
    assert adapter_name("数学").startswith("task-")


@pytest.mark.parametrize(("name", "count"), [("examples", 0), ("rows", -2)])
def test_batches_of_no_rows_are_refused(name, count):
    class Asks(TaskMethod):
        def before_task(self, run):
            list(run.batches(**{name: count}))

    tasks = language_tasks()[:1]
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1; got {count}"):
        TaskSequence(tiny_gpt2(), tasks, settings=settings(), collate=collate_padded, methods=[Asks()]).run()
