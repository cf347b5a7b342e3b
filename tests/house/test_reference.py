"""The pages of docs/reference/ are what the docstrings say today, and the script that writes them does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_reference import markdown, render, stale, write

ROOT = Path(__file__).parents[2]


def test_pages_are_current():
    assert stale() == [], "run: python docs/make_reference.py"


@pytest.fixture
def tree(tmp_path):
    package = tmp_path / "llmtune"
    (package / "losses").mkdir(parents=True)
    (package / "__init__.py").write_text(
        '"""The top."""\n\n__all__ = ["f", "losses"]\n\n'
        "if TYPE_CHECKING:\n    from llmtune import losses\n    from llmtune.losses import f\n"
    )
    (package / "losses" / "f.py").write_text('"""A file of the same name as the function, which hides it."""\n')
    (package / "losses" / "__init__.py").write_text(
        '"""Losses."""\n\nfrom llmtune.losses.a import A, f, off, one\n\n__all__ = ["A", "f", "off", "one"]\n'
    )
    (package / "losses" / "a.py").write_text(
        '''
from contextlib import contextmanager
from dataclasses import dataclass, field

def f(x: Tensor, /, y=None, *, how: str = "mean", size: int = 2**14) -> Tensor:
    """Return a * b, where __x__ <is it> and `a*b` stays.

    Args:
        x: [B, T], which
            goes on here.
        y, how: as always.

    Raises:
        ValueError: never.

    Example:
        >>> f(1)
        1
    """

@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Switch off."""

@dataclass(frozen=True, kw_only=True)
class A(Base):
    """A record."""

    rank: int
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Its size."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [N]."""

    def _own(self): ...

one = A(rank=1)
'''
    )
    return tmp_path


def test_a_page_shows_signatures_as_they_were_written(tree):
    page = render(tree)["losses.md"]
    assert 'f(x: Tensor, /, y=None, *, how: str = "mean", size: int = 2**14) -> Tensor\n' in page
    assert "with off(model: nn.Module)\n" in page
    assert "class A(*, rank: int, parts: dict[str, int] = {})\n" in page
    assert "A.size -> int\n" in page
    assert "A.__call__(x: Tensor) -> Tensor\n" in page
    assert "one = A(rank=1)\n```\n\nAn instance of [`A`](#a)" in page
    assert "_own" not in page


def test_the_top_page_leads_to_the_parts(tree):
    page = render(tree)["llmtune.md"]
    assert "## f\n\nReturn a * b, where \\_\\_x\\_\\_ &lt;is it> and `a*b` stays. See [`losses`](losses.md#f)." in page
    assert "## losses\n\nLosses. See [`losses`](losses.md)." in page


def test_a_docstring_becomes_markdown():
    doc = (
        "Return a * b, where __x__ <is it> and `a*b` stays, 2*3.\n\n"
        "Args:\n    x: [B, T], which\n        goes on here.\n    y, how: as always.\n\n"
        "Returns:\n    x [N].\n\nExample:\n    >>> f(1)\n    1\n"
    )
    assert markdown(doc) == [
        "Return a * b, where \\_\\_x\\_\\_ &lt;is it> and `a*b` stays, 2\\*3.",
        "",
        "**Args**", "", "- `x`: [B, T], which", "  goes on here.", "- `y`, `how`: as always.", "",
        "**Returns**", "", "x [N].", "",
        "**Example**", "", "```pycon", ">>> f(1)", "1", "```",
    ]  # fmt: skip


def test_a_stale_a_missing_and_a_left_over_page_are_seen(tree):
    assert "docs/reference/losses.md is missing" in [line.replace("\\", "/") for line in stale(tree)]
    write(tree)
    assert stale(tree) == []
    folder = tree / "docs" / "reference"
    page = folder / "losses.md"
    page.write_text(page.read_text().replace("Switch off.", "Switch on."))
    (folder / "gone.md").write_text("")
    stale_page, left_over = stale(tree)
    assert "losses.md is stale" in stale_page
    assert "to add" in stale_page
    assert "Switch on." in stale_page
    assert left_over == "docs/reference/gone.md is of no package: remove it"
    write(tree)
    assert stale(tree) == []
