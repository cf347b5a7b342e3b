"""The programs in README.md and docs/ run, their links lead somewhere, and the README's two commands are what they are.

The python fences of a file run in order, in one namespace, in a fresh interpreter and a folder that is empty but for
what `stages.py` lays there. A file whose first line is `<!-- slow -->` runs with the slow tests. A fence below a line
`<!-- needs: module -->` runs where that module is installed; where it is not, a skipped test names the fence. Python
that does not run cannot be shown.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from stages import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?ms)(?:^ *<!-- needs: (?P<needs>\w+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$"
)
RUN, SHOWN = "python", {"", "text", "bash", "json", "toml", "csv"}

RUNNER = """
import json, sys
name, fences = json.loads(sys.stdin.read())
namespace = {"__name__": "__main__"}
for line, code in fences:  # padded, so that a traceback names the page's own lines
    exec(compile("\\n" * line + code, name, "exec"), namespace)
"""


def fences(text: str) -> list[tuple[int, str, str]]:
    """Return (lines above the code, language, code) of every fence."""
    found = []
    for match in FENCE.finditer(text):
        code = re.sub(f"(?m)^{match['indent']}", "", match["code"])
        found.append((text.count("\n", 0, match.start("code")), match["language"].strip(), code))
    return found


def needs(text: str) -> dict[int, str]:
    """Return {lines above the code: module} of the fences that need a module."""
    return {
        text.count("\n", 0, match.start("code")): match["needs"] for match in FENCE.finditer(text) if match["needs"]
    }


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the python fences of a page, one after the other, in an empty folder."""
    text = page.read_text(encoding="utf-8")
    left_out = {line for line, module in needs(text).items() if not installed(module)}
    code = [(line, code) for line, language, code in fences(text) if language == RUN and line not in left_out]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error::llmtune.errors.LlmtuneWarning", "-c", RUNNER],
        input=json.dumps([str(page), code]), env={**os.environ, **quiet, "PYTHONPATH": paths}, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def programs() -> list[pytest.param]:
    made = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if any(language == RUN for _, language, _ in fences(text)):
            marks = [pytest.mark.slow] if text.startswith("<!-- slow -->") else []
            made.append(pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=marks))
    return made


@pytest.mark.parametrize("page", programs())
def test_program_runs(page, tmp_path):
    set_the_stage = STAGES.get(page.relative_to(ROOT).as_posix())
    if set_the_stage is not None:
        set_the_stage(tmp_path)
    ran = run_page(page, tmp_path)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]


NEEDS = {
    f"{page.relative_to(ROOT).as_posix()}:{line}": module
    for page in PAGES
    for line, module in needs(page.read_text(encoding="utf-8")).items()
}


@pytest.mark.parametrize("fence", NEEDS)
def test_what_a_fence_needs_is_installed(fence):
    if not installed(NEEDS[fence]):
        pytest.skip(f'{fence} was left out: it needs {NEEDS[fence]} (pip install -e ".[log]")')


def test_no_python_is_shown_that_does_not_run():
    reference = ROOT / "docs" / "reference"  # its examples are the docstrings', and run there
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        allowed = {RUN, *SHOWN} | ({"pycon"} if page.parent == reference else set())
        odd = [f"line {line}: ```{language}" for line, language, _ in fences(text) if language not in allowed]
        assert odd == [], f"{page}: a fence is one of {sorted(allowed)}"
        assert text.count("```") == 2 * len(fences(text)), f"{page}: a fence is not closed, or is indented unevenly"
        assert len(re.findall("(?m)^ *<!-- needs", text)) == len(needs(text)), (
            f"{page}: a need stands on the line above its fence"
        )
        assert "~~~" not in text


def test_links_lead_somewhere():
    dead = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = target.split("#")[0]
            if not re.match(r"[a-z]+:", target) and path and not (page.parent / path).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []


def test_readme_has_exactly_the_two_commands():
    shell = [
        code for _, language, code in fences((ROOT / "README.md").read_text(encoding="utf-8")) if language == "bash"
    ]
    assert shell == [
        'pip install -e ".[plot]" && python -m llmtune.quickstart\n',
        'pip install -e ".[dev]" && pytest\n',
    ]


def test_ci_takes_the_commands_out_of_the_readme():
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert "README.md" in text
    assert "pip install -e" not in text, "the commands are read out of README.md, not repeated"
    assert os.name == "nt" or script.stat().st_mode & stat.S_IXUSR
    program = re.search(r"(?s)<<'EXTRACT'\n(.*?)\nEXTRACT\n", text)
    ran = subprocess.run(
        [sys.executable, "-c", program[1], str(ROOT / "README.md")], capture_output=True, text=True, check=True
    )
    shell = [
        code for _, language, code in fences((ROOT / "README.md").read_text(encoding="utf-8")) if language == "bash"
    ]
    assert [f"{command}\n" for command in ran.stdout.split("\0")[:-1]] == shell


BROKEN = {
    "an error": "```python\nx = 1\n```\n\nand then\n\n```python\nassert x == 2, 'seeded'\n```\n",
    "a name of a later fence": "```python\nprint(x)\n```\n\n```python\nx = 1\n```\n",
    "an indented fence": "- a list\n\n  ```python\n  def f():\n      return seeded\n  f()\n  ```\n",
    "our own warning": "```python\nimport warnings\nfrom llmtune.errors import LlmtuneWarning\n"
    "warnings.warn('seeded', LlmtuneWarning)\n```\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_seeded_broken_fence_is_seen(name, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(BROKEN[name])
    ran = run_page(page, tmp_path)
    assert ran.returncode == 1
    assert "Error" in ran.stderr or "LlmtuneWarning" in ran.stderr
    if name == "an error":
        assert 'page.md", line 8' in ran.stderr
        assert "seeded" in ran.stderr


def test_a_fence_is_left_out_where_what_it_needs_is_missing(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n<!-- needs: no_such_module -->\n```python\nx = 2\n```\n\n"
        "<!-- needs: json -->\n```python\nassert x == 1\nx = seeded\n```\n"
    )
    assert needs(page.read_text()) == {6: "no_such_module", 11: "json"}
    ran = run_page(page, tmp_path)
    assert 'page.md", line 13' in ran.stderr
    assert "NameError: name 'seeded'" in ran.stderr


def test_a_good_page_passes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```text\nnot python\n```\n\n```python\nassert x == 1\n```\n")
    assert run_page(page, tmp_path).returncode == 0
