from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.embedding import sentence_embeddings
from llmtune.losses.packed import is_packed
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_bert, tiny_llama, tiny_t5

ROWS = [{"input_ids": [5, 7, 11, 13, 17]}, {"input_ids": [19, 23]}, {"input_ids": [29, 31, 37]}]


def body(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """Return the last hidden states [n, E] of a row by itself."""
    return model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("name", ["encoder", "decoder, right", "decoder, left"])
def test_padding_takes_no_part(name: str, pooling: Any) -> None:
    model = tiny_bert(labels=2).bert if name == "encoder" else tiny_llama().model
    batch = collate_padded(ROWS, side="left" if "left" in name else "right")
    pool = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "last": lambda h: h[-1]}[pooling]
    expected = torch.stack([pool(body(model, row)) for row in ROWS])
    assert_close(sentence_embeddings(model, batch, pooling=pooling), expected)


def test_a_classifier_gives_what_its_body_gives() -> None:
    from transformers import LlamaForSequenceClassification

    batch = collate_padded(ROWS)
    classifier = tiny_bert(labels=2)
    assert_close(sentence_embeddings(classifier, batch), sentence_embeddings(classifier.bert, batch), rtol=1e-6)
    decoder = LlamaForSequenceClassification(tiny_llama().config).eval()
    assert_close(sentence_embeddings(decoder, batch), sentence_embeddings(decoder.model, batch), rtol=1e-6)


def test_without_a_mask_all_tokens_are_real_and_nan_in_padding_stays_there() -> None:
    model = tiny_bert(labels=2).bert
    ids = torch.tensor([[5, 7, 11]])
    assert_close(sentence_embeddings(model, {"input_ids": ids})[0], body(model, {"input_ids": ids[0].tolist()}).mean(0))

    class Spoilt(nn.Module):
        def forward(self, attention_mask: Tensor) -> SimpleNamespace:
            hidden = torch.tensor([[[1.0, 3.0], [2.0, 5.0], [float("nan"), float("inf")]]])
            return SimpleNamespace(last_hidden_state=hidden)

    assert sentence_embeddings(Spoilt(), {"attention_mask": torch.tensor([[1, 1, 0]])}).tolist() == [[1.5, 4.0]]


def test_virtual_tokens_take_no_part() -> None:
    class Longer(nn.Module):
        def forward(self, attention_mask: Tensor) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=torch.arange(5.0)[None, :, None].repeat(2, 1, 1))

    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    assert sentence_embeddings(Longer(), batch).tolist() == [[2.5], [3.0]]
    assert sentence_embeddings(Longer(), batch, pooling="cls").tolist() == [[2.0], [2.0]]
    assert sentence_embeddings(Longer(), batch, pooling="last").tolist() == [[3.0], [4.0]]


def test_left_padding_is_not_packing() -> None:
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    assert is_packed({"position_ids": positions})
    assert not is_packed({"position_ids": positions, "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])})
    assert is_packed({"position_ids": positions, "attention_mask": torch.ones(1, 5)})
    assert not is_packed({"position_ids": torch.arange(5)[None]})


def test_what_has_no_embedding_is_an_error() -> None:
    batch, model = collate_padded(ROWS), tiny_bert(labels=2)
    with pytest.raises(ValueError, match="LlamaForCausalLM has a language-modelling head, whose logits"):
        sentence_embeddings(tiny_llama(), batch)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder: give its encoder"):
        sentence_embeddings(tiny_t5(), batch)
    assert sentence_embeddings(tiny_t5().get_encoder(), batch).shape == (3, 26)
    with pytest.raises(ValueError, match='pooling must be "mean", "cls" or "last"; got \'max\''):
        sentence_embeddings(model, batch, pooling="max")
    with pytest.raises(ValueError, match=r"the batch is packed .* pad one text a row"):
        sentence_embeddings(model, collate_packed(ROWS))
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    with pytest.raises(ValueError, match="row 1 has no real token: its attention_mask is all 0"):
        sentence_embeddings(model, {**batch, "attention_mask": mask})
    empty = nn.Module()
    empty.forward = lambda: SimpleNamespace()
    with pytest.raises(ValueError, match="Module gives neither last_hidden_state nor hidden_states to pool"):
        sentence_embeddings(empty, {})
