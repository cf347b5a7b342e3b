"""Runs drawn at random, broken off at random moments and gone on with: each ends as the run that nothing stopped."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from runs import StreamOf

from llmtune.adapters import IA3, DoRA, LayerNormTuning, LoRA, PrefixTuning, VeRA, attach
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.best import KeepBest
from llmtune.training.early_stopping import EarlyStopping
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback

EVENTS = ("on_fit_start", "on_step_start", "on_task_gradients", "on_before_optimizer_step", "on_step_end",
          "on_eval_end", "on_save", "on_fit_end")  # fmt: skip
MODELS = {
    "llama": (tiny_llama, causal_lm_loss),
    "gpt2": (lambda: tiny_gpt2(dropout=0.2), causal_lm_loss),
    "bert": (lambda: tiny_bert(dropout=0.1), masked_lm_loss),
    "t5": (lambda: tiny_t5(dropout=0.1), sequence_to_sequence_loss),
}
ADAPTERS = (
    None, None, LoRA(rank=2, alpha=4, dropout=0.1), DoRA(rank=2, alpha=4), IA3(targets="all-linear"), VeRA(rank=3),
    LayerNormTuning(), PrefixTuning(tokens=2),
)  # fmt: skip


class Augmented(list):
    """Rows that change at random each time they are fetched."""

    def __getitem__(self, place):
        row, shift = super().__getitem__(place), random.randrange(3) + int(torch.randint(3, ())) + np.random.randint(3)
        return row | {"input_ids": [3 + (token + shift) % 94 for token in row["input_ids"]]}


class MapStyle:
    """The same, as a data set that is no list."""

    def __init__(self, rows):
        self.rows = Augmented(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


class Broken(Exception):
    pass


class Trouble(Callback):
    """Breaks a run off once, at the first `event` from a step on, by an error or by a signal."""

    def __init__(self, event, step, by_signal):
        def act(loop, *_):
            if self.waiting and loop.step >= step:
                self.waiting = False
                if not by_signal:
                    raise Broken
                os.kill(os.getpid(), signal.SIGINT)

        self.waiting = True
        setattr(self, event, act)


class Pull(Callback):
    """A penalty with state: towards the running mean of a weight."""

    mean = torch.zeros(())

    def __call__(self, model):
        return 0.01 * (self.first(model) - self.mean).square().sum()

    def first(self, model):
        return next(parameter for parameter in model.parameters() if parameter.requires_grad)

    def on_step_end(self, loop, metrics):
        self.mean = 0.5 * self.mean + 0.5 * self.first(loop.model).detach().mean()

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


class Loop(TrainingLoop):
    most, since, spoiled = 99, 0, ()

    def compute_loss(self, model, batch):
        loss = super().compute_loss(model, batch)
        if not loss.requires_grad:
            return loss
        if "position_ids" not in batch and len(batch["input_ids"]) > self.most and self.step >= self.since:
            raise torch.OutOfMemoryError("out of memory")
        return loss * float("nan") if self.step in self.spoiled else loss


def drawn(chance):
    """Return a way to make one loop, in a folder, again and again."""
    pick = chance.choice
    name, adapter, data = pick(list(MODELS)), pick(ADAPTERS), pick(("list", "map-style", "stream"))
    evaluated = chance.random() < 0.7
    settings = {
        "rows_per_step": chance.randint(1, 6), "rows_per_micro_batch": pick((None, 1, 2, 3, 8)),
        "learning_rate": pick((1e-3, 1e-2)), "weight_decay": pick((0.0, 0.1)), "clip_norm": pick((None, 0.5)),
        "precision": pick(("float32", "bf16", "fp16")), "fused": pick((None, False)), "seed": chance.randint(0, 3),
        "activation_checkpointing": chance.random() < 0.2, "spike_factor": pick((None, 1.5)), "on_bad_step": "skip",
        "save_every": pick((None, 1, 2, 3)), "keep": chance.randint(1, 3), "save_frozen": chance.random() < 0.3,
        "background_save": chance.random() < 0.3, "eval_every": pick((None, 1, 2)) if evaluated else None,
        "data_workers": pick((0, 0, 2)) if data != "stream" else 0, "progress": False,
        "schedule": pick(("linear", "cosine", "inverse_sqrt")), "warmup_steps": pick((0, 1, 3)),
    }  # fmt: skip
    settings |= {"epochs": chance.randint(1, 2)} if data != "stream" and chance.random() < 0.4 else {"max_steps": 5}
    packed = name in ("llama", "gpt2") and not isinstance(adapter, PrefixTuning) and chance.random() < 0.5
    kept, patience, restore = chance.random() < 0.5, chance.randint(1, 3), chance.random() < 0.5
    pulled, count = chance.random() < 0.3, pick((3, 7, 11))
    most, since, spoiled = pick((99, 99, 1, 2)), chance.randint(0, 3), pick(((), (), (1,), (0, 2)))

    def make(folder):
        model, loss = MODELS[name][0](), MODELS[name][1]
        torch.manual_seed(0)
        if adapter is not None:
            attach(model, adapter)
        callbacks = [EarlyStopping(patience=patience)] if settings["eval_every"] else []
        callbacks += [KeepBest(restore=restore)] if evaluated and kept else []
        rows = {"list": list, "map-style": MapStyle, "stream": StreamOf}[data](uneven_rows(count))
        loop = Loop(
            model, rows, settings=LoopSettings(folder=folder, **settings), loss=loss, callbacks=callbacks,
            collate=collate_packed if packed else collate_padded, penalties=[Pull()] if pulled else [],
            eval_data=uneven_rows(5, seed=9) if evaluated else None,
        )  # fmt: skip
        loop.most, loop.since, loop.spoiled = most, since, spoiled
        return loop

    return make


def fit_in_pieces(make, folder, chance, steps):
    """Break off one to four times, then let it come to its end; now and then the very same loop goes on."""
    loop = None
    for _ in range(chance.randint(1, 4)):
        if loop is None or chance.random() < 0.7:
            loop = make(folder)
        trouble = Trouble(chance.choice(EVENTS), chance.randint(0, steps), chance.random() < 0.5)
        loop.callbacks.insert(chance.randint(0, len(loop.callbacks)), trouble)
        try:
            loop.fit(resume=True)
        except (Broken, KeyboardInterrupt):
            pass
        loop.callbacks.remove(trouble)
    loop = make(folder) if chance.random() < 0.7 else loop
    loop.fit(resume=True)
    return loop


def rows_of(loop):
    return [{name: repr(value) for name, value in row.items() if name != "seconds"} for row in loop.history]


@pytest.mark.parametrize("seed", [*range(7), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(7, 150))])
def test_a_run_in_pieces_is_the_run(tmp_path, seed):
    chance = random.Random(seed)
    make = drawn(chance)
    whole = make(tmp_path / "whole")
    whole.fit()
    pieces = fit_in_pieces(make, tmp_path / "pieces", chance, whole.total_steps)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, pieces.model.state_dict()[name]), name
    assert rows_of(whole) == rows_of(pieces)
    assert whole.stopped == pieces.stopped
    assert len((tmp_path / "pieces" / "history.csv").read_text().splitlines()) == 1 + len(whole.history)
