"""Two domains of text that every CPython brings along: the prose of its documentation, and its source code.

The old domain is prose: the help topics of `pydoc_data.topics` and the docstrings of the standard library. The new
domain is the code of the same library, without its docstrings and comments. Both are read from the source files as
text; no module is imported. A piece of text (a paragraph of prose, a top-level statement of code) occurs once and lies
on the training or on the held-out side by a hash of the piece itself: the sides are disjoint, whichever CPython reads.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Other people's packages, test suites, tables of characters, bundled programs: neither the library's prose nor its code
LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "turtledemo",
     "ensurepip", "__pycache__", "__phello__", "msilib")
)  # fmt: skip
TOPICS = "pydoc_data/topics.py"
HELD_OUT_OF = 10  # one piece in so many is held out
LEAST_CHARACTERS = 60  # of a paragraph of prose, so that headings and signatures drop out
LEAST_LETTERS = (
    0.85  # share of letters, spaces and ordinary punctuation in a paragraph, so that grammars and examples drop out
)

EXAMPLE = re.compile(r">>>|::=")

Source = tuple[str, Callable[[], list[str]]]


@dataclass(frozen=True)
class Corpus:
    """The documents of one domain.

    Attributes:
        train: texts to learn from, one a source file or help topic, in the order of a hash of the source's name.
        held_out: texts of pieces that are in no text of `train`, in the same order.
    """

    train: list[str]
    held_out: list[str]


def prose(root: str | Path | None = None, *, characters: int | None = None) -> Corpus:
    """Return the standard library's documentation: paragraphs of running text, one a line.

    Args:
        root: the library's folder; that of the running CPython unless given.
        characters: stop after so many characters of both sides together; all of them unless given.

    Raises:
        FileNotFoundError: the library's source files are not there.
    """
    folder = standard_library(root)
    sources = [(f"{TOPICS}:{name}", lambda text=text: [text]) for name, text in _topics(folder / TOPICS).items()]
    sources += [(name, lambda path=path: _docstrings(path)) for name, path in _files(folder)]
    return _split(sources, lambda texts: [p for text in texts for p in paragraphs(text)], "\n", characters)


def code(root: str | Path | None = None, *, characters: int | None = None) -> Corpus:
    """Return the standard library's code: top-level statements as they were written, without docstrings and comments.

    Args:
        root: the library's folder; that of the running CPython unless given.
        characters: stop after so many characters of both sides together; all of them unless given.

    Raises:
        FileNotFoundError: the library's source files are not there.
    """
    sources = [(name, lambda path=path: statements(_text(path))) for name, path in _files(standard_library(root))]
    return _split(sources, lambda pieces: pieces, "\n\n", characters)


def standard_library(root: str | Path | None = None) -> Path:
    """Return the folder of the standard library's source files.

    Raises:
        FileNotFoundError: the folder holds no source files, as where CPython keeps its library in a zip file.
    """
    folder = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    for needed in (TOPICS, "argparse.py", "typing.py"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(
                f"the quickstart reads the source files of the Python standard library, and {folder / needed} is not "
                "there: use a CPython that comes with them (python.org, a Linux distribution's full package, conda, uv)"
            )
    return folder


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of running text in a docstring or help topic, each on one line."""
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        line = " ".join(block.split())
        ordinary = sum(c.isalpha() or c in " .,;:'\"()-" for c in line)
        if len(line) >= LEAST_CHARACTERS and ordinary >= LEAST_LETTERS * len(line) and not EXAMPLE.search(line):
            found.append(line)
    return found


def statements(source: str) -> list[str]:
    """Return the top-level statements of a Python file without docstrings and comments; none if it does not parse."""
    tree = _parse(source)
    if tree is None:
        return []
    lines = io.StringIO(source).readlines()
    for (row, start), end in _comments(source):
        lines[row - 1] = lines[row - 1][:start].rstrip() + lines[row - 1][end:]
    for documented in _documented(tree):
        first = documented.body[0]
        for row in range(first.lineno, (first.end_lineno or first.lineno) + 1):
            lines[row - 1] = ""
    found = []
    for statement in tree.body:
        begin = min((d.lineno for d in getattr(statement, "decorator_list", ())), default=statement.lineno)
        text = "".join(lines[begin - 1 : statement.end_lineno])
        text = re.sub(r"\n(?:[ \t]*\n)+", "\n", text).strip("\n")
        if text:
            found.append(text)
    return found


def _split(
    sources: Iterable[Source], pieces_of: Callable[[list[str]], list[str]], between: str, characters: int | None
) -> Corpus:
    """Read the sources in the order of a hash of their names, and share each one's new pieces out to the two sides."""
    corpus, seen, count = Corpus([], []), set(), 0
    for _, read in sorted(sources, key=lambda source: _hash(source[0])):
        sides: tuple[list[str], list[str]] = ([], [])
        for piece in pieces_of(read()):
            number = _hash(piece)
            if number not in seen:
                seen.add(number)
                sides[number % HELD_OUT_OF == 0].append(piece)
                count += len(piece)
        for texts, side in zip((corpus.train, corpus.held_out), sides, strict=True):
            if side:
                texts.append(between.join(side) + "\n")
        if characters is not None and count >= characters:
            break
    return corpus


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):  # how this CPython was built
                path = Path(place, name)
                yield path.relative_to(folder).as_posix(), path


def _topics(path: Path) -> dict[str, str]:
    """Return the help topics by name: the dictionary literal that `pydoc_data/topics.py` is."""
    tree = _parse(_text(path))
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return dict(ast.literal_eval(node.value))
    return {}


def _docstrings(path: Path) -> list[str]:
    tree = _parse(_text(path))
    return [] if tree is None else [ast.get_docstring(node) or "" for node in _documented(tree)]


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            yield node


def _comments(source: str) -> list[tuple[tuple[int, int], int]]:
    """Return ((row, first column), end column) of every comment."""
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start, token.end[1]) for token in found if token.type == tokenize.COMMENT]


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in old files, which are not ours to mend
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")
