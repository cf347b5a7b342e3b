"""Projections inside Hugging Face's Trainer: it is given the optimizer that carries the hooks."""

import copy

import pytest
import torch
from trainers import ROWS, arguments, texts
from transformers import Trainer, TrainerCallback

from llmtune.data.collate import collate_padded
from llmtune.forgetting import GradientProjectionMemory, ReferenceProjection, reference_gradients
from llmtune.losses import causal_lm_loss
from llmtune.optim.wrapped import inner_optimizer
from llmtune.regularizers import DecoupledL2SP
from llmtune.testing.models import tiny_gpt2, tiny_llama


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_weights_stay_on_old_inputs_under_accumulation_and_clipping(make, tmp_path):
    model = make()
    memory = GradientProjectionMemory(rank=4)
    memory.finish_task(model, [collate_padded(texts()[: ROWS // 3])])
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    memory.attach(model, optimizer)
    given = arguments(tmp_path, 2, max_grad_norm=0.5, lr_scheduler_type="linear", max_steps=6)
    trainer = Trainer(
        model, given, train_dataset=texts(), data_collator=collate_padded, optimizers=(optimizer, None)
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 6
    for name, basis in memory.kept.items():
        change = (model.get_submodule(name).weight - before.get_submodule(name).weight).detach()
        change = change.T if make is tiny_gpt2 and name != "lm_head" else change
        assert float(change.norm()) > 0
        assert float((change @ basis).norm()) < 1e-5 * float(change.norm()), name


class Guards(TrainerCallback):
    """A-GEM on the update; notes how each step stands to the stored examples' gradient."""

    def __init__(self, stored, *, projected=True):
        self.stored, self.projected, self.projection, self.found = stored, projected, None, []

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, **_):
        if self.projection is None and self.projected:
            self.projection = ReferenceProjection(optimizer)
        self.reference = reference_gradients(model, self.stored, loss=causal_lm_loss)
        self.before = {parameter: parameter.detach().clone() for parameter in self.reference}
        if self.projected:
            self.projection.reference = self.reference

    def on_step_end(self, args, state, control, **_):
        products, sizes = 0.0, 1e-30
        for parameter, gradient in self.reference.items():
            change = (parameter.detach() - self.before[parameter]).double()
            products += float((change * gradient).sum())
            sizes += float(change.norm() * gradient.norm())
        self.found.append(products / sizes)


class Attaches(TrainerCallback):
    """Attaches a part to the optimizer that the Trainer hands over, which is accelerate's."""

    def __init__(self, part):
        self.part = part

    def on_train_begin(self, args, state, control, *, model, optimizer, **_):
        self.part.attach(model, optimizer)


def test_a_part_is_attached_to_the_optimizer_inside_the_wrapper(tmp_path):
    found = []
    for strength in (0.0, 5.0):
        model = tiny_gpt2()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        callback = Attaches(DecoupledL2SP(before, strength))
        given = arguments(tmp_path, 2, max_steps=4, learning_rate=1e-2)
        Trainer(model, given, train_dataset=texts(), data_collator=collate_padded, callbacks=[callback]).train()
        found.append(sum(float((p.detach() - before[n]).norm()) for n, p in model.named_parameters()))
    assert found[1] < 0.99 * found[0]
    with pytest.raises(TypeError, match="a torch optimizer that has been made is expected"):
        inner_optimizer(torch.optim.AdamW)


def test_no_step_goes_against_stored_examples(tmp_path):
    """The stored texts go on with other tokens than those trained on: without a guard steps go against them."""
    others = [{**row, "labels": [t if t < 0 else (t + 1) % 90 for t in row["labels"]]} for row in texts()]
    old = [collate_padded(others[:4])]
    found = {}
    for projected in (True, False):
        guard = Guards(old, projected=projected)
        given = arguments(tmp_path, 2, max_grad_norm=0.5, max_steps=6, learning_rate=1e-2)
        Trainer(tiny_gpt2(), given, train_dataset=texts(), data_collator=collate_padded, callbacks=[guard]).train()
        assert len(guard.found) == 6
        found[projected] = max(guard.found)
    assert found[True] < 1e-6 < 1e-3 < found[False]
