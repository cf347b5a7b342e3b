"""Conversations to training rows: the assistant's tokens are learned, all others are only read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.data.collate import IGNORED

MARKER = re.compile(r"\{%-?\s*generation\b")
FAR = 8  # tokens; adding text behind a prefix can change how its last few characters are cut, never more


def chat_examples(tokenizer: Any, conversations: Sequence[Any]) -> list[dict[str, list[int]]]:
    """Return a row for each conversation, rendered by the tokenizer's chat template, with labels on the assistant only.

    The assistant's tokens are what the template marks with `{% generation %}`. Where it has no such marker, they are
    found by rendering the conversation up to each of the assistant's turns: the tokens from there to the end of the
    turn, its closing token included and white space behind that left out. A token that holds the last character before
    a turn and the first of it belongs to the turn.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        conversations: each a list of messages {"role": ..., "content": ...}, or a dict with such a list as "messages".

    Returns:
        Rows {"input_ids", "labels"}, lists of equal length; labels are -100 outside the assistant's turns.

    Raises:
        ValueError: the tokenizer has no chat template; or a conversation has no message, or none of the assistant, or
            the template cannot render it or rewrites earlier turns. Names the conversation by its index.
    """
    template = _template(tokenizer)
    rows = []
    for index, conversation in enumerate(conversations):
        messages: Any = conversation.get("messages") if isinstance(conversation, Mapping) else conversation
        check_messages(messages, f"conversation {index}")
        if all(message["role"] != "assistant" for message in messages):
            roles = sorted({str(message["role"]) for message in messages})
            raise ValueError(
                f'conversation {index} has no turn of the role "assistant" to learn; its roles are {roles}'
            )
        if MARKER.search(template):
            ids, learned = _by_marker(tokenizer, messages, index)
        else:
            ids, learned = _by_prefix(tokenizer, messages, index)
        if not any(learned):
            raise ValueError(f"conversation {index}: the chat template gives the assistant's turns no tokens to learn")
        labels = [token if mine else IGNORED for token, mine in zip(ids, learned, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _template(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template: set tokenizer.chat_template, or use prompt_examples"
        )
    return str(tokenizer.get_chat_template())


def check_messages(messages: Any, where: str) -> None:
    """Raise ValueError, beginning with `where`, unless `messages` is a list of messages with role and content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) == 0:
        raise ValueError(
            f'{where}: expected a list of messages, or a dict with one as "messages"; got {messages!r:.80}'
        )
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & set(message):
            raise ValueError(f'{where}, message {turn} must have "role" and "content"; got {message!r:.80}')


def _by_marker(tokenizer: Any, messages: Sequence[Any], index: int) -> tuple[list[int], list[bool]]:
    encoded = _render(tokenizer, messages, index, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]


def _by_prefix(tokenizer: Any, messages: Sequence[Any], index: int) -> tuple[list[int], list[bool]]:
    text = _render(tokenizer, messages, index)
    ids = _encode(tokenizer, text)
    learned = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], index, add_generation_prompt=True)
        through = _render(tokenizer, messages[: turn + 1], index)
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"conversation {index}, message {turn}: the chat template does not render the conversation up to this "
                "turn as the beginning of the whole (it rewrites earlier turns, or adds a text of its own before the "
                "assistant's). Mark the assistant's text in the template with {% generation %} ... {% endgeneration %}"
            )
        start, stop = (_shared(tokenizer, part, ids, index) for part in (before, through))
        stop = _without_trailing_space(tokenizer, ids, start, stop)
        learned[start:stop] = [True] * (stop - start)
    return ids, learned


def _render(tokenizer: Any, messages: Sequence[Any], index: int, *, tokenize: bool = False, **how: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=tokenize, **how)
    except Exception as error:  # Jinja's own and whatever a template raises
        raise ValueError(f"conversation {index}: the chat template cannot render it: {error}") from error


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _shared(tokenizer: Any, prefix: str, ids: list[int], index: int) -> int:
    """Return how many tokens at the start of `ids` are those of `prefix`, the beginning of the same text."""
    own = _encode(tokenizer, prefix)
    same = next((at for at, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), min(len(own), len(ids)))
    if len(own) - same > FAR:
        raise ValueError(
            f"conversation {index}: the tokens of the conversation up to a turn are not the first tokens of the whole: "
            f"of {len(own)} tokens the first {same} agree. Mark the assistant's text in the chat template with "
            "{% generation %} ... {% endgeneration %}"
        )
    return same


def _without_trailing_space(tokenizer: Any, ids: list[int], start: int, stop: int) -> int:
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items() if added.special}
    last = next((at for at in range(stop - 1, start - 1, -1) if ids[at] in special), None)
    if last is None or tokenizer.decode(ids[last + 1 : stop]).strip():
        return stop
    return last + 1
