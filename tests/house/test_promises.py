"""A promise in the docs names its test; a test of that name must be there."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

NAMED = re.compile(r"`(test_[a-z0-9_]+)`")
PLACED = re.compile(r"`(tests/[a-z0-9_/]+\.py)(?:::([A-Za-z0-9_:]+))?`")


@cache
def named_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def known_tests():
    paths = list((ROOT / "tests").rglob("test_*.py"))
    return {path.stem for path in paths}.union(*map(named_in, paths))


def missing(text, known):
    alone = [name for name in NAMED.findall(text) if name not in known]
    for file, name in PLACED.findall(text):
        path = ROOT / file
        if not path.is_file() or (name and not set(name.split("::")) <= named_in(path)):
            alone.append(f"{file}::{name}")
    return alone


def test_every_test_that_the_docs_name_is_there():
    known = known_tests()
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert {page.name: missing(page.read_text(encoding="utf-8"), known) for page in pages} == {
        page.name: [] for page in pages
    }


def test_a_name_without_a_test_is_found():
    here, known = "tests/house/test_promises.py", known_tests()
    assert missing("held by `test_that_nobody_wrote`", known) == ["test_that_nobody_wrote"]
    assert missing(f"held by `{here}::test_that_nobody_wrote`", known) == [f"{here}::test_that_nobody_wrote"]
    assert missing("held by `tests/house/test_nowhere.py`", known) == ["tests/house/test_nowhere.py::"]
    assert missing(f"held by `{here}::test_a_name_without_a_test_is_found`", known) == []
