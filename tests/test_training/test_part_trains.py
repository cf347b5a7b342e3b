"""Only a part trains in a step: LISA, gradual unfreezing, the linear probe first. And no weight is lost by it."""

from functools import partial

import pytest
import torch
from runs import Stop, equal, settings, weights
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.data import collate_padded
from llmtune.losses import causal_lm_loss, classification_loss, sequence_to_sequence_loss
from llmtune.optim import Together
from llmtune.regularizers import DeltaNorm
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training import LISA, GradualUnfreezing, KeepBest, LinearProbeFirst, PartTrains, TrainingLoop
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.types import Callback

CLASSES = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(uneven_rows(8))]


class Watch(Callback):
    """Remembers what changed in each step, which flags a callback sees, modes, learning rates and moments."""

    def __init__(self):
        self.changed, self.flags, self.modes, self.rates, self.moments = [], [], [], [], []

    def on_fit_start(self, loop):
        self.before = weights(loop.model)

    def on_task_gradients(self, loop):
        self.modes.append({module.training for module in loop.model.modules()})
        self.with_gradient = {name for name, p in loop.model.named_parameters() if p.grad is not None}

    def on_step_end(self, loop, metrics):
        now = weights(loop.model)
        self.changed.append({name for name, value in now.items() if not torch.equal(value, self.before[name])})
        assert self.changed[-1] == self.with_gradient
        self.before = now
        self.flags.append([p.requires_grad for p in loop.model.parameters()])
        names = {id(p): name for name, p in loop.model.named_parameters()}
        self.moments.append({names[id(p)] for p in loop.optimizer.state})
        self.rates.append((metrics["learning_rate"], loop.optimizer.param_groups[0]["lr"]))


class Body(nn.Module):
    """Numbers in, logits out: a body of four layers with dropout, and a head."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(97, 11)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(11, 11), nn.Dropout(0.3), nn.Tanh()) for _ in range(4))
            self.head = nn.Linear(11, 97)

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class TokenLoss:
    """The mean cross-entropy of each next token."""

    def __call__(self, model, batch):
        logits = model(batch["input_ids"])[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def count_targets(self, batch):
        return int((batch["labels"][:, 1:] != -100).sum())


def loop(callbacks, *, model=None, eval_data=None, **changed):
    model = Body() if model is None else model
    kind = type(model).__name__
    rows = CLASSES if "Classification" in kind else uneven_rows(8)
    losses = {"Body": TokenLoss(), "BertForSequenceClassification": classification_loss,
              "T5ForConditionalGeneration": sequence_to_sequence_loss}  # fmt: skip
    return TrainingLoop(model, rows, settings=settings(**{"max_steps": 9, "weight_decay": 0.1} | changed),
                        loss=losses.get(kind, causal_lm_loss), callbacks=callbacks, eval_data=eval_data,
                        collate=partial(collate_padded, pad_token_id=0))  # fmt: skip


MAKE = {
    "LISA": lambda: LISA(2, every=2),
    "LISA that keeps": lambda: LISA(2, every=2, keep_state=True),
    "gradual": lambda: GradualUnfreezing(1),
    "probe": lambda: LinearProbeFirst(4, head=["head"], rate_factor=7.0),
    "both": lambda: None,
}


def callbacks_of(kind):
    return [LISA(2, every=2), GradualUnfreezing(1)] if kind == "both" else [MAKE[kind]()]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_at_a_step_is_uninterrupted_bit_for_bit(tmp_path, kind, stop):
    straight = loop(callbacks_of(kind))
    straight.fit()
    where = {"folder": tmp_path, "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        loop([Stop(stop), *callbacks_of(kind)], **where).fit()
    resumed = loop(callbacks_of(kind), **where)
    resumed.fit(resume=True)
    assert equal(weights(straight.model), weights(resumed.model))
    assert straight.history.column("loss") == resumed.history.column("loss")
    assert straight.history.column("learning_rate") == resumed.history.column("learning_rate")


@pytest.mark.parametrize("kind", MAKE)
def test_a_checkpoint_holds_all_that_is_trained_whoever_asks_for_it(tmp_path, kind):
    class Save(Callback):
        def on_step_end(self, loop, metrics):  # before the part that sleeps has its step end
            loop.save()

    for before in (True, False):
        folder = tmp_path / str(before)
        callbacks = [Save(), *callbacks_of(kind)] if before else [*callbacks_of(kind), Save()]
        made = loop(callbacks, folder=folder, max_steps=9)
        names = {name for name, _ in made.model.named_parameters()}
        made.fit()
        for path in sorted(folder.glob("step*")):
            state = read_checkpoint(path)
            assert state["frozen"] == {}
            assert set(state["model"]) == names


def test_lisa_trains_what_it_drew_and_what_lies_in_no_layer():
    watch, lisa = Watch(), LISA(2, every=3)
    made = loop([lisa, watch], max_steps=12)
    made.fit()
    always = {"embed.weight", "head.weight", "head.bias"}
    for step, changed in enumerate(watch.changed):
        made.step = step
        drawn = lisa.drawn(made)
        assert len(drawn) == 2
        assert changed == always | {f"{layer}.0.{local}" for layer in drawn for local in ("weight", "bias")}
        assert watch.moments[step] == changed  # those that sleep have none
    sets = [frozenset(changed) for changed in watch.changed]
    assert [len(set(sets[start : start + 3])) for start in (0, 3, 6, 9)] == [1, 1, 1, 1]
    assert len(set(sets)) > 1
    assert all(all(flags) for flags in watch.flags)
    keep = Watch()
    loop([LISA(2, every=3, keep_state=True), keep], max_steps=12).fit()
    assert set(keep.moments[-1]) == set().union(*keep.changed) > keep.changed[-1]


def test_lisa_draws_by_the_seed_and_every_layer_as_often():
    lisa = LISA(2, every=1)
    made = loop([lisa], max_steps=2)
    lisa.on_fit_start(made)
    counts = {}
    for step in range(2000):
        made.step = step
        for layer in lisa.drawn(made):
            counts[layer] = counts.get(layer, 0) + 1
    assert sorted(counts) == [f"layers.{n}" for n in range(4)]
    assert all(abs(count - 1000) < 5 * (2000 * 0.25) ** 0.5 for count in counts.values())
    other = loop([lisa], max_steps=2, seed=1)
    draws = []
    for run in (made, other):
        draws.append([])
        for run.step in range(20):
            draws[-1].append(tuple(lisa.drawn(run)))
    assert draws[0] != draws[1]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, partial(tiny_bert, labels=3), tiny_t5])
def test_lisa_finds_the_layers_of_the_four_shapes(make):
    watch, lisa = Watch(), LISA(1, every=1)
    loop([lisa, watch], model=make(), max_steps=4).fit()
    layers = set(lisa._places.values())
    assert len(layers) == (4 if make is tiny_t5 else 2)
    for changed in watch.changed:
        assert len({layer for layer in layers if any(name.startswith(f"{layer}.") for name in changed)}) == 1


def test_gradual_unfreezing_goes_from_the_top_down():
    watch = Watch()
    loop([GradualUnfreezing(2), watch], max_steps=12).fit()
    order = ["head", "layers.3", "layers.2", "layers.1", "layers.0", "embed"]
    for step, changed in enumerate(watch.changed):
        awake = tuple(f"{place}." for place in order[: step // 2 + 1])
        assert changed == {name for name in watch.before if name.startswith(awake)}
        assert watch.moments[step] == changed


def test_gradual_unfreezing_under_lora_begins_with_the_top_layer():
    model, watch = tiny_llama(), Watch()
    attach(model, LoRA(rank=2, alpha=3))
    loop([GradualUnfreezing(1), watch], model=model, max_steps=3).fit()
    by_step = [{name.split(".")[2] for name in changed} for changed in watch.changed]
    assert by_step == [{"1"}, {"0", "1"}, {"0", "1"}]


def test_gradual_unfreezing_is_the_run_of_each_depth_by_hand():
    """The first steps equal a run in which everything but the head is frozen beforehand."""
    one = loop([GradualUnfreezing(4)], max_steps=21, schedule="constant", weight_decay=0.0)
    one.total_steps = 21

    class Enough(Callback):
        def on_step_end(self, loop, metrics):
            if loop.step == 4:
                loop.stop("enough")

    one.callbacks.append(Enough())
    one.fit()
    model = Body()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    other = loop([], model=model, max_steps=4, schedule="constant", weight_decay=0.0)
    other.fit()
    assert equal(weights(one.model), weights(other.model))


def test_the_linear_probe_is_two_runs_and_the_second_starts_anew():
    """By hand: the head alone in eval mode, then everything in train mode with a new AdamW, step by step."""
    watch = Watch()
    both = loop([LinearProbeFirst(3, head=["head"]), watch], schedule="constant", clip_norm=None)
    both.fit()
    by_hand = loop([], schedule="constant", clip_norm=None)
    model = by_hand.model
    from llmtune.training.randomness import seed_everything

    def train(parameters, steps):
        groups = [{"params": [p for p in parameters if (p.ndim >= 2) == matrix], "weight_decay": 0.1 * matrix}
                  for matrix in (True, False)]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        for step in steps:
            seed_everything(0, "step", step)
            batches = by_hand.micro_batches(step)
            model.zero_grad()
            for batch in batches:
                (by_hand.loss(model, batch) / len(batches)).backward()
            for parameter in model.parameters():
                parameter.grad = parameter.grad if any(parameter is one for one in parameters) else None
            optimizer.step()

    model.eval()
    train(list(model.head.parameters()), range(3))
    model.train()
    train(list(model.parameters()), range(3, 9))
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(both.model)[name], value, rtol=1e-5, atol=1e-6)
    head = {"head.weight", "head.bias"}
    assert watch.changed == [head] * 3 + [set(watch.before)] * 6
    assert watch.modes == [{False}] * 3 + [{True}] * 6


def test_the_rate_of_the_probe_is_the_schedules_times_the_factor():
    watch, plain = Watch(), Watch()
    loop([LinearProbeFirst(4, head=["head"], rate_factor=7.0), watch], schedule="cosine").fit()
    loop([LinearProbeFirst(4, head=["head"]), plain], schedule="cosine").fit()
    for step, ((told, after), (told_plain, after_plain)) in enumerate(zip(watch.rates, plain.rates, strict=True)):
        assert told == pytest.approx(told_plain * (7 if step < 4 else 1), rel=1e-12)
        assert after == after_plain  # what the schedule goes on from
    fast = loop([LinearProbeFirst(1, head=["head"], rate_factor=7.0)], max_steps=2, schedule="constant")
    fast.callbacks.append(taken := Taken())
    fast.fit()
    slow = loop([LinearProbeFirst(1, head=["head"])], max_steps=2, schedule="constant", learning_rate=7e-3)
    slow.callbacks.append(wanted := Taken())
    slow.fit()
    assert torch.equal(taken.head, wanted.head)


class Taken(Callback):
    def on_step_end(self, loop, metrics):
        if loop.step == 1:
            self.head = loop.model.head.weight.detach().clone()


def test_a_probe_that_passes_over_a_step_puts_the_rate_back():
    class Poison(Callback):
        def on_task_gradients(self, loop):
            if loop.step == 1:
                loop.model.head.weight.grad.fill_(float("nan"))

    watch = Watch()
    watch.on_task_gradients = lambda loop: None
    watch.on_step_end = lambda loop, metrics: watch.rates.append(loop.optimizer.param_groups[0]["lr"])
    made = loop([LinearProbeFirst(3, head=["head"], rate_factor=7.0), Poison(), watch], schedule="constant",
                on_bad_step="skip")  # fmt: skip
    made.fit()
    assert watch.rates == [1e-3] * 9
    assert not made.optimizer._optimizer_step_post_hooks


def test_the_head_is_what_the_model_has_beside_its_body():
    for make, head in (
        (tiny_llama, {"lm_head.weight"}),
        (partial(tiny_bert, labels=3), {"classifier.weight", "classifier.bias"}),
    ):
        watch = Watch()
        loop([LinearProbeFirst(2), watch], model=make(), max_steps=3).fit()
        assert watch.changed[:2] == [head, head]
        assert watch.changed[2] == set(watch.before)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no head of its own beside its body: name the head's"):
        loop([LinearProbeFirst(2)], model=tiny_gpt2()).fit()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no head of its own beside its body"):
        loop([LinearProbeFirst(2)], model=tiny_t5()).fit()
    with pytest.raises(ValueError, match="Body does not tell its body from its head: name the head's modules"):
        loop([LinearProbeFirst(2)]).fit()
    with pytest.raises(
        ValueError, match=r'no module of Body is called "haed", so it has no such head. Did you mean "h'
    ):
        loop([LinearProbeFirst(2, head=["haed"])]).fit()


def test_the_head_of_a_classifier_under_lora_is_its_trained_copy():
    model, watch = tiny_bert(labels=3), Watch()
    attach(model, LoRA(rank=2, alpha=3, targets=["query"], train_modules=["classifier"]))
    loop([LinearProbeFirst(2), watch], model=model, max_steps=3).fit()
    assert all("classifier" in name for name in watch.changed[0])
    assert len(watch.changed[0]) == 2
    assert len(watch.changed[2]) == 2 + 4


def test_a_failed_step_leaves_every_flag_as_it_was_and_the_run_can_go_on(tmp_path):
    class Fail(Callback):
        def __init__(self):
            self.done = False

        def on_task_gradients(self, loop):
            if loop.step == 2 and not self.done:
                self.done = True
                raise ZeroDivisionError

    for kind in MAKE:
        made = loop([*callbacks_of(kind), Fail()])
        made.model.eval()
        with pytest.raises(ZeroDivisionError):
            made.fit()
        assert all(p.requires_grad for p in made.model.parameters())
        assert not any(module.training for module in made.model.modules())
        made.fit()
        straight = loop(callbacks_of(kind))
        straight.fit()
        assert equal(weights(straight.model), weights(made.model))


def test_the_best_weights_are_copied_whole():
    made = loop([LISA(1, every=1), keep := KeepBest(restore=True)], eval_data=uneven_rows(3), eval_every=1)
    made.fit()
    assert set(keep._copy) == {name for name, _ in made.model.named_parameters()}


def test_a_part_of_ones_own_is_one_method():
    class Odd(PartTrains):
        def awake(self, loop):
            return set(self.trained[loop.step % 2 :: 2])

    watch = Watch()
    loop([Odd(), watch], max_steps=4).fit()
    names = list(watch.before)
    assert watch.changed == [set(names[step % 2 :: 2]) for step in range(4)]


def test_what_is_refused():
    for make, sentence in (
        (lambda: LISA(0), "layers must be a whole number of at least 1; got 0"),
        (lambda: LISA(1, every=0), "every must be a whole number of at least 1; got 0"),
        (lambda: GradualUnfreezing(True), "every must be a whole number of at least 1; got True"),
        (lambda: LinearProbeFirst(0), "steps must be a whole number of at least 1; got 0"),
        (lambda: LinearProbeFirst(1, rate_factor=0), "rate_factor must be a number above 0; got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
    with pytest.raises(TypeError, match=r"head must be a list of names of modules, such as \[\"classifier\"\]; got 'h"):
        LinearProbeFirst(1, head="head")
    with pytest.raises(ValueError, match="LISA trains 4 layers at a time and 4 are trained in all: leave it out"):
        loop([LISA(4)]).fit()
    with pytest.raises(ValueError, match="every=3 wakes the lowest of what is trained in step 16, and the run has 9"):
        loop([GradualUnfreezing(3)]).fit()
    with pytest.raises(ValueError, match="the head trains alone for 9 steps, and the run has 9: set steps lower"):
        loop([LinearProbeFirst(9, head=["head"])]).fit()
    model = Body()
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match="step 1: LinearProbeFirst leaves nothing to train: of what it would train no"):
        loop([LinearProbeFirst(2, head=["head"])], model=model).fit()


class Gradients(Callback):
    """What has a gradient when the penalty's is there, told before the part that sleeps is woken."""

    def __init__(self):
        self.names = []

    def on_before_optimizer_step(self, loop):
        self.names.append({name for name, p in loop.model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("part", [partial(LinearProbeFirst, 3), partial(GradualUnfreezing, 3)])
def test_a_penalty_on_what_sleeps_is_counted_and_moves_nothing(part):
    """The head trains alone, and the adapter that the penalty is of has been moved before: by 2 in each of B's."""
    model, seen, watch = tiny_bert(labels=3), Gradients(), Watch()
    attach(model, LoRA(rank=2, alpha=3, targets=["query"], train_modules=["classifier"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.fill_(2.0 if "lora_b" in name else 1.0)
    sizes = [p.shape for name, p in model.named_parameters() if "lora_b" in name]
    made = loop([seen, part(), watch], model=model, clip_norm=None)
    made.penalties.append(DeltaNorm(0.1))
    history = made.fit()
    entry = 1.5 * (2 * 2.0 * 1.0)  # scaling * B A, of rank 2
    width = model.config.hidden_size
    assert history[0]["penalty"] == pytest.approx(0.05 * sum(rows * width for rows, _ in sizes) * entry**2, rel=1e-5)
    head = {name for name in seen.names[0] if "classifier" in name}
    assert seen.names[:3] == watch.changed[:3] == [head] * 3
    assert history[2]["penalty"] == history[0]["penalty"] > history[-1]["penalty"]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


class Two(TrainingLoop):
    def configure_optimizer(self):
        matrices, vectors = ([p for p in self.model.parameters() if (p.ndim > 1) == more] for more in (True, False))
        optimizer = Together(torch.optim.AdamW(matrices, lr=1e-3), torch.optim.AdamW(vectors, lr=1e-3))
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def test_the_state_is_dropped_of_several_optimizers_too():
    for part, counts in ((LISA(1, every=1), [5] * 6), (LinearProbeFirst(2, head=["head"]), [2, 2, 11, 11, 11, 11])):
        watch = Watch()
        made = Two(Body(), uneven_rows(8), settings=settings(max_steps=6), loss=TokenLoss(), callbacks=[part, watch],
                   collate=collate_padded)  # fmt: skip
        made.fit()
        assert [len(moments) for moments in watch.moments] == counts
        steps = {int(entry["step"]) for entry in made.optimizer.state.values()}
        assert steps == {4} if isinstance(part, LinearProbeFirst) else steps < {1, 2, 3, 4, 5, 6}
