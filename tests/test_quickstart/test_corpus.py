"""The two domains of text: the same each time, disjoint, and really different."""

from __future__ import annotations

import io
import tokenize

import pytest

from llmtune.quickstart import corpus

SOURCE = '''"""What the module does."""
# a comment of its own
import os  # behind code

LINES = "# no comment"

def first(x):
    """What the function does,
    in two lines."""
    # why

    return x

@decorated(1)
class Second:
    """One line."""
    def method(self): "short"
    value = 2
'''
PARAGRAPH = (
    "This paragraph is number {} and has enough words in it to be taken for running prose by anybody who reads it."
)


@pytest.fixture(scope="module")
def prose():
    return corpus.prose(characters=200_000)


@pytest.fixture(scope="module")
def code():
    return corpus.code(characters=200_000)


@pytest.fixture
def library(tmp_path):
    """A small standard library: topics, two modules, and things that are to be left out."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    topics = "\\n\\n".join(PARAGRAPH.format(number) for number in range(40))
    write("pydoc_data/topics.py", f"topics = {{'one': '{topics}', 'two': 'short'}}\n")
    write("argparse.py", f'"""{PARAGRAPH.format(100)}"""\nparsed = 1\n')
    write(
        "typing.py",
        f'def typed():\n    """{PARAGRAPH.format(101)}\n\n    >>> {PARAGRAPH.format(102)}\n    """\n    return 3\n',
    )
    for folder in ("test", "site-packages", "concurrent/tests", "encodings"):
        write(f"{folder}/module.py", f'"""{PARAGRAPH.format(200)}"""\nleft_out = 1\n')
    write("_sysconfigdata__linux.py", "left_out = 2\n")
    write("broken.py", "def (:\n")
    return tmp_path


@pytest.mark.parametrize("domain", [corpus.prose, corpus.code])
def test_the_same_texts_each_time(domain):
    assert domain(characters=50_000) == domain(characters=50_000)


@pytest.mark.parametrize("domain", [corpus.prose, corpus.code])
def test_a_limit_cuts_the_end_off(domain):
    short, longer = domain(characters=50_000), domain(characters=90_000)
    assert longer.train[: len(short.train)] == short.train
    assert longer.held_out[: len(short.held_out)] == short.held_out
    assert 50_000 <= sum(map(len, short.train + short.held_out)) < sum(map(len, longer.train + longer.held_out))


def test_no_piece_is_on_both_sides_or_twice(prose, code):
    for texts, between in ((prose, "\n"), (code, "\n\n")):
        sides = [
            [piece for text in side for piece in text[:-1].split(between)] for side in (texts.train, texts.held_out)
        ]
        assert all(len(side) > 20 for side in sides)
        assert len(sides[0]) + len(sides[1]) == len({*sides[0], *sides[1]})


def test_the_domains_differ(prose, code):
    lines = {line for text in prose.train + prose.held_out for line in text.splitlines()}
    assert not lines & {line for text in code.train + code.held_out for line in text.splitlines() if line.strip()}

    def share(texts, characters):
        text = "".join(texts)
        return sum(text.count(character) for character in characters) / len(text)

    assert share(code.train, "=()[]{}:") > 3 * share(prose.train, "=()[]{}:")
    assert share(code.train, "\n") > 3 * share(prose.train, "\n")


def test_prose_is_paragraphs_of_running_text(prose):
    for line in "".join(prose.train).splitlines():
        assert len(line) >= corpus.LEAST_CHARACTERS
        assert ">>>" not in line
        assert "::=" not in line


def test_code_has_no_comments(code):
    for text in code.train[:20]:
        for piece in text.split("\n\n"):
            try:
                kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(piece + "\n").readline)}
            except (tokenize.TokenError, SyntaxError):  # a piece whose blank lines separated statements of one block
                continue
            assert tokenize.COMMENT not in kinds


def test_statements_lose_docstrings_and_comments_and_keep_the_rest():
    assert corpus.statements(SOURCE) == [
        "import os",
        'LINES = "# no comment"',
        "def first(x):\n    return x",
        "@decorated(1)\nclass Second:\n    value = 2",
    ]
    assert corpus.statements("def (:") == []


def test_the_side_hangs_on_the_piece_alone(library):
    first = corpus.prose(library)
    held_out = set("".join(first.held_out).splitlines())
    assert 0 < len(held_out) < 20
    (library / "another.py").write_text('"""' + "\n\n".join(sorted(held_out)) + '"""\n', encoding="utf-8")
    (library / "pydoc_data/topics.py").write_text("topics = {}\n", encoding="utf-8")
    moved = corpus.prose(library)
    assert held_out <= set("".join(moved.held_out).splitlines())
    assert not held_out & set("".join(moved.train).splitlines())


def test_tests_packages_and_examples_are_left_out(library):
    prose, code = corpus.prose(library), corpus.code(library)
    lines = set("".join(prose.train + prose.held_out).splitlines())
    assert lines == {PARAGRAPH.format(number) for number in (*range(40), 100, 101)}
    text = "".join(code.train + code.held_out)
    assert sorted(text.splitlines()) == ["    return 3", "def typed():", "parsed = 1"]


def test_a_library_without_sources_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"source files of the Python standard library.*topics\.py is not there"
    ):
        corpus.prose(tmp_path)
    with pytest.raises(FileNotFoundError, match="source files of the Python standard library"):
        corpus.code(tmp_path)
