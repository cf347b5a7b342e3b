"""The texts of a quickstart as packs of tokens: a new domain to learn, an old one that must not be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtune.data.chat import chat_examples
from llmtune.data.packing import PackedDataset, pack
from llmtune.data.rows import prompt_examples, read_rows, text_examples
from llmtune.quickstart.corpus import code, prose

Pack = dict[str, Tensor]  # a row of a PackedDataset
OLD_TOKENS = 256  # the longest piece of the old domain: the embedded model has learned on such
OLD_CHARACTERS, NEW_CHARACTERS = 300_000, 300_000  # read of each of CPython's domains: a second or two
HELD_OUT_OF = 8  # one of so many rows of the user's is held out


@dataclass(frozen=True)
class Inputs:
    """What every way is given.

    Attributes:
        new: packs of the new domain to learn from.
        new_held_out: packs of the new domain to measure on; nothing of them is in `new`.
        old: packs of the old domain to take Fisher information from.
        old_held_out: packs of the old domain to measure on.
        described: a line for each domain that says what it is.
    """

    new: PackedDataset
    new_held_out: list[Pack]
    old: list[Pack]
    old_held_out: list[Pack]
    described: tuple[str, ...]


def cpython_inputs(tokenizer: Any, *, max_tokens: int, measured: int, fisher: int) -> Inputs:
    """Return the standard library's code as the new domain, and its prose as the old one.

    Args:
        tokenizer: of the model to be tuned.
        max_tokens: tokens in a pack of the new domain.
        measured: packs of each held-out side to measure on, at most.
        fisher: packs of the old domain to take Fisher information from, at most.

    Raises:
        FileNotFoundError: the library's source files are not on this machine.
    """
    texts = code(characters=NEW_CHARACTERS)
    new = pack(text_examples(tokenizer, texts.train), max_tokens, too_long="split")
    held_out = pack(text_examples(tokenizer, texts.held_out), max_tokens, too_long="split")
    line = f"new domain: source code of the Python standard library, {_size(new)} to learn from"
    return _with_old_domain(tokenizer, new, held_out, line, measured=measured, fisher=fisher)


def row_inputs(tokenizer: Any, data: Path, *, rows: int | None, max_tokens: int, measured: int, fisher: int) -> Inputs:
    """Return a file's rows as the new domain, every eighth of them held out (of fewer than 8, the last); and CPython's
    prose as the old one.

    Args:
        tokenizer: of the model to be tuned; rows of prompt and response go through its chat template where it has one.
        data: a file that `read_rows` reads.
        rows: how many of the first rows to take; None for all.
        max_tokens: tokens in a pack; longer plain texts are cut, other rows that are longer are left out.
        measured: packs of each held-out side to measure on, at most.
        fisher: packs of the old domain to take Fisher information from, at most.

    Raises:
        ValueError: the file cannot be read, lacks rows or fields, or too few rows are left.
        FileNotFoundError: the library's source files are not on this machine.
    """
    try:
        found = read_rows(data)[:rows]
    except OSError as error:
        raise ValueError(f"--data must be a file of JSON lines; {data} cannot be read: {error.strerror}") from error
    if len(found) < 2:
        raise ValueError(
            f"at least 2 rows are needed, one to learn from and one to measure on; {data} gives {len(found)}"
        )
    held = set(range(HELD_OUT_OF - 1, len(found), HELD_OUT_OF)) or {len(found) - 1}
    train = _packed(tokenizer, [row for i, row in enumerate(found) if i not in held], max_tokens, "to learn from")
    held_out = _packed(tokenizer, [found[i] for i in sorted(held)], max_tokens, "held out")
    dropped = train.dropped + held_out.dropped
    line = f"new domain: {len(found)} rows of {data}, {len(held)} of them held out, {_size(train)} to learn from"
    line += f" ({dropped} rows of more than {max_tokens} tokens left out)" if dropped else ""
    return _with_old_domain(tokenizer, train, held_out, line, measured=measured, fisher=fisher)


def examples(tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, max_tokens: int) -> list[dict[str, list[int]]]:
    """Return rows of any of `read_rows`' forms as token ids with labels; plain texts cut to pieces of `max_tokens`."""
    texts = text_examples(tokenizer, [row["text"] for row in rows if "text" in row])
    pieces = [
        {name: ids[start : start + max_tokens] for name, ids in example.items()}
        for example in texts
        for start in range(0, len(example["input_ids"]), max_tokens)
    ]
    pairs = [row for row in rows if "prompt" in row]
    chats = [row["messages"] for row in rows if "messages" in row]
    if getattr(tokenizer, "chat_template", None):
        chats += [_as_messages(pair) for pair in pairs]
        pairs = []
    return [*pieces, *prompt_examples(tokenizer, pairs), *(chat_examples(tokenizer, chats) if chats else ())]


def _as_messages(pair: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["response"]}]


def _packed(tokenizer: Any, rows: Sequence[Mapping[str, Any]], max_tokens: int, which: str) -> PackedDataset:
    try:
        return pack(examples(tokenizer, rows, max_tokens=max_tokens), max_tokens, too_long="drop")
    except ValueError as error:
        raise ValueError(f"of the rows {which}: {error}") from error


def _with_old_domain(
    tokenizer: Any, new: PackedDataset, held_out: PackedDataset, line: str, *, measured: int, fisher: int
) -> Inputs:
    texts = prose(characters=OLD_CHARACTERS)
    longest = min(OLD_TOKENS, new.max_tokens)
    old, old_held_out = (
        pack(text_examples(tokenizer, side), longest, too_long="split") for side in (texts.train, texts.held_out)
    )
    return Inputs(
        new=new,
        new_held_out=_first(held_out, measured),
        old=_first(old, fisher),
        old_held_out=_first(old_held_out, measured),
        described=(line, "old domain: documentation of the Python standard library, which no way learns from"),
    )


def _first(packs: PackedDataset, count: int) -> list[Pack]:
    return [packs[index] for index in range(min(count, len(packs)))]


def _size(packs: PackedDataset) -> str:
    return f"{sum(packs.lengths):,} tokens in {len(packs)} packs"
