"""Projections inside Hugging Face's Trainer: it is given the optimizer that carries the hooks."""

import copy

import pytest
import torch
from trainers import ROWS, arguments, texts
from transformers import Trainer

from llmtune.data.collate import collate_padded
from llmtune.forgetting import GradientProjectionMemory
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
