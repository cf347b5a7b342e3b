"""The public names of the package and the statements that define them, read from the source as text (`ast`).

Nothing is imported: what is found is the same on every machine and every Python, and no part needs what it would need
to run. `make_reference.py` writes the pages from it, and a test checks the docstrings with it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "llmtune"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Public:
    """A public name and the statement that defines it.

    Attributes:
        name: as users write it.
        module: the dotted name of the file that defines it.
        node: a function, a class, an assignment, or a whole module.
        doc: its docstring; for an assignment the string below it, or else that of the class it is made of.
    """

    name: str
    module: str
    node: ast.AST
    doc: str | None


def file_of(root: Path, module: str) -> Path | None:
    """Return the file of a dotted module name, or None where there is none."""
    path = root.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@cache
def parsed(path: Path) -> tuple[ast.Module, str]:
    """Return a file's tree and its source."""
    source = path.read_text(encoding="utf-8")
    return ast.parse(source), source


def pages(root: Path, package: str = PACKAGE) -> list[str]:
    """Return the modules that get a page: the top, the packages under it, and its public single files."""
    folder = root / package
    names = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
    files = sorted(path.stem for path in folder.glob("*.py") if path.stem in public_names(root, package))
    return [package, *(f"{package}.{name}" for name in sorted({*names, *files}))]


def public_names(root: Path, module: str) -> list[str]:
    """Return a module's `__all__`, or what a file without one defines; sorted without regard to case."""
    path = file_of(root, module)
    assert path is not None
    tree, _ = parsed(path)
    listed = next((node.value for node in tree.body if _assigned(node) == "__all__"), None)
    if listed is not None:
        return sorted(ast.literal_eval(listed), key=lambda name: (name.lower(), name))
    if path.name == "__init__.py":
        return []
    defined = (node.name if isinstance(node, Function | ast.ClassDef) else _assigned(node) for node in tree.body)
    return sorted({name for name in defined if name and not name.startswith("_")}, key=str.lower)


def find(root: Path, module: str, name: str) -> Public | None:
    """Follow a name from a module, through imports, to the statement that defines it; None where it leads nowhere."""
    path = file_of(root, module)
    if path is None:
        return None
    tree, _ = parsed(path)
    for node, below in reversed(list(_statements(tree.body))):
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return Public(name, module, node, ast.get_docstring(node))
        if _assigned(node) == name:
            return Public(name, module, node, _doc_of_value(root, module, node, below))
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) != name:
                    continue
                source = node.module or ""
                found = find(root, source, alias.name) if source != module else None
                whole = file_of(root, f"{source}.{alias.name}")  # what a folder binds hides a file of the same name
                if found is None and whole is not None:
                    tree, _ = parsed(whole)
                    return Public(name, f"{source}.{alias.name}", tree, ast.get_docstring(tree))
                return found
    return None


def class_of_value(root: Path, public: Public) -> Public | None:
    """Return the class that a public instance is made of (`x = C()`), where that class is ours."""
    value = getattr(public.node, "value", None)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        found = find(root, public.module, value.func.id)
        return found if found is not None and isinstance(found.node, ast.ClassDef) else None
    return None


def methods(node: ast.ClassDef) -> Iterator[Function]:
    """Yield a class's public methods and properties, and `__call__`, in the order of the file."""
    for child in node.body:
        if isinstance(child, Function) and (child.name == "__call__" or not child.name.startswith("_")):
            yield child


def _statements(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, ast.stmt | None]]:
    """Yield every statement of a module with the one below it, those of `if` blocks as well."""
    for node, below in zip(body, [*body, None][1:], strict=True):
        yield node, below
        if isinstance(node, ast.If):
            yield from _statements(node.body)
            yield from _statements(node.orelse)


def _assigned(node: ast.AST) -> str | None:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        return ast.unparse(node.targets[0])
    return ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else None


def _doc_of_value(root: Path, module: str, node: ast.stmt, below: ast.stmt | None) -> str | None:
    if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
        return below.value.value
    made_of = class_of_value(root, Public("", module, node, None))
    return None if made_of is None else made_of.doc


def source_of(root: Path, module: str) -> str:
    """Return the source of a module of the package."""
    path = file_of(root, module)
    assert path is not None
    return parsed(path)[1]
