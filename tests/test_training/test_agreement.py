"""What must agree before a run goes on: each difference is refused by name, told of, or free; nothing is forgotten."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from runs import Stop
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import VOCABULARY, tiny_gpt2, tiny_llama
from llmtune.training.agreement import data_fingerprint, row_count
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import ROUNDING, LoopSettings
from llmtune.types import Callback

BASE = {"max_steps": 4, "rows_per_step": 4, "rows_per_micro_batch": 2, "progress": False, "learning_rate": 1e-2}


def run(folder, *, model=None, data=None, kind=TrainingLoop, more=None, **changed):
    settings = LoopSettings(**(BASE | {"folder": folder} | changed))
    return kind(
        model or tiny_llama(), data or uneven_rows(11), settings=settings, collate=collate_padded, **(more or {})
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# For each setting: another value, and what going on with it does. A new setting has to be put here.
REFUSED, TOLD, FREE = "refused", "told", "free"
SETTINGS = {
    "max_steps": (5, REFUSED),
    "epochs": (3, REFUSED),
    "rows_per_step": (5, REFUSED),
    "rows_per_micro_batch": (1, TOLD),
    "learning_rate": (2e-2, REFUSED),
    "schedule": ("cosine", REFUSED),
    "schedule_options": ({"lr_end": 1e-3}, REFUSED),
    "warmup_steps": (1, REFUSED),
    "weight_decay": (0.1, REFUSED),
    "clip_norm": (2.0, REFUSED),
    "precision": ("bf16", REFUSED),
    "fused": (False, TOLD),
    "compile": ("aot_eager", TOLD),
    "activation_checkpointing": (True, TOLD),
    "on_bad_step": ("skip", REFUSED),
    "spike_factor": (3.0, REFUSED),
    "seed": (1, REFUSED),
    "folder": (None, FREE),  # here the same run under another path
    "save_every": (1, FREE),
    "keep": (7, FREE),
    "save_frozen": (True, FREE),
    "background_save": (True, FREE),
    "eval_every": (1, FREE),
    "log_every": (1, FREE),
    "data_workers": (1, FREE),
    "progress": (True, FREE),
}


def test_every_setting_is_in_the_table():
    assert set(SETTINGS) == {field.name for field in dataclasses.fields(LoopSettings)}
    assert {name for name, (_, what) in SETTINGS.items() if what == TOLD} == ROUNDING


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "compile" else n for n in SETTINGS])
def test_another_value_of_each_setting(tmp_path, name, capsys):
    value, what = SETTINGS[name]
    first = {"schedule": "polynomial"} if name == "schedule_options" else {}
    if name == "epochs":
        first |= {"max_steps": None, "epochs": 2}
    eval_data = {"eval_data": uneven_rows(3)}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", save_every=1, more=eval_data | {"callbacks": [Stop(2)]}, **first).fit()
    plain = run(tmp_path / "plain", more=eval_data, **first)
    plain.fit()
    if name == "folder":
        (tmp_path / "a").rename(tmp_path / "b")
        value = tmp_path / "b"
    then = getattr(plain.settings, name)
    loop = run(**({"folder": tmp_path / "a", "more": eval_data} | first | {name: value}))
    before = weights(loop.model)
    capsys.readouterr()
    if what == REFUSED:
        said = rf"step-0000000[23]: {name} was {then!r} in the run and is {value!r} now, which changes the result"
        with pytest.raises(CheckpointError, match=said.replace("{", r"\{")):
            loop.fit(resume=True)
        assert equal(before, weights(loop.model))
        assert loop.step == 0
        return
    loop.fit(resume=True)
    out = capsys.readouterr().out
    assert (f"not bit for bit: {name} was {then!r} and is {value!r}" in out) == (what == TOLD)
    for key, wanted in weights(plain.model).items():
        if what == FREE:
            assert torch.equal(wanted, weights(loop.model)[key]), key
        else:
            torch.testing.assert_close(weights(loop.model)[key], wanted, rtol=1e-3, atol=2e-4)


def test_options_are_compared_as_they_are_saved(tmp_path):
    options = {"min_lr_rate": 0.1, "num_cycles": 0.5}
    run(tmp_path, schedule="cosine_with_min_lr", schedule_options=options).fit()
    assert len(run(tmp_path, schedule="cosine_with_min_lr", schedule_options=options).fit(resume=True)) == 4


def reordered(rows):
    return [rows[1], rows[0], *rows[2:]]


def one_label_less(rows):
    changed = [dict(row) for row in rows]
    changed[7]["labels"] = [-100, *changed[7]["labels"][1:-1], -100]
    return changed


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (uneven_rows(12), "the run had 11 rows of data; now there are 12"),
        (uneven_rows(11, seed=1), "the data has as many rows as the run's, 11, but other ones, or in another order"),
        (reordered(uneven_rows(11)), "other ones, or in another order: give the same data, or start a new run"),
        (one_label_less(uneven_rows(11)), "other ones, or in another order"),
        ([row | {"weight": 2.0} for row in uneven_rows(11)], "other ones, or in another order"),
    ],
)
def test_other_data_are_refused(tmp_path, data, said):
    run(tmp_path).fit()
    loop = run(tmp_path, data=data)
    before = weights(loop.model)
    with pytest.raises(CheckpointError, match=said):
        loop.fit(resume=True)
    assert equal(before, weights(loop.model))


def test_a_stream_in_place_of_rows_is_refused(tmp_path):
    class Stream:
        def __iter__(self):
            return iter(uneven_rows(11))

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    run(tmp_path).fit()
    with pytest.raises(CheckpointError, match="the run had 11 rows of data; now there are None"):
        run(tmp_path, data=Stream()).fit(resume=True)


def test_the_same_rows_in_another_form_are_the_same_rows():
    rows = uneven_rows(11)

    class Made:
        def __len__(self):
            return 11

        def __getitem__(self, place):
            return dict(reversed(rows[place].items()))

    assert data_fingerprint(Made()) == data_fingerprint(rows) == data_fingerprint(tuple(rows))
    assert row_count(Made()) == 11


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.tensor([1, 2, 4]), lambda x: torch.tensor([1.0, 2, 3]), lambda x: torch.tensor([[1, 2, 3]]),
        lambda x: np.array([1, 2, 3], dtype=np.int32), lambda x: np.array([1, 2, 4]), lambda x: [1, 2, 3],
        lambda x: (1, 2, 4), lambda x: list(np.array([1, 2, 4])), lambda x: "1 2 3",
        lambda x: {"a": [1, 2, 3]}, lambda x: None,
        lambda x: [1.5, float("nan")], lambda x: np.float32(2.5), lambda x: np.int64(3), lambda x: np.int64(4),
        lambda x: torch.ones(3, dtype=torch.bfloat16), lambda x: torch.ones(()), lambda x: torch.ones(0),
        lambda x: torch.ones(3, dtype=torch.bool), lambda x: True, lambda x: 7, lambda x: b"x",
    ],
)  # fmt: skip
def test_every_kind_of_value_tells(change):
    """Each of these, in one place of one row, gives a fingerprint of its own, which is the same when made again."""
    base = [{"x": torch.tensor([1, 2, 3])}, {"x": torch.tensor([5])}]
    found = data_fingerprint([{"x": change(None)}, base[1]])
    assert found != data_fingerprint(base)
    assert found == data_fingerprint([{"x": change(None)}, base[1]])


def test_no_two_of_many_values_look_alike():
    values = [
        torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), [1, 2, 3], [1, 2, 4], list(np.array([1, 2, 5])), "a", "b",
        np.int64(3), np.int64(4), np.float32(0.5), 1.5, None, True, {"a": 1}, {"a": 2}, {"b": 1}, [[1], [2]],
    ]  # fmt: skip
    assert len({data_fingerprint([value]) for value in values}) == len(values)


def test_rows_drawn_at_random_have_a_fingerprint():
    class Random:
        def __len__(self):
            return 97

        def __getitem__(self, place):
            return {"x": random.random() + float(np.random.rand()) + float(torch.rand(()))}

    state = torch.get_rng_state()
    assert data_fingerprint(Random()) == data_fingerprint(Random())
    assert torch.equal(state, torch.get_rng_state())


class Counted:
    """A million rows, each made when it is asked for."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, place):
        self.asked.append(place)
        ids = [3 + (place * 7 + step) % (VOCABULARY - 3) for step in range(4)]
        return {"input_ids": ids, "labels": ids}


def test_resuming_late_costs_no_more_than_resuming_early(tmp_path):
    """At the millionth step: 16 rows for the fingerprint, and those of the steps that are still to be done."""
    late, steps = 10**6, 2

    def loop(data):
        return run(tmp_path, data=data, max_steps=late + steps, schedule="constant", save_every=1)

    first = loop(Counted(10**6))
    first.step = late
    first.history.append({"step": late, "loss": 1.0})
    first.keeper.start(first, resume=False, strict=False)
    first.save()
    data = Counted(10**6)
    resumed = loop(data)
    history = resumed.fit(resume=True)
    assert [row["step"] for row in history] == [late, late + 1, late + 2]
    assert len(data.asked) == 16 + steps * 4 + 4, "the first batch is tried once more"


def wider():
    model = tiny_llama()
    model.lm_head = nn.Linear(28, 101, bias=False)
    return model


def bfloat():
    model = tiny_llama()
    model.lm_head = model.lm_head.to(torch.bfloat16)
    return model


def frozen():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    return model


def with_buffer():
    model = tiny_llama()
    model.register_buffer("mark", torch.zeros(3))
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (tiny_gpt2, r"the model has a parameter transformer\.wte\.weight"),
        (lambda: tiny_llama(tied=True), r"the checkpoint's model had a parameter lm_head\.weight"),
        (wider, r"lm_head\.weight is \[\[101, 28\], 'float32'\] in the model and \[\[97, 28\], 'float32'\] in the ch"),
        (bfloat, r"lm_head\.weight is \[\[97, 28\], 'bfloat16'\] in the model and"),
        (frozen, r"lm_head\.weight is frozen now and was trained in the checkpoint's run"),
        (with_buffer, "the tensor mark is in the model only"),
    ],
)
def test_another_model_is_refused(tmp_path, model, said):
    run(tmp_path).fit()
    loop = run(tmp_path, model=model())
    before = weights(loop.model)
    with pytest.raises(CheckpointError, match=said):
        loop.fit(resume=True)
    assert equal(before, weights(loop.model))


def lora(seed=0, **changed):
    model = tiny_llama(seed)
    torch.manual_seed(0)  # of the adapter's start
    attach(model, LoRA(**({"rank": 3, "alpha": 6} | changed)))
    return model


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"alpha": 12}, 'adapter "default" has alpha=12 now and had alpha=6 in the run'),
        ({"dropout": 0.5}, r'adapter "default" has dropout=0\.5 now and had dropout=0\.0'),
        ({"rank": 5}, r"q_proj\.lora_a is \[\[5, 28\], 'float32'\] in the model and \[\[3, 28\]"),
        ({"targets": ["q_proj"]}, r"the model has a parameter .*k_proj\.weight .* that the checkpoint's model had not"),
        ({"rslora": True}, 'adapter "default" has rslora=True now and had rslora=False'),
    ],
)
def test_another_adapter_is_refused(tmp_path, changed, said):
    run(tmp_path, model=lora()).fit()
    with pytest.raises(CheckpointError, match=f"{said}"):
        run(tmp_path, model=lora(**changed)).fit(resume=True)


def test_other_frozen_weights_are_refused_unless_they_are_saved(tmp_path):
    """With save_frozen the checkpoint is the whole model, whatever the one that it is loaded into began with."""
    run(tmp_path / "short", model=lora()).fit()
    with pytest.raises(CheckpointError, match=r"the frozen parameter .* has other values than in the checkpoint's run"):
        run(tmp_path / "short", model=lora(seed=1)).fit(resume=True)

    whole = run(tmp_path / "plain", model=lora())
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "full", model=lora(), save_frozen=True, save_every=1, more={"callbacks": [Stop(2)]}).fit()
    other = run(tmp_path / "full", model=lora(seed=1), save_every=1)
    other.fit(resume=True)
    assert equal(weights(whole.model), weights(other.model))
    again = run(tmp_path / "full", model=lora())
    assert len(again.fit(resume=True)) == 4, "its own checkpoints hold fingerprints of what it took over"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_everything_together_is_resumed_bit_for_bit(tmp_path, schedule):
    """Dropout, rows drawn at random, workers, a penalty with state, accumulation, an adapter, at every step."""

    class Random:
        def __len__(self):
            return 11

        def __getitem__(self, place):
            row, shift = uneven_rows(11)[place], random.randrange(3) + int(torch.randint(3, ())) + np.random.randint(3)
            return row | {"input_ids": [3 + (token + shift) % 94 for token in row["input_ids"]]}

    class Growing(Callback):
        """Pulls towards the mean of the weights it has seen."""

        def __init__(self):
            self.sum, self.count = torch.zeros(()), 0

        def __call__(self, model):
            parameter = next(p for p in model.parameters() if p.requires_grad)
            return ((parameter - self.sum / max(self.count, 1)) ** 2).sum()

        def on_step_end(self, loop, metrics):
            parameter = next(p for p in loop.model.parameters() if p.requires_grad)
            self.sum, self.count = self.sum + parameter.detach().mean(), self.count + 1

        def state_dict(self):
            return {"sum": self.sum, "count": self.count}

        def load_state_dict(self, state):
            self.sum, self.count = state["sum"], state["count"]

    def make(folder, stop=99):
        model = tiny_gpt2(dropout=0.2)
        torch.manual_seed(0)
        attach(model, LoRA(rank=3, alpha=6, dropout=0.2))
        more = {"penalties": [Growing()], "callbacks": [Stop(stop)]}
        return run(folder, model=model, data=Random(), more=more, data_workers=2, save_every=1, schedule=schedule,
                   max_steps=5, warmup_steps=1)  # fmt: skip

    whole = make(tmp_path / "whole")
    whole.fit()
    for stop in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cut", stop).fit(resume=True)
    resumed = make(tmp_path / "cut")
    resumed.fit(resume=True)
    assert equal(weights(whole.model), weights(resumed.model))
    same = ("loss", "penalty", "grad_norm", "learning_rate", "targets")
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert [one[name] for name in same] == [other[name] for name in same]
    assert len({row["learning_rate"] for row in whole.history}) > 2


def test_numbers_that_are_not_finite_come_back_in_the_history(tmp_path):
    class Spoiled(TrainingLoop):
        def compute_loss(self, model, batch):
            loss = super().compute_loss(model, batch)
            bad = {1: float("nan"), 2: float("inf"), 3: -float("inf")}.get(self.step)
            return loss if bad is None else loss * bad

    first = run(tmp_path, kind=Spoiled, on_bad_step="skip", max_steps=5)
    first.fit()
    again = run(tmp_path, kind=Spoiled, on_bad_step="skip", max_steps=5)
    again.fit(resume=True)
    assert [repr(row["loss"]) for row in again.history] == [repr(row["loss"]) for row in first.history]
    assert [repr(row["loss"]) for row in again.history][1:4] == ["nan", "inf", "-inf"]
    state = json.loads((tmp_path / "step-00000005" / "state.json").read_text())
    assert state["history"][1]["loss"] == {"__float__": "nan"}


def test_state_of_a_subclass_goes_with_the_run(tmp_path):
    class Counting(TrainingLoop):
        seen = 0

        def training_step(self, batches):
            self.seen += 1
            return super().training_step(batches)

        def state_dict(self):
            return super().state_dict() | {"seen": self.seen}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.seen = state["seen"]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, kind=Counting, save_every=1, more={"callbacks": [Stop(2)]}).fit()
    loop = run(tmp_path, kind=Counting)
    loop.fit(resume=True)
    assert loop.seen == 4
