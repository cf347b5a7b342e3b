"""What importing does: nothing but define names. Looked at from outside, in a fresh interpreter."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmtune

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent.name for path in (ROOT / "llmtune").glob("*/__init__.py"))

# Run in the interpreter that is watched; prints one JSON line for each statement, each in a process of its own that is
# forked after the setup, so that torch is loaded once for all of them.
PROBE = """
import json, logging, os, sys, warnings
statements, setup = json.loads(sys.argv[1])
exec(setup)

def loggers():
    named = {n: l for n, l in logging.root.manager.loggerDict.items() if isinstance(l, logging.Logger)}
    plain = [logging.NOTSET, [], [], True, False]
    state = {n: [l.level, list(map(repr, l.handlers)), list(map(repr, l.filters)), l.propagate, l.disabled]
             for n, l in {**named, "root": logging.root}.items()}
    state["disable"] = logging.root.manager.disable
    return {n: value for n, value in state.items() if value != plain}

def world():
    return {"environment": dict(os.environ), "loggers": loggers(), "warning filters": list(map(repr, warnings.filters)),
            "working directory": os.getcwd(), "paths": list(sys.path)}

asked = []
def watch(owner, name):
    if hasattr(owner, name):
        setattr(owner, name, lambda *a, old=getattr(owner, name), **k: (asked.append(name), old(*a, **k))[1])

if "torch" in sys.modules:
    import torch
    for name in ("is_available", "device_count", "current_device", "get_device_capability", "init"):
        watch(torch.cuda, name)
    for name in ("is_available", "device_count", "current_accelerator"):
        watch(torch.accelerator, name)

for statement in statements:
    child = os.fork()
    if child == 0:
        before, loaded = world(), set(sys.modules)
        exec(statement)
        after = world()
        changed = sorted(name for name in before if before[name] != after[name])
        new = sorted(set(sys.modules) - loaded)
        print(json.dumps({"changed": changed, "loaded": new, "devices asked": sorted(set(asked))}), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {statement}")
"""

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork a process")


def probe(statements: list[str], *, setup: str = "", path: Path = ROOT) -> dict[str, dict[str, list[str]]]:
    """Return what each statement changed and loaded, run in a fresh interpreter after `setup`."""
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([statements, setup])],
        env={**os.environ, "PYTHONPATH": str(path)}, cwd=path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return dict(zip(statements, map(json.loads, ran.stdout.splitlines()), strict=True))


def sins(report: dict[str, list[str]], forbidden: tuple[str, ...]) -> list[str]:
    """Return what a report says that an import must not do, a sentence each."""
    return [
        *(f"changes the {name}" for name in report["changed"]),
        *(f"loads {name}" for name in forbidden if name in report["loaded"]),
        *(f"asks torch for devices: {name}" for name in report["devices asked"]),
    ]


@forks
def test_import_llmtune_does_nothing():
    report = probe(["import llmtune"])["import llmtune"]
    assert sins(report, ("transformers", "matplotlib", "triton", "peft", "torch", "numpy")) == []


@forks
def test_import_of_each_package_does_nothing():
    statements = [f"import llmtune.{name}" for name in PACKAGES]
    reports = probe(statements, setup="import torch")  # what torch itself does and loads is torch's
    forbidden = ("transformers", "matplotlib", "triton", "peft", "accelerate", "datasets", "sklearn", "torch._dynamo")
    said = {statement: sins(report, forbidden) for statement, report in reports.items()}
    assert {statement: sentences for statement, sentences in said.items() if sentences} == {}


SINS = {
    "import os; os.environ['SEEDED'] = '1'": "changes the environment",
    "import logging; logging.getLogger('transformers').setLevel('ERROR')": "changes the loggers",
    "import logging; logging.basicConfig()": "changes the loggers",
    "import logging; logging.getLogger('new').addHandler(logging.NullHandler())": "changes the loggers",
    "import logging; logging.disable()": "changes the loggers",
    "import warnings; warnings.simplefilter('ignore')": "changes the warning filters",
    "import sys; sys.path.append('.')": "changes the paths",
    "import peft": "loads peft",
    "import torch; torch.cuda.is_available()": "asks torch for devices: is_available",
}


@forks
def test_a_seeded_sin_is_seen(tmp_path):
    (tmp_path / "peft.py").write_text("")
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: False)\nclass accelerator:\n    pass\n"
    )
    for number, text in enumerate(SINS):
        (tmp_path / f"sinner{number}.py").write_text(text)
    (tmp_path / "innocent.py").write_text("import logging\nlog = logging.getLogger('innocent')\n")
    statements = [f"import sinner{number}" for number in range(len(SINS))]
    reports = probe([*statements, "import innocent"], setup="import torch", path=tmp_path)
    for statement, expected in zip(statements, SINS.values(), strict=True):
        assert sins(reports[statement], ("peft",)) == [expected]
    assert sins(reports["import innocent"], ("peft",)) == []


def test_the_public_face_names_every_package_and_what_it_holds():
    assert set(PACKAGES) <= set(llmtune.__all__)
    for name in llmtune.__all__:
        assert getattr(llmtune, name) is not None
    assert dir(llmtune) == sorted([*llmtune.__all__, "__version__"])


def test_the_table_of_homes_agrees_with_what_type_checkers_see():
    tree = ast.parse((ROOT / "llmtune/__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module.removeprefix("llmtune").removeprefix(".")
        for guard in tree.body
        if isinstance(guard, ast.If)
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(llmtune.__all__)
    assert {name: home for name, home in seen.items() if home} == llmtune._HOMES


def test_an_unknown_name_names_the_near_ones():
    with pytest.raises(AttributeError, match=r'llmtune has no "LoopSetting"\. Did you mean "LoopSettings"'):
        _ = llmtune.LoopSetting


def test_version_is_that_of_the_project_file():
    versions = re.findall(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert versions == [llmtune.__version__]
