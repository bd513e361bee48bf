"""The figures of an evaluation as one table: a row a figure, with its baselines and chance beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from cogvit.evaluation.results import PLAIN, Evaluation, Score

_BASELINES = {  # a metric that ends so belongs to the metric without it
    "untrained": "the same encoder before training",
    "pixels": "the image itself, made small",
    "color": "an image's colors alone, a caption being those of the training images that have it",
    "place": "the mean of what other images have at the place of a patch",
}
_FURTHER = ("_r1", "_r10", "_usual")  # metrics that end so are a click away: one recall is enough to begin with


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation with its baselines, by name."""

    task: str
    metric: str
    score: Score
    beside: Mapping[str, float]


def evaluation_table(evaluation: Evaluation) -> str:
    """Return a table that a reader can sort by any column, and the finer figures behind a click; empty without any."""
    figures = [
        Figure(task, metric, score, _beside(metric, metrics))
        for task, metrics in sorted(evaluation.items(), key=lambda item: item[0].startswith("distill"))
        for metric, score in metrics.items()
        if not metric.endswith(tuple(f"_{name}" for name in _BASELINES))
    ]
    if not figures:
        return ""
    told = "".join(f" {name}: {_BASELINES[name]}." for name in _columns(figures))
    first = [figure for figure in figures if not figure.metric.endswith(_FURTHER)]
    rest = [figure for figure in figures if figure.metric.endswith(_FURTHER)]
    more = f"<details><summary>{len(rest)} further figures</summary>{_table(rest)}</details>" if rest else ""
    return (
        f"<p><small>The mark in a bar is chance; a click on a column's name sorts by it.{told}</small></p>"
        f"{_table(first) if first else ''}{more}"
    )


def _columns(figures: Sequence[Figure]) -> list[str]:
    """The baselines that some figure has."""
    return [name for name in _BASELINES if any(name in figure.beside for figure in figures)]


def _table(figures: Sequence[Figure]) -> str:
    columns = _columns(figures)
    heads = "".join(f'<th class="num sorts">{name}</th>' for name in ("value", "chance", *columns))
    rows = "".join(_row(figure, columns) for figure in figures)
    return (
        f'<div class="wide"><table><thead><tr><th class=sorts>task</th>{heads}<th class=bar></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _beside(metric: str, metrics: Mapping[str, Score]) -> dict[str, float]:
    """The baselines of a metric, by column."""
    return {name: metrics[f"{metric}_{name}"]["value"] for name in _BASELINES if f"{metric}_{name}" in metrics}


def _row(figure: Figure, columns: Sequence[str]) -> str:
    value, chance = figure.score["value"], figure.score["chance"]
    others = "".join(_cell(figure.beside.get(name)) for name in columns)
    bar = f'<div><b style="width:{_percent(value)}"></b><i style="left:{_percent(chance)}"></i></div>'
    plain = figure.metric.startswith(PLAIN)
    bar = "" if plain else bar
    return (
        f"<tr><td>{_wrapping(figure.task)}<br><small>{_wrapping(figure.metric)}</small></td>"
        f"{_cell(value, bold=True, plain=plain)}{_cell(chance, plain=plain)}{others}<td class=bar>{bar}</td></tr>"
    )


def _wrapping(name: str) -> str:
    """A name that a narrow page may break behind its underscores."""
    return escape(name).replace("_", "_<wbr>")


def _cell(value: float | None, *, bold: bool = False, plain: bool = False) -> str:
    if value is None:
        return '<td class=num data-value=""></td>'
    shown = f"{value:.3f}" if plain else f"{100 * value:.1f}&#8239;%"
    return f'<td class=num data-value="{value!r}">{f"<b>{shown}</b>" if bold else shown}</td>'


def _percent(value: float) -> str:
    """Return a CSS width or position inside its box."""
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"
