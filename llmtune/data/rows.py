"""Files of text to rows, and rows to token ids with labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.data.chat import check_messages
from llmtune.data.collate import IGNORED
from llmtune.errors import did_you_mean

FORMS = (("messages",), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("text",))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file, one object a line, each in one of three forms.

    | a line holds | the row is |
    |---|---|
    | "messages": a list of {"role", "content"} | {"messages": ...}, for `chat_examples` |
    | "prompt" and "response" (or "completion") | {"prompt": ..., "response": ...}, for `prompt_examples` |
    | "instruction", "output" and perhaps "input" (Alpaca) | the same; the prompt is instruction, blank line, input |
    | "text" | {"text": ...}, for `text_examples` |

    Further fields are left out. Empty lines are skipped.

    Args:
        path: the file, in UTF-8.

    Raises:
        ValueError: the file holds no rows; or a line is not a JSON object, lacks a field, or has one of the wrong kind.
            Names file, line and field.
        OSError: the file cannot be read.
    """
    path = Path(path)
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(line, f"{path}, line {number}"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows: expected one JSON object a line")
    return rows


def text_examples(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, list[int]]]:
    """Return a row for each text, every token a label, with the end-of-text token behind it.

    Args:
        tokenizer: a Hugging Face tokenizer; whatever it puts before a text (a first token) is kept.
        texts: strings, none empty.

    Returns:
        Rows {"input_ids", "labels"}, lists of equal length.

    Raises:
        ValueError: a text is empty, or the tokenizer has no end-of-text token.
        TypeError: a text is no string.
    """
    end = _end_of_text(tokenizer)
    rows = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {index} must be a string; got {type(text).__name__}")
        if not text:
            raise ValueError(f"text {index} is empty")
        ids = [*_encode(tokenizer, text, end), end]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


def prompt_examples(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, separator: str = "\n\n"
) -> list[dict[str, list[int]]]:
    """Return a training row for each prompt and response, with labels on the response and the end-of-text token only.

    Prompt and response are tokenized apart, as they will be when the model is asked: the boundary is exact, and no
    token holds a piece of both.

    Args:
        tokenizer: a Hugging Face tokenizer; whatever it puts before a text (a first token) is kept.
        rows: each with "prompt" and "response", strings, none empty.
        separator: text between them, counted to the prompt.

    Returns:
        Rows {"input_ids", "labels"}, lists of equal length; labels are -100 on the prompt.

    Raises:
        ValueError: a row lacks a field or has an empty one, or the tokenizer has no end-of-text token. Names row and
            field.
    """
    end = _end_of_text(tokenizer)
    examples = []
    for index, row in enumerate(rows):
        for name in ("prompt", "response"):
            _check_text(row, name, f"row {index}")
        prompt = _encode(tokenizer, row["prompt"] + separator, end)
        response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], end]
        examples.append({"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response})
    return examples


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}. Expected one JSON object a line") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object; got a {type(found).__name__}")
    form = next((form for form in FORMS if set(form) <= set(found)), None)
    if form is None:
        raise ValueError(f"{where}: {_what_lacks(found)}")
    if form == ("messages",):
        check_messages(found["messages"], where)
        return {"messages": found["messages"]}
    for name in form:
        _check_text(found, name, where)
    if form == ("text",):
        return {"text": found["text"]}
    prompt, response = (found[name] for name in form)
    if form[0] == "instruction" and found.get("input"):
        _check_text(found, "input", where)
        prompt = f"{prompt}\n\n{found['input']}"
    return {"prompt": prompt, "response": response}


def _what_lacks(found: dict[str, Any]) -> str:
    """Return what is wrong with a row of no known form: the field it lacks where it has begun one."""
    for first, *rest in FORMS:
        if first in found and rest:
            return f'field "{rest[0]}" is missing (the row has {", ".join(sorted(found))})'
    known = sorted({name for form in FORMS for name in form})
    near = "".join(did_you_mean(name, known) for name in list(found)[:1])
    return (
        'no known fields: expected "messages", or "prompt" and "response", or "instruction" and "output", or "text"; '
        f"the row has {', '.join(sorted(found)) or 'none'}.{near}"
    )


def _check_text(row: Mapping[str, Any], name: str, where: str) -> None:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        came = "it is missing" if name not in row else "it is empty" if value == "" else f"got {value!r:.80}"
        raise ValueError(f'{where}: field "{name}" must be a text; {came}')


def _end_of_text(tokenizer: Any) -> int:
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-text token, so a model could not learn to stop: set "
            "tokenizer.eos_token"
        )
    return int(end)


def _encode(tokenizer: Any, text: str, end: int) -> list[int]:
    """Return the text's ids with what the tokenizer puts before it, and without an end-of-text token behind it."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == end else ids
