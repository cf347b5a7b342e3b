"""The loop's laws, run on our loop with every loss that is a mean over rows, and on loops that break them."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from llmtune.data.collate import collate_padded
from llmtune.errors import LawBroken
from llmtune.losses.causal_lm import CausalLMLoss
from llmtune.regularizers.freelb import FreeLBLoss
from llmtune.testing.loop import check_loop, uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings


def settings(rows_per_micro_batch, folder="run"):
    return LoopSettings(
        max_steps=4, rows_per_step=8, rows_per_micro_batch=rows_per_micro_batch, learning_rate=1e-2, folder=folder,
        progress=False,
    )  # fmt: skip


def make(model, data, size, *, kind=TrainingLoop, **options):
    return kind(model, data, settings=settings(size), **options)


class PlainLoss:
    """A user's own loss: an ordinary mean."""

    def __call__(self, model, batch):
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()), {"part": logits.mean()}

    def count_targets(self, batch):
        return int((batch["labels"][:, 1:] != -100).sum())


class SequenceToSequence:
    """The encoder-decoder's own mean loss over all labels."""

    def __call__(self, model, batch):
        return model(**batch).loss

    def count_targets(self, batch):
        return int((batch["labels"] != -100).sum())


def calm_t5():
    """T5 does not scale its attention logits: at the tiny model's wide weights float32 alone moves gradients 2e-6."""
    model = tiny_t5()
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model


CASES = {
    "packed": (tiny_llama, {}),
    "padded": (tiny_llama, {"collate": collate_padded}),
    "gpt2 with dropout": (partial(tiny_gpt2, dropout=0.1), {}),
    "smoothed": (tiny_llama, {"loss": CausalLMLoss(label_smoothing=0.1, z_loss=1e-3)}),
    "a user's loss": (tiny_llama, {"loss": PlainLoss(), "collate": collate_padded}),
    "with a penalty": (tiny_llama, {"penalties": [lambda m: 0.0 * m.lm_head.weight.sum()]}),
    "FreeLB": (tiny_gpt2, {"loss": FreeLBLoss(epsilon=0.5, step_size=0.3, start=0.0)}),
    "encoder-decoder": (calm_t5, {"loss": SequenceToSequence(), "collate": collate_padded}),
}


@pytest.mark.parametrize("case", CASES)
def test_our_loop_keeps_the_laws(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, options = CASES[case]
    check_loop(partial(make, **options), model=model())


class MeanOfMeans(TrainingLoop):
    """What plain accumulation does: each micro-batch counts the same, however many targets it has."""

    def count_targets(self, batch):
        return 1


class SumOfMeans(TrainingLoop):
    """A loss that is not divided by the number of micro-batches."""

    def accumulate_gradients(self, batches):
        self.model.zero_grad()
        for batch in batches:
            self.compute_loss(self.model, self.prepare_batch(batch)).backward()
        return {}


class Accumulating(TrainingLoop):
    """Forgets to drop the gradients of before."""

    def accumulate_gradients(self, batches):
        before = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        metrics = super().accumulate_gradients(batches)
        for p, old in zip(self.model.parameters(), before, strict=True):
            if old is not None:
                p.grad += old
        return metrics


class SwitchesMode(TrainingLoop):
    def accumulate_gradients(self, batches):
        self.model.train()
        return super().accumulate_gradients(batches)


class Wandering(TrainingLoop):
    """Takes its rows from a generator that it never puts back."""

    def row_indices(self, step):
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(0)
        return torch.randperm(len(self.train_data), generator=self.generator)[:8].tolist()


class ForgetsMomentum(TrainingLoop):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._configured = (torch.optim.AdamW(self.model.parameters(), lr=1e-2), self.scheduler)


class ForgetsRandomness(TrainingLoop):
    """Draws from a generator of its own, which no checkpoint holds."""

    def training_step(self, batches):
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(0)
        metrics = super().training_step(batches)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=self.generator))
        return metrics


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (MeanOfMeans, "one gradient: "),
        (SumOfMeans, "one gradient: the gradient of 2 micro-batches against 1"),
        (Accumulating, "no trace: the gradient of"),
        (SwitchesMode, "no trace: accumulate_gradients changed the model's mode from training=False"),
        (Wandering, "order by step: micro_batches"),
        (ForgetsRandomness, "one result: after a stop and a resume .* is off by"),
        (ForgetsMomentum, "one result: after a stop and a resume .* is off by"),
    ],
)
def test_a_loop_that_breaks_a_law_is_caught(kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LawBroken, match=message):
        check_loop(partial(make, kind=kind))


def test_the_rows_are_uneven():
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in uneven_rows()]
    assert counts == list(range(1, 9))
