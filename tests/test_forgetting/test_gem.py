"""A-GEM: the formula over the whole gradient, what it does not hold under Adam, and its use on the update."""

import copy

import pytest
import torch
from torch import nn

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.forgetting import AveragedGEM, ReferenceProjection, averaged_gem, reference_gradients
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.sharpness import SharpnessAware
from llmtune.types import Callback

OLD, NEW = uneven_rows(4, seed=7), uneven_rows(12, seed=8)


def vectors(seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=draw, dtype=dtype) for name, shape in (("a", (3, 5)), ("b", (7,)))}


def dot(one, other):
    return sum(float((one[key] * other[key]).sum()) for key in one)


def against(gradient, reference):
    """Return the gradient turned round where that is needed for it to go against the reference."""
    sign = -1.0 if dot(gradient, reference) > 0 else 1.0
    return {key: sign * value for key, value in gradient.items()}


@pytest.mark.parametrize("seed", range(5))
def test_the_formula_over_all_parameters_as_one_vector(seed):
    reference = vectors(seed + 50)
    gradient = against(vectors(seed), reference)
    factor = dot(gradient, reference) / dot(reference, reference)
    found = averaged_gem(gradient, reference)
    for key in gradient:
        torch.testing.assert_close(found[key], gradient[key] - factor * reference[key], rtol=1e-12, atol=1e-12)
    assert abs(dot(found, reference)) < 1e-12
    again = averaged_gem(found, reference)
    for key in gradient:
        torch.testing.assert_close(again[key], found[key], rtol=1e-12, atol=1e-12)


def test_where_it_does_not_go_against_the_reference_the_very_tensors_come_back():
    reference = vectors(50)
    gradient = {key: -value for key, value in against(vectors(0), reference).items()}
    found = averaged_gem(gradient, reference)
    assert all(found[key] is gradient[key] for key in gradient)
    one_against = {"a": -reference["a"], "b": 10 * reference["b"]}  # parameter by parameter "a" would be projected
    assert averaged_gem(one_against, reference)["a"] is one_against["a"]


def test_what_has_no_gradient_counts_as_zero():
    reference = {**vectors(50), "old head": torch.ones(2, dtype=torch.float64)}
    gradient = {"a": -reference["a"], "new head": torch.ones(3), "b": None}
    found = averaged_gem(gradient, reference)
    square = dot(reference, reference)
    factor = -float(reference["a"].square().sum()) / square
    torch.testing.assert_close(found["a"], gradient["a"] - factor * reference["a"])
    assert found["new head"] is gradient["new head"]
    assert found["b"] is None
    assert set(found) == set(gradient)
    assert averaged_gem({"a": None}, reference) == {"a": None}
    assert averaged_gem({"a": torch.ones(2)}, {"a": torch.zeros(2)})["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("size", [1e-25, 1e-22, 1e-18, 1e22])
def test_the_size_of_the_reference_changes_nothing(size):
    """The square of what well learned examples leave vanishes in float32, and of 1e22 it overflows."""
    reference = vectors(50, torch.float32)
    gradient = against(vectors(0, torch.float32), reference)
    plain, found = (
        averaged_gem(gradient, reference),
        averaged_gem(gradient, {k: r * size for k, r in reference.items()}),
    )
    for key in gradient:
        torch.testing.assert_close(found[key], plain[key], rtol=1e-5, atol=1e-6)


def test_low_precision_gradients_are_computed_in_float32():
    reference = vectors(50, torch.float32)
    gradient = {key: value.bfloat16() for key, value in against(vectors(0, torch.float32), reference).items()}
    found = averaged_gem(gradient, reference)
    wide = averaged_gem({key: value.float() for key, value in gradient.items()}, reference)
    for key in found:
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], wide[key].bfloat16())


@pytest.mark.parametrize("size", [1e-30, 1e-42, 1e25])
def test_a_reference_whose_square_vanishes_or_overflows_is_one_too(size):
    found = averaged_gem({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([-size, 0.0]), "b": torch.zeros(0)})
    assert found["a"].tolist() == pytest.approx([0.0, 2.0], abs=1e-6)


@pytest.mark.parametrize(
    ("gradient", "reference", "text"),
    [
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, r"a gradient is \[2\] and its reference \[3\]"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "no gradient of anything that has one now"),
        ({"a": torch.ones(2)}, {}, "no gradient of anything that has one now"),
        ({"a": torch.ones(2)}, {"a": torch.tensor([1.0, torch.nan])}, "the reference gradient is not finite"),
    ],
)
def test_bad_gradients(gradient, reference, text):
    with pytest.raises(ValueError, match=text):
        averaged_gem(gradient, reference)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5])
def test_the_reference_is_the_gradient_of_the_mean_over_all_targets_without_dropout(make):
    model = make(dropout=0.3) if make is not tiny_llama else make()
    model.train()
    before = torch.get_rng_state()
    loss = sequence_to_sequence_loss if make is tiny_t5 else causal_lm_loss
    batches = [collate_padded(OLD[:1]), collate_padded(OLD[1:])]
    found = reference_gradients(model, batches, loss=loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    counts = [loss.count_targets(batch) for batch in batches]
    parts = [loss(model, batch) for batch in batches]
    total = sum((p[0] if isinstance(p, tuple) else p) * c for p, c in zip(parts, counts, strict=True)) / sum(counts)
    total.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[parameter], parameter.grad, rtol=1e-4, atol=1e-6)
    assert len(found) == sum(p.grad is not None for p in model.parameters())


def test_bad_examples():
    model = tiny_llama()
    empty = {"input_ids": torch.tensor([[5, 7]]), "labels": torch.tensor([[-100, -100]])}
    with pytest.raises(ValueError, match="none of the stored examples has a target"):
        reference_gradients(model, [empty], loss=causal_lm_loss)
    with pytest.raises(TypeError, match="got a single one"):
        reference_gradients(model, empty, loss=causal_lm_loss)


def two_tasks(seed):
    """Return a linear layer and batches of two regressions that pull it in different directions."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(11, generator=draw))
    old, new = ((torch.randn(19, 11, generator=draw) * sizes, torch.randn(19, 3, generator=draw)) for _ in range(2))
    torch.manual_seed(seed)
    return nn.Linear(11, 3), old, new


def gradients_of(model, task):
    loss = (model(task[0]) - task[1]).square().mean()
    return dict(zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def products(space, steps=60):
    """Return <change, old task's gradient> / their starts, for each step of AdamW."""
    model, old, new = two_tasks(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    projection = ReferenceProjection(optimizer) if space == "update" else None
    found = []
    for _ in range(steps):
        reference, now = gradients_of(model, old), gradients_of(model, new)
        if projection is None:
            now = averaged_gem(now, reference)
        else:
            projection.reference = reference
        before = {p: p.detach().clone() for p in model.parameters()}
        for parameter, gradient in now.items():
            parameter.grad = gradient
        optimizer.step()
        change = {p: p.detach() - before[p] for p in model.parameters()}
        found.append(dot(change, reference) / (dot(change, change) * dot(reference, reference)) ** 0.5)
    return torch.tensor(found)


def test_no_step_of_adamw_goes_against_the_stored_examples_where_the_update_is_projected():
    assert float(products("update").max()) < 1e-5
    assert float(products("gradient").max()) > 1e-2  # the gradient's projection alone: some do


def test_a_step_without_a_reference_or_with_a_bad_one_is_refused_before_anything_moves():
    model, old, new = two_tasks(0)
    projection = ReferenceProjection(torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    for parameter, gradient in gradients_of(model, new).items():
        parameter.grad = gradient
    with pytest.raises(ValueError, match=r"has no reference gradient for this step: set \.reference before each"):
        projection.step()
    projection.reference = {model.weight: torch.full_like(model.weight, torch.nan)}
    with pytest.raises(ValueError, match="the reference gradient is not finite"):
        projection.step()
    projection.reference = {model.weight: torch.ones(2)}
    with pytest.raises(ValueError, match="and its reference"):
        projection.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    projection.reference = gradients_of(model, old)
    projection.step()
    assert projection.reference is None  # for one step
    with pytest.raises(TypeError, match="takes a torch optimizer"):
        ReferenceProjection("adam")


def settings(**more):
    given = {"max_steps": 5, "rows_per_step": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "progress": False}
    return LoopSettings(**{**given, **more})


def stored(step):
    return [collate_packed(OLD[step % 2 :: 2])]


class Subclass(TrainingLoop):
    def configure_optimizer(self):
        optimizer, schedule = super().configure_optimizer()
        self.projection = ReferenceProjection(optimizer)
        return optimizer, schedule

    def accumulate_gradients(self, batches):
        self.projection.reference = reference_gradients(self.model, stored(self.step), loss=self.loss)
        return super().accumulate_gradients(batches)


class Published(TrainingLoop):
    def accumulate_gradients(self, batches):
        reference = reference_gradients(self.model, stored(self.step), loss=self.loss)
        metrics = super().accumulate_gradients(batches)
        for p, gradient in averaged_gem({p: p.grad for p in self.model.parameters()}, reference).items():
            p.grad = gradient
        return metrics


@pytest.mark.parametrize(("kind", "space"), [(Subclass, "update"), (Published, "gradient")])
def test_nine_lines_of_a_subclass_do_what_the_callback_does(kind, space):
    import inspect

    assert len([line for line in inspect.getsource(kind).splitlines() if line.strip()]) <= 9
    one, other = tiny_llama(), tiny_llama()
    kind(one, NEW, settings=settings()).fit()
    TrainingLoop(other, NEW, settings=settings(), callbacks=[AveragedGEM(stored, space=space)]).fit()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    plain = tiny_llama()
    TrainingLoop(plain, NEW, settings=settings()).fit()
    assert any(not torch.equal(value, plain.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(("space", "precision"), [("update", "fp16"), ("gradient", "float32")])
def test_a_resumed_run_is_the_same_run_bit_for_bit(space, precision, tmp_path):
    def made(steps, folder):
        model = tiny_gpt2(dropout=0.1)
        chosen = settings(folder=folder, save_every=2, precision=precision, rows_per_micro_batch=2, max_steps=5)
        loop = TrainingLoop(model, NEW, settings=chosen, callbacks=[AveragedGEM(stored, space=space)])
        if steps < 5:
            loop.callbacks.append(Stop(steps))
        return loop

    whole = made(5, tmp_path / "whole")
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        made(2, tmp_path / "cut").fit()
    again = made(5, tmp_path / "cut")
    again.fit(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


class Stop:
    def __init__(self, step):
        self.step = step

    def __getattr__(self, name):
        def call(loop, *_):
            if name == "on_step_start" and loop.step == self.step:
                raise KeyboardInterrupt

        if name.startswith("on_"):
            return call
        raise AttributeError(name)


def test_in_a_sharpness_aware_loop_the_reference_is_that_at_the_weights():
    seen, model, starts = [], tiny_llama(), []

    def memory(step):
        seen.append((step, model.lm_head.weight.detach().clone()))
        return stored(step)

    class Starts(Callback):
        def on_step_start(self, loop):
            starts.append(loop.model.lm_head.weight.detach().clone())

    callbacks = [AveragedGEM(memory), Starts()]
    SharpnessAware(model, NEW, settings=settings(max_steps=3), callbacks=callbacks).fit()
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(torch.equal(weight, start) for (_, weight), start in zip(seen, starts, strict=True))


def test_it_works_for_an_encoder():
    memory = AveragedGEM(lambda step: [collate_padded(OLD[:3])])
    options = {"collate": collate_padded, "loss": masked_lm_loss}
    history = TrainingLoop(tiny_bert(), NEW, settings=settings(max_steps=2), callbacks=[memory], **options).fit()
    assert len(history) == 2


def test_bad_arguments():
    with pytest.raises(TypeError, match="memory must be a function"):
        AveragedGEM([1, 2])
    with pytest.raises(ValueError, match='space must be "update" or "gradient"; got \'both\''):
        AveragedGEM(stored, space="both")
