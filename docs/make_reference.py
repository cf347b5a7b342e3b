"""Write docs/reference/ from the docstrings: a page for each package, and an index.

    python docs/make_reference.py            writes the pages
    python docs/make_reference.py --check    changes nothing, and fails where a page is not what would be written

Everything is read from the source as text (`ast`), nothing is imported: the pages are the same on every machine and
every Python, defaults stand there as they were written, and no part needs what it would need to run.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

from public_names import (
    PACKAGE,
    Function,
    Public,
    class_of_value,
    file_of,
    find,
    methods,
    pages,
    parsed,
    public_names,
    source_of,
)

ROOT = Path(__file__).parents[1]
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")
LISTED = ("Args", "Attributes", "Raises")
WIDTH = 100


# --- signatures ---------------------------------------------------------------------------------------------------


def signature(root: Path, public: Public) -> str:
    """Return how a function or class is called, or a value's definition, as Python text of at most `WIDTH` columns."""
    source = source_of(root, public.module)
    if isinstance(public.node, Function):
        return _function(public.node, source, public.name)
    if isinstance(public.node, ast.ClassDef):
        made = next((c for c in public.node.body if isinstance(c, Function) and c.name == "__init__"), None)
        arguments = _fields(root, public) if made is None else _arguments(made, source)[1:]
        if arguments in ([], ["*"]):
            bases = ", ".join(_text(base, source) for base in public.node.bases)
            return f"class {public.name}({bases})" if bases else f"class {public.name}"
        return _call(f"class {public.name}", arguments, "")
    return _text(public.node, source)


def _function(node: Function, source: str, name: str, *, skip: int = 0) -> str:
    arguments = _arguments(node, source)[skip:]
    if any("contextmanager" in ast.unparse(mark) for mark in node.decorator_list):
        return _call(f"with {name}", arguments, "")
    return _call(name, arguments, f" -> {_text(node.returns, source)}" if node.returns else "")


def _call(name: str, arguments: list[str], result: str) -> str:
    line = f"{name}({', '.join(arguments)}){result}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {a}," for a in arguments), f"){result}"])


def _arguments(node: Function, source: str) -> list[str]:
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [*[None] * (len(positional) - len(a.defaults)), *a.defaults]
    shown = [_argument(arg, default, source) for arg, default in zip(positional, defaults, strict=True)]
    if a.posonlyargs:
        shown.insert(len(a.posonlyargs), "/")
    if a.vararg:
        shown.append("*" + _argument(a.vararg, None, source))
    elif a.kwonlyargs:
        shown.append("*")
    shown += [_argument(arg, default, source) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return [*shown, "**" + _argument(a.kwarg, None, source)] if a.kwarg else shown


def _argument(arg: ast.arg, default: ast.expr | None, source: str) -> str:
    shown = arg.arg + (f": {_text(arg.annotation, source)}" if arg.annotation else "")
    if default is None:
        return shown
    return f"{shown} = {_text(default, source)}" if arg.annotation else f"{shown}={_text(default, source)}"


def _fields(root: Path, public: Public) -> list[str]:
    """Return a dataclass's fields as arguments, those of its bases first; empty for any other class."""
    node = public.node
    assert isinstance(node, ast.ClassDef)
    marks = [ast.unparse(mark) for mark in node.decorator_list if "dataclass" in ast.unparse(mark)]
    if not marks:
        return []
    source, shown = source_of(root, public.module), []
    for base in node.bases:
        found = find(root, public.module, base.id) if isinstance(base, ast.Name) else None
        if found is not None and isinstance(found.node, ast.ClassDef):
            shown += [field for field in _fields(root, found) if field != "*"]
    if "kw_only=True" in marks[0]:
        shown.insert(0, "*")
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and "ClassVar" not in ast.unparse(child.annotation):
            default = "" if child.value is None else f" = {_default(child.value, source)}"
            shown.append(f"{ast.unparse(child.target)}: {_text(child.annotation, source)}{default}")
    return shown


def _default(value: ast.expr, source: str) -> str:
    made = {keyword.arg: keyword.value for keyword in value.keywords} if isinstance(value, ast.Call) else {}
    if "default_factory" in made:
        factory = ast.unparse(made["default_factory"])
        return {"dict": "{}", "list": "[]", "tuple": "()"}.get(factory, f"{factory}()")
    return _text(made.get("default", value), source)


def _text(node: ast.AST | None, source: str) -> str:
    """Return the source of a node on one line."""
    return "" if node is None else " ".join((ast.get_source_segment(source, node) or "").split())


# --- pages --------------------------------------------------------------------------------------------------------


def render(root: Path, package: str = PACKAGE) -> dict[str, str]:
    """Return all pages, file name to text."""
    made = {"README.md": _index(root, package)}
    for module in pages(root, package):
        body = _top(root, module) if module == package else _page(root, module)
        made[f"{module.split('.')[-1]}.md"] = "\n".join(body).rstrip() + "\n"
    return made


def _index(root: Path, package: str) -> str:
    lines = ["# Reference", "", "Made from the docstrings by `python docs/make_reference.py`; edit those.", ""]
    for module in pages(root, package):
        path = file_of(root, module)
        assert path is not None
        lines.append(
            f"- [`{module}`]({module.split('.')[-1]}.md): {_first(ast.get_docstring(parsed(path)[0]))}".rstrip()
        )
    return "\n".join(lines) + "\n"


def _top(root: Path, module: str) -> list[str]:
    path = file_of(root, module)
    assert path is not None
    lines = [f"# {module}", "", *markdown(ast.get_docstring(parsed(path)[0]) or ""), ""]
    for name in public_names(root, module):
        public = find(root, module, name)
        if public is None:
            continue
        whole = isinstance(public.node, ast.Module)
        home = f"{name}.md" if whole else f"{public.module.split('.')[1]}.md#{name.lower()}"
        lines += [f"## {name}", "", f"{_first(public.doc)} See [`{home.split('.')[0]}`]({home}).".strip(), ""]
    return lines


def _page(root: Path, module: str) -> list[str]:
    path = file_of(root, module)
    assert path is not None
    found = [find(root, module, name) for name in public_names(root, module)]
    lines = [f"# {module}", "", *markdown(ast.get_docstring(parsed(path)[0]) or ""), ""]
    lines += [f"- [`{p.name}`](#{p.name.lower()}): {_first(p.doc)}" for p in found if p is not None]
    for public in found:
        if public is not None:
            lines += ["", *_entry(root, public, [p.name for p in found if p is not None])]
    return lines


def _entry(root: Path, public: Public, on_this_page: list[str]) -> list[str]:
    path = file_of(root, public.module)
    assert path is not None
    file = path.relative_to(root).as_posix()
    lines = [f"## {public.name}", "", *_fence("text", signature(root, public).split("\n")), ""]
    made_of = class_of_value(root, public)
    if made_of is not None and made_of.name in on_this_page:
        return [*lines, f"An instance of [`{made_of.name}`](#{made_of.name.lower()}), in [{file}](../../{file})."]
    described = public if made_of is None else made_of
    lines += [*markdown(public.doc or ""), "", f"In [{file}](../../{file})."]
    if isinstance(described.node, ast.ClassDef):
        source = source_of(root, described.module)
        for method in methods(described.node):
            is_property = any("property" in ast.unparse(mark) for mark in method.decorator_list)
            is_static = any(ast.unparse(mark) == "staticmethod" for mark in method.decorator_list)
            name = f"{public.name}.{method.name}"
            shown = _function(method, source, name, skip=0 if is_static else 1)
            shown = shown.replace("()", "", 1) if is_property else shown
            title = f"### {name}".replace("__", "\\_\\_")
            lines += ["", title, "", *_fence("text", shown.split("\n")), ""]
            lines += markdown(ast.get_docstring(method) or "")
    return lines


def markdown(doc: str) -> list[str]:
    """Return a Google-style docstring as lines of Markdown."""
    made: list[str] = []
    lines, at = doc.split("\n"), 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            end = next((i for i in range(at, len(lines)) if lines[i] and lines[i][0] != " "), len(lines))
            body = [text[4:] for text in lines[at:end]]
            inner = _items(body) if line[:-1] in LISTED else markdown("\n".join(body).strip("\n"))
            made += [*([""] if made and made[-1] else []), f"**{line[:-1]}**", "", *inner, ""]
            at = end
        elif line.lstrip().startswith(">>>"):
            end = next((i for i in range(at, len(lines)) if not lines[i].strip()), len(lines))
            made += [*([""] if made and made[-1] else []), *_fence("pycon", [line, *lines[at:end]])]
            at = end
        else:
            made.append(line if line.startswith("    ") else _escaped(line))
    while made and not made[-1]:
        made.pop()
    return made


def _items(body: list[str]) -> list[str]:
    """Return `name: text` entries, continued on indented lines, as a list."""
    made = []
    for line in body:
        entry = re.match(r"([\w*.]+(?:, [\w*.]+)*): ?(.*)", line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            made.append(f"- {names}: {_escaped(entry[2])}")
        elif line.strip():
            made.append(f"  {_escaped(line.strip())}")
    return made


def _escaped(line: str) -> str:
    """Keep Markdown from reading products, dunder names and comparisons as markup, outside of backticks."""
    pieces = line.split("`")
    for index in range(0, len(pieces), 2):
        piece = re.sub(r"(?<=\S)\*|\*(?=\S)", r"\\*", pieces[index])
        pieces[index] = re.sub(r"<(?=[A-Za-z/])", "&lt;", piece.replace("__", "\\_\\_"))
    return "`".join(pieces)


def _fence(language: str, lines: list[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _first(doc: str | None) -> str:
    """Return a docstring's first paragraph on one line."""
    return _escaped(" ".join((doc or "").split("\n\n")[0].split()))


# --- files --------------------------------------------------------------------------------------------------------


def stale(root: Path = ROOT, package: str = PACKAGE) -> list[str]:
    """Return one line for every page that is missing, out of date, or of a package that is no more."""
    folder, wanted, said = root / "docs" / "reference", render(root, package), []
    for name, text in wanted.items():
        path = folder / name
        if not path.is_file():
            said.append(f"{path.relative_to(root)} is missing")
            continue
        old = path.read_text(encoding="utf-8")
        if old != text:
            changes = [d for d in difflib.ndiff(old.splitlines(), text.splitlines()) if d[0] in "+-"]
            plus = sum(change[0] == "+" for change in changes)
            said.append(
                f"{path.relative_to(root)} is stale: {plus} lines to add, {len(changes) - plus} to remove, "
                f"the first {changes[0] if changes else 'at its end'!r}"
            )
    extra = sorted({path.name for path in folder.glob("*.md")} - set(wanted))
    return said + [f"docs/reference/{name} is of no package: remove it" for name in extra]


def write(root: Path = ROOT, package: str = PACKAGE) -> None:
    """Write all pages, and remove those of packages that are no more."""
    folder, wanted = root / "docs" / "reference", render(root, package)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    """Write the pages, or check them; return the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/reference/ from the docstrings.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not current")
    if not parser.parse_args().check:
        write()
        return 0
    said = stale()
    for line in said:
        print(line)
    print("run: python docs/make_reference.py" if said else "docs/reference is current")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
