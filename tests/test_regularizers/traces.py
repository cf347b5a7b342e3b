"""What the tests of noise share: the models, a batch, what a model looks like, and two runs of a loop."""

import torch

from llmtune.data.collate import collate_packed
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5}
LOSSES = {"llama": causal_lm_loss, "gpt2": causal_lm_loss, "bert": masked_lm_loss, "t5": sequence_to_sequence_loss}


def batch_of(name, *, rows=3, length=7):
    """Return a batch of random tokens for a model, with labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def logits_of(name, model):
    """Return the model's logits on its batch."""
    return model(**batch_of(name)).logits.detach()


def traces(model):
    """Return all there is to see of a model: classes, modes, attributes, hooks, parameters and buffers."""
    seen = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if "hooks" in key and value is not None}
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | bool)}
        seen[name] = (id(module), type(module), sorted(vars(module)), hooks, plain)
    tensors = {
        name: (id(t), t.detach().clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()
    }
    return seen, tensors


def assert_same(before, after):
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    for name, (identity, value, flag) in before[1].items():
        assert after[1][name][0] == identity, name
        assert torch.equal(after[1][name][1], value), name
        assert after[1][name][2] == flag, name


def trained(
    model,
    context,
    *,
    steps=4,
    folder=None,
    stop=None,
    resume=False,
    loss=causal_lm_loss,
    collate=collate_packed,
    **changed,
):
    """Return the weights after a run inside `context(model)`; `stop` ends it early, as a kill does."""
    settings = LoopSettings(
        max_steps=steps, rows_per_step=4, rows_per_micro_batch=2, learning_rate=1e-2, progress=False, folder=folder,
        save_every=None if folder is None else 1, seed=3, **changed,
    )  # fmt: skip

    class Loop(TrainingLoop):
        def training_step(self, batches):
            if self.step == stop:
                raise InterruptedError
            return super().training_step(batches)

    with context(model):
        try:
            Loop(model, uneven_rows(13), settings=settings, loss=loss, collate=collate).fit(resume=resume)
        except InterruptedError:
            assert stop is not None
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
