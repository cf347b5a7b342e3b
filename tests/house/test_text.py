"""What may stand in the project's files: it speaks of itself alone, in plain characters, in files one can read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("llmtune", "tests", "docs", "benchmarks", ".ci")
FILES = [
    *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".md", "")),
    *(ROOT / name for name in ("README.md", "pyproject.toml", ".gitignore")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path for path in FILES if path.is_file()}

# Written in pieces, so that this file does not contain what it looks for.
FORBIDDEN = {
    "/" + r"work\b": "a path of somebody's machine",
    "/" + r"(home|root|Users)/": "a path of somebody's machine",
    r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b": "a note to oneself",
    r"(?i)\bissue" + r" #?\d": "a number that only its authors can look up",
    "[\u2018\u2019\u201c\u201d]": "a curly quote",
}

MOST_LINES = 300
LONGER = {"llmtune/training/loop.py": 350}  # the one class made to be read from top to bottom


def complaints(name: str, text: str) -> list[str]:
    """Return what is wrong with a file's text, a sentence each."""
    said = [
        f"{name}, line {text.count(chr(10), 0, found.start()) + 1}: {found[0]!r} is {what}"
        for pattern, what in FORBIDDEN.items()
        for found in re.finditer(pattern, text)
    ]
    most, lines = LONGER.get(name, MOST_LINES), text.count("\n")
    if name.startswith("llmtune/") and name.endswith(".py") and lines > most:
        said.append(f"{name} has {lines} lines, more than {most}: its second idea moves out")
    if name.endswith("/" + "utils.py"):
        said.append(f"{name}: name the file after what it does")
    return said


@pytest.mark.parametrize("name", TEXTS)
def test_text_of(name):
    assert complaints(name, TEXTS[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("docs/a.md", "see /" + "work/main", "a path of somebody's machine"),
        ("docs/a.md", "see /" + "home/me", "a path of somebody's machine"),
        ("llmtune/a.py", "# TO" + "DO: more", "a note to oneself"),
        ("README.md", "fixes issue" + " #3", "a number that only"),
        ("README.md", "a \u201cquote\u201d", "a curly quote"),
        ("llmtune/a.py", "\n" * 301, "llmtune/a.py has 301 lines, more than 300"),
        ("llmtune/losses/" + "utils.py", "", "name the file after what it does"),
    ],
)
def test_a_seeded_fault_is_seen(name, text, sentence):
    assert sentence in complaints(name, text)[0]


def test_good_text_passes():
    assert complaints("llmtune/a.py", "# a network, a framework/part, issues in general\n" * 300) == []
