from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtune.data.collate import collate_padded
from llmtune.losses.contrastive import prototypical_loss
from llmtune.losses.embedding import sentence_embeddings
from llmtune.losses.prototypical import PrototypicalLoss
from llmtune.testing.close import assert_close
from llmtune.testing.models import VOCABULARY, tiny_bert
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import LossFunction


def rows(labels: list[int]) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (3 + k % 5,), generator=draw).tolist(), "labels": label}
        for k, label in enumerate(labels)
    ]


@pytest.mark.parametrize("options", [{}, {"distance": "cosine", "temperature": 0.1}, {"pooling": "cls"}])
def test_every_row_is_the_query_of_an_episode_with_all_others(options: dict[str, Any]) -> None:
    model, batch = tiny_bert(labels=3).double(), collate_padded(rows([4, 9, 4, -100, 9, 4, 7]))
    labels = batch["labels"]
    z = sentence_embeddings(model, batch, pooling=options.get("pooling", "mean"))
    plain = {key: value for key, value in options.items() if key != "pooling"}
    losses = []
    for i in (0, 1, 2, 4, 5):  # 7 has no classmate
        others = [j for j in range(7) if j != i]
        losses.append(prototypical_loss(z[others], labels[others], z[i : i + 1], labels[i : i + 1], **plain))
    loss = PrototypicalLoss(**options)
    assert_close(loss(model, batch), torch.stack(losses).mean(), rtol=1e-10)
    assert loss.count_targets(batch) == 5


def test_targets_are_rows_with_a_classmate_where_there_is_another_class() -> None:
    assert isinstance(PrototypicalLoss(), LossFunction)
    for labels, count in (([0, 1, 1, -100, 2], 2), ([1, 1, -100], 0), ([0, 1, 2], 0), ([-100, -100], 0)):
        batch = collate_padded(rows(labels))
        assert PrototypicalLoss().count_targets(batch) == count
        if not count:
            with pytest.raises(ValueError, match="needs two classes in a batch, one of them with two rows"):
                PrototypicalLoss()(tiny_bert(labels=3), batch)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match='distance must be "euclidean" or "cosine"; got \'manhattan\''):
        PrototypicalLoss(distance="manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be a finite number larger than 0; got 0"):
        PrototypicalLoss(temperature=0)
    with pytest.raises(ValueError, match="pooling must be"):
        PrototypicalLoss(pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'integer "labels" \[B\] in the batch, one class a row; got None'):
        PrototypicalLoss().count_targets({})


def test_training_draws_classes_apart() -> None:
    data = rows([0, 1, 2] * 4 + [3])
    settings = LoopSettings(max_steps=12, rows_per_step=13, learning_rate=3e-3, schedule="constant", progress=False)
    options = {"settings": settings, "collate": collate_padded, "loss": PrototypicalLoss()}
    history = TrainingLoop(tiny_bert(labels=3), data, **options).fit()
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[0]["targets"] == 12
