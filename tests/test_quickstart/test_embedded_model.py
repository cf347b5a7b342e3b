"""The model that travels with the package, and the program that trains it."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.data import collate_packed, pack, text_examples
from llmtune.metrics import perplexity
from llmtune.quickstart import corpus, embedded_model, train_embedded


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model(), local_files_only=True)


@pytest.fixture(scope="module")
def texts():
    return corpus.prose(characters=250_000)


def test_small_on_disk_and_without_pickles():
    files = [path for path in embedded_model().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_is_a_llama_with_a_byte_level_tokenizer(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32, local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.vocab_size == len(tokenizer) == train_embedded.VOCABULARY
    text = "Plain prose, a — dash,\n\ttabs, naïve, 漢字 and {code: [0x1F]}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id not in tokenizer(text)["input_ids"]


def test_knows_held_out_prose_far_better_than_word_counts_do(tokenizer, texts):
    """The closed bound is a unigram model with the counts of the training side, its perplexity divided by 5."""
    train, held_out = (text_examples(tokenizer, side) for side in (texts.train, texts.held_out))
    counts = Counter(token for row in train for token in row["input_ids"])
    total = sum(counts.values()) + len(tokenizer)
    targets = [token for row in held_out for token in row["input_ids"][1:]]
    unigram = math.exp(-sum(math.log((counts[token] + 1) / total) for token in targets) / len(targets))
    packs = pack(held_out, 256, too_long="split")
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32, local_files_only=True)
    assert perplexity(model, [collate_packed([packs[i]]) for i in range(16)]) < unigram / 5


def test_training_is_one_seeded_command(tmp_path, monkeypatch, texts, capsys):
    small = corpus.Corpus(texts.train[:12], texts.held_out[:12])
    monkeypatch.setattr(train_embedded, "prose", lambda: small)
    for folder in ("one", "two"):
        assert train_embedded.main(["--steps", "3", "--out", str(tmp_path / folder), "--seed", "7"]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("one", "two")]
    for one, two in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, two)
        assert one.dtype == torch.bfloat16
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab()
        == AutoTokenizer.from_pretrained(tmp_path / "two").get_vocab()
    )
    made, kept = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "one", embedded_model()))
    for version in (made, kept):
        version.pop("transformers_version")
        version.pop("vocab_size")
    assert made == kept


def test_training_lowers_the_loss(texts):
    torch.manual_seed(0)
    tokenizer = train_embedded.train_tokenizer(texts.train[:12], vocabulary=300)
    model = train_embedded.untrained(len(tokenizer), seed=1)
    rows = train_embedded.Windows(train_embedded.stream(tokenizer, texts.train[:12]), length=32, stride=8)
    settings = train_embedded.LoopSettings(max_steps=12, rows_per_step=4, learning_rate=5e-3, progress=False)
    history = train_embedded.Pretraining(model, rows, settings=settings, collate=train_embedded.stacked).fit()
    assert history[-1]["loss"] < history[0]["loss"] - 1


def test_windows_overlap_and_end_inside_the_stream():
    rows = train_embedded.Windows(torch.arange(23), length=7, stride=5)
    assert [rows[index]["input_ids"].tolist()[0] for index in range(len(rows))] == [0, 5, 10, 15]
    assert rows[3]["input_ids"].tolist() == list(range(15, 22))
    assert len(train_embedded.Windows(torch.arange(5), length=7, stride=5)) == 0


def test_a_number_of_steps_below_one_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        train_embedded.main(["--steps", "0"])
    assert "--steps must be 1 or more; got 0" in capsys.readouterr().err
