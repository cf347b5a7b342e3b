"""Pictures of the R-matrix as SVG text, made by hand: no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from llmtune.metrics.continual import ContinualMatrix
from llmtune.metrics.intervals import mean_and_interval

COLORS = ("#1b6ca8", "#d95f02", "#2a9d5c", "#7b4fa3", "#b8860b", "#c2366b", "#3b8ea5", "#8c5a3c", "#5a7d2a", "#555555")
FONT = "font-family:sans-serif;font-size:11px"
Line = tuple[str, Sequence[tuple[float, float, float]], str, bool]  # label, (x, y, half of interval), color, thick


def heat_map(
    matrix: ContinualMatrix, names: Sequence[str] | None = None, *, low: float = 0.0, high: float = 1.0
) -> str:
    """Return the R-matrix as a heat map: a row for what was just learned, a column for what is measured.

    The diagonal is framed; what was not measured is left blank.

    Args:
        matrix: of T tasks.
        names: T names of the tasks; left out, "1" to "T".
        low: the score that is white.
        high: the score that is darkest, above `low`: 100 for scores in per cent.

    Returns:
        The text of an SVG file.

    Raises:
        ValueError: there are not T names, or `high` is not above `low`.

    Example:
        >>> text = heat_map(ContinualMatrix([[0.9, None], [0.5, 0.8]]), ["maths", "French"])
        >>> text.startswith("<svg"), text.count("<rect"), "maths" in text
        (True, 4, True)
    """
    labels, T = _names(names, matrix.tasks), matrix.tasks
    if not high > low:
        raise ValueError(
            f"high must be above low, the scores of the darkest cell and of a white one; got {high}, {low}"
        )
    side, left, top = 46, 24 + 7 * max(map(len, labels)), 30 + 5 * max(map(len, labels))
    parts = [_text(left + side * T / 2, 14, "score on", "middle"), _text(6, top - 8, "after")]
    for t, row in enumerate(matrix.scores):
        parts.append(_text(left - 6, top + side * (t + 0.5) + 4, labels[t], "end"))
        x, y = left + side * (t + 0.5), top - 8
        turned = f' transform="rotate(-40 {x:.1f} {y})"' if max(map(len, labels)) > 5 else ""
        parts.append(_text(x, y, labels[t], "start" if turned else "middle", turned))
        for i, value in enumerate(row):
            share = 0.0 if value is None else min(1.0, max(0.0, (value - low) / (high - low)))
            parts.append(
                f'<rect x="{left + side * i}" y="{top + side * t}" width="{side}" height="{side}" '
                f'fill="{"none" if value is None else _blue(share)}" stroke="{"#222" if i == t else "#ddd"}" '
                f'stroke-width="{2 if i == t else 1}"/>'
            )
            if value is not None:
                number = f"{100 * (value - low) / (high - low):.0f}" if (low, high) == (0.0, 1.0) else f"{value:.3g}"
                ink = ' fill="#fff"' if share > 0.6 else ""
                parts.append(_text(left + side * (i + 0.5), top + side * (t + 0.5) + 4, number, "middle", ink))
    return _svg(left + side * T + 40, top + side * T + 10, parts)


def curves(matrix: ContinualMatrix, names: Sequence[str] | None = None) -> str:
    """Return the score on each task after each task, from its own on, and the mean of the tasks so far as a thick line.

    Args:
        matrix: of T tasks.
        names: T names of the tasks; left out, "1" to "T".

    Returns:
        The text of an SVG file.

    Raises:
        ValueError: there are not T names.

    Example:
        >>> curves(ContinualMatrix([[0.9, None], [0.5, 0.8]]), ["maths", "French"]).count("<polyline")
        3
    """
    labels = _names(names, matrix.tasks)
    lines: list[Line] = []
    for i, label in enumerate(labels):
        points = [
            (t + 1.0, value, 0.0) for t, row in enumerate(matrix.scores) if t >= i and (value := row[i]) is not None
        ]
        lines.append((label, points, COLORS[i % len(COLORS)], False))
    means = [(t + 1.0, value, 0.0) for t, value in enumerate(matrix.accuracy_over_time)]
    return _chart([*lines, ("mean so far", means, "#000", True)], labels)


def compare_curves(methods: Mapping[str, Sequence[ContinualMatrix]], *, confidence: float = 0.95) -> str:
    """Return the mean score of the tasks so far, after each task: a line a method, with intervals over its runs.

    Args:
        methods: by name, one matrix a run; all of one number of tasks.
        confidence: of the intervals (Student's t), above 0 and below 1; a single run has none.

    Returns:
        The text of an SVG file.

    Raises:
        ValueError: there is no method, one has no run, or numbers of tasks differ.

    Example:
        >>> runs = [ContinualMatrix([[0.9, None], [0.5, 0.8]]), ContinualMatrix([[0.9, None], [0.6, 0.8]])]
        >>> compare_curves({"EWC": runs, "sequential": runs[:1]}).count("<polyline")
        2
    """
    sizes = {matrix.tasks for runs in methods.values() for matrix in runs}
    if not methods or not all(methods.values()):
        raise ValueError("each method needs at least one run, and there must be a method")
    if len(sizes) > 1:
        raise ValueError(f"all runs must be of one number of tasks; got {sorted(sizes)}")
    lines: list[Line] = []
    for place, (name, runs) in enumerate(methods.items()):
        columns = zip(*(matrix.accuracy_over_time for matrix in runs), strict=True)
        points = [(t + 1.0, *mean_and_interval(column, confidence)) for t, column in enumerate(columns)]
        lines.append((name, points, COLORS[place % len(COLORS)], True))
    return _chart(lines, _names(None, sizes.pop()))


def _chart(lines: Sequence[Line], ticks: Sequence[str]) -> str:
    """Return lines over 1 ... T with a legend beside them."""
    width, height, left, top = 60.0 + 46 * len(ticks), 240, 46, 14
    bounds = [y + sign * (0.0 if half != half else half) for _, points, _, _ in lines for _, y, half in points
              for sign in (-1, 1)]  # fmt: skip
    low, high = min(bounds), max(bounds)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)

    def x(value: float) -> float:
        return left + (value - 0.5) / len(ticks) * width

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * height

    parts = [f'<path d="M{left} {top}V{top + height}H{left + width:.1f}" fill="none" stroke="#888"/>']
    for value in _marks(low, high):
        parts.append(f'<path d="M{left} {y(value):.1f}h{width:.1f}" stroke="#eee"/>')
        parts.append(_text(left - 5, y(value) + 4, f"{value:.3g}", "end"))
    short = max(map(len, ticks)) <= 8  # else they are numbered; the legend has them in the same order
    shown = ticks if short else _names(None, len(ticks))
    parts += [_text(x(n + 1), top + height + 16, tick, "middle") for n, tick in enumerate(shown)]
    parts.append(_text(left + width / 2, top + height + 32, "after task", "middle"))
    for place, (label, points, color, thick) in enumerate(lines):
        path = " ".join(f"{x(t):.1f},{y(value):.1f}" for t, value, _ in points)
        stroke = f'stroke="{color}" stroke-width="{2.5 if thick else 1.2}"'
        parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        for t, value, half in points:
            parts.append(f'<circle cx="{x(t):.1f}" cy="{y(value):.1f}" r="{3 if thick else 2}" fill="{color}"/>')
            if half > 0:
                bar = f"M{x(t):.1f} {y(value - half):.1f}V{y(value + half):.1f}"
                parts.append(f'<path class="interval" d="{bar}" stroke="{color}"/>')
        row = top + 10 + 17 * place
        parts.append(f'<path d="M{left + width + 12:.1f} {row - 4}h18" {stroke}/>')
        parts.append(_text(left + width + 36, row, label))
    widest = max(len(label) for label, _, _, _ in lines)
    return _svg(left + width + 50 + 7 * widest, max(top + height + 42, top + 20 + 17 * len(lines)), parts)


def _marks(low: float, high: float) -> list[float]:
    """Return at most six round numbers between two."""
    wanted = (high - low) / 5
    unit = math.pow(10, math.floor(math.log10(wanted)))
    step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= wanted)
    return [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _names(names: Sequence[str] | None, T: int) -> list[str]:
    found = [str(t + 1) for t in range(T)] if names is None else [str(name) for name in names]
    if len(found) != T:
        raise ValueError(f"a name for each of the {T} tasks is expected; got {len(found)}")
    return found


def _blue(share: float) -> str:
    """Return the color of a share of 0 ... 1: white to dark blue."""
    return "#" + "".join(f"{round(255 + (dark - 255) * share):02x}" for dark in (16, 66, 122))


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{FONT};background:#fff">\n{body}\n</svg>\n'
