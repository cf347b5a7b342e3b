"""The streams and the model of `forgetting.py`: tasks one after another, a sentence encoder with one linear head."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from llmtune.losses.embedding import embeddings_and_output

Rows = Sequence[Mapping[str, Any]]
FIVE = ("trec6", "snips", "banking77", "clinc150", "tweeteval_emotion")
ORDERS = {0: FIVE, 1: ("tweeteval_emotion", "clinc150", "trec6", "banking77", "snips")}
TASKS = 10  # CLINC150 in parts of 15 classes
TOKENS = 48
TRAIN, TEST = 1200, 500  # rows at most
MASKED = -1e4  # the logit of a class that the row's task does not have


@dataclass(frozen=True)
class Stage:
    """One task: its rows, and which of all tasks' classes are its own."""

    name: str
    train: Rows
    test: Rows
    classes: tuple[int, ...]


def stream(models: Path, data: Path, name: str, order: int, *, test: int = TEST, dev: bool = False) -> list[Stage]:
    """Return the tasks of a stream in one of its orders.

    Args:
        models, data: folders, as `forgetting.py` says.
        name: "clinc150", 10 tasks that share no label, which are drawn by the order; or "five", five data sets.
        order: 0 or 1.
        test: test rows a task at most.
        dev: score training rows that are held out in every run, in place of test rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(models / "minilm-l6-v2")
    if name == "clinc150":
        train, held = (_lines(data / "clinc150" / f"{part}.jsonl") for part in ("train", "test"))
        labels = sorted({row["label"] for row in train})
        Random(f"clinc150 {order}").shuffle(labels)
        size = len(labels) // TASKS
        parts = [(f"intents {n + 1}", train, held, labels[n * size : (n + 1) * size]) for n in range(TASKS)]
    else:
        parts = []
        for part in ORDERS[order]:
            train, held = (_lines(data / part / f"{which}.jsonl") for which in ("train", "test"))
            parts.append((part, train, held, sorted({row["label"] for row in train})))
    stages, first = [], 0
    for number, (title, train, held, labels) in enumerate(parts):
        classes = range(first, first + len(labels))
        place = dict(zip(labels, classes, strict=True))

        def rows(
            some: list[dict[str, Any]], place: dict[str, int] = place, number: int = number
        ) -> list[dict[str, Any]]:
            own = [row for row in some if row["label"] in place]
            Random(f"rows {name}").shuffle(own)
            own = own[: TRAIN + TEST]
            ids = tokenizer([row["text"] for row in own], truncation=True, max_length=TOKENS)["input_ids"]
            return [{"input_ids": i, "labels": place[row["label"]], "task": number}
                    for i, row in zip(ids, own, strict=True)]  # fmt: skip

        taken = rows(train)
        scored = taken[TRAIN:] if dev else rows(held)
        scored = sorted(scored[:test], key=lambda row: len(row["input_ids"]))  # little padding
        stages.append(Stage(title, taken[:TRAIN], scored, tuple(classes)))
        first += len(labels)
    return stages


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Classifier(nn.Module):
    """A sentence encoder, the mean over its tokens, dropout, and one linear head over the classes of all tasks.

    With "task" [B] in a batch each row's logits outside of its own task's classes are -1e4: a head for each task. A
    batch without it, or a row of task -1, is for all classes: the model must find out the task too.
    """

    def __init__(self, encoder: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)
        classes = sum(len(stage.classes) for stage in stages)
        self.classifier = nn.Linear(self.config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)
        own = torch.ones(len(stages) + 1, classes, dtype=torch.bool)  # the last line is that of task -1
        own[:-1] = False
        for number, stage in enumerate(stages):
            own[number, list(stage.classes)] = True
        self.register_buffer("own", own, persistent=False)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's, as a model of transformers does."""
        return self.encoder.get_input_embeddings()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, task: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return the logits [B, C]."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        vectors, _ = embeddings_and_output(self.encoder, batch, pooling="mean")
        logits = self.classifier(self.dropout(vectors))
        if task is not None:
            logits = logits.masked_fill(~self.own[task], MASKED)
        return SequenceClassifierOutput(logits=logits)


def make_model(models: Path, stages: Sequence[Stage], seed: int) -> Classifier:
    """Return the pretrained encoder under a head at random, in float32; the word embeddings are frozen."""
    torch.manual_seed(seed)
    folder = models / "minilm-l6-v2"
    encoder: nn.Module = AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    encoder.get_input_embeddings().requires_grad_(False)
    return Classifier(encoder, stages)
