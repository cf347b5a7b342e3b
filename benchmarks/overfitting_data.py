"""The data and the model of `overfitting.py`: few rows a class, a sentence encoder, a linear head."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from llmtune.data import collate_padded
from llmtune.losses import sentence_embeddings
from llmtune.losses.embedding import embeddings_and_output
from llmtune.modules import eval_mode

Rows = Sequence[Mapping[str, Any]]
NAMES = {"trec6": "TREC", "tweeteval_emotion": "emotion", "banking77": "BANKING77", "clinc150": "CLINC150"}
TOKENS = 48
DEV = 1000
TEST = 500
ROWS_AT_ONCE = {"cpu": 16, "cuda": 250}


@dataclass(frozen=True)
class Data:
    """The rows of one run, tokenised."""

    train: Rows
    test: Rows
    classes: int


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(models: Path, data: Path, name: str, *, shots: int, seed: int, dev: bool = False) -> Data:
    """Return `shots` training rows a class and the rows to score.

    The file of training rows is shuffled once and cut: its first 1000 rows are for choosing (`dev`); every seed draws
    its examples from the rest. The test rows are 500 of the test file, the same in every run.
    """
    folder = data / name
    tokenizer = AutoTokenizer.from_pretrained(models / "minilm-l6-v2")
    rows = lines(folder / "train.jsonl")
    classes = sorted({row["label"] for row in rows})
    Random(f"dev {name}").shuffle(rows)
    scored, pool = rows[:DEV], rows[DEV:]
    if not dev:
        scored = lines(folder / "test.jsonl")
        Random(f"test {name}").shuffle(scored)
        scored = scored[:TEST]
    Random(f"{name} {seed}").shuffle(pool)
    taken = dict.fromkeys(classes, 0)
    train = []
    for row in pool:
        taken[row["label"]] += 1
        if taken[row["label"]] <= shots:
            train.append(row)

    def tokenised(some: Rows) -> Rows:
        ids = tokenizer([row["text"] for row in some], truncation=True, max_length=TOKENS)["input_ids"]
        return [{"input_ids": i, "labels": classes.index(row["label"])} for i, row in zip(ids, some, strict=True)]

    return Data(tokenised(train), tokenised(scored), len(classes))


class Classifier(nn.Module):
    """A sentence encoder, the mean over its tokens, dropout, and a linear head that starts as in transformers."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)
        self.classifier = nn.Linear(self.config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's, as a model of transformers does."""
        return self.encoder.get_input_embeddings()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> SequenceClassifierOutput:
        """Return the logits, and the last hidden states [B, T, E] as the one entry of `hidden_states`."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        vectors, output = embeddings_and_output(self.encoder, batch, pooling="mean")
        logits = self.classifier(self.dropout(vectors))
        return SequenceClassifierOutput(logits=logits, hidden_states=(output.last_hidden_state,))


def encoder(models: Path) -> nn.Module:
    """Return the pretrained encoder, in float32."""
    model: nn.Module = AutoModel.from_pretrained(models / "minilm-l6-v2", add_pooling_layer=False, dtype=torch.float32)
    return model


@torch.no_grad()
def predictions(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return logits [N, C] and labels [N] of all rows, in eval mode; on a CPU in bfloat16 autocast."""
    return _over(model, rows, lambda batch: model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float())


@torch.no_grad()
def features(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return sentence vectors [N, E] and labels [N] of all rows, in eval mode; on a CPU in bfloat16 autocast."""
    return _over(model, rows, lambda batch: sentence_embeddings(model, batch))


def _over(model: nn.Module, rows: Rows, run: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    found = []
    with eval_mode(model), torch.autocast("cpu", torch.bfloat16, enabled=device.type == "cpu"):
        for start in range(0, len(rows), ROWS_AT_ONCE[device.type]):
            batch = collate_padded(rows[start : start + ROWS_AT_ONCE[device.type]])
            batch = {name: value.to(device) for name, value in batch.items()}
            found.append((run(batch).cpu(), batch["labels"].cpu()))
    values, labels = (torch.cat(some) for some in zip(*found, strict=True))
    return values, labels
