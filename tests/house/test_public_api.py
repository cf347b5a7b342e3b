"""Every public name says what a caller needs: a docstring, shapes where there are tensors, `Raises` where it raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from public_names import PACKAGE, Function, Public, class_of_value, find, methods, pages, public_names

ROOT = Path(__file__).parents[2]

# A list in brackets with at least one letter or dots in it, that is no indexing: [B, T], [n+1], [..., V], [out, in].
SHAPE = re.compile(
    r"(?<![\w\])])\[(?=[^\]]*(?:[A-Za-z]|\.\.\.))[\w.*+/ -]+(?:, ?[\w.*+/ -]+)*\]|\bscalars?\b|\bshapes?\b"
)
STATE = re.compile(r"\b(?:dict|Mapping|MutableMapping)\[str, (?:nn\.)?(?:Tensor|Parameter)\]")
OURS_ALONE = {"AssertionError", "NotImplementedError"}  # our own invariants, and what a subclass has to write


def raised(function: Function) -> set[str]:
    """Return the exceptions a function raises by itself, not those of functions defined in it; "" for a variable."""
    found, open_nodes = set(), list(function.body)
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(called).split(".")[-1]
            found.add(name if name[0].isupper() else "")
        open_nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.match_case)]
        open_nodes += getattr(node, "handlers", [])
    return found - OURS_ALONE


def handles_tensors(annotations: list[ast.expr | None]) -> bool:
    """Return whether tensors go in or out; a dict of tensors by name is a state, whose shapes are the model's."""
    return any(re.search(r"\bTensor\b", STATE.sub("", ast.unparse(a))) for a in annotations if a is not None)


def signature_of(function: Function) -> list[ast.expr | None]:
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [*(arg.annotation for arg in every), function.returns]


def faults(root: Path, public: Public) -> Iterator[str]:
    """Yield what the documentation of a public name lacks."""
    made_of = class_of_value(root, public)
    node, doc = public.node, public.doc
    if not doc:
        yield f"{public.name} has no docstring"
        return
    if made_of is not None:
        node, doc = made_of.node, made_of.doc or doc
    if isinstance(node, Function):
        yield from _lacks(public.name, node, doc)
    elif isinstance(node, ast.ClassDef):
        fields = [child.annotation for child in node.body if isinstance(child, ast.AnnAssign)]
        if handles_tensors(list(fields)) and not _has_shape(doc):
            yield f"{public.name} has fields that are tensors and gives no shape"
        for child in node.body:
            if isinstance(child, Function) and child.name in ("__init__", "__post_init__", "__new__"):
                yield from _lacks(public.name, child, f"{doc}\n{ast.get_docstring(child) or ''}")
        for method in methods(node):
            own = ast.get_docstring(method)
            if not own:
                yield f"{public.name}.{method.name} has no docstring"
            else:
                yield from _lacks(f"{public.name}.{method.name}", method, own + _referred_to(root, public.module, own))


def _lacks(name: str, function: Function, doc: str) -> Iterator[str]:
    if handles_tensors(signature_of(function)) and not _has_shape(doc):
        yield f"{name} handles tensors and gives no shape"
    missing = sorted(error or "an error" for error in raised(function) if error not in doc)
    if raised(function) and not re.search(r"(?m)^Raises:|^Raise ", doc):
        missing = sorted(error or "an error" for error in raised(function))
    if missing:
        yield f"{name} raises {', '.join(missing)} and does not say so under Raises"


def _referred_to(root: Path, module: str, doc: str) -> str:
    """Return the docstrings of the methods that a docstring hands over to by "See `Class.method`"."""
    said = ""
    for owner, name in re.findall(r"[Ss]ee `(\w+)\.(\w+)`", doc):
        found = find(root, module, owner)
        if found is not None and isinstance(found.node, ast.ClassDef):
            said += "".join(f"\n{ast.get_docstring(m) or ''}" for m in methods(found.node) if m.name == name)
    return said


def _has_shape(doc: str) -> bool:
    prose = "\n".join(line for line in doc.split("\n") if not line.lstrip().startswith((">>>", "...")))
    return bool(SHAPE.search(prose))


def every_public_name(root: Path) -> Iterator[tuple[str, str, Public | None]]:
    for module in pages(root):
        if module != PACKAGE:  # the top only hands on what lives below it
            for name in public_names(root, module):
                yield module, name, find(root, module, name)


PUBLIC = {f"{module}.{name}": public for module, name, public in every_public_name(ROOT)}


@pytest.mark.parametrize("name", PUBLIC)
def test_documentation_of(name):
    public = PUBLIC[name]
    assert public is not None, f"{name} is in __all__ and nothing defines it"
    assert list(faults(ROOT, public)) == []


@pytest.mark.parametrize("module", [module for module in pages(ROOT) if module != PACKAGE])
def test_stands_in_the_reference(module):
    assert public_names(ROOT, module), f"{module} has no __all__"
    page = (ROOT / "docs" / "reference" / f"{module.split('.')[-1]}.md").read_text(encoding="utf-8")
    missing = [name for name in public_names(ROOT, module) if f"\n## {name}\n" not in page]
    assert missing == [], "run: python docs/make_reference.py"


def test_every_package_says_what_it_is():
    import importlib

    assert [module for module in pages(ROOT) if not (importlib.import_module(module).__doc__ or "").strip()] == []


GOOD = '''
"""A part."""
from dataclasses import dataclass
from torch import Tensor

def fine(x: Tensor, *, p: float = 0.0) -> Tensor:
    """Return x.

    Args:
        x: [B, T].

    Raises:
        ValueError: p is negative.
    """
    if p < 0:
        raise ValueError(p)
    return x

@dataclass
class Fine:
    """A record.

    Args:
        x: [N] ints.

    Raises:
        TypeError: x is no tensor.
    """

    x: Tensor

    def __post_init__(self):
        raise TypeError(self.x)

    def __call__(self, state: dict[str, Tensor]) -> Tensor:
        """Return a scalar."""

    def _hidden(self, x: Tensor): ...

value = Fine(None)

number = 3
"""How many."""
'''

SEEDED = {
    '    """Return x.\n\n    Args:\n        x: [B, T].\n\n    Raises:\n        ValueError: p is negative.\n    """\n': (
        "",
        "fine has no docstring",
    ),
    "x: [B, T].": ("x: what to return, as x[0, i].", "fine handles tensors and gives no shape"),
    "    Raises:\n        ValueError: p is negative.\n": (
        "    ValueError: p.\n",
        "fine raises ValueError and does not say so under Raises",
    ),
    "raise ValueError(p)": (
        "try:\n            pass\n        except KeyError:\n            raise KeyError(p)",
        "fine raises KeyError and does not say so under Raises",
    ),
    "x: [N] ints.": ("x: ints, [3].", "Fine has fields that are tensors and gives no shape"),
    "TypeError: x is": ("ValueError: x is", "Fine raises TypeError and does not say so under Raises"),
    '        """Return a scalar."""\n': ("        return x\n", "Fine.__call__ has no docstring"),
    "Return a scalar": ("Return it", "Fine.__call__ handles tensors and gives no shape"),
    '"""How many."""': ("", "number has no docstring"),
}


def seeded_faults(folder: Path, text: str) -> list[str]:
    package = folder / PACKAGE / "losses"
    package.mkdir(parents=True)
    (package / "a.py").write_text(text)
    (package / "__init__.py").write_text(
        f'from {PACKAGE}.losses.a import Fine, fine, number, value\n__all__ = ["Fine", "fine", "number", "value"]\n'
    )
    (folder / PACKAGE / "__init__.py").write_text("")
    return [fault for _, _, public in every_public_name(folder) if public for fault in faults(folder, public)]


def test_a_good_part_has_no_fault(tmp_path):
    assert seeded_faults(tmp_path, GOOD) == []


@pytest.mark.parametrize("text", SEEDED)
def test_a_seeded_fault_is_seen(tmp_path, text):
    instead, sentence = SEEDED[text]
    assert GOOD.count(text) == 1
    assert sentence in seeded_faults(tmp_path, GOOD.replace(text, instead))


def test_a_name_that_nothing_defines_is_seen(tmp_path):
    package = tmp_path / PACKAGE / "losses"
    package.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("")
    (package / "__init__.py").write_text('__all__ = ["gone"]\n')
    assert list(every_public_name(tmp_path)) == [(f"{PACKAGE}.losses", "gone", None)]
