"""A promise in the docs names its test; a test of that name must be there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

NAMED = re.compile(r"`(test_[a-z0-9_]+)`")


def known_tests():
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        names.add(path.stem)
    return names


def missing(text, known):
    return [name for name in NAMED.findall(text) if name not in known]


def test_every_test_that_the_docs_name_is_there():
    known = known_tests()
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert {page.name: missing(page.read_text(encoding="utf-8"), known) for page in pages} == {
        page.name: [] for page in pages
    }


def test_a_name_without_a_test_is_found():
    assert missing("held by `test_that_nobody_wrote`", known_tests()) == ["test_that_nobody_wrote"]
