from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmtune.data.rows import prompt_examples, read_rows, text_examples

WORDS = ["<s>", "</s>", "<unk>", "say", "it", "again", "yes", "no", "\n"]


def tokenizer(*, bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    core.post_processor = processors.TemplateProcessing(
        single=" ".join((["<s>"] if bos else []) + ["$A"] + (["</s>"] if eos else [])),
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_every_form_of_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write(
        tmp_path,
        {"prompt": "a", "response": "b", "id": 3},
        {"prompt": "a", "completion": "b"},
        {"instruction": "do", "input": "", "output": "done"},
        "",
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "input": None, "output": "done"},
        {"messages": messages},
        {"text": "æ plain text"},
    )
    assert read_rows(str(path)) == [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": "b"},
        {"prompt": "do", "response": "done"},
        {"prompt": "do\n\nthis", "response": "done"},
        {"prompt": "do", "response": "done"},
        {"messages": messages},
        {"text": "æ plain text"},
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert read_rows(path) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"data\.jsonl, line 2: not valid JSON: .* Expected one JSON object a line"),
        ("[1, 2]", r"data\.jsonl, line 2: expected a JSON object; got a list"),
        ({"instruction": "do"}, r'data\.jsonl, line 2: field "output" is missing \(the row has instruction\)'),
        ({"prompt": "do", "answer": "x"}, r'line 2: field "response" is missing \(the row has answer, prompt\)'),
        ({"prompt": "do", "response": ""}, r'line 2: field "response" must be a text; it is empty'),
        ({"prompt": 3, "response": "x"}, r'line 2: field "prompt" must be a text; got 3'),
        ({"instruction": "do", "input": 7, "output": "x"}, r'line 2: field "input" must be a text; got 7'),
        ({"messages": []}, r"line 2: expected a list of messages"),
        ({"messages": [{"role": "user"}]}, r'line 2, message 0 must have "role" and "content"'),
        ({"txt": "a"}, r'line 2: no known fields: .* the row has txt\. Did you mean "text"'),
        ({}, r"line 2: no known fields: .* the row has none"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path, {"text": "good"}, line))


def test_files_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl holds no rows: expected one JSON object a line"):
        read_rows(write(tmp_path, "", "  "))
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "nothing.jsonl")
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"data\.jsonl is no UTF-8 text"):
        read_rows(tmp_path / "data.jsonl")


@pytest.mark.parametrize("eos", [False, True])
def test_texts_end_once(eos: bool) -> None:
    rows = text_examples(tokenizer(eos=eos), ["say it", "again"])
    assert rows == [
        {"input_ids": [0, 3, 4, 1], "labels": [0, 3, 4, 1]},
        {"input_ids": [0, 5, 1], "labels": [0, 5, 1]},
    ]


@pytest.mark.parametrize("eos", [False, True])
def test_prompts_are_read_and_responses_learned(eos: bool) -> None:
    rows = prompt_examples(tokenizer(eos=eos), [{"prompt": "say it", "response": "yes no"}])
    assert rows == [{"input_ids": [0, 3, 4, 8, 8, 6, 7, 1], "labels": [-100] * 5 + [6, 7, 1]}]
    (row,) = prompt_examples(tokenizer(bos=False), [{"prompt": "say", "response": "yes"}], separator=" ")
    assert row == {"input_ids": [3, 6, 1], "labels": [-100, 6, 1]}


def test_bad_texts_are_named() -> None:
    with pytest.raises(ValueError, match="text 1 is empty"):
        text_examples(tokenizer(), ["say", ""])
    with pytest.raises(TypeError, match="text 0 must be a string; got int"):
        text_examples(tokenizer(), [3])
    with pytest.raises(ValueError, match='row 1: field "response" must be a text; it is missing'):
        prompt_examples(tokenizer(), [{"prompt": "say", "response": "yes"}, {"prompt": "say"}])
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"has no end-of-text token, .*: set tokenizer\.eos_token"):
        text_examples(endless, ["say"])
