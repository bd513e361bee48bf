"""Line charts as inline SVG: colors come from the page's CSS, so that one drawing serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Literal

WIDTH, HEIGHT = 400, 216  # viewBox units; text of 12 units stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
NUM_COLORS = 6  # --series-1 ... of the page
MAX_POINTS = 300
_NAME_WIDTH = 150  # of a line's name below a picture
_FILE_STYLE = (
    ":root{--series-1:#2a6fdb;--series-2:#d9622b;--series-3:#17936a;--series-4:#8a55c8;--series-5:#b8860b;"
    "--series-6:#c23b6b}text{fill:#686b70;font:11.5px sans-serif}.title{fill:#1c1d1f;font-size:13px}"
    "path{fill:none;stroke-width:2;stroke-linejoin:round}.raw{stroke-width:1;opacity:.3}.grid{stroke:#e4e4e1}"
)


@dataclass(frozen=True)
class Series:
    """One named line; x ascends."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    noisy: bool = True  # drawn faint, with its running mean on top


@dataclass(frozen=True)
class Axis:
    """How values become positions."""

    ticks: tuple[float, ...]
    place: Callable[[float], float]  # value -> 0..1


def line_chart(title: str, series: Sequence[Series]) -> str:
    """Return an HTML figure: title, legend with last values, and the lines on common axes.

    The value axis is logarithmic where the values are positive and span more than a factor of 50.
    """
    lines = [line for line in series if line.y]
    if not lines:
        return ""
    label = f"{title}, steps {number(lines[0].x[0])} to {number(lines[0].x[-1])}"
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{_legend(lines)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{_body(lines)}</svg></figure>'
    )


def svg_picture(charts: Sequence[tuple[str, Sequence[Series]]]) -> str:
    """Return an SVG file of titled charts side by side, whose colors are its own; no line may be empty.

    All charts have the same lines, at most NUM_COLORS; they are named once, below.
    """
    parts = [f'<rect width="100%" height="100%" fill="#fff"/><style>{_FILE_STYLE}</style>']
    for place, (title, lines) in enumerate(charts):
        parts.append(f'<text class="title" x="{place * WIDTH + LEFT}" y="16">{escape(title)}</text>')
        parts.append(f'<svg x="{place * WIDTH}" y="24" width="{WIDTH}" height="{HEIGHT}">{_body(lines)}</svg>')
    for color, line in enumerate(charts[0][1]):
        x, y = LEFT + color * _NAME_WIDTH, HEIGHT + 40
        parts.append(f'<path class="line" {_stroke(color)} d="M{x} {y - 4}h20"/><text x="{x + 26}" y="{y}">')
        parts.append(f"{escape(line.name)}</text>")
    width = max(len(charts) * WIDTH, LEFT + len(charts[0][1]) * _NAME_WIDTH)
    size = f'viewBox="0 0 {width} {HEIGHT + 52}" width="{width}" height="{HEIGHT + 52}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def _body(lines: Sequence[Series]) -> str:
    """The grid and the lines of a chart."""
    x_axis = linear_axis(min(line.x[0] for line in lines), max(line.x[-1] for line in lines), ends="values")
    low, high = min(min(line.y) for line in lines), max(max(line.y) for line in lines)
    y_axis = log_axis(low, high) if low > 0 and high > 50 * low else linear_axis(min(low, 0.0), high, ends="round")
    body = _grid(x_axis, y_axis)
    for color, line in enumerate(lines):
        if line.noisy:
            body += f'<path class="raw" {_stroke(color)} d="{_path(line.x, line.y, x_axis, y_axis)}"/>'
        smooth = running_mean(line.y) if line.noisy else line.y
        body += f'<path class="line" {_stroke(color)} d="{_path(line.x, smooth, x_axis, y_axis)}"/>'
    return body


def _stroke(color: int) -> str:
    return f'style="stroke:var(--series-{color % NUM_COLORS + 1})"'


def linear_axis(low: float, high: float, *, ends: Literal["values", "round"]) -> Axis:
    """Return an axis with ticks on round numbers that ends at the values, or at the ticks beyond them."""
    span = max((high - low) or abs(high) or 1.0, 1e-300)
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if span / (m * magnitude) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if ends == "round":
        low, span = first * step, max(1, last - first) * step
    ticks = tuple(index * step for index in range(first, last + 1))
    return Axis(
        tuple(tick for tick in ticks if low - 1e-9 * span <= tick <= low + span * (1 + 1e-9)),
        lambda value: (value - low) / span,
    )


def log_axis(low: float, high: float) -> Axis:
    """Return a logarithmic axis over positive values; ticks at powers of ten, thinned to at most five.

    A mean of values that rounding took below `low` is drawn there.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    exponents = range(first, last + 1, max(1, math.ceil((last - first) / 4)))
    bottom, length = math.log10(low), math.log10(high) - math.log10(low)
    ticks = tuple(10.0**exponent for exponent in exponents if low <= 10.0**exponent <= high)
    return Axis(ticks, lambda value: (math.log10(max(value, low)) - bottom) / length)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbors, up to a sixtieth of the whole on either side."""
    reach = max(1, len(values) // 60)
    sums = [0.0, *accumulate(values)]
    means = []
    for index in range(len(values)):
        start, stop = max(0, index - reach), min(len(values), index + reach + 1)
        means.append((sums[stop] - sums[start]) / (stop - start))
    return means


def number(value: float) -> str:
    """Write a number in at most about five characters: 0.25, 1200 as 1.2k, 0.003 as 3e-3."""
    size = abs(value)
    if size and size < 1e-2:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def _legend(lines: Sequence[Series]) -> str:
    entries = (
        f'<span><i style="background:var(--series-{color % NUM_COLORS + 1})"></i>{escape(line.name)}'
        f" <em>{number(line.y[-1])}</em></span>"
        for color, line in enumerate(lines)
    )
    return f'<span class="legend">{"".join(entries)}</span>'


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for tick in y_axis.ticks:
        y = _y(tick, y_axis)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_axis.ticks:
        anchor = "end" if x_axis.place(tick) > 0.97 else "middle"
        parts.append(f'<text x="{_x(tick, x_axis):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{number(tick)}</text>')
    return "".join(parts)


def _path(x: Sequence[float], y: Sequence[float], x_axis: Axis, y_axis: Axis) -> str:
    """Return SVG path data of at most MAX_POINTS points, each the mean of its stretch."""
    stride = math.ceil(len(x) / MAX_POINTS)
    points = []
    for start in range(0, len(x), stride):
        xs, ys = x[start : start + stride], y[start : start + stride]
        points.append(f"{_x(sum(xs) / len(xs), x_axis):.1f} {_y(sum(ys) / len(ys), y_axis):.1f}")
    return "M" + "L".join(points)


def _x(value: float, axis: Axis) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(value: float, axis: Axis) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)
