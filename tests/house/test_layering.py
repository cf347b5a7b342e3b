"""Who may import whom: a part imports only from smaller numbers, a file imports the file that defines a name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "llmtune"

NUMBERS = {
    "types": 0, "errors": 0, "modules": 0,
    "attention": 1, "losses": 1, "data": 1, "optim": 1, "gradients": 1, "weights": 1,
    "adapters": 2, "layers": 2, "metrics": 2,
    "regularizers": 3, "forgetting": 3, "meta": 3,
    "training": 4,
    "integrations": 5, "planning": 5, "testing": 5,
    "quickstart": 6,
    "": 9,  # the public face, llmtune/__init__.py
}  # fmt: skip


@dataclass(frozen=True)
class Edge:
    """One import of one of our modules, inside a function or under TYPE_CHECKING as well."""

    importer: str
    target: str
    line: int
    for_types: bool

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.target}"


def modules(package: Path) -> dict[str, Path]:
    """Return the files of a package by dotted name; a folder stands for its `__init__.py`."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def edges(files: dict[str, Path], root: str) -> Iterator[Edge]:
    for importer, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            id(node)
            for test in ast.walk(tree)
            if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
            for statement in test.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(tree):
            for target in targets(node, importer, path, files):
                if target.split(".")[0] == root:
                    yield Edge(importer, target, getattr(node, "lineno", 0), id(node) in guarded)


def targets(node: ast.AST, importer: str, path: Path, files: dict[str, Path]) -> list[str]:
    """Return the modules that a statement imports: `from a import b` is a.b where that is a file, else a.

    What a folder's `__init__` imports under the name b hides the file b.
    """
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = node.module or ""
    if node.level:
        up = importer.split(".")[: None if path.name == "__init__.py" else -1]
        up = up[: len(up) - node.level + 1]
        source = ".".join([*up, *filter(None, [source])])
    hidden = bound(files[source]) if source in files and source != importer else set()
    joined = {alias.name: f"{source}.{alias.name}" for alias in node.names}
    return [file if file in files and name not in hidden else source for name, file in joined.items()]


@cache
def bound(path: Path) -> set[str]:
    """Return the names that a file imports."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def broken_rules(package: Path) -> list[str]:
    """Return one sentence for every import that breaks a rule of the house."""
    files = modules(package)
    root = package.name

    def part(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    said = [f"{module}: the part {part(module)!r} has no number" for module in files if part(module) not in NUMBERS]
    graph: dict[str, set[str]] = {}
    for edge in dict.fromkeys(edges(files, root)):
        ours, theirs = part(edge.importer), part(edge.target)
        number, other = NUMBERS.get(ours, -1), NUMBERS.get(theirs, 99)
        if ours != theirs and other >= number:
            said.append(f"{edge}: {ours!r} has number {number}, {theirs!r} has {other}")
        is_folder = edge.target in files and files[edge.target].name == "__init__.py"
        if is_folder and files[edge.importer].name != "__init__.py" and edge.target != root:
            said.append(f"{edge}: import the file that defines the name, not the folder")
        if not edge.for_types:
            graph.setdefault(edge.importer, set()).add(edge.target)
    return said + [f"a circle of imports: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return circles of imports, one for each that a walk in depth meets."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                walk(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


def test_every_import_goes_down():
    assert broken_rules(PACKAGE) == []


def test_the_design_page_shows_these_numbers():
    page = (PACKAGE.parent / "docs" / "design" / "01-the-house.md").read_text(encoding="utf-8")
    shown = {
        part if part != "llmtune" else "": int(number)
        for number, parts in re.findall(r"(?m)^\| (\d) \| (.+?) \|", page)
        for part in re.findall(r"`(\w+)`", parts)
    }
    assert shown == NUMBERS


SEEDED = {
    "a larger number": ("losses/a.py", "from llmtune.training.loop import TrainingLoop", "'training' has 4"),
    "the same number": ("losses/a.py", "import llmtune.data.packing", "'losses' has number 1, 'data' has 1"),
    "the same number, both 0": ("types.py", "from llmtune.errors import did_you_mean", "'errors' has 0"),
    "inside a function": ("losses/a.py", "def f():\n    import llmtune.adapters.lora", "'adapters' has 2"),
    "for types only": (
        "losses/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from llmtune.adapters.lora import LoRALinear",
        "line 3: imports llmtune.adapters.lora",
    ),
    "relatively": ("losses/a.py", "from ..training import loop", "imports llmtune.training.loop"),
    "the public face": ("quickstart/a.py", "import llmtune", "'' has 9"),
    "the folder's own face": ("losses/a.py", "from llmtune.losses import chunked_loss", "not the folder"),
    "another folder's face": ("training/a.py", "from llmtune.losses import chunked_loss", "not the folder"),
    "a name that hides a file": ("training/a.py", "from llmtune.adapters import lora", "not the folder"),
    "its own folder, relatively": ("losses/a.py", "from . import chunked_loss", "not the folder"),
    "a part without a number": ("helpers/__init__.py", "", "'helpers' has no number"),
    "a circle": ("losses/a.py", "from llmtune.losses.b import f", "llmtune.losses.a -> llmtune.losses.b"),
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_violation_is_seen(tmp_path, name):
    house = {
        "__init__.py": "", "types.py": "", "errors.py": "", "losses/__init__.py": "", "data/__init__.py": "",
        "data/packing.py": "", "adapters/__init__.py": "from llmtune.adapters.lora import lora",
        "adapters/lora.py": "", "training/__init__.py": "",
        "training/loop.py": "from llmtune.losses import b\nfrom llmtune.errors import did_you_mean\n",
        "losses/b.py": "def f():\n    from llmtune.losses import a" if name == "a circle" else "",
    }  # fmt: skip
    for file, text in house.items():
        path = tmp_path / "llmtune" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if name != "a circle":
        assert broken_rules(tmp_path / "llmtune") == []
    file, text, sentence = SEEDED[name]
    path = tmp_path / "llmtune" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    said = broken_rules(tmp_path / "llmtune")
    assert len(said) == 1, said
    assert sentence in said[0]
