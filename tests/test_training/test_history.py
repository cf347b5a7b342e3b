"""The history: rows, CSV, plot."""

import csv

import pytest

from llmtune.training.history import History


@pytest.fixture
def history():
    return History(
        {"step": i + 1, "loss": 3.0 / (i + 1), "grad_norm": 1.0} | ({"eval_loss": 2.5} if i == 22 else {})
        for i in range(23)
    )


def test_columns(history):
    assert history.column("eval_loss") == [2.5]
    assert len(history.column("loss")) == 23
    with pytest.raises(KeyError, match="no row of the history has 'los'; there are: step, loss, grad_norm, eval_loss"):
        history.column("los")


def test_csv_holds_every_row(history, tmp_path):
    path = history.to_csv(tmp_path / "deep" / "history.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == history.column("loss")
    assert rows[0]["eval_loss"] == ""
    assert [child.name for child in path.parent.iterdir()] == ["history.csv"]


def test_html_shows_the_ends_of_a_long_run(history):
    assert "23 steps, the first and last 10 shown" in history._repr_html_()
    assert "<td>12</td>" not in history._repr_html_()
    assert "&lt;b&gt;" in History([{"step": 1, "<b>": 0.5}])._repr_html_()


def test_plot_draws_what_there_is(history, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    figure = history.plot(path=tmp_path / "run.png")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "grad norm"]
    assert (tmp_path / "run.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"no row of the history has any of \['accuracy'\]"):
        history.plot(["accuracy"])
