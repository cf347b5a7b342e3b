"""The pictures are well-formed SVG with every score where it belongs."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from llmtune.metrics import ContinualMatrix, compare_curves, curves, heat_map

SVG = "{http://www.w3.org/2000/svg}"
MATRIX = ContinualMatrix([[0.9, None, 0.1], [0.5, 0.8, 0.2], [0.6, 0.7, 1.0]])
NAMES = ["a <b>", 'French & "others"', "c"]


def parts(text, kind):
    return list(ElementTree.fromstring(text).iter(SVG + kind))


def texts(svg):
    return [element.text for element in parts(svg, "text")]


def points(line):
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_a_heat_map_shows_every_score_in_its_cell():
    svg = heat_map(MATRIX, NAMES)
    cells = parts(svg, "rect")
    assert len(cells) == 9
    columns, rows = ({float(cell.get(axis)) for cell in cells} for axis in ("x", "y"))
    assert len(columns) == len(rows) == 3
    assert [text for text in texts(svg) if text.isdigit()] == ["90", "10", "50", "80", "20", "60", "70", "100"]
    blank = [cell for cell in cells if cell.get("fill") == "none"]
    assert [(float(cell.get("x")), float(cell.get("y"))) for cell in blank] == [(sorted(columns)[1], min(rows))]
    framed = {cell.get("x") for cell in cells if cell.get("stroke-width") == "2"}
    assert len(framed) == 3, "the diagonal"
    assert cells[0].get("fill") != cells[2].get("fill")


def test_names_are_escaped_and_shown_whole():
    for svg in (heat_map(MATRIX, NAMES), curves(MATRIX, NAMES), compare_curves({name: [MATRIX] for name in NAMES})):
        assert set(NAMES) <= set(texts(svg))
        assert "<b>" not in svg


def test_the_darkest_is_high_and_white_is_low():
    svg = heat_map(ContinualMatrix([[100.0, 0.0], [50.0, 250.0]]), high=100.0)
    fills = [cell.get("fill") for cell in parts(svg, "rect")]
    assert fills[0] == fills[3] == "#10427a"
    assert fills[1] == "#ffffff"
    assert "250" in texts(svg)


def test_curves_start_at_their_own_task_and_the_mean_is_of_the_tasks_so_far():
    lines = [points(line) for line in parts(curves(MATRIX, NAMES), "polyline")]
    assert [len(line) for line in lines] == [3, 2, 1, 3]
    heights = dict(zip((0.9, 0.5, 0.6), (y for _, y in lines[0]), strict=True))
    slope = (heights[0.5] - heights[0.9]) / (0.5 - 0.9)
    expected = [heights[0.9] + slope * (mean - 0.9) for mean in (0.9, 0.65, 2.3 / 3)]
    assert [y for _, y in lines[3]] == pytest.approx(expected, abs=0.11)
    assert lines[1][0][0] == lines[0][1][0], "the second task begins where the second was learned"


def test_methods_have_a_line_each_and_intervals_where_there_are_runs():
    other = ContinualMatrix([[0.7, None, 0.1], [0.6, 0.8, 0.2], [0.6, 0.7, 0.9]])
    one = compare_curves({"EWC": [MATRIX], "sequential": [other]})
    several = compare_curves({"EWC": [MATRIX, other], "sequential": [other]})
    assert len(parts(one, "polyline")) == len(parts(several, "polyline")) == 2
    bars = [[path for path in parts(svg, "path") if path.get("class") == "interval"] for svg in (one, several)]
    assert [len(found) for found in bars] == [0, 3]
    assert "nan" not in one + several


def test_one_task_and_one_score_are_drawn():
    single = ContinualMatrix([[0.5]])
    for svg in (heat_map(single), curves(single), compare_curves({"a": [single]})):
        assert "nan" not in svg
        assert not any(math.isnan(float(element.get("cx"))) for element in parts(svg, "circle"))


def test_bad_input():
    for draw in (heat_map, curves):
        with pytest.raises(ValueError, match="a name for each of the 3 tasks is expected; got 1"):
            draw(MATRIX, ["one"])
    with pytest.raises(ValueError, match="high must be above low"):
        heat_map(MATRIX, high=0.0)
    with pytest.raises(ValueError, match="each method needs at least one run"):
        compare_curves({"EWC": []})
    with pytest.raises(ValueError, match="each method needs at least one run"):
        compare_curves({})
    with pytest.raises(ValueError, match=r"all runs must be of one number of tasks; got \[1, 3\]"):
        compare_curves({"EWC": [MATRIX], "other": [ContinualMatrix([[0.5]])]})
