"""A run in a notebook: what is shown, and where it is not."""

import html.parser
import sys
from types import ModuleType, SimpleNamespace

import pytest

from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.notebook import NotebookView, in_notebook
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


class ZMQInteractiveShell:
    """Named as Jupyter's own."""


class Shell(ZMQInteractiveShell):
    """Colab's is made of Jupyter's."""


class TerminalInteractiveShell:
    """Named as that of ipython in a terminal."""


@pytest.fixture
def shown(monkeypatch):
    """Stand in for IPython: a list of what was displayed, later versions put over earlier ones."""
    package, display = ModuleType("IPython"), ModuleType("IPython.display")
    package.get_ipython, package.display, cells = ZMQInteractiveShell, display, []

    def show(made, *, display_id=False):
        cells.append([made])
        return SimpleNamespace(update=cells[-1].append) if display_id else None

    display.HTML, display.display = lambda text: text, show
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return cells


class Reader(html.parser.HTMLParser):
    """Reads a table's rows, and checks that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.bars, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "progress":
            self.bars.append({name: value for name, value in attrs if name in ("value", "max")})

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        elif self.open and self.open[-1] == "td":
            self.rows[-1].append("")


def fit(callbacks, **changed):
    settings = LoopSettings(
        **({"max_steps": 7, "rows_per_step": 4, "log_every": 3, "eval_every": 2, "progress": False} | changed)
    )
    loop = TrainingLoop(tiny_llama(), uneven_rows(), settings=settings, eval_data=uneven_rows(3), callbacks=callbacks)
    return loop.fit()


@pytest.mark.parametrize(
    ("kind", "found"), [(ZMQInteractiveShell, True), (Shell, True), (TerminalInteractiveShell, False)]
)
def test_in_notebook_goes_by_the_shell(monkeypatch, kind, found):
    package = ModuleType("IPython")
    package.get_ipython = kind
    monkeypatch.setitem(sys.modules, "IPython", package)
    assert in_notebook() is found
    package.get_ipython = lambda: None
    assert not in_notebook()
    del package.get_ipython
    assert not in_notebook()


def test_nothing_is_imported_to_find_out(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    assert "IPython" not in sys.modules


def test_the_table_grows_in_place(shown):
    history = fit([NotebookView(seconds=0.0)])
    assert len(shown) == 2, "the banner, and one cell that is updated"
    assert shown[0][0].startswith("<pre>Training LlamaForCausalLM: 7 steps of 4 rows")
    last = Reader(shown[1][-1])
    assert last.rows[0] == ["step", "loss", "eval_loss", "grad_norm", "lr", "tokens/s"]
    assert [row[0] for row in last.rows[1:]] == ["2", "3", "4", "6", "7"]
    assert last.bars == [{"value": "7", "max": "7"}]
    assert "7 of 7 steps" in shown[1][-1]
    assert "done, peak memory" in shown[1][-1]
    first_two = sum(row["loss"] * row["targets"] for row in history[:2]) / sum(row["targets"] for row in history[:2])
    assert last.rows[1][1:3] == [f"{first_two:.4g}", f"{history[1]['eval_loss']:.4g}"]
    assert Reader(shown[1][1]).bars == [{"value": "1", "max": "7"}]


def test_a_long_run_shows_both_ends(shown):
    fit([NotebookView()], max_steps=23, log_every=1, eval_every=23)
    steps = [row[0] for row in Reader(shown[1][-1]).rows[1:]]
    assert steps == [*map(str, range(1, 11)), "...", *map(str, range(14, 24))]


def test_redrawing_takes_its_time(shown):
    fit([NotebookView(seconds=3600.0)], log_every=7, eval_every=7)
    assert len(shown[1]) == 1 + 4, "the empty one, the first step, the last one, its evaluation, the end"


def test_markup_in_names_and_paths_is_text(shown, tmp_path):
    class Marked(Callback):
        def on_step_end(self, loop, metrics):
            metrics["<b>odd</b>"] = 1.0

    fit([Marked(), NotebookView()], folder=tmp_path / "<i>&run")
    assert "<b>" not in shown[1][-1]
    assert "&lt;b&gt;odd&lt;/b&gt;" in shown[1][-1]
    assert "saved in " in shown[1][-1]
    assert "&lt;i&gt;&amp;run" in shown[1][-1]


def test_what_broke_the_run_is_said(shown):
    class Break(Callback):
        def on_step_end(self, loop, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit([NotebookView(), Break()])
    assert "1 of 7 steps" in shown[1][-1]
    assert "ended by KeyboardInterrupt" in shown[1][-1]


def test_another_process_shows_nothing(shown):
    view = NotebookView(seconds=0.0)
    loop = SimpleNamespace(
        step=0, total_steps=3, settings=SimpleNamespace(log_every=1), ranks=SimpleNamespace(main=False)
    )
    view.on_fit_start(loop)
    loop.step = 1
    view.on_step_end(loop, {"loss": 1.0})
    assert shown == []


def test_the_real_display_takes_it():
    ipython = pytest.importorskip("IPython", reason="IPython is not installed")
    from IPython.utils.capture import capture_output

    ipython.core.interactiveshell.InteractiveShell.instance()
    with capture_output() as seen:
        fit([NotebookView()])
    texts = [output.data["text/html"] for output in seen.outputs]
    assert "<progress" in texts[-1]
    assert len(Reader(texts[-1]).rows) == 6
