"""What a page of the docs expects to find in its folder, in small: the page then runs as it stands."""

from __future__ import annotations

import json
import random
from pathlib import Path

QUESTIONS = {
    "ABBR": "stands short letters abbreviation",
    "DESC": "why how does define meaning",
    "ENTY": "which animal colour product plant",
    "HUM": "who wrote invented president actor",
    "LOC": "where city country river mountain",
    "NUM": "when year many much distance",
}
INTENTS = {
    "AddToPlaylist": "add song playlist tune album",
    "BookRestaurant": "book table restaurant lunch people",
    "GetWeather": "weather rain forecast snow windy",
    "PlayMusic": "play music artist listen station",
    "RateBook": "rate novel stars points essay",
    "SearchCreativeWork": "find show game picture saga",
    "SearchScreeningEvent": "movie cinema schedule theatre times",
}
COMMON = "the a of in is to for please me today this that one two ?"


def rows(kinds: dict[str, str], count: int, seed: int) -> list[dict[str, str]]:
    """Return sentences of common words with two words of their label's own among them."""
    draw, labels, made = random.Random(seed), sorted(kinds), []
    for index in range(count):
        label = labels[index % len(labels)]
        words = draw.choices(COMMON.split(), k=draw.randint(3, 9)) + draw.sample(kinds[label].split(), 2)
        draw.shuffle(words)
        made.append({"text": " ".join(words), "label": label})
    return made


def classifier(folder: Path) -> None:
    """Lay out an encoder with its tokenizer, and the rows of two classification tasks."""
    for name, kinds in (("trec", QUESTIONS), ("snips", INTENTS)):
        (folder / name).mkdir()
        for seed, (split, count) in enumerate((("train", 480), ("test", 250))):
            lines = [json.dumps(row) + "\n" for row in rows(kinds, count, seed)]
            (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    encoder(folder / "minilm-l6-v2", " ".join((COMMON, *QUESTIONS.values(), *INTENTS.values())).split())


def encoder(folder: Path, words: list[str]) -> None:
    """Save a small seeded BERT and a tokenizer that knows the words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


STAGES = {"docs/tutorials/02-a-classifier.md": classifier}
