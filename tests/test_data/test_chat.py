from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtune.data.chat import chat_examples

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
SPOKEN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORGETFUL = (  # leaves out what the assistant said before its last turn, as templates that drop earlier reasoning do
    "{% for m in messages %}{% set gone = m.role == 'assistant' and not loop.last %}"
    "{{ '<|im_start|>' + m.role + '\n' + ('' if gone else m.content) + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}")
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}" + CHATML


def tokenizer(template: str | None, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: a token a byte, but for the merges."""
    words = {token: index for index, token in enumerate([*BYTES, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(words, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    made.chat_template = template
    return made


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TWO_TURNS = [
    turn("system", "be kind"),
    turn("user", "hi"),
    turn("assistant", "hello you"),
    turn("user", "bye"),
    turn("assistant", "so long"),
]


def learned(tok: Any, row: dict[str, list[int]]) -> str:
    """The text of the labelled tokens, stretches of them set apart by |."""
    pieces, ids = [], []
    for token, label in zip([*row["input_ids"], None], [*row["labels"], -100], strict=True):
        if label != -100:
            assert label == token
            ids.append(token)
        elif ids:
            pieces.append(tok.decode(ids))
            ids = []
    return "|".join(pieces)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_labels_are_the_assistants_turns_with_their_end(template: str) -> None:
    tok = tokenizer(template)
    (row,) = chat_examples(tok, [TWO_TURNS])
    assert row["input_ids"] == tok.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert len(row["labels"]) == len(row["input_ids"])
    assert learned(tok, row) == "hello you<|im_end|>|so long<|im_end|>"


def test_both_ways_to_find_the_assistant_agree() -> None:
    marked, unmarked = tokenizer(MARKED), tokenizer(CHATML)
    assert chat_examples(marked, [TWO_TURNS]) == chat_examples(unmarked, [TWO_TURNS])


def test_conversations_come_as_lists_or_as_rows_with_messages() -> None:
    tok = tokenizer(CHATML)
    rows = chat_examples(tok, [TWO_TURNS, {"messages": TWO_TURNS, "source": "x"}])
    assert rows[0] == rows[1]


def test_a_template_without_special_tokens() -> None:
    tok = tokenizer(SPOKEN)
    (row,) = chat_examples(tok, [TWO_TURNS])
    assert learned(tok, row) == "hello you\n|so long\n"


def test_a_token_across_the_boundary_belongs_to_the_turn() -> None:
    newline = tokenizer(None).convert_ids_to_tokens(tokenizer(None)("\n")["input_ids"])[0]
    tok = tokenizer(CHATML, merges=((newline, newline),))
    (row,) = chat_examples(tok, [[turn("user", "hi"), turn("assistant", "\nfirst line")]])
    assert learned(tok, row) == "\n\nfirst line<|im_end|>"  # the header's line break and the answer's are one token
    (row,) = chat_examples(tok, [[turn("user", "hi"), turn("assistant", "first line")]])
    assert learned(tok, row) == "first line<|im_end|>"


def test_an_end_token_that_is_also_the_padding_is_learned() -> None:
    tok = tokenizer(CHATML)
    tok.eos_token = tok.pad_token = "<|im_end|>"
    (row,) = chat_examples(tok, [TWO_TURNS])
    assert row["labels"].count(tok.pad_token_id) == 2


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (
            CHATML,
            [turn("user", "hi")],
            r'conversation 1 has no turn of the role "assistant" .* its roles are \[\'user\'\]',
        ),
        (CHATML, [], r"conversation 1: expected a list of messages"),
        (CHATML, {"dialogue": []}, r"conversation 1: expected a list of messages, or a dict .*; got None"),
        (CHATML, [{"from": "gpt", "value": "x"}], r'conversation 1, message 0 must have "role" and "content"; got'),
        (FORGETFUL, TWO_TURNS, r"conversation 1, message 2: the chat template does not render .* \{% generation %\}"),
        (THINKING, TWO_TURNS, r"conversation 1, message 2: the chat template does not render"),
        (STRICT, TWO_TURNS, r"conversation 1: the chat template cannot render it: a user must begin"),
    ],
)
def test_bad_conversations_are_named(template: str, conversation: Any, message: str) -> None:
    good = [turn("user", "hi"), turn("assistant", "yes")] if template is not THINKING else None
    with pytest.raises(ValueError, match=message if good else message.replace("conversation 1", "conversation 0")):
        chat_examples(tokenizer(template), [good, conversation] if good else [conversation])


def test_a_marked_template_that_marks_nothing() -> None:
    empty = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    )
    with pytest.raises(ValueError, match="conversation 0: the chat template gives the assistant's turns no tokens"):
        chat_examples(tokenizer(empty), [TWO_TURNS])


def test_without_a_template() -> None:
    with pytest.raises(ValueError, match=r"has no chat template: set tokenizer\.chat_template, or use prompt_examples"):
        chat_examples(tokenizer(None), [TWO_TURNS])
