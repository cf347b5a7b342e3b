from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_padded
from llmtune.losses.contrastive import supervised_contrastive_loss
from llmtune.losses.embedding import sentence_embeddings
from llmtune.losses.supervised_contrastive import SupervisedContrastiveLoss
from llmtune.testing.close import assert_close
from llmtune.testing.models import VOCABULARY, tiny_bert
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import LossFunction


def rows(labels: list[int], *, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (3 + k % 5,), generator=generator).tolist(), "labels": label}
        for k, label in enumerate(labels)
    ]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_mixture_of_cross_entropy_and_contrast(pooling: Any) -> None:
    model, batch = tiny_bert(labels=3).double(), collate_padded(rows([0, 1, 1, -100, 0, 2, 1]))
    loss, parts = SupervisedContrastiveLoss(temperature=0.3, weight=0.9, pooling=pooling)(model, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hard = F.cross_entropy(model(**inputs).logits, batch["labels"])
    labels = batch["labels"]
    soft = supervised_contrastive_loss(sentence_embeddings(model, batch, pooling=pooling), labels, temperature=0.3)
    assert_close(loss, 0.1 * hard + 0.9 * soft, rtol=1e-10)
    assert_close(parts["cross_entropy"], hard, rtol=1e-10)
    assert_close(parts["contrastive"], soft, rtol=1e-10)
    assert parts["anchors"].item() == pytest.approx(5 / 6)
    assert not any(part.requires_grad for part in parts.values())


def test_by_itself_it_needs_no_classifier() -> None:
    model, batch = tiny_bert(labels=3), collate_padded(rows([4, 9, 4, 9, 50]))
    loss, parts = SupervisedContrastiveLoss()(model.bert, batch)
    assert_close(loss, supervised_contrastive_loss(sentence_embeddings(model.bert, batch), batch["labels"]))
    assert set(parts) == {"contrastive", "anchors"}


def test_targets_are_what_the_mean_is_over() -> None:
    batch = collate_padded(rows([0, 1, 1, -100, 2]))
    assert SupervisedContrastiveLoss().count_targets(batch) == 2
    assert SupervisedContrastiveLoss(weight=0.5).count_targets(batch) == 4
    lonely = collate_padded(rows([0, 1, 2, -100, -100]))
    assert SupervisedContrastiveLoss().count_targets(lonely) == 0
    with pytest.raises(ValueError, match="none of the 5 rows has a classmate in the batch"):
        SupervisedContrastiveLoss()(tiny_bert(labels=3), lonely)
    loss, parts = SupervisedContrastiveLoss(weight=0.5)(tiny_bert(labels=3), lonely)
    assert parts["anchors"] == parts["contrastive"] == 0
    assert_close(loss, 0.5 * parts["cross_entropy"])
    lonely["labels"][:] = -100
    with pytest.raises(ValueError, match=r"none of the 5 rows has a label \(all are -100\)"):
        SupervisedContrastiveLoss(weight=0.5)(tiny_bert(labels=3), lonely)


def test_the_protocol_and_options() -> None:
    assert isinstance(SupervisedContrastiveLoss(), LossFunction)
    batch = collate_padded(rows([0, 1, 1]))
    for bad in ({}, {"labels": torch.ones(2, 3, dtype=torch.long)}, {"labels": torch.ones(3)}):
        with pytest.raises(ValueError, match=r'integer "labels" \[B\] in the batch, one class a row; got'):
            SupervisedContrastiveLoss().count_targets(bad)
    with pytest.raises(ValueError, match="weight must be above 0 and at most 1"):
        SupervisedContrastiveLoss(weight=0.0)
    with pytest.raises(ValueError, match="temperature must be a finite number larger than 0; got -1"):
        SupervisedContrastiveLoss(temperature=-1.0)
    with pytest.raises(ValueError, match="pooling must be"):
        SupervisedContrastiveLoss(pooling="max")
    with pytest.raises(ValueError, match=r"must give logits \[3, C\] of two classes or more; it gave none"):
        SupervisedContrastiveLoss(weight=0.5)(tiny_bert(labels=3).bert, batch)
    batch["labels"][1] = 3
    with pytest.raises(ValueError, match=r"targets must be in 0 \.\.\. 2"):
        SupervisedContrastiveLoss(weight=0.5)(tiny_bert(labels=3), batch)


def test_micro_batches_change_the_gradient_as_the_docstring_says() -> None:
    model = tiny_bert(labels=2)
    data = rows([0, 1] * 4)

    def gradient(size: int) -> torch.Tensor:
        settings = LoopSettings(max_steps=1, rows_per_step=8, rows_per_micro_batch=size, progress=False)
        loop = TrainingLoop(
            model, data, settings=settings, collate=collate_padded, loss=SupervisedContrastiveLoss(temperature=0.5)
        )
        loop.accumulate_gradients(loop.micro_batches(0))
        return model.bert.embeddings.word_embeddings.weight.grad.clone()

    whole = gradient(8)
    assert (gradient(4) - whole).norm() > 0.05 * whole.norm()


def test_training_under_lora_draws_classes_together() -> None:
    model, data = tiny_bert(labels=2).bert, rows([0, 1, 2] * 4)
    attach(model, LoRA(rank=4, alpha=8, targets=["query", "value", "dense"], exclude=["pooler.dense"]))
    settings = LoopSettings(max_steps=15, rows_per_step=12, learning_rate=1e-2, schedule="constant", progress=False)
    loss = SupervisedContrastiveLoss(temperature=0.3)
    history = TrainingLoop(model, data, settings=settings, collate=collate_padded, loss=loss).fit()
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["anchors"] == 1.0
