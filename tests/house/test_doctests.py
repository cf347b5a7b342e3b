"""The examples in the docstrings run. They are found in the source, so that no decorator hides one."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def docstrings(path: Path) -> dict[str, tuple[str, int]]:
    """Return {name: (docstring, line)} of everything in a file whose docstring has an example."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and ">>>" in doc:
                line = node.body[0].lineno
                found[f"{getattr(node, 'name', 'module')}:{line}"] = (doc, line)
    return found


EXAMPLES = {
    f"{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.').removesuffix('.__init__')}:{name}": example
    for path in sorted((ROOT / "llmtune").rglob("*.py"))
    for name, example in docstrings(path).items()
}


def failures(doc: str, names: dict[str, object], name: str, line: int) -> str:
    """Run one docstring's examples and return what the runner says of those that fail."""
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(doc, dict(names), name, name, line)
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name.split(":")[0])
    doc, line = EXAMPLES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        said = failures(doc, vars(module), name, line)
    assert not said, said


def test_a_seeded_wrong_example_is_seen():
    assert "Got:\n    3" in failures("Add.\n\n>>> 1 + 2\n4\n", {}, "seeded", 1)
    assert "NameError" in failures("Add.\n\n>>> gone\n", {}, "seeded", 1)
    assert not failures("Add.\n\n>>> 1 + 2\n3\n", {}, "good", 1)


def test_an_example_behind_a_decorator_is_found(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('@contextmanager\ndef f():\n    """Do.\n\n    >>> 1\n    2\n    """\n')
    assert list(docstrings(path)) == ["f:3"]
