"""The sequence's method that makes the head out of statistics, and adapters that stand alone."""

import pytest
import torch
from runs import equal, weights
from sequences import class_rows_of, classifier, settings
from transformers import LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

from llmtune.adapters import LoRA, active, attach
from llmtune.adapters.attach import adapter_names
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError
from llmtune.forgetting.class_statistics import ClassStatistics
from llmtune.losses.classification import ClassificationLoss, classification_loss
from llmtune.losses.embedding import sentence_embeddings
from llmtune.losses.own_classes import OwnClassesLoss
from llmtune.testing.models import tiny_llama
from llmtune.training.sequence import TaskSequence
from llmtune.training.sequence_adapters import AdapterPerTask
from llmtune.training.sequence_methods import OwnClasses
from llmtune.training.sequence_task import Task, TaskMethod
from llmtune.training.statistics_head import HeadFromStatistics


def tasks():
    parts = [class_rows_of(labels, seed=n) for n, labels in enumerate([(0, 1), (2, 3, 4)])]
    return [Task(f"part {n}", rows, rows) for n, rows in enumerate(parts)]


def run(model, *methods, some=None, **changed):
    given = {"settings": settings(), "collate": collate_padded, "loss": classification_loss, "score": "accuracy"}
    return TaskSequence(model, some or tasks(), methods=methods, **(given | changed)).run()


def entering(model, rows):
    seen = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(**{name: value for name, value in collate_padded(rows).items() if name != "labels"})
    handle.remove()
    return seen[0]


def test_the_head_is_that_of_all_rows_and_nothing_else_moves():
    model = classifier(labels=5)
    before, method = weights(model), HeadFromStatistics("classifier", shrinkage=0.3)
    history = run(model, method)
    assert [len(steps) for steps in history.loops] == [0, 0]
    statistics = ClassStatistics(5, model.config.hidden_size)
    for task in tasks():
        statistics.add(entering(model, task.train), torch.tensor([row["labels"] for row in task.train]))
    weight, bias = statistics.head(shrinkage=0.3)
    torch.testing.assert_close(model.classifier.weight.data, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.classifier.bias.data, bias, rtol=1e-3, atol=1e-4)
    body = [name for name in before if not name.startswith("classifier")]
    assert equal({n: before[n] for n in body}, {n: weights(model)[n] for n in body})
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_order_of_tasks_changes_nothing():
    found = []
    for some in (tasks(), tasks()[::-1]):
        model = classifier(labels=5)
        run(model, HeadFromStatistics("classifier"), some=some)
        found.append(model.classifier.weight.data)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_first_task_alone_is_trained_where_that_is_asked_for():
    model = classifier(labels=5)
    before = weights(model)
    history = run(model, HeadFromStatistics("classifier", adapt_first=True))
    assert [len(steps) for steps in history.loops] == [3, 0]
    assert any(not torch.equal(before[name], now) for name, now in weights(model).items() if "layer" in name)


def test_what_enters_the_head_may_be_said():
    model = classifier(labels=5)
    run(model, HeadFromStatistics("classifier", embed=lambda model, batch: sentence_embeddings(model, batch) * 2))
    assert model.classifier.weight.abs().sum() > 0


def test_a_decoder_gives_its_last_token():
    model = LlamaForSequenceClassification(tiny_llama().config)
    model.config.pad_token_id, model.num_labels = 0, 5
    with pytest.raises(ValueError, match=r"with a weight .* and a bias"):
        HeadFromStatistics("score").before_task(TaskRunOf(model))
    model.score = torch.nn.Linear(model.config.hidden_size, 5)
    with pytest.raises(ValueError, match=r"one vector a row.*embed="):
        run(model, HeadFromStatistics("score"), score=None)
    method = HeadFromStatistics("score", embed=lambda model, batch: sentence_embeddings(model, batch, pooling="last"))
    history = run(model, method)
    assert history.scores[0][0] > 0.9  # the two words that tell the first task's classes apart
    states = model.eval().model(input_ids=torch.tensor([[3, 60, 70]])).last_hidden_state[:, -1]
    torch.testing.assert_close(model(input_ids=torch.tensor([[3, 60, 70]])).logits, model.score(states))


def lora(**options):
    return LoRA(**({"rank": 3, "alpha": 6, "targets": ["query"]} | options))


@pytest.mark.parametrize("wrap", [
    lambda model: model,
    lambda model: attach(model, lora(train_modules=["classifier"])) and model,
    pytest.param(lambda model: model.compile(backend="eager") or model,  # in place, and compiled without the hook by
                 marks=pytest.mark.slow),                                # the first score
    lambda model: torch.compile(model, backend="eager"),
    torch.nn.DataParallel,
    lambda model: model.bfloat16(),
    lambda model: model.double(),
], ids=["plain", "adapter", "compiled", "torch.compile", "parallel", "bfloat16", "float64"])  # fmt: skip
def test_the_head_that_runs_is_the_one_that_is_set(wrap):
    model = classifier(labels=5)
    method = HeadFromStatistics("classifier", adapt_first=wrap is not torch.nn.DataParallel)  # which no loop takes
    run(wrap(model), method)
    weight, bias = method.statistics.head()
    head = model.classifier
    x = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(head.weight.dtype)
    wanted = torch.nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    torch.testing.assert_close(head(x), wanted)


class TwoLayers(torch.nn.Module):
    """A head of two layers, as RoBERTa's."""

    def __init__(self, width, classes):
        super().__init__()
        self.dense, self.out_proj = torch.nn.Linear(width, width), torch.nn.Linear(width, classes)

    def forward(self, x):
        return self.out_proj(self.dense(x).tanh())


def test_a_layer_inside_of_a_copied_head_is_found():
    model = classifier(labels=5)
    model.classifier = TwoLayers(model.config.hidden_size, 5)
    attach(model, lora(train_modules=["classifier"]))
    method = HeadFromStatistics("classifier.out_proj", adapt_first=True)
    run(model, method)
    assert torch.equal(model.classifier.copy.out_proj.weight.data, method.statistics.head()[0])
    assert not torch.equal(model.classifier.base.out_proj.weight, model.classifier.copy.out_proj.weight)


def test_a_head_that_an_adapter_changes_or_something_computes_is_refused():
    model = classifier(labels=5)
    attach(model, lora(targets=["query", "classifier"]), "mine")
    with pytest.raises(ValueError, match=r'"mine" changes what "classifier" gives.*train_modules'):
        run(model, HeadFromStatistics("classifier"))
    model = classifier(labels=5)
    torch.nn.utils.parametrizations.weight_norm(model.classifier)
    with pytest.raises(ValueError, match="a bias of its own; found ParametrizedLinear"):
        run(model, HeadFromStatistics("classifier"))
    model.classifier = Conv1D(5, model.config.hidden_size)  # whose weight is [E, C]
    with pytest.raises(ValueError, match="found Conv1D"):
        run(model, HeadFromStatistics("classifier"))


def test_tasks_of_one_class_each():
    single = [Task(f"{c}", class_rows_of((c,), seed=c), class_rows_of((c,), seed=c)) for c in range(3)]
    history = run(classifier(labels=5), HeadFromStatistics("classifier"), some=single)
    assert history.scores[0] == [1.0, 0.0, 0.0]
    assert history.scores[2] == [1.0, 1.0, 1.0]


def test_where_a_row_is_refused_nothing_of_the_task_was_added():
    method = HeadFromStatistics("classifier")
    bad = class_rows_of((0, 1), seed=0)
    bad[-1]["labels"] = 5
    with pytest.raises(ValueError, match="from 0 to 4"):
        run(classifier(labels=5), method, some=[Task("bad", bad)], score=None)
    assert method.statistics is None
    with pytest.raises(ValueError, match='must have "labels"'):
        run(classifier(labels=5), method, some=[Task("bare", [{"input_ids": [3, 5]}] * 4)], score=None)


class TaskRunOf:
    """As much of a run as the check looks at."""

    def __init__(self, model):
        self.model, self.index = model, 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="nothing of that name"):
        run(classifier(labels=5), HeadFromStatistics("score"))
    with pytest.raises(ValueError, match="shrinkage"):
        HeadFromStatistics("classifier", shrinkage=2.0)
    with pytest.raises(TypeError, match="embed a function"):
        HeadFromStatistics("classifier", embed="mean")
    with pytest.raises(CheckpointError, match="sums"):
        HeadFromStatistics("classifier").load_state_dict({"held": []})
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        run(classifier(labels=5).half(), HeadFromStatistics("classifier", shrinkage=1e-9, embed=too_alike))
    with pytest.raises(ValueError, match="merge or alone"):
        AdapterPerTask(LoRA(rank=3, alpha=6), merge=True, alone=True)


def too_alike(model, batch):
    generator = torch.Generator().manual_seed(int(batch["input_ids"][0, 0]))
    return batch["input_ids"][:, :1] + 1e-5 * torch.randn(1, model.config.hidden_size, generator=generator)


def test_own_classes_are_those_of_the_tasks_rows():
    seen = []

    class Notes(TaskMethod):
        def before_task(self, run):
            seen.append(run.loss)

    model = classifier(labels=5)
    before = weights(model)["classifier.weight"][:2]
    rows = class_rows_of((2, 3, 4), seed=1)
    run(model, OwnClasses(), Notes(), some=[Task("part 1", [*rows, {"input_ids": [3, 5], "labels": -100}], rows)])
    assert seen == [OwnClassesLoss((2, 3, 4))]
    assert torch.equal(weights(model)["classifier.weight"][:2], before)  # other classes' rows of the head stand still


def test_own_classes_refuse_what_they_cannot_tell_apart_or_would_lose():
    single, bare = [Task("one", class_rows_of((3,), seed=0))], [Task("bare", [{"input_ids": [3, 5]}] * 4)]
    floats = [Task("floats", [{"input_ids": [3, 5], "labels": 0.5 * n} for n in range(3)])]
    for some, error, words in (
        (single, ValueError, r'task "one" are of \[3\]'),
        (bare, ValueError, r'row 0 of task "bare" has no "labels"'),
        (floats, TypeError, r"classes are whole numbers; the labels of row 0 of task \"floats\" are torch.float32"),
    ):
        with pytest.raises(error, match=words):
            run(classifier(labels=5), OwnClasses(), some=some, score=None)
    with pytest.raises(ValueError, match=r"label_smoothing=0.1.*would be lost"):
        run(classifier(labels=5), OwnClasses(), loss=ClassificationLoss(label_smoothing=0.1))


def test_adapters_alone_are_each_trained_on_the_base():
    """The second task's adapter is what it would have been without the first, and each is scored by its own."""
    adapter = lora(train_modules=["classifier"])
    together = classifier(labels=5)
    history = run(together, AdapterPerTask(adapter, alone=True))
    assert history.scores[1][0] == history.scores[0][0]
    names = ["part-0", "part-1"]
    for number, task in enumerate(tasks()):
        batch = collate_padded(task.train)
        apart = classifier(labels=5)
        run(apart, AdapterPerTask(adapter, alone=True), some=[task])
        own = next(name for name in adapter_names(together) if name.startswith(names[number]))
        with active(together, own), torch.no_grad():
            found = together.eval()(**batch).logits
            torch.testing.assert_close(found, apart.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
        with active(together, ()), torch.no_grad():
            assert torch.equal(together.eval()(**batch).logits, classifier(labels=5).eval()(**batch).logits)
